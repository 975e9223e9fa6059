"""Reading the vocabulary matrix on a CUDA device: numbers, noise to the bit, bits of a row, recorded launches."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculator.sampling import gumbel_of
from target.products import Config, FixedProduct, Table, default_config
from target.readout import READ, ROWS, Asked, Readout, read_by_kernel, read_logits, values_of

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


def test_more_rows_than_a_pass_pays_for_are_written() -> None:
    x, weight = reals(ROWS + 1, N, K)
    assert read_by_kernel(x, weight, F.linear, Asked(BEST)) is None
    assert read_by_kernel(x[:ROWS], weight, F.linear, Asked(BEST)) is not None


def test_values_are_those_that_scores_were_made_of() -> None:
    x, weight = whole_numbers(8, N, K)
    asked = question(8, N, BEST, "tr")
    assert torch.equal(values_of(read(x, weight, asked), asked), read(x, weight, asked).scores)
