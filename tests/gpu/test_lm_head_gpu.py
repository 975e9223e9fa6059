"""Reading the vocabulary matrix and written logits on a CUDA device: numbers, noise, bits of a row, recordings."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculator.readout import kept
from speculator.sampling import RowSampling, gumbel_of
from speculator.types import SamplingParams
from target.products import Config, FixedProduct, Table, default_config
from target.readout import READ, ROWS, Asked, Keep, Readout, read_by_kernel, read_logits, read_written, values_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
CUDA = torch.device("cuda")
KINDS = ["", "tn", "r", "tr", "tnr", "tnir"]
N, K, BEST = 3000, 512, 10
HALF, BF16 = torch.float16, torch.bfloat16
# each is a kernel to compile, so not every combination: every kind, then every configuration, tile, type and `best`
CASES = [
    *((BF16, READ, kind, 8, BEST) for kind in KINDS),
    (HALF, READ, "tnir", 1, 1),
    (BF16, READ._replace(tma=False), "tnr", 17, 16),
    (HALF, Config(32, 128), "tnir", 17, 16),
    (BF16, Config(128, 64, warps=8), "tr", 64, 4),
    (BF16, READ._replace(pdl=True), "tnir", 64, 4),
    (HALF, Config(128, 64, warps=8), "", 1, 1),
]


@pytest.fixture(autouse=True, scope="module")
def full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def whole_numbers(rows: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """x and weight whose products are exact in any order; whatever lies between the rows of x is NaN."""
    generator = torch.Generator("cuda").manual_seed(rows + n)
    wide = torch.full((rows, k + 64), float("nan"), device="cuda")
    wide[:, :k] = torch.randint(-2, 3, (rows, k), generator=generator, device="cuda").float()
    weight = torch.randint(-2, 3, (n, k), generator=generator, device="cuda").float() / 16
    return wide.to(dtype)[:, :k], weight.to(dtype)


def reals(rows: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows + n)
    x = torch.randn(rows, k, generator=generator, device="cuda")
    return x.to(dtype), (torch.randn(n, k, generator=generator, device="cuda") * 0.05).to(dtype)


def question(rows: int, n: int, best: int, kind: str) -> Asked:
    """`kind` names what is in it: t(emperature), n(oise), i(ds), r(anked)."""
    generator = torch.Generator("cuda").manual_seed(rows)
    warm = torch.rand(rows, generator=generator, device="cuda") + 0.2
    warm[::3] = 0.0
    keys = torch.randint(-(2**62), 2**62, (rows,), generator=generator, device="cuda")
    ids = torch.arange(n, device="cuda") * 3 + 1
    temperature = warm if "t" in kind else None
    return Asked(best, temperature, keys if "n" in kind else None, ids if "i" in kind else None, "r" in kind)


def read(x: Tensor, weight: Tensor, asked: Asked, config: Config = READ) -> Readout:
    from target.kernels.lm_head import launch_read

    return launch_read(x, weight, asked, config)


def twin(x: Tensor, weight: Tensor, asked: Asked) -> Readout:
    return read_logits((x.float() @ weight.float().T).to(x.dtype), asked, gumbel_of)


def same(got: Readout, expected: Readout) -> None:
    """Everything to the bit, noise too, except sums of exponentials."""
    for name in ("columns", "logits", "scores", "finite"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    torch.testing.assert_close(got.total, expected.total, rtol=1e-5, atol=1e-5)
    assert (got.score_total is None) == (expected.score_total is None)
    if got.score_total is not None:
        torch.testing.assert_close(got.score_total, expected.score_total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "config", "kind", "rows", "best"), CASES)
def test_answers_are_those_of_the_twin(dtype: torch.dtype, config: Config, kind: str, rows: int, best: int) -> None:
    x, weight = whole_numbers(rows, N, K, dtype)
    asked = question(rows, N, best, kind)
    same(read(x, weight, asked, config), twin(x, weight, asked))


@pytest.mark.parametrize(
    ("n", "k", "rows", "kind"),
    [
        (128256, 4096, (1, 8), "tnir"),
        (128256, 4096, (33, 64), ""),
        (32000, 4096, (33, 64), "tnir"),
        (151936, 1024, (17, 32), ""),
        (1000, 1032, (1, 8), "tnir"),
    ],
)
def test_vocabularies_of_models(n: int, k: int, rows: tuple[int, ...], kind: str) -> None:
    for some in rows:
        x, weight = whole_numbers(some, n, k)
        asked = question(some, n, 10, kind)
        same(read(x, weight, asked), twin(x, weight, asked))


@pytest.mark.parametrize(("n", "k", "kind"), [(32000, 4096, "tnir"), (151936, 1024, "")])
def test_logits_are_those_of_the_product_of_fixed_order(n: int, k: int, kind: str) -> None:
    """So tokens do not depend on whether something had the logits written."""
    config = default_config(n, k)._replace(split=1)
    table = Table.none()
    table.fixed = lambda n, k, found=config: found  # type: ignore[method-assign]
    x, weight = reals(24, n, k)
    asked = question(24, n, BEST, kind)
    written = FixedProduct(table)(x, weight, None)
    found = read_by_kernel(x, weight, FixedProduct(table), asked)
    assert found is not None
    same(found, read_logits(written, asked, gumbel_of))


def test_a_row_gives_the_same_bits_whatever_shares_the_call() -> None:
    x, weight = reals(ROWS, 32000, 4096)
    asked = question(ROWS, 32000, BEST, "tnir")
    whole = read(x, weight, asked)
    for first, count in [(0, 1), (5, 1), (7, 8), (20, 17), (3, 40)]:
        some = slice(first, first + count)
        rowwise = {n: v[some] for n in ("temperature", "keys") if (v := getattr(asked, n)) is not None}
        part = read(x[some], weight, asked._replace(**rowwise))
        for a, b in zip(part, whole, strict=True):
            assert (a is None and b is None) or torch.equal(a, b[some])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_of_nonsense_are_named_and_give_columns_all_the_same(bad: float) -> None:
    x, weight = whole_numbers(8, N, K)
    x = x.clone()
    x[4, 7] = bad
    for kind in KINDS:
        found = read(x, weight, question(8, N, BEST, kind))
        assert found.finite.tolist() == [i != 4 for i in range(8)]
        assert ((found.columns >= 0) & (found.columns < N)).all()


def test_recorded_launches_answer_anew() -> None:
    x, weight = whole_numbers(8, N, K)
    asked = question(8, N, BEST, "tnr")
    read(x, weight, asked)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = read(x, weight, asked)
    x.copy_(whole_numbers(8, N + 1, K)[0])
    asked.keys.add_(17)  # type: ignore[union-attr]
    graph.replay()
    same(found, twin(x, weight, asked))


@pytest.mark.parametrize(("rows", "keep"), [(ROWS + 1, None), (256, None), (8, Keep(3, lambda best: best[:, 2:]))])
def test_what_a_pass_does_not_pay_for_is_written(rows: int, keep: Keep | None) -> None:
    x, weight = reals(rows, N, K)
    asked = question(rows, N, BEST, "tnr")._replace(keep=keep)
    found = read_by_kernel(x, weight, F.linear, asked)
    assert found is not None
    same(found, read_logits(F.linear(x, weight), asked, gumbel_of))


# ---- written logits ----


def written(rows: int, n: int, dtype: torch.dtype = BF16, gap: int = 8) -> Tensor:
    """Logits as a model has them, with ties in half precision, and NaN between the rows."""
    generator = torch.Generator("cuda").manual_seed(rows + n)
    wide = torch.full((rows, n + gap), float("nan"), device="cuda")
    wide[:, :n] = torch.randn(rows, n, generator=generator, device="cuda") * 3
    return wide.to(dtype)[:, :n]


def filters(rows: int, each: int = 1) -> RowSampling:
    """Of rows / each rows, every kind in turn."""
    given = [(0, 1.0, 0.0), (50, 0.9, 0.0), (0, 0.95, 0.0), (20, 1.0, 0.1), (0, 1.0, 0.05), (10**6, 0.5, 0.0)]
    picked = [given[i % len(given)] for i in range(rows // each)]
    params = [SamplingParams(temperature=0.4 + 0.3 * (i % 4), top_k=k, top_p=p, min_p=m)
              for i, (k, p, m) in enumerate(picked)]  # fmt: skip
    return RowSampling.from_params(params, "cuda")


@pytest.mark.parametrize("dtype", [BF16, HALF, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_written_logits_are_answered_as_by_the_twin(kind: str, dtype: torch.dtype) -> None:
    for rows, n, best, gap in [(1, 1000, 1, 0), (33, 3001, BEST, 7)]:
        logits, asked = written(rows, n, dtype, gap), question(rows, n, best, kind)
        same(read_written(logits, asked), read_logits(logits, asked, gumbel_of))


@pytest.mark.parametrize(
    ("rows", "n", "kind", "best"), [(256, 128256, "tn", 1), (80, 32000, "tnir", 10), (300, 151936, "", 1)]
)
def test_written_vocabularies_of_models(rows: int, n: int, kind: str, best: int) -> None:
    logits, asked = written(rows, n), question(rows, n, best, kind)
    same(read_written(logits, asked), read_logits(logits, asked, gumbel_of))


@pytest.mark.parametrize("dtype", [BF16, HALF, torch.float32])
@pytest.mark.parametrize(("rows", "each", "n"), [(12, 1, 3000), (48, 8, 32000), (12, 2, 128256)])
def test_floors_are_those_of_a_sort(dtype: torch.dtype, rows: int, each: int, n: int) -> None:
    """To the bit where masses are not within rounding of what is wanted; there the next value, of the same mass."""
    logits, sampling = written(rows, n, dtype), filters(rows, each)
    hot = sampling.temperature.repeat_interleave(each)
    keep = kept(sampling, (rows // each, each))
    assert keep is not None and keep.find is not None
    values = logits.float() / hot[:, None]
    found, expected = keep.find(logits, hot), keep.floor(values.sort(dim=1, descending=True).values)
    weights = values.double().softmax(-1)
    mass = [weights.masked_fill(values < floor, 0).sum(-1) for floor in (found, expected)]
    torch.testing.assert_close(*mass, rtol=0, atol=3e-6)
    assert (found == expected).float().mean() > 0.6
    assert all(
        torch.equal(found[r : r + each], keep_of(sampling, r // each, each, logits, hot)) for r in range(0, rows, each)
    )


def keep_of(sampling: RowSampling, row: int, each: int, logits: Tensor, hot: Tensor) -> Tensor:
    """The floors [each, 1] of one row's places by themselves."""
    one, some = slice(row, row + 1), slice(row * each, (row + 1) * each)
    alone = sampling._replace(**{name: getattr(sampling, name)[one] for name in ("top_k", "top_p", "min_p")})
    keep = kept(alone, (1, each))
    assert keep is not None and keep.find is not None
    return keep.find(logits[some], hot[some])


def test_a_written_row_gives_the_same_bits_whatever_shares_the_call() -> None:
    logits, asked = written(256, 32000), question(256, 32000, BEST, "tnir")
    whole = read_written(logits, asked)
    for first, count in [(0, 1), (5, 1), (7, 8), (20, 99)]:
        some = slice(first, first + count)
        rowwise = {n: v[some] for n in ("temperature", "keys") if (v := getattr(asked, n)) is not None}
        for a, b in zip(read_written(logits[some], asked._replace(**rowwise)), whole, strict=True):
            assert (a is None and b is None) or torch.equal(a, b[some])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_written_rows_of_nonsense_are_named(bad: float) -> None:
    logits, keep = written(12, N).clone(), kept(filters(12), (12, 1))
    logits[4, N - 1], logits[7] = bad, bad
    for kind in KINDS:
        for filtered in (None, keep):
            found = read_written(logits, question(12, N, BEST, kind)._replace(keep=filtered))
            assert found.finite.tolist() == [i not in (4, 7) for i in range(12)]
            assert ((found.columns >= 0) & (found.columns < N)).all()


def test_recorded_answers_about_filtered_rows_are_made_anew() -> None:
    logits, sampling = written(12, N), filters(12)
    asked = question(12, N, 3, "tnr")._replace(keep=kept(sampling, (12, 1)))
    read_written(logits, asked)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = read_written(logits, asked)
    logits.copy_(written(12, N, gap=9))
    sampling.top_k.fill_(7)
    graph.replay()
    same(found, read_written(logits, asked))
    same(found, read_logits(logits, asked, gumbel_of))


def test_values_are_those_that_scores_were_made_of() -> None:
    x, weight = whole_numbers(8, N, K)
    asked = question(8, N, BEST, "tr")
    assert torch.equal(values_of(read(x, weight, asked), asked), read(x, weight, asked).scores)
