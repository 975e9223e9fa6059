"""Writes MTP modules into the folder of their target, in the layout that its family is published in.

Owns: extending a folder's weight files and its config. Must never know how modules are trained or run.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculator.errors import CheckpointError
from speculator.heads.folder import checkpoint_errors
from speculator.heads.mtp import MtpHead
from speculator.heads.mtp_names import COMMON_CLAIM, Modules, find_modules, layout_of, mtp_slots
from target.config import load_config, read_json
from target.weights import WeightFiles, export_tensors

SHARD = "model-mtp.safetensors"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def save_mtp(head: MtpHead, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Add the modules to a target's folder of safetensors; `load_head` of that folder then reads them back.

    Tables that the head shares with the target are not written again. CheckpointError when the target's family has no
    published layout for such modules, or the folder holds some already.
    """
    with checkpoint_errors(folder):
        config = load_config(folder)
        names = WeightFiles(folder).names()
        if find_modules(names, config) is not None:
            raise CheckpointError("this folder holds MTP modules already")
        layout = layout_of(config)
        if layout is None or layout.hidden_first != head.record.hidden_first:
            raise CheckpointError(f"no layout for such MTP modules is published for {config.architecture}")
        if not layout.tables and (head.record.own_embed or head.record.own_lm_head):
            raise CheckpointError(f"modules in the layout of {layout.family} have no tables of their own")
        if layout.outer and head.record.modules > 1:
            raise CheckpointError(f"the layout of {layout.family} has one module, not {head.record.modules}")
        slots = mtp_slots(Modules(layout, head.record.modules, frozenset()), config, head.record)
        _add(folder, export_tensors(head, slots, dtype))
    _claim(folder / "config.json", layout.claim, head.record.modules)


def _add(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Into the one file, or as a shard of its own."""
    if (folder / _WHOLE).exists():
        tensors |= load_file(str(folder / _WHOLE))
        save_file(tensors, str(folder / _WHOLE), metadata={"format": "pt"})
        return
    index = read_json(folder / _INDEX)
    save_file(tensors, str(folder / SHARD), metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, SHARD)
    metadata = index.get("metadata") or {}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index["metadata"] = {**metadata, "total_size": metadata.get("total_size", 0) + size}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _claim(path: Path, key: str, modules: int) -> None:
    """By the family's own key, and by the one that tells of every family."""
    config = {**read_json(path), COMMON_CLAIM: modules, key: modules}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
