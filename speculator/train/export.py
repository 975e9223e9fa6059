"""Writes and reads the trained head in the layout of the EAGLE-3 authors.

Owns: the published names of our one head. Must never know training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from speculator.heads.base import TargetWeights
from speculator.heads.eagle3 import Eagle3Head
from speculator.heads.record import HeadRecord
from speculator.train.tokenizer import END
from target.config import parse_rope, read_json
from target.llama import Llama
from target.weights import Slot, WeightFiles, attention_slots, check_names, export_tensors, fill, mlp_slots


def head_slots(record: HeadRecord) -> dict[str, Slot]:
    """Published name -> our parameter."""
    r = record
    slots = {name: Slot(name) for name in ("fc.weight", "norm.weight", "lm_head.weight")}
    slots |= {f"fc_norm.{i}.weight": Slot(f"fc_norms.{i}.weight") for i in range(len(r.boundaries) if r.fc_norm else 0)}
    norms = {"input_layernorm": "input_norm", "hidden_norm": "hidden_norm", "post_attention_layernorm": "post_norm"}
    slots |= {f"midlayer.{theirs}.weight": Slot(f"layers.0.{ours}.weight") for theirs, ours in norms.items()}
    heads = (r.num_heads, r.num_kv_heads, r.head_dim)
    slots |= attention_slots("midlayer.self_attn.", "layers.0.attention.", *heads, False, False, False)
    return slots | mlp_slots("midlayer.mlp.", "layers.0.mlp.", r.intermediate_size, False)


def head_config(record: HeadRecord) -> dict[str, Any]:
    r = record
    flags = {name: True for name in ("fc_norm", "norm_output") if getattr(r, name)}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": r.vocab_size,
        "draft_vocab_size": r.draft_vocab_size,
        "hidden_size": r.hidden_size,
        "target_hidden_size": r.target_hidden_size,
        "intermediate_size": r.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": r.num_heads,
        "num_key_value_heads": r.num_kv_heads,
        "head_dim": r.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": r.norm_eps,
        "rope_theta": r.rope.theta,
        "rope_scaling": None,
        "max_position_embeddings": r.rope.max_position,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": END,
        # ids of layers whose output is tapped, as SpecForge counts them: boundary - 1
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [b - 1 for b in r.boundaries]},
        "torch_dtype": "bfloat16",
        **flags,
    }


def save_eagle3(head: Eagle3Head, folder: Path) -> None:
    """Write config.json and model.safetensors in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = export_tensors(head, head_slots(head.record), torch.bfloat16)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(head_config(head.record), indent=2) + "\n", encoding="utf-8")


def load_eagle3(folder: Path, model: Llama) -> Eagle3Head:
    """Read a head that `save_eagle3` wrote, in the target's dtype and on its device."""
    raw = read_json(folder / "config.json")
    record = HeadRecord(
        kind="eagle3",
        hidden_size=raw["hidden_size"],
        target_hidden_size=raw["target_hidden_size"],
        vocab_size=raw["vocab_size"],
        draft_vocab_size=raw["draft_vocab_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=1,
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        norm_eps=raw["rms_norm_eps"],
        rope=parse_rope(raw, str(folder)),
        boundaries=tuple(i + 1 for i in raw["eagle_config"]["eagle_aux_hidden_state_layer_ids"]),
        fc_norm=bool(raw.get("fc_norm", False)),
        norm_output=bool(raw.get("norm_output", False)),
    )
    head = Eagle3Head(record, TargetWeights(model.embed.weight, model.head_weight), 0)
    files, slots = WeightFiles(folder), head_slots(record)
    check_names(files.names(), set(slots), folder)
    fill(head, slots, files.items(slots), folder)
    return head.to(model.embed.weight).requires_grad_(False).eval()


@torch.no_grad()
def round_weights(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Make float32 parameters hold what the saved half-precision ones will: what is served is what is measured."""
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))
