"""Writes a target as a Hugging Face folder that transformers loads too.

Owns: config.json in published keys, the inverse of `target.config`. Must never know drafting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from target.config import FAMILIES, ModelConfig, parse_config
from target.config_hybrid import hybrid_keys
from target.config_mla import MlaConfig
from target.config_moe import MoeConfig
from target.decoder import Decoder
from target.errors import CheckpointError
from target.names import decoder_slots
from target.weights import export_tensors


def save_target(model: Decoder, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors; experts are stored one by one, or fused, as the family publishes them.

    CheckpointError when the family's published keys cannot say what the model's config says.
    """
    published = published_config(model.config, dtype)
    _check_readable(published, model.config)
    text = json.dumps(published, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = export_tensors(model, decoder_slots(model.config), dtype)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _check_readable(published: Mapping[str, Any], config: ModelConfig) -> None:
    """CheckpointError when the keys would be read as another config."""
    read = parse_config(published, f"a {config.architecture} with this config cannot be written")
    differs = [f.name for f in fields(config) if getattr(read, f.name) != getattr(config, f.name)]
    lost = [name for name in differs if name not in ("dtype", "fp8_block")]  # how weights were stored before
    if lost:
        text = "; ".join(f"{name} {getattr(config, name)} would be read as {getattr(read, name)}" for name in lost)
        raise CheckpointError(f"a {config.architecture} with this config cannot be written: {text}")


def published_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a model whose weights are stored as `dtype`."""
    c = config
    eos = list(c.eos_token_ids) if len(c.eos_token_ids) > 1 else (c.eos_token_ids or (None,))[0]
    return {
        "architectures": [c.architecture],
        "model_type": FAMILIES[c.architecture].model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.theta,
        "rope_parameters": _rope_keys(c),
        "max_position_embeddings": c.max_position,
        "attention_bias": c.qkv_bias,
        "tie_word_embeddings": c.tied,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **_family_keys(c),
    }


def _rope_keys(c: ModelConfig) -> dict[str, Any]:
    default = FAMILIES[c.architecture].partial_rotary
    partial = {} if default is None else {"partial_rotary_factor": c.partial_rotary}
    return {"rope_type": c.rope.kind, "rope_theta": c.rope.theta, **c.rope.scaling, **partial}


def _family_keys(c: ModelConfig) -> dict[str, Any]:
    """What only some families publish."""
    family = FAMILIES[c.architecture]
    keys: dict[str, Any] = _mla_keys(c.mla) if c.mla else {"head_dim": c.head_dim}
    if family.mlp_bias:
        keys["mlp_bias"] = c.mlp_bias
    if isinstance(family.qk_norm, str):
        keys[family.qk_norm] = c.qk_norm
    if family.windows != "none":
        keys |= _window_keys(c)
    if c.delta is not None:
        keys |= hybrid_keys(c.delta, c.num_layers)
    if c.moe is not None:
        keys |= _qwen3_keys(c.moe) if family.moe in ("qwen3", "qwen3_5") else _deepseek_keys(c, c.moe)
    return keys


def _window_keys(c: ModelConfig) -> dict[str, Any]:
    window = next((w for w in c.windows if w is not None), None)
    keys: dict[str, Any] = {"sliding_window": window}
    if FAMILIES[c.architecture].windows != "all":
        keys["use_sliding_window"] = window is not None
    if FAMILIES[c.architecture].windows == "some where used":
        keys["layer_types"] = ["sliding_attention" if w else "full_attention" for w in c.windows]
    return keys


def _mla_keys(mla: MlaConfig) -> dict[str, Any]:
    return {
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "rope_interleave": mla.interleaved,
    }


def _qwen3_keys(moe: MoeConfig) -> dict[str, Any]:
    shared = {"shared_expert_intermediate_size": moe.shared_size} if moe.shared_size else {}
    return shared | {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.inner_size,
        "norm_topk_prob": moe.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(moe.dense_layers),
    }


def _deepseek_keys(c: ModelConfig, moe: MoeConfig) -> dict[str, Any]:
    greedy = "greedy" if moe.groups == 1 else "group_limited_greedy"
    keys = {
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.inner_size,
        "n_shared_experts": moe.shared_size // moe.inner_size,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
        "topk_method": greedy if moe.gate == "softmax" else "noaux_tc",
        "scoring_func": moe.gate,
        "norm_topk_prob": moe.normalise,
        "routed_scaling_factor": moe.scale,
        "first_k_dense_replace": len(moe.dense_layers),
        "moe_layer_freq": 1,
    }
    if c.architecture == "Glm4MoeLiteForCausalLM":
        keys["mlp_layer_types"] = ["sparse" if c.is_sparse(i) else "dense" for i in range(c.num_layers)]
    return keys
