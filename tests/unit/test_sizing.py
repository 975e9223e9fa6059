"""What start-up measures before the cache exists is what it records afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphs.tape import TapeRecorder
from speculator import sizing
from speculator.capture import record_rounds
from speculator.config import load
from speculator.drafts import fitted
from speculator.load import _load, engine_info, graph_mode, graph_sizes, with_page_size
from speculator.types import DraftShape
from tests.unit.engines import tiny_engine, tiny_head, tiny_target

CPU = torch.device("cpu")


def config(*sets: str) -> Any:
    return with_page_size(load(None, ["graphs.mode=round", "graphs.rows=2", "engine.max_context=64", *sets]), CPU)


TREES = ("draft.branching=3", "draft.branching=3 draft.depth=2 draft.nodes=60", "draft.branching=2 draft.nodes=7")


@pytest.mark.parametrize("sets", ["", *TREES, "draft.branching=3 draft.depth=0"])
def test_rounds_are_recorded_in_the_shape_that_sessions_get(sets: str) -> None:
    target, chosen = tiny_target(), config(*sets.split())
    shape = graph_sizes(chosen, target).shape
    assert shape == fitted(chosen.draft.shape, engine_info(chosen, target, None, 9))
    assert shape.is_chain or shape.depth <= shape.nodes <= 63


@pytest.mark.parametrize(("depths", "wanted"), [("0", set()), ("0,1", {1}), ("1,2,9", {1, 2}), ("", set())])
def test_a_trial_takes_every_depth_that_will_be_recorded(
    depths: str, wanted: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, tried = config("draft.depth=3", f"graphs.depths={depths}"), list[Any]()
    target = tiny_target()
    engine = tiny_engine(target, tiny_head(target, "eagle3"), rows=2)
    sizes = graph_sizes(chosen, target)
    load_ = _load(chosen, target, sizes, graph_mode(chosen, CPU))
    trial = sizing.trial_rounds

    def watched(*args: Any) -> Any:
        rounds = trial(*args)
        monkeypatch.setattr(rounds, "capture", lambda: None)
        tried.append(rounds)
        return rounds

    monkeypatch.setattr(sizing, "CudaRecorder", lambda device: TapeRecorder())
    monkeypatch.setattr(sizing, "cuda_meter", lambda device: None)
    monkeypatch.setattr(sizing, "recorded_passes", lambda *args: _Captured())
    monkeypatch.setattr(sizing, "trial_rounds", watched)
    monkeypatch.setattr(sizing, "estimate_graphs", lambda shapes, capture, release, meter: [capture(s) for s in shapes])
    sizing._estimate(engine.passes, engine.cache, load_, CPU)  # type: ignore[arg-type]
    assert _depths(tried[0]) == {0, 3} | wanted
    assert all(rounds.state is tried[0].state for rounds in tried[1:]) and len(tried) > 1  # rows are there once
    monkeypatch.setattr("speculator.capture._captured", lambda *args: "not now")
    record_rounds(engine, engine.passes, TapeRecorder(), sizes, chosen.graphs.round_depths)  # type: ignore[arg-type]
    assert engine.rounds is not None and _depths(engine.rounds) == _depths(tried[0])


def _depths(rounds: Any) -> set[int]:
    return {shape.query_len - 1 for shape in rounds.manager.ladder.largest_first()}


class _Captured:
    def capture(self) -> None: ...


def test_without_rounds_none_are_tried() -> None:
    chosen, target = config(), tiny_target()
    sizes = graph_sizes(chosen, target)
    assert _load(chosen, target, sizes, "piecewise").rounds is None
    assert _load(chosen, target, sizes, "round").rounds == (0,)
    assert sizes.shape == DraftShape(5)
