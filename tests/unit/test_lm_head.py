"""Reading the vocabulary matrix and written logits: the kernels on the interpreter against the torch twin."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speculator.sampling import gumbel_of
from target import readout
from target.products import Config
from target.readout import ROWS, Asked, Keep, Readout, read_by_kernel, read_logits

CONFIGS = [Config(16, 32), Config(64, 64, tma=False), Config(128, 128, stages=2, warps=8)]
LOWEST = -(2**62)


@pytest.fixture
def interpreted() -> None:
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs triton and TRITON_INTERPRET=1 from the start")
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("triton's interpreter converts arrays in a way numpy 2.4 forbids")


def on_the_interpreter(test):  # type: ignore[no-untyped-def]
    grumbles = ("Conversion of an array:DeprecationWarning", "overflow encountered:RuntimeWarning")
    for grumble in (*grumbles, "invalid value encountered:RuntimeWarning"):
        test = pytest.mark.filterwarnings(f"ignore:{grumble}")(test)
    return pytest.mark.usefixtures("interpreted")(test)


def inputs(rows: int, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and weight of small whole numbers, whose products are exact in any order; NaN between the rows of x."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((rows, k + 16), float("nan"))
    wide[:, :k] = torch.randint(-2, 3, (rows, k), generator=generator).float()
    weight = torch.randint(-2, 3, (n, k), generator=generator).float() / 8
    return wide.to(dtype)[:, :k], weight.to(dtype)


def question(rows: int, n: int, best: int, kind: str, seed: int = 0) -> Asked:
    """`kind` names what is in it: t(emperature), n(oise), i(ds), r(anked)."""
    generator = torch.Generator().manual_seed(seed)
    warm = torch.rand(rows, generator=generator) + 0.2
    warm[::3] = 0.0
    keys = torch.randint(LOWEST, -LOWEST, (rows,), generator=generator)
    ids = torch.randperm(3 * n, generator=generator)[:n].sort().values
    temperature = warm if "t" in kind else None
    return Asked(best, temperature, keys if "n" in kind else None, ids if "i" in kind else None, "r" in kind)


def read(x: Tensor, weight: Tensor, asked: Asked, config: Config) -> Readout:
    from target.kernels.lm_head import launch_read

    return launch_read(x, weight, asked, config)


def twin(x: Tensor, weight: Tensor, asked: Asked) -> Readout:
    return read_logits((x.float() @ weight.float().T).to(x.dtype), asked, gumbel_of)


def same(got: Readout, expected: Readout) -> None:
    """Everything but sums of exponentials to the bit; noise is allowed the last bits of numpy's logarithm."""
    assert torch.equal(got.columns, expected.columns)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.finite, expected.finite)
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.total, expected.total, rtol=1e-5, atol=1e-5)
    assert (got.score_total is None) == (expected.score_total is None)
    if got.score_total is not None:
        torch.testing.assert_close(got.score_total, expected.score_total, rtol=1e-5, atol=1e-5)


@on_the_interpreter
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["", "t", "tn", "tni", "r", "tr", "tnr", "tnir"])
def test_answers_are_those_of_the_twin(config: Config, kind: str) -> None:
    for rows, n, k, best in [(1, 48, 64, 1), (5, 150, 72, 3), (17, 70, 40, 16)]:
        x, weight = inputs(rows, n, k, torch.float16 if rows == 5 else torch.float32)
        asked = question(rows, n, best, kind)
        same(read(x, weight, asked, config), twin(x, weight, asked))


@on_the_interpreter
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70), n=st.integers(16, 200), k=st.integers(1, 9).map(lambda i: 8 * i),
    best=st.integers(1, 16), kind=st.sampled_from(["", "tn", "tnir"]), config=st.sampled_from(CONFIGS),
)  # fmt: skip
def test_any_shape(rows: int, n: int, k: int, best: int, kind: str, config: Config) -> None:
    x, weight = inputs(rows, n, k, seed=n)
    asked = question(rows, n, best, kind)
    same(read(x, weight, asked, config), twin(x, weight, asked))


@on_the_interpreter
@pytest.mark.parametrize("best", [1, 5, 16])
def test_among_equals_the_smallest_id_wins(best: int) -> None:
    """Blocks of the same logits: ties within a block and between blocks."""
    weight = torch.ones(200, 32)
    weight[7], weight[40], weight[41], weight[199] = 2.0, 2.0, 3.0, 3.0
    order = [41, 199, 7, 40, *(i for i in range(200) if i not in (7, 40, 41, 199))]
    found = read(torch.ones(3, 32), weight, Asked(best), Config(16, 32))
    assert found.columns.tolist() == [order[:best]] * 3


@on_the_interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["", "tnir"])
def test_a_row_of_nonsense_says_so_and_spares_the_others(bad: float, kind: str) -> None:
    """The row's columns are columns all the same."""
    x, weight = inputs(4, 77, 32)
    asked = question(4, 77, 6, kind)
    expected = twin(x, weight, asked)
    spoilt = x.clone()
    spoilt[2, 0] = bad
    found = read(spoilt, weight, asked, Config(16, 32))
    assert found.finite.tolist() == [True, True, False, True]
    assert ((found.columns >= 0) & (found.columns < 77)).all()
    assert torch.equal(found.columns[[0, 1, 3]], expected.columns[[0, 1, 3]])


@on_the_interpreter
def test_one_logit_of_the_last_block_is_enough() -> None:
    weight = torch.ones(77, 16, dtype=torch.float16)
    weight[76] = 60000.0  # finite, its logit is not
    found = read(torch.ones(2, 16, dtype=torch.float16), weight, Asked(3), Config(16, 16))
    assert found.finite.tolist() == [False, False]
    assert ((found.columns >= 0) & (found.columns < 77)).all()


@on_the_interpreter
def test_rows_of_nan_alone_and_of_minus_infinity_alone() -> None:
    x = torch.ones(3, 16)
    x[1], x[2] = float("nan"), -float("inf")
    found = read(x, torch.ones(40, 16), Asked(16), Config(16, 16))
    assert found.finite.tolist() == [True, False, False]
    assert ((found.columns >= 0) & (found.columns < 40)).all()
    assert found.columns[0].tolist() == list(range(16))


@on_the_interpreter
def test_logits_are_rounded_to_the_models_type_before_anything_is_compared() -> None:
    """2048 + 1 is 2048 in float16, so the first of the two wins although the second's product is larger."""
    weight = torch.zeros(32, 16, dtype=torch.float16)
    weight[3, 0] = weight[9, 0] = 2048.0
    weight[9, 1] = 1.0
    found = read(torch.ones(1, 16, dtype=torch.float16), weight, Asked(2), Config(16, 16))
    assert found.columns.tolist() == [[3, 9]] and found.logits.tolist() == [[2048.0, 2048.0]]


@on_the_interpreter
@pytest.mark.parametrize("kind", ["", "tnir"])
def test_a_row_gives_the_same_bits_whatever_shares_the_call(kind: str) -> None:
    x, weight = inputs(20, 150, 64)
    asked = question(20, 150, 4, kind)
    whole = read(x, weight, asked, Config(64, 32))
    rowwise = {name: value for name in ("temperature", "keys") if (value := getattr(asked, name)) is not None}
    for row in (0, 7, 19):
        one = slice(row, row + 1)
        alone = read(x[one], weight, asked._replace(**{n: v[one] for n, v in rowwise.items()}), Config(64, 32))
        for a, b in zip(alone, whole, strict=True):
            assert (a is None and b is None) or torch.equal(a, b[one])


@on_the_interpreter
def test_no_rows() -> None:
    found = read(torch.zeros(0, 16), torch.zeros(32, 16), Asked(2, ranked=True), Config(16, 16))
    assert found.columns.shape == (0, 2) and found.score_total is not None


# ---- logits that others have written ----

DTYPES = [torch.float32, torch.float16]


def logits_of(rows: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0, gap: int = 3) -> Tensor:
    """Few different numbers, so that many tie; NaN between the rows."""
    wide = torch.full((rows, n + gap), float("nan"))
    wide[:, :n] = torch.randint(-9, 10, (rows, n), generator=torch.Generator().manual_seed(seed + rows + n)) / 4
    return wide.to(dtype)[:, :n]


def keeping(width: int) -> Keep:
    """The best `width` and all that tie with the last of them."""
    return Keep(width, lambda best: best[:, width - 1 :])


def ask(logits: Tensor, asked: Asked, block: int) -> Readout:
    from target.kernels.lm_head import launch_written

    return launch_written(logits, asked, readout._least(logits, asked), block=block)


@on_the_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["", "t", "tn", "tni", "r", "tr", "tnr", "tnir"])
@pytest.mark.parametrize("keep", [None, 1, 20])
def test_written_logits_are_answered_as_by_the_twin(kind: str, dtype: torch.dtype, keep: int | None) -> None:
    for rows, n, best, block in [(1, 48, 1, 64), (5, 150, 3, 64), (7, 70, 16, 128)]:
        asked = question(rows, n, best, kind)._replace(keep=None if keep is None else keeping(keep))
        logits = logits_of(rows, n, dtype)
        same(ask(logits, asked, block), read_logits(logits, asked, gumbel_of))


@on_the_interpreter
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 6), n=st.integers(16, 300), best=st.integers(1, 16), gap=st.integers(0, 40),
    kind=st.sampled_from(["", "tn", "tnir"]), keep=st.sampled_from([None, 1, 7]), block=st.sampled_from([32, 256]),
)  # fmt: skip
def test_any_written_shape(rows: int, n: int, best: int, gap: int, kind: str, keep: int | None, block: int) -> None:
    asked = question(rows, n, best, kind)._replace(keep=None if keep is None else keeping(keep))
    logits = logits_of(rows, n, gap=gap)
    same(ask(logits, asked, block), read_logits(logits, asked, gumbel_of))


@on_the_interpreter
def test_many_written_rows() -> None:
    logits, asked = logits_of(300, 40), question(300, 40, 1, "t")
    same(ask(logits, asked, 64), read_logits(logits, asked, gumbel_of))


@on_the_interpreter
@pytest.mark.parametrize("best", [1, 4, 16])
def test_among_written_equals_and_among_excluded_ones_the_smallest_id_wins(best: int) -> None:
    """A row keeps three of its values; who asks for more hears of excluded columns, each once."""
    logits = torch.zeros(3, 100)
    logits[:, [7, 40]], logits[:, [41, 99]] = 2.0, 3.0
    found = ask(logits, Asked(best, keep=keeping(2)), 32)
    order = [41, 99, *(i for i in range(100) if i not in (41, 99))]
    assert found.columns.tolist() == [order[:best]] * 3
    assert found.scores.tolist() == [([3.0, 3.0] + [-math.inf] * 14)[:best]] * 3


@on_the_interpreter
@pytest.mark.parametrize("kind", ["", "tnir"])
@pytest.mark.parametrize("keep", [None, 5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_written_row_of_nonsense_says_so_and_spares_the_others(bad: float, kind: str, keep: int | None) -> None:
    logits, asked = logits_of(4, 77), question(4, 77, 6, kind)._replace(keep=keeping(keep) if keep else None)
    expected = read_logits(logits, asked, gumbel_of)
    spoilt = logits.clone()
    spoilt[1, 76], spoilt[2] = bad, bad
    found = ask(spoilt, asked, 32)
    assert found.finite.tolist() == [True, False, False, True]
    assert ((found.columns >= 0) & (found.columns < 77)).all()
    assert torch.equal(found.columns[[0, 3]], expected.columns[[0, 3]])


@on_the_interpreter
@pytest.mark.parametrize("kind", ["", "tnir"])
def test_a_written_row_gives_the_same_bits_whatever_shares_the_call(kind: str) -> None:
    logits, asked = logits_of(12, 150), question(12, 150, 4, kind)._replace(keep=keeping(9))
    whole = ask(logits, asked, 64)
    rowwise = {name: value for name in ("temperature", "keys") if (value := getattr(asked, name)) is not None}
    for row in (0, 7, 11):
        one = slice(row, row + 1)
        alone = ask(logits[one], asked._replace(**{n: v[one] for n, v in rowwise.items()}), 64)
        for a, b in zip(alone, whole, strict=True):
            assert (a is None and b is None) or torch.equal(a, b[one])


@on_the_interpreter
def test_who_is_asked_writes_what_the_weights_are_not_read_for() -> None:
    """More rows than one pass over the weights pays for, weights of another type, filters; not more than is kept."""
    x, weight = inputs(ROWS + 1, 48, 64, torch.float16)
    for asked in (Asked(), Asked(keep=keeping(3))):
        found = read_by_kernel(x, weight, torch.nn.functional.linear, asked)
        assert found is not None
        same(found, twin(x, weight, asked))
    x, weight = inputs(2, 48, 64)
    found = read_by_kernel(x, weight, torch.nn.functional.linear, Asked(best=4))
    assert found is not None
    same(found, twin(x, weight, Asked(best=4)))
