"""Rounds of one engine with forced acceptance, in each way that passes can be recorded, on the clock.

Owns: putting a way in place and taking it out again, and playing rounds. Must never know what a figure is compared to.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from graphs.recorder import CudaRecorder, Recorder
from graphs.tape import TapeRecorder
from speculator.bench.round_floor import settle
from speculator.bench.round_forced import Depths, ForcedEager, ForcedPasses
from speculator.bench.round_ledger import Ledger, profiled
from speculator.engine import Engine
from speculator.passes import EagerPasses, Verified
from speculator.recorded import RecordedPasses, Sizes
from speculator.round import Rounds
from speculator.types import Draft, DraftShape, SamplingParams, Step, StepResult
from target.batch import Batch, causal_positions

WARM = 5
WRAP = 256
PROFILED = 5
MODES = ("off", "split", "round")
Said = Callable[[Verified], Any]


class Played(NamedTuple):
    """Rounds of one setting."""

    seconds: list[float]  # of each round
    committed: float  # tokens of a round of one row, on average
    context: float  # tokens that a row held, on average
    replayed: bool  # every round, or every pass of it, came from a recording
    ledger: Ledger | None


@contextmanager
def recorded(engine: Engine, mode: str, sizes: Sizes, depths: Depths, shorter: Sequence[int] = ()) -> Iterator[None]:
    """The engine with passes of this mode for batches of `sizes.rows`, accepting by `depths`; then as it was.

    `shorter` are the depths of further chains that get whole rounds.

    Raises GraphError when a pass cannot be recorded.
    """
    before = engine.passes
    assert isinstance(before, EagerPasses)
    recorder: Recorder = CudaRecorder(engine.device) if engine.device.type == "cuda" else TapeRecorder()
    forced = ForcedEager(before, depths)
    opened: list[RecordedPasses | Rounds] = []
    try:
        if mode == "split":
            passes = RecordedPasses(before, recorder, sizes, engine.device, rung=0)
            opened.append(passes)
            passes.capture()
            engine.passes = ForcedPasses(passes, depths)
        elif mode == "round":
            engine.rounds = Rounds(forced, recorder, sizes, engine.cache, engine.rows, engine.lookback, shorter, rung=0)
            opened.append(engine.rounds)
            engine.rounds.capture()
            engine.passes = forced
        else:
            engine.passes = forced
        yield
    finally:
        engine.passes, engine.rounds = before, None
        for one in opened:
            one.close()
        recorder.close()


class Rows:
    """Sessions on rows 0 to n - 1, each in pages of its own; without a shape they decode plainly.

    All begin with `context` tokens, and begin again there after WRAP more, so that long plays cost what short ones do.
    They begin again without a draft: below one of its own, a recorded round goes on from where the device stands.
    """

    def __init__(self, engine: Engine, count: int, context: int, shape: DraftShape | None) -> None:
        info = engine.info
        each = (info.total_pages - 1) // info.max_rows
        self.engine, self.shape = engine, shape
        self.pages = [list(range(1 + row * each, 1 + (row + 1) * each)) for row in range(count)]
        self.start, self.cached, self.roots = context, [context] * count, [7 + row for row in range(count)]
        self.drafts, self.committed = [Draft()] * count, 0
        self.results: Sequence[StepResult] = ()
        for row in range(count):
            engine.open(row, SamplingParams(), shape is not None)

    def close(self) -> None:
        for row in range(len(self.pages)):
            self.engine.close(row)

    def steps(self) -> list[Step]:
        rows = enumerate(zip(self.cached, self.pages, self.roots, self.drafts, strict=True))
        return [Step(i, cached, pages, None, root, draft, self.shape) for i, (cached, pages, root, draft) in rows]

    def round(self) -> float:
        """One round; its seconds, as the caller of the engine waits for it."""
        steps = self.steps()
        begin = time.perf_counter()
        results = self.engine.step(steps)
        taken = time.perf_counter() - begin
        self._take(results)
        self.results = results
        return taken

    def _take(self, results: Sequence[StepResult]) -> None:
        for row, result in enumerate(results):
            held = self.cached[row] + len(result.tokens)
            full = held >= self.start + WRAP
            self.cached[row], self.drafts[row] = (self.start, Draft()) if full else (held, result.draft or Draft())
            self.committed += len(result.tokens)
            self.roots[row] = result.tokens[-1]


def play(engine: Engine, rows: int, context: int, shape: DraftShape, rounds: int, depths: Depths) -> Played:
    """Time `rounds` rounds that accept by `depths` from its beginning, then look into a few more."""
    group = Rows(engine, rows, context, shape)
    try:
        for _ in range(WARM):
            group.round()
        depths.restart()
        counts = _eager_count(engine)
        before, held, seconds = group.committed, 0, list[float]()
        for _ in range(rounds):
            held += sum(group.cached)
            seconds.append(group.round())
        committed = group.committed - before
        replayed = _eager_count(engine) == counts and _records(engine)
        ledger = profiled(group.round, PROFILED, engine.device)
    finally:
        group.close()
    return Played(seconds, committed / (rows * rounds), held / (rows * rounds), replayed, ledger)


def _records(engine: Engine) -> bool:
    return bool(engine.passes_run())


def _eager_count(engine: Engine) -> int:
    return sum(eager for _, eager in engine.passes_run().values())


# ---- passes of the target alone


@torch.inference_mode()
def time_pass(engine: Engine, queries: int, context: int, repeats: int, said: Said = attrgetter("logits")) -> float:
    """Median seconds of a target pass over `queries` tokens of one row and what is `said` of it, recorded on a GPU."""
    batch, passes = _one_row(engine, queries, context), engine.passes
    return Timer(engine.device).median(lambda: said(passes.verify(batch)), repeats)


def _one_row(engine: Engine, queries: int, context: int) -> Batch:
    device, size = engine.device, engine.info.page_size
    pages = torch.arange(1, 2 + (context + queries) // size, device=device)[None]
    length = torch.full((1,), context, device=device)
    tokens = torch.randint(0, engine.info.vocab_size, (1, queries), device=device)
    counts = torch.full((1,), queries, device=device)
    return Batch(
        tokens=tokens,
        positions=causal_positions(length, queries),
        context=length,
        counts=counts,
        pages=pages,
        longest=context + queries,
        static=True,
    )


class Timer:
    """Times work on a device; on a GPU a recording of it, by the device's own clock, so that launches cost nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def median(self, run: Callable[[], Any], repeats: int) -> float:
        """Seconds."""
        if self.device.type != "cuda":
            return self._median(run, self._by_host, repeats)
        recorder = CudaRecorder(self.device)
        try:
            for _ in range(WARM):
                recorder.warm(run)
            _, recording = recorder.record(run)
            return self._median(recording.replay, self._by_device, repeats)
        finally:
            recorder.close()

    def _median(self, run: Callable[[], Any], clock: Callable[[Callable[[], Any]], float], repeats: int) -> float:
        for _ in range(WARM):
            run()
        return statistics.median(clock(run) for _ in range(repeats))

    def _by_host(self, run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def _by_device(self, run: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        settle(self.device)
        return float(begin.elapsed_time(end)) / 1e3
