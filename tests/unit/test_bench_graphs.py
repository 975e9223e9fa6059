"""`speculator bench graphs`: the comparison of replays with eager passes, and the whole command on a tiny pair.

Owns: that a wrong replay cannot pass for a right one. Must never assert a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speculator.bench import graphs as bench
from speculator.bench.bitwise import compare
from speculator.bench.round_forced import Depths, ForcedEager
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.recorded import RecordedPasses
from speculator.types import DraftShape, Step, StepResult
from tests.e2e.tiny_pair import make_pair
from tests.unit.engines import tiny_engine
from tests.unit.test_recorded import CHAIN, TREE, pair, record

PASSES = {"target verify", "head prefill", "draft decode", "prompt", "prompt, head"}


def recorded(kind: str, shape: DraftShape) -> tuple[Engine, RecordedPasses]:
    engine = tiny_engine(*pair(kind))
    return engine, record(engine, shape, rows=2, prompt_tokens=32)


@pytest.mark.parametrize("kind, shape", [("eagle3", CHAIN), ("eagle3", TREE), ("mtp2", CHAIN)])
def test_every_recorded_shape_replays_what_running_gives_bit_for_bit(kind: str, shape: DraftShape) -> None:
    engine, passes = recorded(kind, shape)
    found = compare(engine, passes)
    assert found.keys() == PASSES and all(found["target verify"]) and all(found["draft decode"])
    assert {name: [shape for shape, equal in shapes.items() if not equal] for name, shapes in found.items()} == {
        name: [] for name in PASSES
    }
    assert {m.name: len(m.graphs) for m in passes.managers} == {name: len(shapes) for name, shapes in found.items()}


def drop(recording: Any) -> None:
    """A recording without the last of its operations that computes."""
    recording.operations.pop()


@pytest.mark.parametrize("name", sorted(PASSES))
def test_a_replay_that_leaves_something_out_is_told(name: str) -> None:
    engine, passes = recorded("eagle3", CHAIN)
    manager = next(m for m in passes.managers if m.name == name)
    shape, graph = next(iter(manager.graphs.items()))
    drop(graph.segments[-1] if name.startswith("prompt") else graph.recording)
    found = compare(engine, passes)
    assert [(p, s) for p, shapes in found.items() for s, equal in shapes.items() if not equal] == [(name, str(shape))]


def test_a_replay_that_stores_nothing_is_told() -> None:
    """What an eager pass stored must not stand in for what the replay should have."""
    engine, passes = recorded("eagle3", CHAIN)
    for graph in passes.drafting.graphs.values():
        tape: Any = graph.recording
        stores = {store.untyped_storage().data_ptr() for store in engine.cache.groups}
        tape.operations = [op for op in tape.operations if not _writes(op, stores)]
    assert not any(compare(engine, passes)["draft decode"].values())


def _writes(op: Any, stores: set[int]) -> bool:
    into = op.args[0] if op.func._schema.is_mutable and op.args else None
    return isinstance(into, torch.Tensor) and into.untyped_storage().data_ptr() in stores


@pytest.mark.parametrize("pages", [600, 140])
def test_sessions_whose_drafts_are_all_accepted_stay_in_their_pages(
    pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nobody looks whether a page table is long enough."""
    engine = tiny_engine(*pair("eagle3"), rows=2, pages=pages)
    engine.info = replace(engine.info, default_shape=CHAIN)
    engine.passes = ForcedEager(engine.passes, Depths(1 + CHAIN.depth, CHAIN.depth, engine.device))
    most, run = 0, engine.step

    def step(steps: Sequence[Step]) -> list[StepResult]:
        nonlocal most
        for each in steps:
            tokens = len(each.feed.tokens) if each.feed else 0
            assert each.cached + tokens + engine.info.scratch_tokens <= len(each.pages) * engine.info.page_size
            most = max(most, each.cached)
        return run(steps)

    monkeypatch.setattr(engine, "step", step)
    found, _ = bench._timed_waves(engine, 2, 2)
    assert all(accepted for _, accepted in found)
    assert most > (100 if pages < 600 else 250)


@pytest.mark.parametrize("given, word", [("--context 600", "--context"), ("--sessions 10", "260 tokens of KV cache")])
def test_what_would_leave_the_pages_is_refused(given: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        bench._check(bench.parser().parse_args(given.split()), tiny_engine(*pair("eagle3")))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made, out = make_pair(tmp_path / "pair"), tmp_path / "report.json"
    given = f"--target {made.target} --head {made.head} --device cpu --sessions 2 --waves 1 --repeats 1 --context 9"
    monkeypatch.setattr(sys, "argv", ["graphs", *given.split(), "--json", str(out)])
    assert bench.main() == 0, capsys.readouterr().err
    report = json.loads(out.read_text())
    assert {name.rpartition(", ")[0] for name in report["bit_equal"]} == PASSES and all(report["bit_equal"].values())
    assert report["mixed"]["equal"] and set(report["mixed"]["share_replayed"].values()) == {1.0}
    assert report["memory"]["graphs_taken_mib"] == report["capture"]["pool_mib"] > 0
    assert report["memory"]["kv_cache_tokens"] > 0 and set(report["one_row"]) == {
        "verify",
        "head prefill",
        "draft decode",
    }


def test_the_command_fails_where_a_replay_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_pair(tmp_path / "pair")
    given = f"--target {made.target} --head {made.head} --device cpu --graphs split --sessions 1 --waves 0 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["graphs", *given.split(), "--context", "9"])
    monkeypatch.setattr(bench, "compare", lambda *_: {"target verify": {"1x1": True, "2x1": False}, "prompt": {}})
    assert bench.main() == 1
    assert json.loads(capsys.readouterr().out)["bit_equal"] == {"target verify, 2 shapes": False}
