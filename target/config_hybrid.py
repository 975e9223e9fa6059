"""The keys of hybrid targets: which layers are recurrent, their sizes, and the text part of a multimodal config.

Must never know tensors or other parts of the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from target.config_moe import MoeConfig, parse_qwen3_moe
from target.errors import CheckpointError
from target.keys import Raw, read_int, require

KINDS = ("linear_attention", "full_attention")
WRAPPERS = {
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM",
}
# keys of a wrapper that count for its text model too, where it has them
_OUTER = ("quantization_config", "tie_word_embeddings", "eos_token_id", "bos_token_id", "dtype", "torch_dtype")


@dataclass(frozen=True)
class DeltaNetConfig:
    """Gated DeltaNet (arXiv 2412.06464) in the layers `layers`; the rest have gated attention.

    A sequence has one state a layer: `value_heads` matrices [key_dim, value_dim], and the last `kernel` - 1 inputs of
    its convolution. Value head h reads key head h // (value_heads / key_heads).
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    layers: frozenset[int]
    grouped: bool  # projections are stored key head by key head (Qwen3-Next), not all q, all k, all v (Qwen3.5)

    @property
    def ratio(self) -> int:
        """Value heads of one key head."""
        return self.value_heads // self.key_heads

    @property
    def key_size(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution: q, k and v of all heads."""
        return 2 * self.key_size + self.value_size


def text_config(raw: Raw, where: str) -> Raw:
    """The config of the text model inside a multimodal one; any other config as it is."""
    names = raw.get("architectures") or []
    inner = next((WRAPPERS[name] for name in names if name in WRAPPERS), None) if isinstance(names, list) else None
    if inner is None:
        return raw
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"{where}: {names[0]} must have a text_config object, got {text!r}")
    outer = {key: raw[key] for key in _OUTER if raw.get(key) is not None}
    return {**text, **outer, "architectures": [inner]}


def parse_delta(raw: Raw, layers: int, grouped: bool, where: str) -> DeltaNetConfig:
    """CheckpointError names the key that is missing or unusable."""
    require(raw, "attn_output_gate", where, True)
    require(raw, "output_gate_type", where, "swish", "silu")
    delta = DeltaNetConfig(
        key_heads=read_int(raw, "linear_num_key_heads", where, 16),
        value_heads=read_int(raw, "linear_num_value_heads", where, 32),
        key_dim=read_int(raw, "linear_key_head_dim", where, 128),
        value_dim=read_int(raw, "linear_value_head_dim", where, 128),
        kernel=read_int(raw, "linear_conv_kernel_dim", where, 4, least=2),
        layers=_recurrent_layers(raw, layers, where),
        grouped=grouped,
    )
    if delta.value_heads % delta.key_heads:
        text = f"linear_num_value_heads {delta.value_heads} is no multiple of linear_num_key_heads {delta.key_heads}"
        raise CheckpointError(f"{where}: {text}")
    return delta


def _recurrent_layers(raw: Raw, layers: int, where: str) -> frozenset[int]:
    kinds = raw.get("layer_types")
    if kinds is None:
        every = read_int(raw, "full_attention_interval", where, 4)
        kinds = [KINDS[(i + 1) % every == 0] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in KINDS for kind in kinds):
        text = f"layer_types must say {' or '.join(KINDS)} for each of the {layers} layers"
        raise CheckpointError(f"{where}: {text}, got {kinds!r}")
    if len(set(kinds)) < len(KINDS):
        raise CheckpointError(f"{where}: a hybrid needs layers of both kinds, {' and '.join(KINDS)}")
    return frozenset(i for i, kind in enumerate(kinds) if kind == KINDS[0])


def parse_hybrid_moe(raw: Raw, layers: int, always_normalised: bool, where: str) -> MoeConfig:
    """Qwen3-MoE's keys and a shared expert, which a gate of its own weighs; Qwen3.5's routing has no switches."""
    switches = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []} if always_normalised else {}
    moe = parse_qwen3_moe({"norm_topk_prob": True, **raw, **switches}, layers, where)
    return replace(moe, shared_size=read_int(raw, "shared_expert_intermediate_size", where, 512))


def hybrid_keys(delta: DeltaNetConfig, layers: int) -> dict[str, Any]:
    """The published keys of a DeltaNetConfig."""
    return {
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.kernel,
        "layer_types": [KINDS[i not in delta.layers] for i in range(layers)],
    }
