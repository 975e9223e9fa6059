"""The least value that filters keep: the kernel on the interpreter against a sort of the row."""

from __future__ import annotations

import pytest
import torch
from test_lm_head import interpreted, on_the_interpreter, same  # noqa: F401
from torch import Tensor

from speculator.readout import kept
from speculator.sampling import RowSampling, gumbel_of, lowest_kept
from speculator.types import SamplingParams
from target.readout import Asked, read_logits, read_written

CPU = torch.device("cpu")
PLACES = 2  # of a row
FILTERS = [
    (0.0, 5, 0.5, 0.3), (0.7, 7, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (0.9, 12, 0.6, 0.01), (1.0, 0, 1.0, 0.1),
    (1.0, 900, 0.3, 0.0), (2.0, 1, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.6, 0, 0.9, 0.2),
]  # fmt: skip


def sampled() -> RowSampling:
    given = (SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=k) for t, k, p, m in FILTERS)
    return RowSampling.from_params(list(given), CPU)


def logits_of(n: int, dtype: torch.dtype, tied: bool, device: torch.device = CPU) -> Tensor:
    """[N, n] with NaN between the rows; values of either sign and of any size."""
    wide = torch.randn(len(FILTERS) * PLACES, n + 8, generator=torch.Generator().manual_seed(n)) * 3
    wide = wide.round() if tied else wide
    wide[:, n:] = float("nan")
    return wide.to(device, dtype)[:, :n]


def floors(logits: Tensor, rows: RowSampling, block: int = 128) -> tuple[Tensor, Tensor]:
    """Of the kernel, and of a sort."""
    from speculator.kernels.floor import launch_floor

    temperature = rows.temperature.repeat_interleave(PLACES)
    found = launch_floor(logits, temperature, rows.top_k, rows.top_p, rows.min_p.log(), PLACES, block=block)
    values = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    ranked = values.sort(dim=1, descending=True).values
    return found, lowest_kept(ranked.view(-1, PLACES, logits.shape[1]), rows).flatten(0, 1)


@on_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n, tied", [(16, True), (150, False), (256, True)])
def test_floors_are_those_of_a_sort(dtype: torch.dtype, n: int, tied: bool) -> None:
    found, expected = floors(logits_of(n, dtype, tied), sampled())
    assert torch.equal(found, expected)
    assert len(set(found.flatten().tolist())) > 8


@on_the_interpreter
@pytest.mark.parametrize("top_p, floor", [(0.7, 3.0), (0.8, 2.0)])
def test_of_values_that_tie_with_the_last_of_the_best_those_within_count_for_the_nucleus(
    top_p: float, floor: float
) -> None:
    """Of 1 + e^-1, the best two, 0.7 is less than 1; of all that tie with the second it would not be."""
    rows = RowSampling.from_params([SamplingParams(temperature=1.0, top_k=2, top_p=top_p)], CPU)
    found, expected = floors(torch.tensor([[2.0, 1.0, 3.0, 2.0, 2.0]]).repeat(PLACES, 1), rows, 16)
    assert found.tolist() == expected.tolist() == [[floor]] * PLACES


@on_the_interpreter
@pytest.mark.parametrize("top_p", [1e-50, 1e-7, 1 - 1e-7, 1 - 1e-9])
def test_the_smallest_nucleus_is_the_best_value_and_the_largest_all(top_p: float) -> None:
    rows = RowSampling.from_params([SamplingParams(temperature=1.0, top_p=top_p)], CPU)
    found, expected = floors(torch.tensor([[2.0, 1.0, 3.0, 2.0, 2.0]]).repeat(PLACES, 1), rows, 16)
    assert torch.equal(found, expected)


@on_the_interpreter
def test_a_row_of_nonsense_spares_the_others_and_ends() -> None:
    logits, rows = logits_of(40, torch.float32, False), sampled()
    found, expected = floors(logits, rows)
    spoilt = logits.clone()
    spoilt[2], spoilt[5, 7], spoilt[8] = float("nan"), float("inf"), float("-inf")
    again, _ = floors(spoilt, rows)
    others = [i for i in range(len(logits)) if i not in (2, 5, 8)]
    assert torch.equal(again[others], found[others]) and torch.equal(found, expected)


@on_the_interpreter
def test_questions_about_filtered_rows_are_answered_as_by_the_twin() -> None:
    logits, rows = logits_of(70, torch.float32, True), sampled()
    keys = torch.arange(len(logits)) * 7919
    for asked in (Asked(), Asked(best=4, ranked=True)):
        asked = asked._replace(
            temperature=rows.temperature.repeat_interleave(PLACES),
            keys=keys,
            keep=kept(rows, (len(FILTERS), PLACES)),
        )
        same(read_written(logits, asked), read_logits(logits, asked, gumbel_of))
    assert kept(rows._replace(any_top_k=False, any_top_p=False, any_min_p=False), (1, 1)) is None
