"""The map of published tensor names to our merged parameters.

Owns: what a checkpoint of a config must hold, and which names belong to its MTP modules. Must never know files or
values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from target.config import FAMILIES, ModelConfig
from target.config_hybrid import DeltaNetConfig
from target.config_mla import MlaConfig
from target.config_moe import MoeConfig
from target.weights import Slot

FUSED_EXPERTS = "mlp.experts.gate_up_proj"  # one tensor for all experts, as transformers 5 holds them in memory


TEXT_PREFIX = "model.language_model."  # of the text model inside a multimodal one
VISION_PREFIX = "model.visual."


def decoder_slots(config: ModelConfig, names: Collection[str] = ()) -> dict[str, Slot]:
    """Published name -> place, for every tensor a checkpoint of this config must hold.

    `names` are those found, which say whether experts are stored one by one or fused, and whether the model is the
    text part of a multimodal one; without any, it is as the family publishes text models.
    """
    fused = any(name.endswith(FUSED_EXPERTS) for name in names)
    if not names:
        fused = FAMILIES[config.architecture].moe == "qwen3_5"
    base = TEXT_PREFIX if any(name.startswith(TEXT_PREFIX) for name in names) else "model."
    slots = {f"{base}embed_tokens.weight": Slot("embed.weight"), f"{base}norm.weight": Slot("norm.weight")}
    if not config.tied:
        slots["lm_head.weight"] = Slot("lm_head.weight")
    for i in range(config.num_layers):
        slots |= layer_slots(config, i, f"{base}layers.{i}.", f"layers.{i}.", fused)
    return slots


def vision_names(config: ModelConfig, names: Iterable[str]) -> set[str]:
    """Those of `names` that belong to the part of a multimodal hybrid that sees; text needs none of it."""
    return {name for name in names if config.delta is not None and name.startswith(VISION_PREFIX)}


def layer_slots(config: ModelConfig, layer: int, theirs: str, ours: str, fused: bool = False) -> dict[str, Slot]:
    """The tensors of one DecoderLayer. Prefixes end with a dot."""
    c = config
    slots = {
        f"{theirs}input_layernorm.weight": Slot(f"{ours}input_norm.weight"),
        f"{theirs}post_attention_layernorm.weight": Slot(f"{ours}post_norm.weight"),
    }
    attention = (f"{theirs}self_attn.", f"{ours}attention.")
    if c.delta is not None and c.is_recurrent(layer):
        slots |= delta_slots(f"{theirs}linear_attn.", f"{ours}attention.", c.delta)
    elif c.delta is not None:
        slots |= attention_slots(
            *attention, c.num_heads, c.num_kv_heads, c.head_dim, c.qkv_bias, c.o_bias, c.qk_norm, gated=True
        )
    elif c.mla is not None:
        slots |= latent_slots(*attention, c.num_heads, c.mla)
    else:
        slots |= attention_slots(*attention, c.num_heads, c.num_kv_heads, c.head_dim, c.qkv_bias, c.o_bias, c.qk_norm)
    if c.moe is not None and c.is_sparse(layer):
        return slots | moe_slots(f"{theirs}mlp.", f"{ours}mlp.", c.moe, fused, gated=c.delta is not None)
    return slots | mlp_slots(f"{theirs}mlp.", f"{ours}mlp.", c.intermediate_size, c.mlp_bias)


def attention_slots(
    theirs: str,
    ours: str,
    heads: int,
    kv_heads: int,
    dim: int,
    qkv_bias: bool,
    o_bias: bool,
    qk_norm: bool,
    gated: bool = False,
) -> dict[str, Slot]:
    """q (with a gate of its size where `gated`), k, v stacked into `qkv`; o and norms as they are.

    Prefixes end with a dot.
    """
    q, kv = heads * dim * (1 + gated), kv_heads * dim
    parts = {"q_proj": range(q), "k_proj": range(q, q + kv), "v_proj": range(q + kv, q + 2 * kv)}
    kinds = ("weight", "bias") if qkv_bias else ("weight",)
    slots = {f"{theirs}{p}.{kind}": Slot(f"{ours}qkv.{kind}", rows) for p, rows in parts.items() for kind in kinds}
    for kind in ("weight", "bias") if o_bias else ("weight",):
        slots[f"{theirs}o_proj.{kind}"] = Slot(f"{ours}o.{kind}")
    for norm in ("q_norm", "k_norm") if qk_norm else ():
        slots[f"{theirs}{norm}.weight"] = Slot(f"{ours}{norm}.weight")
    return slots


def delta_slots(theirs: str, ours: str, delta: DeltaNetConfig) -> dict[str, Slot]:
    """Four projections stacked into `qkvz` and `ba`, or two as they are. Prefixes end with a dot."""
    names = {"A_log": "a_log", "dt_bias": "dt_bias", "conv1d.weight": "conv", "norm.weight": "norm.weight"}
    names |= {"out_proj.weight": "o.weight"}
    slots = {f"{theirs}{name}": Slot(f"{ours}{parameter}") for name, parameter in names.items()}
    if delta.grouped:
        return slots | {f"{theirs}in_proj_{part}.weight": Slot(f"{ours}{part}.weight") for part in ("qkvz", "ba")}
    mixed, heads = delta.channels, delta.value_heads
    parts = {
        "qkv": Slot(f"{ours}qkvz.weight", range(mixed)),
        "z": Slot(f"{ours}qkvz.weight", range(mixed, mixed + delta.value_size)),
        "b": Slot(f"{ours}ba.weight", range(heads)),
        "a": Slot(f"{ours}ba.weight", range(heads, 2 * heads)),
    }
    return slots | {f"{theirs}in_proj_{part}.weight": slot for part, slot in parts.items()}


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


def moe_slots(theirs: str, ours: str, moe: MoeConfig, fused: bool = False, gated: bool = False) -> dict[str, Slot]:
    """Gate, experts (one by one, or fused) and the shared expert, which may have a gate. Prefixes end with a dot."""
    slots = {f"{theirs}gate.weight": Slot(f"{ours}gate.weight")}
    if moe.gate == "sigmoid":
        slots[f"{theirs}gate.e_score_correction_bias"] = Slot(f"{ours}gate.correction")
    if moe.shared_size:
        shared = "shared_expert" if gated else "shared_experts"
        slots |= mlp_slots(f"{theirs}{shared}.", f"{ours}shared.", moe.shared_size, bias=False)
    if gated:
        slots[f"{theirs}shared_expert_gate.weight"] = Slot(f"{ours}shared_gate.weight")
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
# hybrids have one set of these for all modules, and number only the layers
_MTP_PREFIX, _MTP_OWN = "mtp.", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")


def mtp_names(config: ModelConfig, names: Iterable[str]) -> set[str]:
    """Those of `names` that are tensors of MTP modules; what merely lies under their prefix is not one of them."""
    prefix = FAMILIES[config.architecture].mtp
    if not prefix:
        return set()
    held, layers = set(names), f"{_MTP_PREFIX}layers." if prefix == _MTP_PREFIX else prefix
    modules: dict[int, set[str]] = {}
    for name in held:
        number = name.removeprefix(layers).partition(".")[0] if name.startswith(layers) else ""
        if number.isdecimal():
            modules.setdefault(int(number), set()).add(name)
    first = config.num_layers if prefix == "model.layers." else 0
    own = {f"{_MTP_PREFIX}{name}.weight" for name in _MTP_OWN} if prefix == _MTP_PREFIX else set()
    return (held & own).union(*(found & _mtp_module(config, layers, i) for i, found in modules.items() if i >= first))


def _mtp_module(config: ModelConfig, prefix: str, number: int) -> set[str]:
    module = f"{prefix}{number}."
    layer = number if prefix == "model.layers." else config.num_layers + number
    known = {f"{module}{extra}.weight" for extra in _MTP_EXTRAS.get(prefix, ())}
    return known.union(*(layer_slots(config, layer, module, "", fused) for fused in (False, True)))
