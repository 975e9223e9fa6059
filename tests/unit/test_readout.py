"""Questions about logits: the torch twin says what sampling says, and who may read the vocabulary matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculator.readout import draft_ranking, draft_reading, target_draws
from speculator.sampling import RowSampling, Stream, coupled_sample, gumbel, gumbel_of, noise_keys, scores
from speculator.types import SamplingParams
from target import readout
from target.products import Config, FastProduct, FixedProduct, Table
from target.readout import (
    MOST,
    READ,
    ROWS,
    Asked,
    Keep,
    Reads,
    choose_readers,
    read_by_kernel,
    read_logits,
    reading_config,
)
from tests.unit.engines import tiny_target

CPU = torch.device("cpu")
MIXED = [SamplingParams(), SamplingParams(temperature=0.7, seed=2**63 + 5), SamplingParams(temperature=1.3, seed=9)]
GREEDY = [SamplingParams()] * 3


def logits_of(places: int = 4, vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(3, places, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def reads(logits: Tensor):  # type: ignore[no-untyped-def]
    """Answers about logits [R, T, V]."""
    return lambda asked: read_logits(logits.flatten(0, 1), asked, gumbel_of)


def test_noise_by_key_is_noise_by_seed_and_counter() -> None:
    seed, counter = torch.tensor([3, -7]), torch.tensor([[1, 2, 3], [10**9, 0, 5]])
    ids = torch.arange(40) * 3
    keys = noise_keys(seed, counter, Stream.TARGET)
    assert torch.equal(gumbel_of(keys, ids), gumbel(seed, counter, Stream.TARGET, ids))


@pytest.mark.parametrize("params", [MIXED, GREEDY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_those_of_the_coupled_rule(params: list[SamplingParams], dtype: torch.dtype) -> None:
    rows = RowSampling.from_params(params, CPU)
    counter = torch.tensor([[5, 6, 7, 6], [100, 101, 101, 102], [0, 1, 2, 3]])
    for seed in range(20):
        logits = logits_of(seed=seed).to(dtype)
        draws = target_draws(reads(logits), rows, counter)
        assert draws is not None
        assert torch.equal(draws.tokens, coupled_sample(scores(logits, rows, None), rows, counter))
        expected = logits.float().log_softmax(-1).gather(-1, draws.tokens[..., None])[..., 0]
        torch.testing.assert_close(draws.logprobs, expected)
        assert draws.finite.all()


def test_ties_go_to_the_smallest_id() -> None:
    rows = RowSampling.from_params(GREEDY, CPU)
    logits = torch.zeros(3, 1, 9)
    logits[1, 0, 4:6] = 1.0
    draws = target_draws(reads(logits), rows, torch.zeros(3, 1, dtype=torch.int64))
    assert draws is not None and draws.tokens.tolist() == [[0], [4], [0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_place_that_is_not_finite_is_named(bad: float) -> None:
    logits = logits_of()
    logits[1, 2, 3] = bad
    draws = target_draws(reads(logits), RowSampling.from_params(MIXED, CPU), torch.zeros(3, 4, dtype=torch.int64))
    assert draws is not None
    assert (~draws.finite).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("params", [MIXED, GREEDY])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_a_ranking_is_the_softened_one_of_draft_trees(params: list[SamplingParams], coupled: bool, named: bool) -> None:
    rows, logits = RowSampling.from_params(params, CPU), logits_of()
    counter = torch.arange(12).view(3, 4)
    ids = torch.arange(50) * 7 if named else None
    found = draft_ranking(reads(logits), rows, counter, 6, ids, coupled)
    logq = scores(logits, rows, None).log_softmax(-1)
    wanted = logq
    if coupled:
        noise = gumbel(rows.seed, counter, Stream.TARGET, torch.arange(50) if ids is None else ids)
        wanted = (logq + noise * (rows.temperature > 0)[:, None, None]).log_softmax(-1)
    best, columns = wanted.topk(6, dim=-1)
    assert found is not None and torch.equal(found.columns, columns)
    torch.testing.assert_close(found.scores, best, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logprobs, logq.gather(-1, columns), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", [None, torch.tensor([77])])
def test_one_row_at_many_places_is_asked_about_from_whole_memory(keys: Tensor | None) -> None:
    """Kernels read a value a place: an expanded tensor would have only the first."""
    rows, counter, asked = RowSampling.from_params(MIXED[1:2], CPU), torch.arange(4)[None], list[Asked]()
    draft_reading(lambda question: asked.append(question), rows, counter, 3, None, True, keys)
    target_draws(lambda question: asked.append(question), rows, counter)
    for question in asked:
        for values in (question.temperature, question.keys):
            assert values is not None and values.shape == (4,) and values.is_contiguous()
    assert keys is None or (asked[0].keys == keys).all()


def test_what_changes_scores_needs_the_logits_themselves() -> None:
    rows = RowSampling.from_params([SamplingParams(temperature=1.0, repetition_penalty=1.5)], CPU)
    assert target_draws(never, rows, torch.zeros(1, 2, dtype=torch.int64)) is None


def never(asked: Asked) -> None:
    raise AssertionError("asked although a penalty changes what is asked about")


FILTERS = pytest.mark.parametrize(
    "filtered",
    [
        {"top_k": 5}, {"top_k": 5, "top_p": 0.4}, {"top_k": 7, "min_p": 0.3}, {"min_p": 0.2}, {"top_k": 99},
        {"top_p": 0.5}, {"top_p": 0.7, "min_p": 0.05},
    ],
    ids=lambda given: "-".join(f"{name}-{value}" for name, value in given.items()),
)  # fmt: skip


@FILTERS
def test_filters_draw_as_from_written_scores(filtered: dict[str, float]) -> None:
    plain = SamplingParams(temperature=1.3, seed=4)
    hot = [SamplingParams(temperature=t, seed=8, **filtered) for t in (0.0, 0.9)]  # type: ignore[arg-type]
    rows, excluded = RowSampling.from_params([plain, *hot], CPU), 0
    counter = torch.arange(12).view(3, 4)
    for seed in range(20):
        logits = logits_of(seed=seed).round()  # ties with the last one kept
        draws = target_draws(reads(logits), rows, counter)
        assert draws is not None
        assert torch.equal(draws.tokens, coupled_sample(scores(logits, rows, None), rows, counter))
        excluded += int((draws.tokens != coupled_sample(logits / 1.3, rows, counter)).sum())
        expected = logits.float().log_softmax(-1).gather(-1, draws.tokens[..., None])[..., 0]
        torch.testing.assert_close(draws.logprobs, expected)
    assert excluded


@FILTERS
@pytest.mark.parametrize("coupled", [True, False])
def test_a_filtered_ranking_is_normalised_over_what_is_kept(filtered: dict[str, float], coupled: bool) -> None:
    hot = [SamplingParams(temperature=t, seed=8, **filtered) for t in (0.0, 0.9, 1.4)]  # type: ignore[arg-type]
    rows, logits, counter = RowSampling.from_params(hot, CPU), logits_of(), torch.arange(12).view(3, 4)
    found = draft_ranking(reads(logits), rows, counter, 3, None, coupled)
    logq = scores(logits, rows, None).log_softmax(-1)
    wanted = logq
    if coupled:
        noise = gumbel(rows.seed, counter, Stream.TARGET, torch.arange(50))
        wanted = (logq + noise * (rows.temperature > 0)[:, None, None]).log_softmax(-1)
    best, columns = wanted.sort(dim=-1, descending=True, stable=True)
    assert found is not None and torch.equal(found.columns, columns[..., :3])
    torch.testing.assert_close(found.scores, best[..., :3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logprobs, logq.gather(-1, found.columns), rtol=1e-5, atol=1e-5)


def test_a_filter_sees_the_best_values_or_all_of_them() -> None:
    logits = torch.tensor([[4.0, 5.0, 1.0, 0.0]])
    assert Keep(6, lambda best: best[:, 5:]).floor(readout._best_values(logits, 6)).tolist() == [[float("-inf")]]
    assert readout._best_values(logits, 2).tolist() == [[5.0, 4.0]]
    assert readout._best_values(logits, 0).tolist() == [[5.0, 4.0, 1.0, 0.0]]


def test_nobody_reads_on_a_cpu() -> None:
    module = Reads()
    assert choose_readers(CPU, None) == 0
    assert module.ask(torch.zeros(2, 3, 4), torch.zeros(8, 4), F.linear, Asked()) is None


def test_places_are_rows_of_the_question() -> None:
    seen = []

    class Model(Reads, torch.nn.Module):
        reader = staticmethod(lambda x, weight, product, asked: seen.append(tuple(x.shape)))  # type: ignore[assignment]

    Model().ask(torch.zeros(2, 3, 4), torch.zeros(8, 4), F.linear, Asked())
    assert seen == [(6, 4)]


def test_a_decoder_reads_its_vocabulary_only_as_a_whole() -> None:
    target = tiny_target()
    target.reader = lambda x, weight, product, asked: read_logits(product(x, weight, None), asked, gumbel_of)
    final = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    found = target.read(final, Asked())
    assert found is not None
    assert torch.equal(found.columns.view(2, 3), target.logits(final).argmax(-1))
    target.lm_head = torch.nn.Linear(32, 31, bias=False)  # a rank's half
    assert target.read(final, Asked()) is None


def table(split: int) -> Table:
    found = Table.none()
    found.fixed = lambda n, k: Config(128, 64, split)  # type: ignore[method-assign]
    return found


def test_how_a_product_is_read() -> None:
    """One cut for any number of rows; in fixed order that of the written logits, or none."""
    weight = torch.zeros(256, 128, dtype=torch.bfloat16)
    for product in (F.linear, FastProduct(Table.none())):
        assert {reading_config(product, weight, rows) for rows in (1, 8, 17, ROWS)} == {READ}
        assert reading_config(product, weight, ROWS + 1) is None
    assert {reading_config(FixedProduct(table(1)), weight, rows) for rows in (1, ROWS, 500)} == {Config(128, 64, 1)}
    assert reading_config(FixedProduct(table(2)), weight, 1) is None
    assert reading_config(F.linear, weight.float(), 1) is None
    assert reading_config(F.linear, weight.T, 1) is None
    assert READ.split == 1


def test_more_best_tokens_than_a_block_keeps_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "reading_config", lambda *given: READ)
    assert read_by_kernel(torch.zeros(1, 4), torch.zeros(99, 4), F.linear, Asked(MOST + 1)) is None
    assert read_by_kernel(torch.zeros(1, 4), torch.zeros(5, 4), F.linear, Asked(6)) is None
