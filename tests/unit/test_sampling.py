"""Filters against transformers' processors, and the noise against a plain-Python twin and statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from speculator.sampling import (
    RowSampling,
    Stream,
    coupled_sample,
    draft_sample,
    fold,
    gumbel,
    probabilities,
    scores,
    uniform,
)
from speculator.types import SamplingParams

VOCAB = 97
FILTERS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=0.8, top_k=1),
    SamplingParams(temperature=1.3, top_k=1000),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=0.6, top_p=1e-6),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=1.0, repetition_penalty=1.3),
    SamplingParams(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.1),
    SamplingParams(temperature=1.5, top_p=0.9, min_p=0.2, repetition_penalty=0.8),
]


def logits_of(rows: int, nodes: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, nodes, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def reference(params: SamplingParams, history: Tensor, logits: Tensor) -> Tensor:
    """transformers' own pipeline on logits [N, V] after `history` [N, L], in the order of its `generate`."""
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(history, logits.clone())


def seen_in(history: Tensor) -> Tensor:
    return torch.zeros(*history.shape[:-1], VOCAB, dtype=torch.bool).scatter_(-1, history, True)


def one_row(params: SamplingParams) -> RowSampling:
    return RowSampling.from_params([params], "cpu")


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_filters_give_the_results_of_transformers(params: SamplingParams) -> None:
    logits = logits_of(1, nodes=50)
    history = torch.randint(VOCAB, (1, 50, 7), generator=torch.Generator().manual_seed(1))
    ours = scores(logits, one_row(params), seen_in(history))
    torch.testing.assert_close(ours[0], reference(params, history[0], logits[0]))


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    params = [*FILTERS, SamplingParams()]
    logits, history = logits_of(len(params)), torch.randint(VOCAB, (len(params), 3, 7))
    batch = scores(logits, RowSampling.from_params(params, "cpu"), seen_in(history))
    for row, alone in enumerate(params):
        expected = scores(logits[row : row + 1], one_row(alone), seen_in(history[row : row + 1]))
        assert torch.equal(batch[row], expected[0])


def test_a_row_keeps_its_filters_beside_rows_that_rank_fewer_tokens() -> None:
    params = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, min_p=1e-30),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=1.0, top_k=2, top_p=0.5),
    ]
    logits = torch.tensor([100.0, 0.0, -1.0, -2.0, -3.0]).expand(4, 1, 5)  # all mass on the first, to the last bit
    finite = scores(logits, RowSampling.from_params(params, "cpu"), None).isfinite()[:, 0]
    assert finite.sum(-1).tolist() == [5, 1, 3, 1]


def test_greedy_rows_get_the_penalty_and_nothing_else() -> None:
    params = SamplingParams(temperature=0.0, top_k=2, top_p=0.1, min_p=0.9, repetition_penalty=2.0)
    rows = one_row(params)
    logits, history = logits_of(1), torch.randint(VOCAB, (1, 3, 7))
    expected = RepetitionPenaltyLogitsProcessor(2.0)(history[0], logits[0].clone())
    assert rows.all_greedy
    assert torch.equal(scores(logits, rows, seen_in(history))[0], expected)


def test_a_penalty_without_the_seen_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="seen"):
        scores(logits_of(1), one_row(SamplingParams(repetition_penalty=1.2)), None)


def kept(params: SamplingParams, values: list[float]) -> list[bool]:
    return scores(torch.tensor([[values]]), one_row(params), None).isfinite()[0, 0].tolist()


def test_ties_with_the_last_kept_token_are_kept() -> None:
    values = [1.0, 3.0, 1.0, 0.0, 1.0]
    assert kept(SamplingParams(temperature=1.0, top_k=2), values) == [True, True, True, False, True]
    assert kept(SamplingParams(temperature=1.0, top_p=0.75), values) == [True, True, True, False, True]
    assert kept(SamplingParams(temperature=1.0, top_k=2, top_p=0.9), values) == [True, True, True, False, True]


@pytest.mark.parametrize("params", [p for p in FILTERS if p.temperature], ids=str)
def test_a_filter_never_empties_a_row(params: SamplingParams) -> None:
    flat = torch.zeros(1, 1, VOCAB)
    spike = torch.full((1, 1, VOCAB), -1e4).index_fill_(2, torch.tensor([5]), 1e4)
    seen = torch.ones(1, 1, VOCAB, dtype=torch.bool)
    for logits in (flat, spike):
        assert scores(logits, one_row(params), seen).isfinite().any(-1).all()


def test_probabilities_are_normalised_and_greedy_is_a_point_mass() -> None:
    rows = RowSampling.from_params([SamplingParams(temperature=0.5, top_k=3), SamplingParams()], "cpu")
    logits = logits_of(2)
    p = probabilities(scores(logits, rows, None), rows)
    assert p.dtype == torch.float64
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert (p[0] > 0).sum(-1).tolist() == [3, 3, 3]
    assert torch.equal(p[1].argmax(-1), logits[1].argmax(-1))
    assert (p[1] > 0).sum(-1).tolist() == [1, 1, 1]


# Noise


def splitmix(z: int) -> int:
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def uniform_by_hand(seed: int, counter: int, stream: int, token: int) -> float:
    mask = 2**64 - 1
    key = splitmix((seed + counter * 0xD1342543DE82EF95 + (stream + 1) * 0xA0761D6478BD642F) & mask)
    return ((splitmix((key + token * 0x9E3779B97F4A7C15) & mask) >> 12) + 0.5) / 2**52


def noise(seeds: list[int], counters: list[list[int]], stream: Stream, ids: Tensor) -> Tensor:
    return uniform(torch.tensor(seeds), torch.tensor(counters), stream, ids)


def test_noise_is_the_documented_function_bit_for_bit() -> None:
    seeds, counters, ids = [0, 1, -1, 2**63 - 1, -(2**63)], [[0, 1, 99_999]] * 5, torch.tensor([0, 1, 151_935])
    for stream in Stream:
        ours = noise(seeds, counters, stream, ids)
        for r, seed in enumerate(seeds):
            for t, counter in enumerate(counters[r]):
                expected = [uniform_by_hand(seed % 2**64, counter, stream, token) for token in ids.tolist()]
                assert ours[r, t].tolist() == expected


def test_noise_keeps_its_golden_values() -> None:
    """Frozen: another function would change every sampled text that anyone has stored with its seed."""
    u = noise([7], [[0, 12345]], Stream.TARGET, torch.tensor([0, 31999]))
    assert u[0].tolist() == [[0.34004352317440334, 0.07561428002012927], [0.8703675280017661, 0.12650515262072248]]
    key = fold(torch.tensor([7, -3]), torch.tensor([10, 11]))
    assert key.tolist() == [268992539605129647, -422301733844953653]


def test_noise_does_not_depend_on_the_batch() -> None:
    ids = torch.arange(50)
    batch = noise([3, 4, 5], [[10, 11], [20, 21], [30, 31]], Stream.DRAFT, ids)
    assert torch.equal(batch[1, 1], noise([4], [[21]], Stream.DRAFT, ids)[0, 0])
    picked = torch.tensor([[[4, 9], [0, 49]]])
    assert torch.equal(noise([4], [[20, 21]], Stream.DRAFT, picked)[0], batch[1].gather(1, picked[0]))


def chi_square_of_uniform(u: Tensor, bins: int = 256) -> float:
    counts = torch.histc(u.flatten(), bins, 0, 1)
    expected = u.numel() / bins
    return p_value(((counts - expected) ** 2 / expected).sum(), bins - 1)


def p_value(statistic: Tensor, freedom: int) -> float:
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0, dtype=torch.float64), statistic.double() / 2))


SWEEPS = {
    "tokens": lambda: noise([1], [[1]], Stream.TARGET, torch.arange(200_000)),
    "counters": lambda: uniform(torch.tensor([1]), torch.arange(200_000)[None], Stream.TARGET, torch.tensor([9])),
    "seeds": lambda: uniform(torch.arange(200_000), torch.ones(200_000, 1).long(), Stream.TARGET, torch.tensor([9])),
    "folds": lambda: uniform(
        fold(torch.ones(200_000).long(), torch.arange(200_000)),
        torch.ones(200_000, 1).long(),
        Stream.ACCEPT,
        torch.tensor([0]),
    ),
}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_noise_is_uniform_and_neighbours_are_independent(sweep: str) -> None:
    u = SWEEPS[sweep]().flatten()
    assert 0 < u.min() and u.max() < 1
    assert chi_square_of_uniform(u) > 1e-4
    cells = (u[:-1] * 16).long() * 16 + (u[1:] * 16).long()  # serial pairs
    counts = torch.bincount(cells, minlength=256).double()
    expected = (len(u) - 1) / 256
    assert p_value(((counts - expected) ** 2 / expected).sum(), 255) > 1e-4


def test_streams_and_rounds_are_independent() -> None:
    seeds, ids = torch.arange(100_000), torch.tensor([3])
    same = torch.full((100_000, 1), 5)
    columns = [uniform(seeds, same, stream, ids).flatten() for stream in Stream]
    columns += [uniform(fold(seeds, same[:, 0] + base), same, Stream.ACCEPT, ids).flatten() for base in (0, 1)]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns), dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(100_000)


def test_gumbel_noise_is_gumbel_and_finite() -> None:
    g = gumbel(torch.tensor([5]), torch.arange(100)[None], Stream.TARGET, torch.arange(1000)).double()
    assert g.isfinite().all()
    assert chi_square_of_uniform((-(-g).exp()).exp()) > 1e-4


# Draws


def test_coupled_draws_follow_the_distribution() -> None:
    rows = one_row(SamplingParams(temperature=1.0, seed=11))
    logits = torch.tensor([0.0, 1.0, 2.0, -math.inf, -1.0])
    counter = torch.arange(50_000)[None]
    tokens = coupled_sample(logits.expand(1, 50_000, 5), rows, counter)
    counts = torch.bincount(tokens.flatten(), minlength=5).double()
    expected = logits.softmax(0).double() * 50_000
    assert counts[3] == 0
    live = [0, 1, 2, 4]
    assert p_value(((counts - expected) ** 2 / expected)[live].sum(), 3) > 1e-4


def test_coupled_draws_take_the_argmax_in_greedy_rows_only() -> None:
    params = [SamplingParams(), SamplingParams(temperature=5.0, seed=1)]
    values, counter = logits_of(2, nodes=40) / 5, torch.arange(40).expand(2, 40)
    drawn = coupled_sample(values, RowSampling.from_params(params, "cpu"), counter)
    assert torch.equal(drawn[0], values[0].argmax(-1))
    assert not torch.equal(drawn[1], values[1].argmax(-1))
    assert torch.equal(drawn[1], coupled_sample(values[1:], one_row(params[1]), counter[1:])[0])


def test_ties_go_to_the_lowest_token_in_greedy_rows() -> None:
    assert coupled_sample(torch.tensor([[[1.0, 2.0, 2.0]]]), one_row(SamplingParams()), torch.tensor([[0]])).item() == 1


def test_a_span_only_saves_work() -> None:
    rows = RowSampling.from_params([SamplingParams(temperature=1.0, seed=s) for s in (1, 2)], "cpu")
    values = logits_of(2, nodes=9) / 3
    counter = torch.tensor([[5, 6, 6, 6, 7, 7, 7, 8, 8], [70, 71, 71, 72, 70, 70, 70, 70, 70]])
    assert torch.equal(coupled_sample(values, rows, counter, span=4), coupled_sample(values, rows, counter))


def test_a_smaller_vocabulary_draws_with_the_noise_of_its_tokens() -> None:
    rows, ids = one_row(SamplingParams(temperature=1.0, seed=4)), torch.tensor([90, 3, 41])
    wide = torch.full((1, 200, VOCAB), -math.inf)
    wide[..., ids] = torch.tensor([0.5, 0.0, 1.0])
    counter = torch.arange(200)[None]
    narrow = coupled_sample(wide[..., ids], rows, counter, ids=ids)
    assert torch.equal(ids[narrow], coupled_sample(wide, rows, counter))


def test_draft_draws_are_fresh_every_round() -> None:
    rows = RowSampling.from_params([SamplingParams(temperature=1.0, seed=4), SamplingParams()], "cpu")
    values, counter = torch.zeros(2, 50, VOCAB), torch.arange(50).expand(2, 50)
    first, second = (draft_sample(values, rows, torch.tensor([n, n]), counter) for n in (10, 11))
    assert (first[0] == second[0]).float().mean() < 0.2
    assert not first[1].any() and not second[1].any()


def test_large_seeds_keep_all_their_bits() -> None:
    rows = RowSampling.from_params(
        [SamplingParams(seed=2**64 - 1), SamplingParams(seed=2**63), SamplingParams()], "cpu"
    )
    assert rows.seed.tolist() == [-1, -(2**63), 0]
