"""Writes a head in the layout of a published exporter.

Owns: each exporter's tensor names and config keys. Must never know how a head is trained or run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from speculator.errors import CheckpointError, ConfigError
from speculator.heads.base import DraftHead
from speculator.heads.d2t import mask, offsets
from speculator.heads.names import head_slots
from speculator.heads.record import HeadRecord
from speculator.heads.taps import IDS
from target.weights import export_tensors

Config = dict[str, Any]


class Layout(NamedTuple):
    """How one exporter writes a head."""

    kind: str  # kind of head it can hold
    config: Callable[[HeadRecord, str], Config]  # record and the target's name -> keys beyond the common ones
    name: Callable[[str], str]  # common tensor name -> published name
    tables: tuple[str, ...] = ("d2t", "t2d")  # written with a draft vocabulary
    always_tables: bool = False  # written without one too
    nested: str = ""  # the key that holds the layer's sizes
    binary: bool = False  # pytorch_model.bin


def save_head(
    head: DraftHead,
    folder: Path,
    layout: str = "specforge",
    dtype: torch.dtype = torch.bfloat16,
    target_name: str = "",
) -> None:
    """Write config.json and the weights; `load_head` reads every layout back into the same record.

    ConfigError when the layout is unknown, CheckpointError when it cannot say what this head is.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown head layout {layout!r}; known are {', '.join(LAYOUTS)}")
    chosen, record = LAYOUTS[layout], head.record
    if chosen.kind != record.kind:
        raise CheckpointError(f"layout {layout} holds {chosen.kind} heads, this one is {record.kind}")
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(record, chosen, target_name, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write(_tensors(head, chosen, dtype), folder, chosen.binary)


def _write(tensors: dict[str, Tensor], folder: Path, binary: bool) -> None:
    if binary:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _tensors(head: DraftHead, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    exported = export_tensors(head, head_slots(head.record), dtype)
    tensors = {layout.name(name): tensor for name, tensor in exported.items()}
    record, ids = head.record, head.target_ids
    if ids is None and layout.always_tables:
        ids = torch.arange(record.vocab_size)
    if ids is not None:
        tables = {"d2t": offsets(ids), "t2d": mask(ids, record.vocab_size)}
        tensors |= {name: tables[name] for name in layout.tables}
    return tensors


def _config(record: HeadRecord, layout: Layout, target_name: str, dtype: torch.dtype) -> Config:
    layer = _layer_config(record)
    keys = layout.config(record, target_name)
    sizes = {layout.nested: layer} if layout.nested else layer
    return {**keys, **sizes, "torch_dtype": str(dtype).removeprefix("torch.")}


def _layer_config(record: HeadRecord) -> Config:
    r = record
    return {
        "model_type": "qwen3" if r.qk_norm else "llama",
        "hidden_size": r.hidden_size,
        "intermediate_size": r.intermediate_size,
        "num_hidden_layers": r.num_layers,
        "num_attention_heads": r.num_heads,
        "num_key_value_heads": r.num_kv_heads,
        "head_dim": r.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": r.norm_eps,
        "max_position_embeddings": r.rope.max_position,
        "vocab_size": r.vocab_size,
        "attention_bias": r.qkv_bias,
        "mlp_bias": r.mlp_bias,
        "tie_word_embeddings": r.lm_head_is_embed,
        **_rope_config(r),
    }


def _rope_config(record: HeadRecord) -> Config:
    """The legacy keys; nothing at all where that means the same, as in SafeAILab's EAGLE-3 heads."""
    rope = record.rope
    scaling = {"rope_type": rope.kind, **rope.scaling} if rope.kind != "default" else None
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _eagle_config(record: HeadRecord, target_name: str) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"],
        "bias": record.fc_bias,
        "qkv_bias": record.qkv_bias,
        **_flags(record),
    }


def _vllm_eagle_config(record: HeadRecord, target_name: str) -> Config:
    return {"architectures": ["EAGLEModel"], "model_type": "eagle", "eagle_fc_bias": record.fc_bias, **_flags(record)}


def _old_speculators_config(record: HeadRecord, target_name: str) -> Config:
    if record.num_layers != 1:
        raise CheckpointError("the speculators layout of EAGLE-1 holds a single layer")
    return {
        **_speculators("eagle", target_name),
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "layernorms": record.embedding_norm and record.fused_norm and record.head_norm,
        "fusion_bias": record.fc_bias,
        **_flags(record),
    }


def _speculators(algorithm: str, target_name: str) -> Config:
    method = {"proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "speculators_model_type": algorithm,
        "speculators_version": "0.5.0",
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": target_name, "architectures": []},
        },
    }


def _flags(record: HeadRecord) -> Config:
    """Switches that stand at the top level in every layout, where they differ from what their absence means."""
    keys: Config = {"norm_output": record.norm_output} if record.norm_output or record.head_norm else {}
    for key, value in (("norm_before_residual", record.norm_before_residual), ("fc_norm", record.fc_norm)):
        if value:
            keys[key] = True
    if record.own_embed and record.hidden_size == record.target_hidden_size:
        keys["embed_requires_grad"] = True
    if record.hidden_size != record.target_hidden_size:
        keys["target_hidden_size"] = record.target_hidden_size
    return keys


def _eagle3_keys(record: HeadRecord, architecture: str) -> Config:
    draft = {"draft_vocab_size": record.draft_vocab_size}
    return {"architectures": [architecture], **draft, **_flags(record)}


def _reference_config(record: HeadRecord, target_name: str) -> Config:
    return {**_eagle3_keys(record, "LlamaForCausalLM"), **_top_ids(record), **_other_switches(record)}


def _specforge_config(record: HeadRecord, target_name: str) -> Config:
    keys, nested = _eagle3_keys(record, "LlamaForCausalLMEagle3"), _nested_ids(record)
    switches = {**nested.pop("eagle_config", {}), **_other_switches(record)}
    return {**keys, **nested, **({"eagle_config": switches} if switches else {})}


def _angelslim_config(record: HeadRecord, target_name: str) -> Config:
    keys = _eagle3_keys(record, "Eagle3LlamaForCausalLM")
    return {**keys, "target_model_type": "llama", **_top_ids(record), **_other_switches(record)}


def _modelopt_config(record: HeadRecord, target_name: str) -> Config:
    keys, nested = _eagle3_keys(record, "LlamaForCausalLMEagle3"), _nested_ids(record)
    switches = {
        "use_aux_hidden_state": bool(record.boundaries),
        "use_input_layernorm_in_first_layer": record.input_layernorm,
        "use_last_layernorm": record.final_norm,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        "norm_before_fc": record.norm_before_fc,
    }
    return {**keys, **nested, "eagle_config": {**nested.get("eagle_config", {}), **switches}}


def _speculators_config(record: HeadRecord, target_name: str) -> Config:
    return {
        **_speculators("eagle3", target_name),
        **_eagle3_keys(record, "Eagle3Speculator"),
        "norm_before_residual": record.norm_before_residual,
        "norm_before_fc": record.norm_before_fc,
        **_top_ids(record),
        **_other_switches(record),
    }


def _deepspec_config(record: HeadRecord, target_name: str) -> Config:
    keys = _eagle3_keys(record, "Qwen3Eagle3Model")
    return {**keys, "target_layer_ids": [k - 1 for k in record.boundaries], "ttt_length": 7, **_other_switches(record)}


def _top_ids(record: HeadRecord) -> Config:
    return {IDS: list(record.boundaries)} if record.boundaries else {}


def _nested_ids(record: HeadRecord) -> Config:
    """Outputs of layers, as SpecForge and ModelOpt mean them; boundaries where a reader would take them for such."""
    if not record.boundaries:
        return {}
    if record.boundaries[0] == 3:
        return _top_ids(record)
    return {"eagle_config": {IDS: [k - 1 for k in record.boundaries]}}


def _other_switches(record: HeadRecord) -> Config:
    keys: Config = {}
    for key, value in (("use_aux_hidden_state", bool(record.boundaries)), ("use_last_layernorm", record.final_norm)):
        if not value:
            keys[key] = False
    if not record.input_layernorm:
        keys["use_input_layernorm_in_first_layer"] = False
    if record.norm_before_fc:
        keys["norm_before_fc"] = True
    return keys


def _same(name: str) -> str:
    return name


def _midlayer(name: str) -> str:
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


_HASS = {
    "embedding_layernorm.weight": "embed_layernorm.weight",
    "layers.0.input_layernorm.weight": "hidden_layernorm.weight",
    "pre_lm_head_layernorm.weight": "lm_head_layernorm.weight",
}


def _hass(name: str) -> str:
    return _HASS.get(name, name)


def _wrapped(name: str) -> str:
    return f"model.{name}" if not name.startswith("lm_head.") else name


def _fusion(name: str) -> str:
    for common, old in (("layers.0.", "transformer."), ("fc.", "fusion_fc.")):
        if name.startswith(common):
            return old + name.removeprefix(common)
    return name


LAYOUTS: dict[str, Layout] = {
    "eagle": Layout("eagle", _eagle_config, _hass),
    "eagle-bin": Layout("eagle", _eagle_config, _hass, binary=True),  # SafeAILab's first heads
    "eagle-vllm": Layout("eagle", _vllm_eagle_config, _wrapped, nested="model"),
    "eagle-speculators": Layout("eagle", _old_speculators_config, _fusion, nested="transformer_layer_config"),
    "eagle3": Layout("eagle3", _reference_config, _midlayer),
    "eagle3-bin": Layout("eagle3", _reference_config, _midlayer, binary=True),
    "specforge": Layout("eagle3", _specforge_config, _midlayer, always_tables=True),
    "angelslim": Layout("eagle3", _angelslim_config, _midlayer),
    "modelopt": Layout("eagle3", _modelopt_config, _same, tables=("d2t",)),
    "speculators": Layout("eagle3", _speculators_config, _same, nested="transformer_layer_config"),
    "deepspec": Layout("eagle3", _deepspec_config, _wrapped),
}
