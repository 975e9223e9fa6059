"""Reads a Hugging Face config.json into one frozen record.

Owns: the meaning of the keys of Llama, Mistral, Qwen2 and Qwen3 configs, legacy and transformers-5 style.
Must never know tensors or devices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from target.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is one of ROPE_TYPES, `scaling` holds that kind's own keys as published."""

    theta: float = 10000.0
    kind: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)
    max_position: int = 2048  # trained length, used by dynamic and yarn only

    @property
    def original_max_position(self) -> int:
        return int(self.scaling.get("original_max_position_embeddings") or self.max_position)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a dense decoder; `windows[i]` is the sliding window of layer i, None is full attention."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    max_position: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str  # torch dtype name as stored, e.g. "bfloat16"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError names the file when it cannot be read or is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected a Hugging Face style model folder") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def load_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json (and the end ids of generation_config.json when it has more of them)."""
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists() and (ends := read_json(generation).get("eos_token_id")) is not None:
        raw["eos_token_id"] = ends
    return parse_config(raw, str(folder / "config.json"))


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Turn published keys into a ModelConfig; CheckpointError names the key that is missing or unusable."""
    architecture = _architecture(raw, where)
    if (act := raw.get("hidden_act", "silu")) != "silu":
        raise CheckpointError(f"{where}: hidden_act {act!r} is not supported, only silu")
    layers, heads = _int(raw, "num_hidden_layers", where), _int(raw, "num_attention_heads", where)
    qwen2, llama = architecture == "Qwen2ForCausalLM", architecture == "LlamaForCausalLM"
    # transformers reads these switches for the named families only
    attention_bias = (llama or architecture == "Qwen3ForCausalLM") and bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        vocab_size=_int(raw, "vocab_size", where),
        hidden_size=_int(raw, "hidden_size", where),
        intermediate_size=_int(raw, "intermediate_size", where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(raw, heads, where),
        head_dim=_head_dim(raw, architecture, heads, where),
        norm_eps=_number(raw, "rms_norm_eps", where, 1e-6),
        rope=parse_rope(raw, where),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=qwen2 or attention_bias,
        o_bias=attention_bias,
        mlp_bias=llama and bool(raw.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        windows=_windows(raw, architecture, layers, where),
        max_position=_int(raw, "max_position_embeddings", where, 2048),
        bos_token_id=next(iter(_ids(raw, "bos_token_id", where)), None),
        eos_token_ids=_ids(raw, "eos_token_id", where),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    names = raw.get("architectures") or []
    for name in names if isinstance(names, list) else ():
        if name in ARCHITECTURES:
            return str(name)
    raise CheckpointError(f"{where}: architectures {names} is not supported; supported are {', '.join(ARCHITECTURES)}")


def _int(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = default if raw.get(key) is None else raw[key]
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"{where}: {key} must be a positive integer, got {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value: Any = default if raw.get(key) is None else raw[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {key} must be a positive number, got {value!r}")
    return float(value)


def _ids(raw: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """None, one id or a list of ids."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        raise CheckpointError(f"{where}: {key} must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _kv_heads(raw: Mapping[str, Any], heads: int, where: str) -> int:
    kv_heads = _int(raw, "num_key_value_heads", where, heads)
    if heads % kv_heads:
        raise CheckpointError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    return kv_heads


def _head_dim(raw: Mapping[str, Any], architecture: str, heads: int, where: str) -> int:
    default = 128 if architecture == "Qwen3ForCausalLM" else _int(raw, "hidden_size", where) // heads
    dim = _int(raw, "head_dim", where, default)
    if dim % 2:
        raise CheckpointError(f"{where}: head_dim must be even for rotary embeddings, got {dim}")
    return dim


ROPE_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def parse_rope(raw: Mapping[str, Any], where: str) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` plus `rope_scaling`; nothing at all is theta 10000."""
    published = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(published, Mapping) or any(isinstance(value, Mapping) for value in published.values()):
        raise CheckpointError(f"{where}: rope parameters must be one set for all layers, got {published!r}")
    scaling = dict(published)
    kind = str(scaling.pop("rope_type", scaling.pop("type", "default")))
    kind = "default" if kind == "mrope" else kind  # text positions are equal in all three streams
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"{where}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    for key in (*ROPE_NUMBERS.get(kind, ()), *(key for key, value in scaling.items() if isinstance(value, str))):
        _number(scaling, key, f"{where}: rope type {kind!r}")
    if {scaling.pop("partial_rotary_factor", 1.0), raw.get("partial_rotary_factor") or 1.0} != {1.0}:
        raise CheckpointError(f"{where}: partial_rotary_factor is not supported")
    theta = _number({"rope_theta": scaling.pop("rope_theta", None) or raw.get("rope_theta")}, "rope_theta", where, 1e4)
    return RopeConfig(theta, kind, scaling, _int(raw, "max_position_embeddings", where, 2048))


def _windows(raw: Mapping[str, Any], architecture: str, layers: int, where: str) -> tuple[int | None, ...]:
    """Per layer; Llama has none, Mistral one for all layers (4096 where the key is absent, as in transformers)."""
    mistral = architecture == "MistralForCausalLM"
    if architecture == "LlamaForCausalLM" or not (mistral or raw.get("use_sliding_window", False)):
        return (None,) * layers
    if raw.get("sliding_window", 4096) is None:
        return (None,) * layers
    window = _int(raw, "sliding_window", where, 4096)
    kinds = None if mistral else raw.get("layer_types")
    if kinds is None:
        first = 0 if mistral else int(raw.get("max_window_layers", 28))
        return tuple(window if i >= first else None for i in range(layers))
    if len(kinds) != layers:
        raise CheckpointError(f"{where}: layer_types names {len(kinds)} layers, num_hidden_layers is {layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
