"""The bench of MLA, as far as it needs no device: what is held against the wanted figures."""

from __future__ import annotations

from typing import Any

import pytest

from speculator.bench import mla


def row(
    length: int = 4096, batch: int = 1, reused: float = 1.0, fresh: float = 1.5, plan: float = 2.0
) -> dict[str, Any]:
    speeds = dict(reused_speed=reused, fresh_speed=fresh)
    return {**mla.Cell(16, batch, length, 8)._asdict(), "ours_plan": plan, "ours_error": 0.001, **speeds}


def test_all_is_met() -> None:
    lines = list(mla.verdict([row(), row(65536, fresh=0.9), row(512, batch=32, reused=0.7, fresh=0.8)]))
    assert lines == [
        "slowest planner 2.0 us, wanted under 5: PASS",
        "largest error 0.0010",
        "reused plan: at least 0.70 of FlashMLA's speed, wanted 0.70 or more: PASS",
        "fresh plan, batch 1, up to 4096: at least 1.50 of FlashMLA's speed, wanted above 1.00: PASS",
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(reused=0.69), "  missed at heads 16 batch 1 length 4096 queries 8: 0.69"),
        (dict(fresh=1.0), "  missed at heads 16 batch 1 length 4096 queries 8: 1.00"),
        (dict(plan=5.0), "slowest planner 5.0 us, wanted under 5: MISS"),
    ],
)
def test_a_cell_that_misses_is_named(changes: dict[str, float], told: str) -> None:
    lines = list(mla.verdict([row(512), row(**changes)]))  # type: ignore[arg-type]
    assert told in lines and sum("MISS" in line for line in lines) == 1


def test_failed_cells_are_counted_and_nothing_is_claimed_of_them() -> None:
    failed = {**mla.Cell(16, 1, 512, 1)._asdict(), "error": "out of memory"}
    assert list(mla.verdict([failed])) == ["1 cells failed"]
    assert list(mla.verdict([failed, row()]))[0] == "1 cells failed"


def test_without_the_peer_there_is_nothing_to_compare() -> None:
    alone = {name: value for name, value in row().items() if not name.endswith("_speed")}
    assert [line.split()[0] for line in mla.verdict([alone])] == ["slowest", "largest"]
