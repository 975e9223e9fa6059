"""Which residual streams an EAGLE-3 head was trained on.

Owns: the two conventions of published layer ids and the rule that decides between them. `B(k)` is the residual stream
after k target layers; "output of layer i" is B(i + 1). Must never know tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from speculator.errors import CheckpointError

IDS = "eagle_aux_hidden_state_layer_ids"


class Taps(NamedTuple):
    """Boundaries k of B(k) in the order of fc's input, where they came from, and whether the file settles them."""

    boundaries: tuple[int, ...]
    source: str
    ambiguous: bool = False


def default_boundaries(layers: int) -> tuple[int, ...]:
    """SafeAILab's (2, n // 2, n - 3), which vLLM, SGLang, SpecForge and ModelOpt share."""
    return (2, layers // 2, layers - 3)


def read_taps(config: Mapping[str, Any], layers: int | None) -> Taps | None:
    """The taps that a config means for a target of `layers` layers; None when it needs the unknown layer count."""
    nested = config.get("eagle_config") or {}
    if config.get(IDS):
        return Taps(_ids(config[IDS], IDS), f"config {IDS}, read as boundaries")
    if nested.get(IDS):
        return _nested(_ids(nested[IDS], f"eagle_config.{IDS}"), layers)
    if config.get("target_layer_ids"):  # DeepSpec
        ids = _ids(config["target_layer_ids"], "target_layer_ids")
        return Taps(_plus_one(ids), "config target_layer_ids, outputs of layers (+1)")
    if layers is None:
        return None
    return Taps(default_boundaries(layers), f"default (2, n//2, n-3) for n = {layers}", ambiguous=True)


def _nested(ids: tuple[int, ...], layers: int | None) -> Taps:
    """Exporters disagree here: ids that reach n, or start with 2, are already boundaries."""
    where = f"config eagle_config.{IDS}"
    if layers is not None and max(ids) == layers:
        return Taps(ids, f"{where}, read as boundaries because the last one is n", ambiguous=True)
    if ids[0] == 2:
        return Taps(ids, f"{where}, read as boundaries because the first one is 2", ambiguous=True)
    return Taps(_plus_one(ids), f"{where}, outputs of layers (+1)", ambiguous=True)


def _plus_one(ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i + 1 for i in ids)


def _ids(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(isinstance(i, int) for i in value):
        raise CheckpointError(f"config.json: {where} must be a list of integers, got {value!r}")
    return tuple(value)


def alternative_boundaries(taps: tuple[int, ...], layers: int) -> tuple[tuple[int, ...], ...]:
    """Other readings worth measuring: one layer up, one layer down, the default."""
    shifted = [tuple(k + step for k in taps) for step in (1, -1)]
    candidates = [*shifted, *([default_boundaries(layers)] if len(taps) == 3 else [])]
    valid = [c for c in candidates if c != taps and all(0 <= k <= layers for k in c)]
    return tuple(dict.fromkeys(valid))


def check_boundaries(boundaries: tuple[int, ...], chunks: int, layers: int | None) -> None:
    """CheckpointError unless there is one boundary per chunk of fc's input, each within the target."""
    if len(boundaries) != chunks:
        raise CheckpointError(
            f"fc reads {chunks} hidden states but {len(boundaries)} boundaries are given "
            f"({', '.join(map(str, boundaries))}); is it made for another target? Else set boundaries=k1,k2,..."
        )
    wrong = [k for k in boundaries if k < 0 or (layers is not None and k > layers)]
    if wrong:
        raise CheckpointError(
            f"boundary {wrong[0]} does not exist in a target of {layers} layers (0..{layers}); "
            "is it made for another target? Else set boundaries=k1,k2,..."
        )
