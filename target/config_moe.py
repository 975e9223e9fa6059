"""Which layers are mixtures of experts and how tokens are routed, read from a published config.

Must never know tensors or other parts of the config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from target.errors import CheckpointError
from target.keys import Raw, read_int, read_number, require

Gate = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in every layer that is not in `dense_layers`, those of MTP modules included.

    `sigmoid` is the gate of DeepSeek-V3 (noaux_tc, arXiv 2412.19437): a learnt correction takes part in the choice of
    experts but not in their weights, and a group counts by its two best. With `softmax` a group counts by its best.
    """

    experts: int
    top_k: int
    inner_size: int  # of one expert
    gate: Gate
    normalise: bool  # weights of the chosen add up to `scale`
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1  # groups from which experts are chosen
    shared_size: int = 0  # inner size of the expert that every token passes; 0 is none
    dense_layers: frozenset[int] = frozenset()


def parse_qwen3_moe(raw: Raw, layers: int, where: str) -> MoeConfig:
    """Qwen3-MoE's keys; CheckpointError names the one that is missing or unusable."""
    step = read_int(raw, "decoder_sparse_step", where, 1)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise CheckpointError(f"{where}: mlp_only_layers must be a list of layers, got {dense!r}")
    return _checked(
        MoeConfig(
            experts=read_int(raw, "num_experts" if "num_experts" in raw else "num_local_experts", where),
            top_k=read_int(raw, "num_experts_per_tok", where),
            inner_size=read_int(raw, "moe_intermediate_size", where),
            gate="softmax",
            normalise=bool(raw.get("norm_topk_prob", False)),
            dense_layers=frozenset(i for i in range(layers) if i in dense or (i + 1) % step),
        ),
        where,
    )


def parse_deepseek_moe(raw: Raw, gate: Gate, layers: int, where: str) -> MoeConfig:
    """DeepSeek's keys, which GLM shares; CheckpointError names the one that is missing or unusable."""
    require(raw, "moe_layer_freq", where, 1)
    require(raw, "scoring_func", where, gate)
    grouped = _grouped(raw, gate, where)
    inner = read_int(raw, "moe_intermediate_size", where)
    return _checked(
        MoeConfig(
            experts=read_int(raw, "n_routed_experts", where),
            top_k=read_int(raw, "num_experts_per_tok", where),
            inner_size=inner,
            gate=gate,
            normalise=_normalised(raw, gate, where),
            scale=read_number(raw, "routed_scaling_factor", where, 1.0),
            groups=read_int(raw, "n_group", where, 1) if grouped else 1,
            top_groups=read_int(raw, "topk_group", where, 1) if grouped else 1,
            shared_size=inner * read_int(raw, "n_shared_experts", where, 0, least=0),
            dense_layers=_dense_layers(raw, layers, where),
        ),
        where,
    )


def _grouped(raw: Raw, gate: Gate, where: str) -> bool:
    methods = ("greedy", "group_limited_greedy") if gate == "softmax" else ("noaux_tc",)
    require(raw, "topk_method", where, *methods)
    return (raw.get("topk_method") or methods[0]) != "greedy"


def _normalised(raw: Raw, gate: Gate, where: str) -> bool:
    if gate == "softmax":
        # DeepSeek-V2's own code then drops the scale, transformers ignores the key: no published model sets it
        require(raw, "norm_topk_prob", where, False)
        return False
    return bool(raw.get("norm_topk_prob", True))


def _dense_layers(raw: Raw, layers: int, where: str) -> frozenset[int]:
    kinds = raw.get("mlp_layer_types")
    if kinds is None:
        return frozenset(range(read_int(raw, "first_k_dense_replace", where, least=0)))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise CheckpointError(f"{where}: mlp_layer_types must name each of the {layers} layers, got {kinds!r}")
    return frozenset(i for i, kind in enumerate(kinds) if kind == "dense")


def _checked(moe: MoeConfig, where: str) -> MoeConfig:
    size, rest = divmod(moe.experts, moe.groups)
    if rest or (moe.gate == "sigmoid" and size < 2):
        raise CheckpointError(f"{where}: {moe.experts} experts do not make {moe.groups} groups")
    if moe.top_groups > moe.groups:
        raise CheckpointError(f"{where}: topk_group {moe.top_groups} is more than n_group {moe.groups}")
    if moe.top_k > moe.top_groups * size:
        choice = f"{moe.top_groups * size} experts that a token may choose from"
        raise CheckpointError(f"{where}: num_experts_per_tok {moe.top_k} is more than the {choice}")
    return moe
