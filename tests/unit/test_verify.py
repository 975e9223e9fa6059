"""The vectorised rules against the textbook loops they stand for, over random trees."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speculator.errors import InvalidTreeError
from speculator.sampling import RowSampling, Stream, coupled_sample, fold, gumbel, probabilities, scores, uniform
from speculator.tree import Tree, pack
from speculator.types import Distribution, Draft, Rule, SamplingParams
from speculator.verify import DraftQ, Verdict, verify, verify_block, verify_coupled

VOCAB = 6
BASE = 17
many = settings(max_examples=40, deadline=None, derandomize=True)


class Round(NamedTuple):
    """One random round of several rows."""

    drafts: list[Draft]
    tree: Tree
    values: Tensor  # [R, T, V] scores
    rows: RowSampling
    base: Tensor
    q: DraftQ | None


@st.composite
def rounds(draw: st.DrawFn, chains: bool = False, with_q: bool | None = None) -> Round:
    """Few tokens and sharp targets, so that drafts are accepted, repeated and rejected often."""
    count, top = draw(st.integers(1, 3)), 5 if chains else 12
    parents = [
        tuple(i - 1 if chains else draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(0, top))))
        for _ in range(count)
    ]
    seed = draw(st.integers(0, 2**32))
    source = torch.Generator().manual_seed(seed)
    carry = draw(st.booleans()) if with_q is None else with_q
    drafts = [drawn_draft(shape, carry, source) for shape in parents]
    width = max(len(d.tokens) for d in drafts) + 1 + draw(st.integers(0, 2))
    temperature = [draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in drafts]
    params = [SamplingParams(temperature=t, top_k=4, seed=seed + i) for i, t in enumerate(temperature)]
    rows = RowSampling.from_params(params, "cpu")
    values = scores(torch.randn(count, width, VOCAB, generator=source) * 2, rows, None)
    tree = pack(drafts, [0] * count, "cpu", width=width)
    base = torch.arange(BASE, BASE + count)
    return Round(drafts, tree, values, rows, base, DraftQ.from_drafts(drafts, width, VOCAB, "cpu"))


def drawn_draft(parents: tuple[int, ...], with_q: bool, source: torch.Generator) -> Draft:
    if not with_q:
        tokens = torch.randint(VOCAB, (len(parents),), generator=source)
        return Draft(tuple(tokens.tolist()), parents)
    logq = (torch.randn(len(parents), VOCAB, generator=source, dtype=torch.float64) * 2).log_softmax(-1)
    q = tuple(Distribution(range(VOCAB), row.tolist()) for row in logq)
    drawn = [int(torch.multinomial(row.exp(), 1, generator=source)) for row in logq]
    return Draft(tuple(drawn), parents, q=q)


def plain(verdict: Verdict, row: int) -> tuple[list[int], list[int]]:
    """Committed tokens and surviving nodes of one row; checks the padding."""
    kept = int(verdict.kept[row])
    tokens, path = verdict.tokens[row].tolist(), verdict.path[row].tolist()
    assert tokens[kept:] == [-1] * (len(tokens) - kept)
    assert path[kept:] == [0] * (len(path) - kept) and path[0] == 0
    return tokens[:kept], path[:kept]


def children(draft: Draft, node: int) -> list[int]:
    return [i + 1 for i, parent in enumerate(draft.parents) if parent + 1 == node]


# Coupled


@many
@given(rounds())
def test_coupled_walks_like_plain_decoding_would(r: Round) -> None:
    samples = coupled_sample(r.values, r.rows, r.base[:, None] + r.tree.depths)
    verdict = verify(Rule.COUPLED, r.tree, r.values, r.rows, r.base, r.q)
    for row, draft in enumerate(r.drafts):
        frontier, reached = [(0, [0])], [[0]]
        while frontier:
            node, path = frontier.pop()
            for child in children(draft, node):
                if draft.tokens[child - 1] == samples[row, node]:
                    frontier.append((child, [*path, child]))
                    reached.append([*path, child])
        best = min(reached, key=lambda path: (-len(path), path[-1]))
        assert plain(verdict, row) == ([int(samples[row, node]) for node in best], best)


@many
@given(rounds())
def test_padding_changes_nothing(r: Round) -> None:
    for rule in (Rule.COUPLED, Rule.REJECTION):
        batch = verify(rule, r.tree, r.values, r.rows, r.base, r.q)
        for row, draft in enumerate(r.drafts):
            width, one = len(draft.tokens) + 1, slice(row, row + 1)
            alone = RowSampling(*(part[one] for part in r.rows[:6]), *r.rows[6:])
            q = r.q and r.q._replace(probs=r.q.probs[one, :width])
            tree = pack([draft], [0], "cpu")
            single = verify(rule, tree, r.values[one, :width], alone, r.base[one], q)
            assert plain(single, 0) == plain(batch, row)


@many
@given(rounds())
def test_garbage_in_padding_nodes_changes_nothing(r: Round) -> None:
    garbage = torch.where(r.tree.valid()[..., None], r.values, math.nan)
    for rule in (Rule.COUPLED, Rule.REJECTION):
        clean = verify(rule, r.tree, r.values, r.rows, r.base, r.q)
        dirty = verify(rule, r.tree, garbage, r.rows, r.base, r.q)
        assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))


def test_repeated_siblings_are_both_followed() -> None:
    """A client's tree may repeat a token; the longer path below the second one counts."""
    draft = Draft((3, 3, 4, 4), (-1, -1, 1, 1))
    verdict = verify_coupled(pack([draft], [0], "cpu"), torch.tensor([[3, 0, 4, 5, 1]]))
    assert plain(verdict, 0) == ([3, 4, 5], [0, 2, 3])


# Rejection


def accept_noise(r: Round) -> Tensor:
    nodes = torch.arange(r.tree.tokens.shape[1]).expand_as(r.tree.tokens)
    return uniform(fold(r.rows.seed, r.base), nodes, Stream.ACCEPT, torch.zeros(1, dtype=torch.int64))[..., 0]


def bonus(r: Round, row: int, weights: Tensor, kept: int) -> int:
    key = fold(r.rows.seed, r.base)[row : row + 1]
    noise = gumbel(key, torch.tensor([[kept]]), Stream.RESIDUAL, torch.arange(VOCAB))[0, 0]
    return int((weights.log() + noise).argmax())


def q_of(r: Round, row: int, node: int) -> Tensor:
    if r.q is not None:
        return r.q.probs[row, node]
    return torch.nn.functional.one_hot(torch.tensor(r.drafts[row].tokens[node - 1]), VOCAB).double()


def rejection_by_hand(r: Round, row: int) -> tuple[list[int], list[int]]:
    p, u, draft = probabilities(r.values, r.rows)[row], accept_noise(r)[row], r.drafts[row]
    path, tokens = [0], []
    while True:
        here = p[path[-1]].clone()
        for child in children(draft, path[-1]):
            token, q = draft.tokens[child - 1], q_of(r, row, child)
            if u[child] < here[token] / q[token]:
                path.append(child)
                tokens.append(token)
                break
            here = (here - q).clamp(min=0)
            here /= here.sum()
        else:
            here = here if here.sum() > 0 else p[path[-1]]
            return [*tokens, bonus(r, row, here, len(path))], path


@many
@given(rounds())
def test_rejection_is_the_textbook_loop(r: Round) -> None:
    verdict = verify(Rule.REJECTION, r.tree, r.values, r.rows, r.base, r.q)
    for row in range(len(r.drafts)):
        assert plain(verdict, row) == rejection_by_hand(r, row)


@many
@given(rounds(with_q=False))
def test_a_draft_without_q_is_one_of_point_masses(r: Round) -> None:
    spikes = tuple(Distribution((t,), (0.0,)) for t in range(VOCAB))
    spiked = [Draft(d.tokens, d.parents, q=tuple(spikes[t] for t in d.tokens)) for d in r.drafts]
    q = DraftQ.from_drafts(spiked, r.tree.tokens.shape[1], VOCAB, "cpu")
    rules = [Rule.REJECTION, Rule.BLOCK] if r.tree.chain else [Rule.REJECTION]
    for rule in rules:
        one = verify(rule, r.tree, r.values, r.rows, r.base, None)
        other = verify(rule, r.tree, r.values, r.rows, r.base, q)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Block


def block_by_hand(r: Round, row: int) -> tuple[list[int], list[int]]:
    p, eta, draft = probabilities(r.values, r.rows)[row], accept_noise(r)[row], r.drafts[row]
    k = len(draft.tokens)
    reach, chance = [1.0], [1.0]
    for i, token in enumerate(draft.tokens):
        reach.append(min(reach[-1] * float(p[i, token] / q_of(r, row, i + 1)[token]), 1.0))
    for i in range(1, k):
        surplus = float((reach[i] * p[i] - q_of(r, row, i + 1)).clamp(min=0).sum())
        rest = surplus + 1 - reach[i]
        chance.append(surplus / rest if rest > 0 else 1.0)
    chance.append(reach[k])
    tau = max([0, *(i for i in range(1, k + 1) if eta[i] <= chance[i])])
    rest = p[tau] if tau == k else (reach[tau] * p[tau] - q_of(r, row, tau + 1)).clamp(min=0)
    rest = rest if rest.sum() > 0 else p[tau]
    return [*draft.tokens[:tau], bonus(r, row, rest, tau + 1)], list(range(tau + 1))


@many
@given(rounds(chains=True))
def test_block_is_the_recursion_of_the_paper(r: Round) -> None:
    verdict = verify(Rule.BLOCK, r.tree, r.values, r.rows, r.base, r.q)
    for row in range(len(r.drafts)):
        assert plain(verdict, row) == block_by_hand(r, row)


def test_block_refuses_trees() -> None:
    tree = pack([Draft((1, 2), (-1, -1))], [0], "cpu")
    rows = RowSampling.from_params([SamplingParams(temperature=1.0)], "cpu")
    with pytest.raises(InvalidTreeError, match="chain"):
        verify_block(tree, torch.zeros(1, 3, VOCAB), rows, torch.tensor([3]))


# All rules


@many
@given(rounds(chains=True), st.sampled_from(Rule))
def test_greedy_rows_take_the_argmax_under_every_rule(r: Round, rule: Rule) -> None:
    greedy = RowSampling.from_params([SamplingParams(temperature=0.0)] * len(r.drafts), "cpu")
    verdict = verify(rule, r.tree, r.values, greedy, r.base, r.q)
    expected = verify_coupled(r.tree, r.values.argmax(-1))
    assert all(torch.equal(a, b) for a, b in zip(verdict, expected, strict=True))


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("with_q", [False, True])
def test_an_exact_head_has_every_token_accepted(rule: Rule, with_q: bool) -> None:
    """q = p and tokens drawn from it: nothing may be lost to rounding. Without q the draft is the greedy one."""
    count, depth = 64, 4
    values = torch.randn(count, depth + 1, VOCAB, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=1.0 if with_q else 0.0, seed=s) for s in range(count)]
    rows = RowSampling.from_params(params, "cpu")
    base = torch.arange(count)
    p = probabilities(scores(values, rows, None), rows)
    drawn = coupled_sample(values, rows, base[:, None] + torch.arange(depth + 1))[:, :depth]
    tree = pack([Draft(tuple(row), tuple(range(-1, depth - 1))) for row in drawn.tolist()], [0] * count, "cpu")
    q = DraftQ(torch.nn.functional.pad(p[:, :-1], (0, 0, 1, 0)), 1) if with_q else None
    verdict = verify(rule, tree, values, rows, base, q)
    assert (verdict.kept == depth + 1).all()
    assert torch.equal(verdict.tokens[:, :-1], drawn)


def test_a_single_token_draft_that_cannot_be_is_never_accepted() -> None:
    values = torch.full((1, 2, VOCAB), -math.inf).index_fill_(2, torch.tensor([1, 4]), 0.0)
    tree = pack([Draft((3,), (-1,))], [0], "cpu")
    for seed in range(50):
        rows = RowSampling.from_params([SamplingParams(temperature=1.0, seed=seed)], "cpu")
        for rule in Rule:
            verdict = verify(rule, tree, values, rows, torch.tensor([9]))
            assert verdict.kept.tolist() == [1] and verdict.tokens[0, 0].item() in (1, 4)


# The q of client drafts


def test_q_is_laid_out_by_node_and_normalised() -> None:
    half = Distribution((4, 1), (math.log(0.5004), math.log(0.5004)))
    sure = Distribution((2,), (0.0,))
    drafts = [Draft((4, 2), (-1, -1), q=(half, sure)), None, Draft((5,), (-1,))]
    q = DraftQ.from_drafts(drafts, 4, VOCAB, "cpu")
    assert q is not None and q.siblings == 2
    expected = torch.zeros(3, 4, VOCAB, dtype=torch.float64)
    expected[0, 1, 4] = expected[0, 1, 1] = 0.5
    expected[0, 2, 2] = expected[2, 1, 5] = 1.0
    torch.testing.assert_close(q.probs, expected)


def test_q_held_by_the_server_replaces_the_draft_s() -> None:
    draft, held = Draft((4, 2), (-1, 0)), torch.rand(2, VOCAB, dtype=torch.float64)
    q = DraftQ.from_drafts([draft, draft], 4, VOCAB, "cpu", held=[None, held])
    assert q is not None and q.siblings == 1
    assert torch.equal(q.probs[1, 1:3], held)
    assert q.probs[0, 1, 4] == 1 and q.probs[0].sum() == 2 and not q.probs[1, 3].any()


def test_point_masses_need_no_q() -> None:
    assert DraftQ.from_drafts([Draft((1,), (-1,)), None], 2, VOCAB, "cpu") is None
