"""Graph memory and the size of the KV cache, on made-up measurements."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graphs.errors import GraphError
from graphs.memory import (
    DRIVER_PAGE,
    GIB,
    MIB,
    CacheSizeError,
    GraphEstimate,
    Measured,
    Reading,
    compare,
    difference,
    estimate_graphs,
    pool_meter,
    size_cache,
)

CARD = Measured(
    total=80 * GIB, free_before=79 * GIB, weights=16 * GIB, peak_activation=2 * GIB, graph_estimate=GIB, other=GIB // 2
)
sizes = st.integers(0, 8 * GIB)
shares = st.floats(0.1, 1.0)
page_bytes = st.integers(1, 64 * MIB)


@st.composite
def measurements(draw: st.DrawFn) -> Measured:
    total = draw(st.integers(GIB, 200 * GIB))
    return Measured(
        total=total,
        free_before=draw(st.integers(0, total)),
        weights=draw(sizes),
        peak_activation=draw(sizes),
        graph_estimate=draw(sizes),
        other=draw(sizes),
        trusted=draw(st.booleans()),
    )


def pages(measured: Measured, share: float, each: int) -> int:
    try:
        return size_cache(measured, share, each).pages
    except CacheSizeError:
        return 0


@given(measurements(), shares, page_bytes)
def test_the_card_is_never_fuller_than_allowed(measured: Measured, share: float, each: int) -> None:
    try:
        plan = size_cache(measured, share, each)
    except CacheSizeError:
        return
    others = measured.total - measured.free_before
    assert plan.pages > 0
    assert others + plan.reserved + plan.pages * each <= measured.total * share
    assert plan.reserved >= measured.held


@given(measurements(), shares, page_bytes, st.integers(0, GIB))
def test_more_free_memory_never_makes_the_cache_smaller(measured: Measured, share: float, each: int, more: int) -> None:
    assume(measured.free_before + more <= measured.total)
    assert pages(replace(measured, free_before=measured.free_before + more), share, each) >= pages(
        measured, share, each
    )


@given(
    measurements(),
    shares,
    page_bytes,
    st.integers(0, GIB),
    st.sampled_from(["weights", "peak_activation", "graph_estimate", "other"]),
)
def test_whatever_takes_more_leaves_less(measured: Measured, share: float, each: int, more: int, what: str) -> None:
    fuller = replace(measured, **{what: getattr(measured, what) + more})
    assert pages(fuller, share, each) <= pages(measured, share, each)


@given(measurements(), shares, page_bytes)
def test_a_doubtful_measurement_never_gets_a_larger_cache(measured: Measured, share: float, each: int) -> None:
    assert pages(replace(measured, trusted=False), share, each) <= pages(replace(measured, trusted=True), share, each)


def test_all_that_was_measured_is_kept_from_the_cache() -> None:
    plan = size_cache(CARD, 0.95, MIB)
    margin = 3 * GIB // 50  # of activations and graphs
    assert plan.reserved == (16 + 2 + 1) * GIB + GIB // 2 + margin
    assert plan.pages == (75 * GIB - plan.reserved) // MIB  # of 76 GiB that may be used others hold one


def test_a_doubtful_measurement_keeps_half_of_what_moves_and_says_why() -> None:
    card = replace(CARD, peak_activation=9 * GIB)
    doubtful = size_cache(replace(card, trusted=False, doubt="another process came"), 0.95, MIB)
    assert doubtful.reserved - card.held == (9 * GIB + card.graph_estimate) // 2
    assert "another process came" in doubtful.why
    assert size_cache(CARD, 0.95, MIB).reserved - CARD.held < 100 * MIB


def test_an_estimate_of_nothing_that_is_not_trusted_still_leaves_a_share_of_the_card() -> None:
    nothing = replace(CARD, peak_activation=0, graph_estimate=0, trusted=False)
    assert size_cache(nothing, 0.95, MIB).reserved - nothing.held == int(CARD.total / 50)


@pytest.mark.parametrize(
    ("measured", "share", "each", "text"),
    [
        (replace(CARD, weights=78 * GIB), 0.95, MIB, "no room for a KV cache: 75.00 GiB may be used, weights 78.00"),
        (replace(CARD, free_before=GIB), 0.95, MIB, "no room for a KV cache: 0.00 GiB may be used"),
        (CARD, 0.95, 80 * GIB, "a page needs 85899345920 bytes"),
        (CARD, 0.0, MIB, "share of the card to use"),
        (CARD, 1.1, MIB, "share of the card to use"),
        (CARD, 0.9, 0, "must have bytes"),
        (replace(CARD, free_before=81 * GIB), 0.9, MIB, "contradicts itself"),
        (replace(CARD, peak_activation=-1), 0.9, MIB, "contradicts itself"),
    ],
)
def test_numbers_that_leave_nothing_or_make_no_sense_are_one_sentence(
    measured: Measured, share: float, each: int, text: str
) -> None:
    with pytest.raises(CacheSizeError, match=text.replace(".", r"\.")) as caught:
        size_cache(measured, share, each)
    assert "\n" not in str(caught.value)


def test_memory_is_what_the_card_lost_unless_others_moved() -> None:
    before = Reading(free=10 * GIB, total=80 * GIB, reserved=GIB)
    assert difference(before, Reading(8 * GIB, 80 * GIB, 2 * GIB)) == (2 * GIB, "")
    assert difference(before, Reading(9 * GIB, 80 * GIB, 3 * GIB)).taken == 2 * GIB
    assert "another process" in difference(before, Reading(9 * GIB, 80 * GIB, 3 * GIB)).doubt
    taken, doubt = difference(before, Reading(11 * GIB, 80 * GIB, 0))
    assert taken == 0 and "came back" in doubt


class Driver:
    """A card whose graphs share one pool: the first costs its tensors, each one a fixed part of the driver's."""

    def __init__(self, tensors: int, each: int, stray: int = 0) -> None:
        self.tensors, self.each, self.stray = tensors, each, stray
        self.taken, self.captured, self.released = 0, list[int](), 0

    def capture(self, rows: int) -> None:
        self.taken += self.each + (self.tensors if not self.captured else 0)
        self.captured.append(rows)

    def release(self) -> None:
        self.taken, self.released = 0, self.released + 1

    def read(self) -> Reading:
        freed = self.stray * len(self.captured)
        return Reading(80 * GIB - self.taken + freed, 80 * GIB, self.taken)

    def actual(self, shapes: int) -> int:
        return self.tensors + shapes * self.each


@pytest.mark.parametrize("shapes", [1, 2, 7])
@pytest.mark.parametrize("each", [DRIVER_PAGE, 9 * MIB])
def test_two_throw_away_captures_tell_what_all_will_take(shapes: int, each: int) -> None:
    card = Driver(300 * MIB, each)
    rows = [64, 32, 16, 8, 4, 2, 1][:shapes]
    estimate = estimate_graphs(rows, card.capture, card.release, card.read)
    assert (card.captured, card.released, card.taken) == (rows[:2], 1, 0)
    assert estimate.trusted
    assert card.actual(shapes) <= estimate.bytes <= 1.1 * card.actual(shapes) + each


def test_graphs_that_seem_free_still_cost_a_page_of_the_driver_and_are_not_trusted() -> None:
    card = Driver(0, 0)
    estimate = estimate_graphs([4, 2, 1], card.capture, card.release, card.read)
    assert estimate.bytes == 3 * DRIVER_PAGE
    assert "no memory that could be seen" in estimate.doubt


def test_memory_freed_by_others_during_the_trial_is_noticed() -> None:
    card = Driver(300 * MIB, 4 * MIB, stray=350 * MIB)
    estimate = estimate_graphs([4, 2, 1], card.capture, card.release, card.read)
    assert not estimate.trusted and estimate.bytes >= card.actual(3)


def test_the_trial_pool_is_released_when_its_capture_fails() -> None:
    card = Driver(0, 0)

    def fail(rows: int) -> None:
        raise GraphError(f"no capture of {rows}")

    with pytest.raises(GraphError, match="no capture of 4"):
        estimate_graphs([4, 2], fail, card.release, card.read)
    assert card.released == 1


def test_no_shapes_no_memory() -> None:
    card = Driver(1, 1)
    assert estimate_graphs([], card.capture, card.release, card.read).bytes == 0
    assert card.captured == []


def test_a_pool_can_be_the_meter() -> None:
    card = Driver(300 * MIB, 9 * MIB)
    read = pool_meter(lambda: card.taken, GIB)
    assert estimate_graphs([4, 2, 1], card.capture, card.release, read).bytes == card.actual(3)


@pytest.mark.parametrize(("actual", "level"), [(90 * MIB, logging.INFO), (130 * MIB, logging.WARNING)])
def test_estimate_and_actual_are_logged_together(caplog: pytest.LogCaptureFixture, actual: int, level: int) -> None:
    caplog.set_level(logging.INFO, "graphs.memory")
    share = compare(GraphEstimate(3, 80 * MIB, 10 * MIB), actual)
    (record,) = caplog.records
    assert record.levelno == level
    assert f"{actual / MIB:.1f} MiB for 3 shapes, 100.0 MiB were estimated" in record.getMessage()
    assert share == actual / (100 * MIB)
