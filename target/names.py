"""The map of published tensor names to our merged parameters.

Owns: what a checkpoint of a config must hold, and which names belong to its MTP modules. Must never know files or
values.
"""

from __future__ import annotations

from collections.abc import Iterable

from target.config import FAMILIES, ModelConfig
from target.config_mla import MlaConfig
from target.config_moe import MoeConfig
from target.weights import Slot

FUSED_EXPERTS = "mlp.experts.gate_up_proj"  # one tensor for all experts, as transformers 5 holds them in memory


def decoder_slots(config: ModelConfig, names: Iterable[str] = ()) -> dict[str, Slot]:
    """Published name -> place, for every tensor a checkpoint of this config must hold.

    `names` are those found, which say whether experts are stored one by one (also without any names) or fused.
    """
    fused = any(name.endswith(FUSED_EXPERTS) for name in names)
    slots = {"model.embed_tokens.weight": Slot("embed.weight"), "model.norm.weight": Slot("norm.weight")}
    if not config.tied:
        slots["lm_head.weight"] = Slot("lm_head.weight")
    for i in range(config.num_layers):
        slots |= layer_slots(config, i, f"model.layers.{i}.", f"layers.{i}.", fused)
    return slots


def layer_slots(config: ModelConfig, layer: int, theirs: str, ours: str, fused: bool = False) -> dict[str, Slot]:
    """The tensors of one DecoderLayer. Prefixes end with a dot."""
    c = config
    slots = {
        f"{theirs}input_layernorm.weight": Slot(f"{ours}input_norm.weight"),
        f"{theirs}post_attention_layernorm.weight": Slot(f"{ours}post_norm.weight"),
    }
    attention = (f"{theirs}self_attn.", f"{ours}attention.")
    if c.mla is not None:
        slots |= latent_slots(*attention, c.num_heads, c.mla)
    else:
        slots |= attention_slots(*attention, c.num_heads, c.num_kv_heads, c.head_dim, c.qkv_bias, c.o_bias, c.qk_norm)
    if c.moe is not None and c.is_sparse(layer):
        return slots | moe_slots(f"{theirs}mlp.", f"{ours}mlp.", c.moe, fused)
    return slots | mlp_slots(f"{theirs}mlp.", f"{ours}mlp.", c.intermediate_size, c.mlp_bias)


def attention_slots(
    theirs: str, ours: str, heads: int, kv_heads: int, dim: int, qkv_bias: bool, o_bias: bool, qk_norm: bool
) -> dict[str, Slot]:
    """q, k, v stacked into `qkv`; o and norms as they are. Prefixes end with a dot."""
    q, kv = heads * dim, kv_heads * dim
    parts = {"q_proj": range(q), "k_proj": range(q, q + kv), "v_proj": range(q + kv, q + 2 * kv)}
    kinds = ("weight", "bias") if qkv_bias else ("weight",)
    slots = {f"{theirs}{p}.{kind}": Slot(f"{ours}qkv.{kind}", rows) for p, rows in parts.items() for kind in kinds}
    for kind in ("weight", "bias") if o_bias else ("weight",):
        slots[f"{theirs}o_proj.{kind}"] = Slot(f"{ours}o.{kind}")
    for norm in ("q_norm", "k_norm") if qk_norm else ():
        slots[f"{theirs}{norm}.weight"] = Slot(f"{ours}{norm}.weight")
    return slots


def latent_slots(theirs: str, ours: str, heads: int, mla: MlaConfig) -> dict[str, Slot]:
    """The first projections of queries and latents stacked into `qkv_a`. Prefixes end with a dot."""
    first = mla.q_rank or heads * mla.query_dim
    slots = {
        f"{theirs}{'q_a_proj' if mla.q_rank else 'q_proj'}.weight": Slot(f"{ours}qkv_a.weight", range(first)),
        f"{theirs}kv_a_proj_with_mqa.weight": Slot(f"{ours}qkv_a.weight", range(first, first + mla.latent_dim)),
        f"{theirs}kv_a_layernorm.weight": Slot(f"{ours}kv_norm.weight"),
        f"{theirs}kv_b_proj.weight": Slot(f"{ours}kv_b"),
        f"{theirs}o_proj.weight": Slot(f"{ours}o.weight"),
    }
    if mla.q_rank:
        slots[f"{theirs}q_a_layernorm.weight"] = Slot(f"{ours}q_norm.weight")
        slots[f"{theirs}q_b_proj.weight"] = Slot(f"{ours}q_b.weight")
    return slots


def mlp_slots(theirs: str, ours: str, inner: int, bias: bool) -> dict[str, Slot]:
    """gate and up stacked into `gate_up`. Prefixes end with a dot."""
    slots: dict[str, Slot] = {}
    for kind in ("weight", "bias") if bias else ("weight",):
        slots[f"{theirs}gate_proj.{kind}"] = Slot(f"{ours}gate_up.{kind}", range(inner))
        slots[f"{theirs}up_proj.{kind}"] = Slot(f"{ours}gate_up.{kind}", range(inner, 2 * inner))
        slots[f"{theirs}down_proj.{kind}"] = Slot(f"{ours}down.{kind}")
    return slots


def moe_slots(theirs: str, ours: str, moe: MoeConfig, fused: bool = False) -> dict[str, Slot]:
    """Gate, experts (one by one, or fused) and the shared expert. Prefixes end with a dot."""
    slots = {f"{theirs}gate.weight": Slot(f"{ours}gate.weight")}
    if moe.gate == "sigmoid":
        slots[f"{theirs}gate.e_score_correction_bias"] = Slot(f"{ours}gate.correction")
    if moe.shared_size:
        slots |= mlp_slots(f"{theirs}shared_experts.", f"{ours}shared.", moe.shared_size, bias=False)
    if fused:
        slots[f"{theirs}experts.gate_up_proj"] = Slot(f"{ours}experts.gate_up")
        slots[f"{theirs}experts.down_proj"] = Slot(f"{ours}experts.down")
        return slots
    inner = moe.inner_size
    for e in range(moe.experts):
        expert = f"{theirs}experts.{e}."
        slots[f"{expert}gate_proj.weight"] = Slot(f"{ours}experts.gate_up", range(inner), e)
        slots[f"{expert}up_proj.weight"] = Slot(f"{ours}experts.gate_up", range(inner, 2 * inner), e)
        slots[f"{expert}down_proj.weight"] = Slot(f"{ours}experts.down", expert=e)
    return slots


# what an MTP module holds beside a decoder layer, by the prefix of the modules
_MTP_EXTRAS = {
    "model.layers.": ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head"),
    "model.mtp_layers.": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
}


def mtp_names(config: ModelConfig, names: Iterable[str]) -> set[str]:
    """Those of `names` that are tensors of MTP modules; what merely lies under their prefix is not one of them."""
    prefix = FAMILIES[config.architecture].mtp
    if not prefix:
        return set()
    modules: dict[int, set[str]] = {}
    for name in names:
        number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        if number.isdecimal():
            modules.setdefault(int(number), set()).add(name)
    first = config.num_layers if prefix == "model.layers." else 0
    return {name for i, found in modules.items() if i >= first for name in found & _mtp_module(config, prefix, i)}


def _mtp_module(config: ModelConfig, prefix: str, number: int) -> set[str]:
    module = f"{prefix}{number}."
    layer = number if prefix == "model.layers." else config.num_layers + number
    known = {f"{module}{extra}.weight" for extra in _MTP_EXTRAS[prefix]}
    return known.union(*(layer_slots(config, layer, module, "", fused) for fused in (False, True)))
