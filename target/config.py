"""Reads a Hugging Face config.json into one frozen record.

Owns: which architectures are supported, and the meaning of their keys, legacy and transformers-5 style.
Must never know tensors or devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from target.config_hybrid import WRAPPERS, DeltaNetConfig, parse_delta, parse_hybrid_moe, text_config
from target.config_mla import MlaConfig, parse_mla
from target.config_moe import MoeConfig, parse_deepseek_moe, parse_qwen3_moe
from target.errors import CheckpointError
from target.keys import Raw, read_ids, read_int, read_number, require

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
    """Sizes and switches of a decoder; `windows[i]` is the sliding window of layer i, None is full attention."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
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
    partial_rotary: float = 1.0  # share of a head's dimensions that are rotated
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None
    delta: DeltaNetConfig | None = None  # a hybrid: its attention is gated and its norms are zero-centred
    fp8_block: tuple[int, int] = (128, 128)  # rows and columns that share a scale, where weights are stored in fp8

    @property
    def rotary_dim(self) -> int:
        return self.mla.rope_dim if self.mla else int(self.head_dim * self.partial_rotary)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; layers of MTP modules, numbered from `num_layers` on, have none."""
        return self.windows[layer] if layer < self.num_layers else None

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer keeps a state in place of keys and values."""
        return self.delta is not None and layer in self.delta.layers

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers


@dataclass(frozen=True)
class Family:
    """What the architecture's name alone settles. `attention_bias` names the projections that the key speaks of."""

    model_type: str
    attention_bias: Literal["", "qkv", "qkvo"] = ""
    qkv_bias: bool = False  # whatever the keys say
    mlp_bias: bool = False  # the key is read
    qk_norm: bool | str = False  # or the key that says it
    head_dim: int | None = None  # default; None is hidden_size / num_attention_heads
    partial_rotary: float | None = None  # default where a part of the head can be rotated
    windows: Literal["none", "all", "all where used", "some where used"] = "none"
    mla: bool = False
    hybrid: Literal["", "grouped", "flat"] = ""  # how the projections of gated DeltaNet are stored
    moe: Literal["", "qwen3", "qwen3_5", "softmax", "sigmoid"] = ""
    mtp: str = ""  # prefix of the MTP modules in the target's folder, before their number


_HYBRID: dict[str, Any] = dict(attention_bias="qkvo", qk_norm=True, head_dim=256, partial_rotary=0.25, mtp="mtp.")
FAMILIES = {
    "LlamaForCausalLM": Family("llama", "qkvo", mlp_bias=True),
    "MistralForCausalLM": Family("mistral", windows="all"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, windows="some where used"),
    "Qwen3ForCausalLM": Family("qwen3", "qkvo", qk_norm=True, head_dim=128, windows="some where used"),
    "MiMoForCausalLM": Family("mimo", qkv_bias=True, windows="some where used", mtp="model.mtp_layers."),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", "qkvo", qk_norm=True, windows="all where used", moe="qwen3"),
    "DeepseekV2ForCausalLM": Family("deepseek_v2", mla=True, moe="softmax"),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", mla=True, moe="sigmoid", mtp="model.layers."),
    "Glm4MoeForCausalLM": Family(
        "glm4_moe", "qkv", qk_norm="use_qk_norm", partial_rotary=0.5, moe="sigmoid", mtp="model.layers."
    ),
    "Glm4MoeLiteForCausalLM": Family("glm4_moe_lite", mla=True, moe="sigmoid", mtp="model.layers."),
    "Qwen3NextForCausalLM": Family("qwen3_next", **_HYBRID, hybrid="grouped", moe="qwen3"),
    "Qwen3_5ForCausalLM": Family("qwen3_5_text", **_HYBRID, hybrid="flat"),
    "Qwen3_5MoeForCausalLM": Family("qwen3_5_moe_text", **_HYBRID, hybrid="flat", moe="qwen3_5"),
}


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


def parse_config(raw: Raw, where: str = "config.json") -> ModelConfig:
    """Turn published keys into a ModelConfig; CheckpointError names the key that is missing or unusable.

    Of a multimodal config the text model is read.
    """
    raw = text_config(raw, where)
    architecture = _architecture(raw, where)
    family = FAMILIES[architecture]
    require(raw, "hidden_act", where, "silu")
    layers, heads = read_int(raw, "num_hidden_layers", where), read_int(raw, "num_attention_heads", where)
    # transformers reads these switches for some families only
    attention_bias = bool(family.attention_bias) and bool(raw.get("attention_bias", False))
    mla = parse_mla(raw, where) if family.mla else None
    head_dim = mla.query_dim if mla else _head_dim(raw, family, heads, where)
    return ModelConfig(
        architecture=architecture,
        vocab_size=read_int(raw, "vocab_size", where),
        hidden_size=read_int(raw, "hidden_size", where),
        intermediate_size=_intermediate_size(raw, family, where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if mla else _kv_heads(raw, heads, where),
        head_dim=head_dim,
        norm_eps=read_number(raw, "rms_norm_eps", where, 1e-6),
        rope=parse_rope(raw, where, partial=family.partial_rotary is not None),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias and family.attention_bias == "qkvo",
        mlp_bias=_mlp_bias(raw, family, where),
        qk_norm=bool(raw.get(family.qk_norm, False)) if isinstance(family.qk_norm, str) else family.qk_norm,
        windows=_windows(raw, family, layers, where),
        max_position=read_int(raw, "max_position_embeddings", where, 2048),
        bos_token_id=next(iter(read_ids(raw, "bos_token_id", where)), None),
        eos_token_ids=read_ids(raw, "eos_token_id", where),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        partial_rotary=_partial_rotary(raw, family, head_dim, where),
        mla=mla,
        moe=_moe(raw, family, layers, where),
        delta=parse_delta(raw, layers, family.hybrid == "grouped", where) if family.hybrid else None,
        fp8_block=_fp8_block(raw, where),
    )


def _architecture(raw: Raw, where: str) -> str:
    names = raw.get("architectures") or []
    for name in names if isinstance(names, list) else ():
        if name in FAMILIES:
            return str(name)
    raise CheckpointError(
        f"{where}: architectures {names} is not supported; supported are {', '.join((*FAMILIES, *WRAPPERS))}"
    )


def _moe(raw: Raw, family: Family, layers: int, where: str) -> MoeConfig | None:
    if family.moe == "":
        return None
    if family.moe == "qwen3_5" or family.hybrid:
        return parse_hybrid_moe(raw, layers, family.moe == "qwen3_5", where)
    if family.moe == "qwen3":
        return parse_qwen3_moe(raw, layers, where)
    return parse_deepseek_moe(raw, family.moe, layers, where)


def _intermediate_size(raw: Raw, family: Family, where: str) -> int:
    """Of dense layers; a family that has none of them names only the size of its experts."""
    key = "moe_intermediate_size" if family.moe == "qwen3_5" else "intermediate_size"
    return read_int(raw, key, where)


def _mlp_bias(raw: Raw, family: Family, where: str) -> bool:
    if family.moe:
        require(raw, "mlp_bias", where, False)
    return family.mlp_bias and bool(raw.get("mlp_bias", False))


def _fp8_block(raw: Raw, where: str) -> tuple[int, int]:
    """The block of fp8 weights; CheckpointError for any other quantisation."""
    published = raw.get("quantization_config") or {}
    if not isinstance(published, Mapping):
        raise CheckpointError(f"{where}: quantization_config must be an object, got {published!r}")
    require(published, "quant_method", f"{where}: quantization_config", "fp8")
    block = published.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        text = f"weight_block_size must be two positive integers, got {block!r}"
        raise CheckpointError(f"{where}: quantization_config: {text}")
    return block[0], block[1]


def _kv_heads(raw: Raw, heads: int, where: str) -> int:
    kv_heads = read_int(raw, "num_key_value_heads", where, heads)
    if heads % kv_heads:
        raise CheckpointError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    return kv_heads


def _head_dim(raw: Raw, family: Family, heads: int, where: str) -> int:
    default = family.head_dim or read_int(raw, "hidden_size", where) // heads
    dim = read_int(raw, "head_dim", where, default)
    if dim % 2:
        raise CheckpointError(f"{where}: head_dim must be even for rotary embeddings, got {dim}")
    return dim


ROPE_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def parse_rope(raw: Raw, where: str, partial: bool = False) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` plus `rope_scaling`; nothing at all is theta 10000.

    A partial_rotary_factor is an error unless the caller reads it (`partial`).
    """
    published = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(published, Mapping) or any(isinstance(value, Mapping) for value in published.values()):
        raise CheckpointError(f"{where}: rope parameters must be one set for all layers, got {published!r}")
    scaling = dict(published)
    kind = str(scaling.pop("rope_type", scaling.pop("type", "default")))
    kind = "default" if kind == "mrope" else kind  # text positions are equal in all three streams
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"{where}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    for key in (*ROPE_NUMBERS.get(kind, ()), *(key for key, value in scaling.items() if isinstance(value, str))):
        read_number(scaling, key, f"{where}: rope type {kind!r}")
    factors = [scaling.pop("partial_rotary_factor", 1.0), raw.get("partial_rotary_factor") or 1.0]
    if factors != [1.0, 1.0] and not partial:
        raise CheckpointError(f"{where}: partial_rotary_factor is not supported")
    theta = read_number(
        {"rope_theta": scaling.pop("rope_theta", None) or raw.get("rope_theta")}, "rope_theta", where, 1e4
    )
    return RopeConfig(theta, kind, scaling, read_int(raw, "max_position_embeddings", where, 2048))


def _partial_rotary(raw: Raw, family: Family, head_dim: int, where: str) -> float:
    if family.partial_rotary is None:
        return 1.0
    nested = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    given = nested.get("partial_rotary_factor") or raw.get("partial_rotary_factor")
    factor = read_number({"partial_rotary_factor": given}, "partial_rotary_factor", where, family.partial_rotary)
    rotated = int(head_dim * factor)
    if factor > 1 or rotated < 2 or rotated % 2:
        raise CheckpointError(f"{where}: partial_rotary_factor {factor:g} of head_dim {head_dim} makes no rotary pairs")
    return factor


def _windows(raw: Raw, family: Family, layers: int, where: str) -> tuple[int | None, ...]:
    """Per layer; Mistral has one for all layers (4096 where the key is absent, as in transformers)."""
    used = family.windows == "all" or (family.windows != "none" and raw.get("use_sliding_window", False))
    if not used or raw.get("sliding_window", 4096) is None:
        return (None,) * layers
    window = read_int(raw, "sliding_window", where, 4096)
    if family.windows != "some where used":
        return (window,) * layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = read_int(raw, "max_window_layers", where, 28, least=0)
        return tuple(window if i >= first else None for i in range(layers))
    if len(kinds) != layers:
        raise CheckpointError(f"{where}: layer_types names {len(kinds)} layers, num_hidden_layers is {layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
