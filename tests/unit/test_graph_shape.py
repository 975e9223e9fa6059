"""Graph shapes and ladders: the smallest that holds, and clear words where none does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.errors import ShapeError
from graphs.shape import GraphShape, Ladder, row_ladder, token_ladder


@given(st.integers(1, 300), st.integers(1, 300))
def test_rows_fit_the_smallest_step_that_holds_them(most, rows):
    ladder = Ladder.grid(row_ladder(most), [4])
    shape = ladder.fit(rows, 4)
    if rows > most:
        assert shape is None
    else:
        assert shape.rows == min(step for step in row_ladder(most) if step >= rows)


def test_row_ladder_is_dense_where_few_sessions_run():
    assert row_ladder(33) == (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 33)
    assert row_ladder(1) == (1,)
    assert row_ladder(128)[-5:] == (64, 80, 96, 112, 128)


def test_token_ladder_reaches_the_largest_bucket():
    assert token_ladder() == (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
    assert token_ladder(100) == (64, 100)
    assert token_ladder(32) == (32,)


def test_padding_is_counted_in_tokens():
    ladder = Ladder([GraphShape(16, 2), GraphShape(2, 8), GraphShape(4, 6)])
    assert ladder.fit(2, 5) == GraphShape(2, 8)
    assert ladder.fit(4, 2) == GraphShape(4, 6)
    assert ladder.fit(1, 1) == GraphShape(2, 8)
    assert ladder.largest_first()[0] == GraphShape(16, 2)
    assert Ladder([GraphShape(4, 2), GraphShape(2, 8)]).fit(2, 2) == GraphShape(4, 2)


def test_variants_are_kept_apart_and_may_mix_words_and_numbers():
    ladder = Ladder.grid([1, 2], [1], [("greedy", 3), ("sampled", "tree")])
    assert ladder.fit(2, 1, ("greedy", 3)) == GraphShape(2, 1, ("greedy", 3))
    assert ladder.fit(2, 1) is None
    assert ladder.misfit(2, 1) == "no shape is plain"
    assert ladder.misfit(3, 1, ("greedy", 3)) == "no shape holds 3 rows of 1"
    assert str(ladder.fit(1, 1, ("sampled", "tree"))) == "1x1/sampled/tree"


@pytest.mark.parametrize(
    "make", [lambda: GraphShape(0, 1), lambda: GraphShape(1, 0), lambda: row_ladder(0), lambda: token_ladder(0)]
)
def test_empty_shapes_are_refused(make):
    with pytest.raises(ShapeError, match="1"):
        make()


def test_an_empty_batch_fits_nothing():
    assert Ladder([GraphShape(1, 1)]).fit(0, 1) is None
