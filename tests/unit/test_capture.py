"""Capture at start-up: what an engine does where it fails, and what it notes where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from graphs.memory import NO_GRAPHS
from graphs.recorder import Recording, record_body
from graphs.tape import TapeRecorder
from speculator import capture
from speculator.config import load
from speculator.engine import Engine
from speculator.load import graph_mode
from speculator.recorded import RecordedPasses, Sizes
from tests.unit.engines import tiny_engine
from tests.unit.test_recorded import CHAIN, pair, run

T = TypeVar("T")


class Full(TapeRecorder):
    """Has no memory for the last few recordings."""

    def record(self, body: Callable[[], T]) -> tuple[T, Recording]:
        return record_body(self, body if len(self._recordings) < 4 else _out_of_memory)


def _out_of_memory() -> T:  # type: ignore[type-var]
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20 MiB.\nGPU 0 has a total capacity of 139 GiB."
    )


def recorded(engine: Engine) -> RecordedPasses:
    pages = -(-(engine.info.max_context + engine.info.scratch_tokens) // engine.info.page_size)
    capture.record_passes(engine, Sizes(2, pages, engine.info.page_size, CHAIN), NO_GRAPHS)
    assert isinstance(engine.passes, RecordedPasses)
    return engine.passes


def test_a_capture_that_fails_leaves_all_passes_eager_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models = pair("eagle3")
    engine = tiny_engine(*models)
    monkeypatch.setattr(capture, "TapeRecorder", Full)
    passes = recorded(engine)
    why = "no memory left to record the pass: CUDA out of memory. Tried to allocate 20 MiB."
    assert f"passes run eager, graphs could not be captured: {why}" in caplog.text
    assert passes.recorder.pool_bytes == 0 and not any(m.ready or m.graphs for m in passes.managers)
    assert run(engine, CHAIN) == run(tiny_engine(*models), CHAIN)
    assert {reason for name in ("target verify", "draft decode") for reason in passes.counts[name].eager} == {
        f"capture failed: {why}"
    }


def test_what_graphs_take_is_noted() -> None:
    passes = recorded(tiny_engine(*pair("eagle3")))
    assert passes.bytes_taken == passes.recorder.pool_bytes > 0 and passes.bytes_expected == 0
    assert all(manager.ready for manager in passes.managers if manager.wanted)


@pytest.mark.parametrize(
    ("asked", "device", "mode"),
    [
        ([], "cuda", "round"),
        ([], "cpu", "off"),
        (["graphs.mode=split"], "cuda", "split"),
        (["graphs.mode=round"], "cpu", "round"),
        (["parallel.pipeline=2"], "cuda", "split"),
        (["parallel.tensor=2"], "cuda", "round"),
        (["parallel.tensor=2", "parallel.attention_data=true"], "cuda", "piecewise"),
        (["parallel.pipeline=2"], "cpu", "off"),
    ],
)
def test_a_gpu_records_the_most_that_its_ranks_can(asked: list[str], device: str, mode: str) -> None:
    assert graph_mode(load(None, asked), torch.device(device)) == mode
