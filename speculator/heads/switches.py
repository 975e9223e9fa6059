"""The switches that change a head's forward: which norms there are, which residual, what is recycled, which taps.

Owns: the meaning of the exporters' flags; a tensor that is there wins over a flag. Must never know sizes.
"""

from __future__ import annotations

from typing import Any

from speculator.heads.overrides import show
from speculator.heads.reading import ATTENTION, Reading
from speculator.heads.taps import alternative_boundaries, read_taps


def read_switches(reading: Reading) -> dict[str, Any]:
    """The boolean fields of the record, and the boundaries of EAGLE-3."""
    r = reading
    common = {
        "fc_bias": r.present("fc_bias", "fc.bias"),
        "qkv_bias": r.present("qkv_bias", f"{ATTENTION}q_proj.bias"),
        "o_bias": r.present("o_bias", f"{ATTENTION}o_proj.bias"),
        "mlp_bias": r.present("mlp_bias", "layers.0.mlp.gate_proj.bias"),
        "qk_norm": r.present("qk_norm", f"{ATTENTION}q_norm.weight"),
    }
    return common | (_eagle(r) if r.source.kind == "eagle" else _eagle3(r))


def _eagle(reading: Reading) -> dict[str, Any]:
    r, layernorms = reading, reading.source.flag("layernorms", "add_para_norm")
    norms = {
        "embedding_norm": _norm(r, "embedding_norm", "embedding_layernorm.weight", layernorms),
        "fused_norm": _norm(r, "fused_norm", "layers.0.input_layernorm.weight", layernorms),
        "head_norm": _norm(r, "head_norm", "pre_lm_head_layernorm.weight", layernorms),
    }
    return norms | ({"norm_output": _eagle_norm_output(r)} if norms["head_norm"] else {})


def _eagle_norm_output(reading: Reading) -> bool:
    declared = reading.source.flag("norm_output")
    if declared is None:
        source = "vLLM recycles what lm_head reads; speculators does not say"
        return reading.pick("norm_output", True, source, ("false",), ambiguous=True)
    return reading.pick("norm_output", declared, "config norm_output", (show(not declared),))


def _eagle3(reading: Reading) -> dict[str, Any]:
    r, flag = reading, reading.source.flag
    wide = _wide_layers(r)
    first_norm, first_flag = "layers.0.input_layernorm.weight", flag("use_input_layernorm_in_first_layer")
    return {
        "boundaries": _boundaries(r),
        "fc": _fc(r),
        "norm_before_fc": _norm(r, "norm_before_fc", "input_norm.weight", flag("norm_before_fc")),
        "fc_norm": _norm(r, "fc_norm", "fc_norm.0.weight", flag("fc_norm", "use_aux_norm")),
        "input_layernorm": _norm(r, "input_layernorm", first_norm, first_flag, default=True),
        "final_norm": _norm(r, "final_norm", "norm.weight", flag("use_last_layernorm"), default=True),
        "norm_before_residual": _norm_before_residual(r),
        "norm_output": _norm_output(r),
        "wide_layers": wide,
    }


def _norm(reading: Reading, field: str, tensor: str, declared: bool | None, default: bool = False) -> bool:
    """A norm shows in its tensor; a config that asks for it without the tensor makes the tensor missing."""
    if reading.source.has(tensor):
        contradicted = declared is False
        source = f"tensor {tensor}" + (", although the config says false" if contradicted else "")
        return reading.pick(field, True, source, ("false",) if contradicted else (), contradicted)
    if declared is not None:
        return reading.pick(field, declared, "config")
    return reading.pick(field, default, "always, unless the config says false" if default else f"no tensor {tensor}")


def _norm_before_residual(reading: Reading) -> bool:
    declared = reading.source.flag("norm_before_residual")
    if declared is None:
        source = "exporters' default, no key in config (vLLM takes true for speculators)"
        return reading.pick("norm_before_residual", False, source, ("true",), ambiguous=True)
    return reading.pick("norm_before_residual", declared, "config norm_before_residual", (show(not declared),))


def _norm_output(reading: Reading) -> bool:
    r, declared = reading, reading.source.flag("norm_output")
    if declared is None:
        return r.pick("norm_output", False, "default, no norm_output in config", ("true",))
    # SpecForge once wrote norm_output for "norm before lm_head", which every head has
    old = declared and not r.source.has("fc_norm.0.weight") and "speculators_model_type" not in r.source.raw
    return r.pick("norm_output", declared, "config norm_output", (show(not declared),), ambiguous=old)


def _fc(reading: Reading) -> bool:
    if reading.source.has("fc.weight"):
        return reading.pick("fc", True, "tensor fc.weight")
    wanted = reading.source.flag("use_aux_hidden_state") is not False
    return reading.pick("fc", wanted, "always, unless use_aux_hidden_state is false" if wanted else "config")


def _wide_layers(reading: Reading) -> bool:
    """DeepSpec's later layers read the embedding again; others are plain, whose norm SGLang calls hidden_norm."""
    source = reading.source
    if not source.has("layers.1.self_attn.q_proj.weight"):
        return False
    width = source.shape("layers.1.self_attn.q_proj.weight")[1]
    wide = reading.pick("wide_layers", width == 2 * reading.hidden_size, "tensor layers.1 q_proj")
    if not wide:
        for name in [n for n in source.shapes if n.endswith(".hidden_norm.weight") and n[:9] != "layers.0."]:
            source.rename(name, name.replace("hidden_norm", "input_layernorm"))
    return wide


def _boundaries(reading: Reading) -> tuple[int, ...]:
    r = reading
    if r.source.flag("use_aux_hidden_state") is False:
        return r.pick("boundaries", (), "config use_aux_hidden_state: the final state F")
    if "boundaries" in r.overrides.fields:
        return tuple(r.overrides.fields["boundaries"])
    layers = r.target.num_layers if r.target else r.source.integer("num_target_layers")
    taps = read_taps(r.source.config, layers)
    if taps is None:
        return r.pick("boundaries", (), "default (2, n//2, n-3), open until the target is known", ambiguous=True)
    others = alternative_boundaries(taps.boundaries, layers) if layers else ()
    return r.pick("boundaries", taps.boundaries, taps.source, tuple(map(show, others)), taps.ambiguous)
