"""The cost table: what it says between its points, its file, and how it is measured.

Owns: lines, limits and sentences of the table. Must never time anything real.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculator.costs import Cost, CostTable, measure_costs, read_costs, save_costs, size
from speculator.errors import ConfigError, NumericalError
from speculator.types import Draft, DraftShape, Step
from tests.fakes import INFO, info

PLAIN, DEEP, TREE = DraftShape(0), DraftShape(7), DraftShape(6, 32, 4)
SUBJECT = {"target": "t", "head": "h"}


def table(*costs: Cost) -> CostTable:
    return CostTable(costs, SUBJECT)


def test_between_rows_and_contexts_lines_are_straight() -> None:
    costs = table(Cost(DEEP, 1, 512, 4.0), Cost(DEEP, 9, 512, 8.0), Cost(DEEP, 1, 1536, 6.0), Cost(DEEP, 9, 1536, 10.0))
    assert costs.seconds(1, DEEP, 512) == 4.0
    assert costs.seconds(5, DEEP, 512) == 6.0
    assert costs.seconds(5, DEEP, 1024) == 7.0
    assert costs.seconds(1, DEEP, 0) == 4.0 and costs.seconds(1, DEEP, 9999) == 6.0


def test_beyond_the_largest_batch_the_last_slope_goes_on() -> None:
    costs = table(Cost(DEEP, 1, 512, 4.0), Cost(DEEP, 8, 512, 4.0), Cost(DEEP, 16, 512, 6.0))
    assert costs.seconds(24, DEEP, 512) == 8.0
    assert table(Cost(DEEP, 4, 512, 4.0)).seconds(64, DEEP, 512) == 4.0


def test_more_rows_never_cost_less() -> None:
    costs = table(Cost(DEEP, 1, 512, 5.0), Cost(DEEP, 2, 512, 4.0), Cost(DEEP, 4, 512, 6.0))
    assert costs.seconds(2, DEEP, 512) == 5.0 and costs.seconds(3, DEEP, 512) == 5.5


@given(st.lists(st.floats(0.001, 10), min_size=3, max_size=3), st.integers(1, 200), st.integers(1, 200))
def test_cost_grows_with_rows_whatever_was_measured(values: list[float], a: int, b: int) -> None:
    costs = table(*(Cost(DEEP, rows, 512, value) for rows, value in zip((1, 8, 64), values, strict=True)))
    assert costs.seconds(min(a, b), DEEP, 600) <= costs.seconds(max(a, b), DEEP, 600) * (1 + 1e-9)


def test_a_shape_that_was_not_measured_costs_what_the_next_larger_does() -> None:
    costs = table(Cost(PLAIN, 1, 512, 1.0), Cost(DEEP, 1, 512, 2.0), Cost(TREE, 1, 512, 3.0))
    assert costs.seconds(1, DraftShape(3), 512) == 2.0
    assert costs.seconds(1, DraftShape(6, 16, 4), 512) == 3.0
    assert costs.seconds(1, DraftShape(6, 60, 4), 512) == 3.0
    assert [size(s)[0] for s in costs.shapes] == [0, 7, 32]


@pytest.mark.parametrize(
    "bad", [(), (Cost(DEEP, 1, 512, 0.0),), (Cost(DEEP, 0, 512, 1.0),), (Cost(DEEP, 1, 5, float("nan")),)]
)
def test_a_table_without_times_is_refused(bad: tuple[Cost, ...]) -> None:
    with pytest.raises(ConfigError, match="a time above 0"):
        CostTable(bad, SUBJECT)


def test_the_file_brings_the_table_back(tmp_path: Path) -> None:
    static = DraftShape(2, 3, 1, (-1, -1, 0))
    costs = table(*(Cost(shape, 8, 512, 0.0123) for shape in (PLAIN, DEEP, TREE, static)))
    save_costs(costs, tmp_path / "costs.json")
    assert read_costs(tmp_path / "costs.json", SUBJECT) == costs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not a cost table: JSONDecodeError"),
        ("{}", "is not a cost table: KeyError: 'costs'"),
        ('{"format": "other", "subject": {}, "costs": []}', "of the format speculator-costs-1"),
        ('{"format": "speculator-costs-1", "subject": {"target": "x"}, "costs": []}', "with target 'x', not 't'"),
        ('{"format": "speculator-costs-1", "subject": {"target": "t", "head": "h"}, "costs": []}', "above 0"),
        ('{"format": "speculator-costs-1", "subject": {}, "costs": [{"shape": {"deep": 1}}]}', "is not a cost table"),
    ],
)
def test_another_file_is_refused_with_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_costs(tmp_path / "costs.json", SUBJECT)
    assert words in caught.value.message


def test_a_file_that_cannot_be_read_or_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read the cost table"):
        read_costs(tmp_path / "none.json", SUBJECT)
    with pytest.raises(ConfigError, match="Cannot write the cost table"):
        save_costs(table(Cost(DEEP, 1, 1, 1.0)), tmp_path / "no" / "folder.json")


class Clock:
    """Time that passes by what a step does: a unit for each row and verified token."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Priced:
    """An engine whose steps take clock time and draft chains of any tokens."""

    def __init__(self, about=INFO, most_rows: int = 99) -> None:
        self.info, self.clock, self.most_rows = about, Clock(), most_rows
        self.rows: set[int] = set()
        self.batches: list[list[Step]] = []

    def open(self, row, sampling, speculate) -> None:
        assert row not in self.rows and speculate
        self.rows.add(row)

    def close(self, row) -> None:
        self.rows.remove(row)

    def step(self, steps):
        if len(steps) > self.most_rows:
            raise NumericalError("too many")
        self.batches.append(list(steps))
        self.clock.now += sum(1.0 + len(s.draft.tokens) for s in steps) + steps[0].cached / 1000
        return [
            type("R", (), {"draft": Draft((1,) * s.propose.depth, tuple(range(-1, s.propose.depth - 1)), draft_id=9)})
            for s in steps
        ]


def measured(engine: Priced, **more) -> CostTable:
    return measure_costs(engine, [PLAIN, DraftShape(3)], SUBJECT, clock=engine.clock, seconds=1e9, **more)


def test_it_times_rounds_that_verify_the_shape_they_draft() -> None:
    engine = Priced()
    costs = measured(engine, rows=(1, 4), contexts=(16, 64))
    assert not engine.rows, "every row is closed again"
    assert costs.seconds(4, DraftShape(3), 16) == pytest.approx(4 * 4 + 0.016)
    assert costs.seconds(1, PLAIN, 64) == pytest.approx(1 + 0.064)
    for batch in engine.batches:
        held = [page for step in batch for page in step.pages]
        assert len(set(held)) == len(held), "rows share no page"
        need = batch[0].cached + engine.info.scratch_tokens
        assert all(len(s.pages) * engine.info.page_size >= need for s in batch)


def test_batches_that_do_not_fit_are_left_out() -> None:
    costs = measured(Priced(info(total_pages=60)), rows=(1, 2, 8), contexts=(16, 64))
    assert {cost.rows for cost in costs.costs} == {1, 2}
    costs = measured(Priced(most_rows=4), rows=(1, 4, 8), contexts=(16,))
    assert {cost.rows for cost in costs.costs} == {1, 4}
    with pytest.raises(ConfigError, match=r"No round could be timed.*policy\.mode"):
        measured(Priced(most_rows=0), rows=(1,), contexts=(16,))


def test_time_is_bounded_and_the_ends_come_first() -> None:
    engine = Priced()
    costs = measure_costs(
        engine, [PLAIN], SUBJECT, clock=engine.clock, seconds=60, rows=(1, 2, 4, 8), contexts=(16, 64)
    )
    assert [(c.context, c.rows) for c in costs.costs][:2] == [(16, 1), (16, 8)]
    assert len(costs.costs) < 8


def test_contexts_and_rows_stay_inside_what_the_engine_serves() -> None:
    costs = measured(Priced(), rows=(1, 64), contexts=(8, 4096))
    assert {c.rows for c in costs.costs} == {1, INFO.max_rows}
    assert {c.context for c in costs.costs} == {8, INFO.max_context - INFO.scratch_tokens}


def test_rows_that_were_opened_are_closed_when_the_next_one_cannot_be() -> None:
    class Narrow(Priced):
        def open(self, row, sampling, speculate) -> None:
            if row > 1:
                raise NumericalError("no more rows")
            super().open(row, sampling, speculate)

    engine = Narrow()
    assert {c.rows for c in measured(engine, rows=(1, 4), contexts=(16,)).costs} == {1}
    assert not engine.rows
