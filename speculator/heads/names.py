"""Names of head tensors: the exporters' spellings, one common spelling, and our parameters.

Owns: both maps. Must never know configs, values or folders.
"""

from __future__ import annotations

from collections.abc import Iterable

from speculator.errors import CheckpointError
from speculator.heads.record import HeadRecord
from target.names import attention_slots, mlp_slots
from target.weights import Slot

# taken off in this order, each at most once
_WRAPPERS = ("model.", "draft_model.", "logit_head.")

_PREFIXES = {
    "midlayer.": "layers.0.",  # SafeAILab, SpecForge, AngelSlim
    "transformer.": "layers.0.",  # speculators 0.4 and older
    "fusion_fc.": "fc.",
    "embed_layernorm.": "embedding_layernorm.",  # HASS
    "hidden_layernorm.": "layers.0.input_layernorm.",
    "lm_head_layernorm.": "pre_lm_head_layernorm.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
    "encoder.fc.": "fc.",  # old DFlash
    "encoder.output_norm_enc.": "hidden_norm.",
}


def common_name(name: str) -> str:
    """One exporter's tensor name -> the common spelling (`layers.0.self_attn.q_proj.weight`, `fc.weight`, ...)."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    for theirs, common in _PREFIXES.items():
        if name.startswith(theirs):
            return common + name.removeprefix(theirs)
    return name


def is_ignorable(common: str) -> bool:
    """Tables that follow from the config, and copies of the target's tensors."""
    return common.endswith("rotary_emb.inv_freq") or common.startswith("verifier_")


def common_names(published: Iterable[str]) -> dict[str, str]:
    """Common name -> published name; CheckpointError when two published names mean the same tensor."""
    found: dict[str, str] = {}
    for name in sorted(published):
        common = common_name(name)
        if is_ignorable(common):
            continue
        if common in found:
            raise CheckpointError(f"tensors {found[common]} and {name} both mean {common}")
        found[common] = name
    return found


def head_slots(record: HeadRecord) -> dict[str, Slot]:
    """Common name -> our parameter, for every tensor that a head of this record holds."""
    slots = {"eagle": _eagle_slots, "eagle3": _eagle3_slots}[record.kind](record)
    if record.own_embed:
        slots["embed_tokens.weight"] = Slot("embed.weight")
    if record.own_lm_head:
        slots["lm_head.weight"] = Slot("lm_head.weight")
    return slots


def _eagle_slots(record: HeadRecord) -> dict[str, Slot]:
    slots = _linear("fc", record.fc_bias)
    for i in range(record.num_layers):
        slots |= _layer_slots(record, i, ("input_layernorm",) if i > 0 or record.fused_norm else ())
    if record.embedding_norm:
        slots["embedding_layernorm.weight"] = Slot("embedding_norm.weight")
    if record.head_norm:
        slots["pre_lm_head_layernorm.weight"] = Slot("head_norm.weight")
    return slots


def _eagle3_slots(record: HeadRecord) -> dict[str, Slot]:
    slots = _linear("fc", record.fc_bias) if record.fc else {}
    for i in range(record.num_layers):
        slots |= _layer_slots(record, i, _eagle3_norms(record, i))
    if record.norm_before_fc:
        slots["input_norm.weight"] = Slot("fc_input_norm.weight")
    for i in range(len(record.boundaries) if record.fc_norm else 0):
        slots[f"fc_norm.{i}.weight"] = Slot(f"fc_norms.{i}.weight")
    if record.final_norm:
        slots["norm.weight"] = Slot("norm.weight")
    return slots


def _eagle3_norms(record: HeadRecord, layer: int) -> tuple[str, ...]:
    if layer > 0 and not record.wide_layers:
        return ("input_layernorm",)
    return ("hidden_norm", "input_layernorm") if record.input_layernorm else ("hidden_norm",)


def _linear(name: str, bias: bool) -> dict[str, Slot]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{kind}": Slot(f"{name}.{kind}") for kind in kinds}


_NORMS = {"input_layernorm": "input_norm", "hidden_norm": "hidden_norm", "post_attention_layernorm": "post_norm"}


def _layer_slots(record: HeadRecord, layer: int, norms: tuple[str, ...]) -> dict[str, Slot]:
    prefix = f"layers.{layer}."
    names = (*norms, "post_attention_layernorm")
    slots = {f"{prefix}{theirs}.weight": Slot(f"{prefix}{_NORMS[theirs]}.weight") for theirs in names}
    sizes = (record.num_heads, record.num_kv_heads, record.head_dim)
    biases = (record.qkv_bias, record.o_bias, record.qk_norm)
    slots |= attention_slots(f"{prefix}self_attn.", f"{prefix}attention.", *sizes, *biases)
    return slots | mlp_slots(f"{prefix}mlp.", f"{prefix}mlp.", record.intermediate_size, record.mlp_bias)
