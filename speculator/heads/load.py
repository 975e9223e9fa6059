"""Builds a draft head for a target: new, or filled from a published folder.

Owns: the table of head kinds, moving tensors into modules, and the log of what was chosen. Must never know formats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from speculator.errors import ConfigError
from speculator.heads.base import DraftHead, TargetWeights
from speculator.heads.eagle import EagleHead
from speculator.heads.eagle3 import Eagle3Head
from speculator.heads.folder import checkpoint_errors
from speculator.heads.formats import read_head
from speculator.heads.mtp import MtpHead
from speculator.heads.reading import HeadFile, TargetFacts
from speculator.heads.record import HeadRecord
from speculator.heads.shard import shard_record, shard_slots, shard_tensors
from target.decoder import Decoder
from target.layers import lay_out_for_cpu
from target.parallel import ALONE, ParallelDecoder, add_up, whole_config, whole_table
from target.weights import Progress, fill

log = logging.getLogger("speculator.heads")

HEADS: dict[str, type[DraftHead]] = {"eagle": EagleHead, "eagle3": Eagle3Head, "mtp": MtpHead}


def load_head(
    folder: Path,
    target: Decoder,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    overrides: Mapping[str, object] | None = None,
    progress: Progress | None = None,
    *,
    target_name: str = "",
    shard: bool = False,
) -> DraftHead:
    """Load a published head for a loaded target, whose dtype and device it must share.

    `overrides` replaces fields of the record by name ("norm_before_residual": "true", "rope.theta": "10000").
    CheckpointError when the folder cannot be used, or not with this target; ConfigError for a wrong override.
    `target_name` is compared with the verifier that the file names, for a warning. With `shard` the head is divided
    over the ranks of its target, else it is whole on each.
    """
    if target.embed.weight.dtype != dtype:
        raise ConfigError(f"the head must run in the target's dtype {target.embed.weight.dtype}, not {dtype}")
    file = read_head(folder, TargetFacts.of(whole_config(target), target_name), overrides)
    record, slots, tensors = file.record, file.slots, _fitting(file)
    axis = target.axis if shard and isinstance(target, ParallelDecoder) else ALONE
    if axis.size > 1:
        kv_heads, record = record.num_kv_heads, shard_record(record, axis.size)
        pieces = list(shard_tensors(tensors, kv_heads, axis))
        tensors, slots = iter(pieces), shard_slots(slots, {name: len(piece) for name, piece in pieces})
    shared = lend(file.record, target)
    if axis.size > 1:
        shared = shared._replace(config=target.config)
    with torch.device("meta"):
        head = _build(record, shared, target)
    add_up(head, axis)
    log_choices(file, sum(parameter.numel() for parameter in head.parameters()))
    head = head.to(dtype).to_empty(device=device)
    head.target_ids = None if file.target_ids is None else file.target_ids.to(device)
    with checkpoint_errors(folder):
        fill(head, slots, tensors, folder, progress)
    lay_out_for_cpu(head)
    return head.requires_grad_(False).eval()


def build_head(record: HeadRecord, target: Decoder, target_ids: Tensor | None = None) -> DraftHead:
    """A head with fresh weights that borrows the target's embedding and lm_head; `target_ids` [Vd] iff record.d2t."""
    head = _build(record, lend(record, target), target)
    if target_ids is not None:
        head.target_ids = target_ids
    return head


def _build(record: HeadRecord, shared: TargetWeights, target: Decoder) -> DraftHead:
    return HEADS[record.kind](record, shared, len(target.cache_layers))


def lend(record: HeadRecord, target: Decoder) -> TargetWeights:
    """The target's tables; of a target over several ranks those that the head reads are gathered whole."""
    embed, lm_head = target.embed.weight, target.head_weight
    if not record.own_embed:
        embed = whole_table(target, embed)
    if not (record.own_lm_head or record.lm_head_is_embed):
        lm_head = embed if target.lm_head is None and not record.own_embed else whole_table(target, lm_head)
    return TargetWeights(embed, lm_head, whole_config(target))


def _fitting(file: HeadFile) -> Iterator[tuple[str, Tensor]]:
    """Tensors in file order; tables over the vocabulary cut or padded with zero rows to the target's size."""
    rows = {"embed.weight": file.record.vocab_size, "lm_head.weight": file.record.draft_vocab_size}
    for name, tensor in file.tensors.items():
        wanted = rows.get(file.slots[name].parameter)
        yield name, tensor if wanted is None or tensor.dim() != 2 else _with_rows(tensor, wanted)


def _with_rows(table: Tensor, rows: int) -> Tensor:
    if table.shape[0] >= rows:
        return table[:rows]
    return torch.cat((table, table.new_zeros(rows - table.shape[0], table.shape[1])))


def log_choices(file: HeadFile, parameters: int) -> None:
    """The record, field by field with its source; what the file leaves open stands out."""
    log.info("head %s: %s, %.1f million parameters", file.folder, file.record.kind, parameters / 1e6)
    for choice in file.choices:
        log.info("  %s", choice)
    for warning in file.warnings:
        log.warning("head %s: %s", file.folder, warning)
