"""The sizes of a head: from the shapes of its tensors, from the config only where shapes cannot tell.

Must never know switches or vocabularies.
"""

from __future__ import annotations

import re
from typing import Any

from speculator.errors import CheckpointError
from speculator.heads.overrides import show
from speculator.heads.reading import ATTENTION, Reading
from target.config import RopeConfig, parse_rope
from target.errors import CheckpointError as TargetCheckpointError
from target.rope import Rope


def read_sizes(reading: Reading) -> dict[str, Any]:
    """Fields hidden_size .. rope of the record."""
    r = reading
    dim = _head_dim(r)
    inner = r.source.shape("layers.0.mlp.gate_proj.weight")[0]
    return {
        "hidden_size": r.pick("hidden_size", r.hidden_size, "tensor o_proj"),
        "target_hidden_size": _target_hidden(r),
        "intermediate_size": r.pick("intermediate_size", inner, "tensor gate_proj"),
        "num_layers": _num_layers(r),
        "num_heads": _heads(r, "num_heads", "num_attention_heads", "q_proj", dim),
        "num_kv_heads": _heads(r, "num_kv_heads", "num_key_value_heads", "k_proj", dim),
        "head_dim": dim,
        "norm_eps": _norm_eps(r),
        "rope": _rope(r, dim),
    }


def _head_dim(reading: Reading) -> int:
    r = reading
    if "head_dim" in r.overrides.fields:
        return int(r.overrides.fields["head_dim"])
    if r.source.has(f"{ATTENTION}q_norm.weight"):
        return r.pick("head_dim", r.source.shape(f"{ATTENTION}q_norm.weight", 1)[0], "tensor q_norm")
    given, heads = r.source.integer("head_dim"), r.source.integer("num_attention_heads")
    if given is not None:
        return r.pick("head_dim", given, "config head_dim")
    if heads is None:
        raise CheckpointError("config.json has neither head_dim nor num_attention_heads; set head_dim=...")
    return r.pick("head_dim", r.hidden_size // heads, "hidden_size / config num_attention_heads")


def _heads(reading: Reading, field: str, key: str, projection: str, dim: int) -> int:
    rows = reading.source.shape(f"{ATTENTION}{projection}.weight")[0]
    if dim < 1 or rows % dim:
        chosen = reading.choices.get("head_dim")
        source = chosen.source if chosen else "override"
        raise CheckpointError(
            f"{projection} has {rows} rows, no multiple of head_dim {dim} ({source}); set head_dim=..."
        )
    reading.compare(field, rows // dim, reading.source.integer(key))
    return reading.pick(field, rows // dim, f"tensor {projection} / head_dim")


def _num_layers(reading: Reading) -> int:
    matches = (re.match(r"layers\.(\d+)\.", name) for name in reading.source.shapes)
    count = 1 + max(int(match[1]) for match in matches if match)
    reading.compare("num_layers", count, reading.source.integer("num_hidden_layers"))
    return reading.pick("num_layers", count, "tensor names")


def _target_hidden(reading: Reading) -> int:
    r, declared = reading, reading.source.integer("target_hidden_size")
    if r.target is None:
        source = "config target_hidden_size" if declared else "equal to hidden_size"
        return r.pick("target_hidden_size", declared or r.hidden_size, source)
    if declared is not None and declared != r.target.hidden_size:
        raise CheckpointError(
            f"this head reads hidden states of {declared} values (target_hidden_size), the target's have "
            f"{r.target.hidden_size}; it was made for another target"
        )
    return r.pick("target_hidden_size", r.target.hidden_size, "target")


def _norm_eps(reading: Reading) -> float:
    given = reading.source.config.get("rms_norm_eps")
    if given is None:
        return reading.pick("norm_eps", 1e-6, "default, no rms_norm_eps in config")
    if not isinstance(given, int | float):
        raise CheckpointError(f"config.json: rms_norm_eps must be a number, got {given!r}")
    return reading.pick("norm_eps", float(given), "config rms_norm_eps")


def _rope(reading: Reading, dim: int) -> RopeConfig:
    """A missing theta is 10000, whatever the target's; published values are at times wrong for the weights."""
    r, config = reading, reading.source.config
    rope = _parsed_rope(reading, dim)
    parameters = config.get("rope_parameters") or {}
    given = bool(config.get("rope_theta") or parameters.get("rope_theta"))
    source = "config rope_theta" if given else "default 10000, no rope_theta in config"
    others = {10000.0, r.target.rope_theta if r.target else 10000.0} - {rope.theta}
    r.pick("rope.theta", rope.theta, source, tuple(map(show, sorted(others))), bool(others) and not given)
    scaled = "config rope_parameters" if parameters else "config rope_scaling"
    r.pick("rope.kind", rope.kind, scaled if rope.kind != "default" else "default")
    return rope


def _parsed_rope(reading: Reading, dim: int) -> RopeConfig:
    try:
        rope = parse_rope(reading.source.config, str(reading.source.folder / "config.json"))
        Rope(rope, dim)  # notices a missing factor now and not when the head is built
    except TargetCheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: the rope cannot be understood: {error}") from None
    return rope
