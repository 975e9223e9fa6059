"""Where sessions go when several ranks have rows and pages of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings

from speculator.errors import ServerFullError
from speculator.places import Places
from speculator.types import Step, StepResult, StoppingParams
from tests.fakes import FakeEngine, info, plain
from tests.unit.test_scheduler import AnyOrder, Bench, prompt

RANKS = info(max_rows=4, rank_pages=(101, 41), total_pages=141, prefill_chunk=8)


class FakeRanks(FakeEngine):
    """Pages of the same number on two ranks are two pages."""

    def __init__(self) -> None:
        super().__init__(replace(RANKS, total_pages=2000))

    def step(self, steps: Sequence[Step]) -> list[StepResult]:
        each = RANKS.max_rows // len(RANKS.rank_pages)
        for step in steps:
            assert all(0 < page < RANKS.rank_pages[step.row // each] for page in step.pages)
        apart = [step._replace(pages=[page + 1000 * (step.row // each) for page in step.pages]) for step in steps]
        return super().step(apart)


class RankBench(Bench):
    """A scheduler over ranks."""

    def __init__(self) -> None:
        super().__init__(RANKS)
        self.engine = FakeRanks()
        self.scheduler._device = self.engine


def test_one_cache_is_one_rank() -> None:
    places = Places(info(max_rows=3, total_pages=11))
    assert (places.largest, places.capacity, places.unpromised, places.free_rows) == (10, 10, 10, [0, 1, 2])
    assert [places.take(4), places.take(4), places.take(4)] == [0, 1, None]


def test_sessions_go_where_fewest_are_then_where_most_pages_are_left() -> None:
    places = Places(RANKS)
    assert (places.largest, places.capacity) == (100, 140)
    assert places.take(10) == 0, "more pages"
    assert places.take(10) == 2, "fewer sessions"
    assert places.take(10) == 1
    assert places.take(31) is None, "the last row is of the smaller rank"
    assert places.unpromised == 30 and places.has(30)
    assert places.take(30) == 3 and places.full


def test_pages_are_those_of_the_row() -> None:
    places = Places(RANKS)
    rows = [places.take(2), places.take(2)]
    pages = [[places.page(row) for _ in range(2)] for row in rows if row is not None]
    assert pages == [[1, 2], [1, 2]] and places.used == 4
    places.give(0, pages[0], 2)
    assert (places.used, places.reserved, places.free_rows) == (2, 2, [0, 1, 3])


def test_a_session_that_fits_no_rank_is_refused() -> None:
    bench = RankBench()
    most = StoppingParams(max_new_tokens=150)  # 150 + 5 + 70 tokens are 57 of 4: the smaller rank has 40
    bench.create("a", prompt(5), stopping=most)
    with pytest.raises(ServerFullError, match="57 KV pages, 43 are not promised"):
        bench.create("b", prompt(5), stopping=most)
    assert bench.scheduler.context == 256
    bench.create("c", prompt(5), stopping=StoppingParams(max_new_tokens=20))
    assert bench.scheduler.usage().used_pages > 0


def test_each_rank_takes_a_prompt_chunk_in_a_step() -> None:
    bench = RankBench()
    jobs = [
        bench.submit(bench.create_job(name, prompt(16), stopping=StoppingParams(max_new_tokens=4))) for name in "ab"
    ]
    bench.step()
    assert [len(step.feed.tokens) for step in bench.engine.steps[0] if step.feed] == [8, 8]
    bench.step()
    assert all(bench.done(job) for job in jobs)
    assert bench.text("a")[16:] == plain(prompt(16), 1)


class AnyOrderOverRanks(AnyOrder):
    """The same with sessions on two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = RankBench()


AnyOrderOverRanks.TestCase.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrderOverRanks = AnyOrderOverRanks.TestCase
