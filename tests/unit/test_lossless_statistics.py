"""The proof of losslessness: what whole rounds emit, against the target's exact distribution, by chi-square.

Thousands of rows with different seeds run side by side on a small tabular target whose joint distribution can be
enumerated. The same test must convict verifiers with a planted bias, so passing it means something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import speculator.verify
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
from speculator.tree import StaticTree, Tree
from speculator.types import Rule, SamplingParams
from speculator.verify import DraftQ, Verdict, verify, verify_coupled

VOCAB, STEPS, ROWS, BASE = 5, 3, 16_000, 40
SUSPICIOUS = 1e-6
CHAIN, TREE, WIDE = (-1, 0, 1), (-1, -1, 0, 0, 1), (-1, -1, -1, 1)
SHAPES = {"chain": CHAIN, "tree": TREE, "wide": WIDE}
FILTERS = {
    "T=1": SamplingParams(temperature=1.0),
    "T=0.7": SamplingParams(temperature=0.7),
    "top-k": SamplingParams(temperature=1.0, top_k=3),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8),
}
Verifier = Callable[[Rule, Tree, Tensor, RowSampling, Tensor, DraftQ | None], Verdict]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many small operations: threads would only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class World(NamedTuple):
    """A target and a head as tables [position, last token, next token] of scores."""

    target: Tensor
    head: Tensor
    rows: RowSampling

    def at(self, table: Tensor, position: Tensor, token: Tensor) -> Tensor:
        return table[position.clamp(max=len(table) - 1), token]


def table(seed: int, sharpness: float = 1.2) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS + 4, VOCAB, VOCAB, generator=source) * sharpness


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    rows = RowSampling.from_params([params], "cpu")
    return scores(logits.flatten(0, 1)[None], rows, None).view_as(logits)


def world(params: SamplingParams, head: Tensor | None = None) -> World:
    """`head` are its scores; by default a perturbed copy of the target under the same filters."""
    logits = table(1)
    near = filtered(logits + table(2, 0.8), params)
    one = RowSampling.from_params([params], "cpu")
    rows = RowSampling(*(part.expand(ROWS) for part in one[:5]), torch.arange(ROWS) * 7 + 3, *one[6:])
    return World(filtered(logits, params), near if head is None else head, rows)


# Drafting: every way to fill a tree is a function (world, values [R, V], base, node, depth, rank) -> tokens [R]

Drawer = Callable[[World, Tensor, Tensor, int, int, int], Tensor]


def sampled(w: World, values: Tensor, base: Tensor, node: int, depth: int, rank: int) -> Tensor:
    """Each node on its own from q, so siblings may repeat."""
    return draft_sample(values[:, None], w.rows, base, torch.full((ROWS, 1), node))[:, 0]


def by_position(w: World, values: Tensor, base: Tensor, node: int, depth: int, rank: int) -> Tensor:
    """From q, with noise of the absolute position: not fresh in the next round."""
    noise = gumbel(w.rows.seed, base[:, None] + depth - 1, Stream.DRAFT, torch.arange(VOCAB))[:, 0]
    return (values + noise).argmax(-1)


def ranked(w: World, values: Tensor, base: Tensor, node: int, depth: int, rank: int) -> Tensor:
    """The best tokens of q: point masses."""
    return values.topk(rank + 1).indices[:, rank]


def repeated(w: World, values: Tensor, base: Tensor, node: int, depth: int, rank: int) -> Tensor:
    """Point masses with every token twice among the siblings."""
    return ranked(w, values, base, node, depth, rank // 2)


def shared(w: World, values: Tensor, base: Tensor, node: int, depth: int, rank: int) -> Tensor:
    """The best tokens of q under the target's own noise."""
    noise = gumbel(w.rows.seed, base[:, None] + depth - 1, Stream.TARGET, torch.arange(VOCAB))[:, 0]
    return ranked(w, values + noise, base, node, depth, rank)


class Drafts(NamedTuple):
    tree: Tree
    q: DraftQ | None


def drafts(w: World, parents: tuple[int, ...], draw: Drawer, root: Tensor, length: Tensor) -> Drafts:
    layout = StaticTree.from_parents(parents, "cpu")
    tokens, q = [root], [torch.zeros(ROWS, VOCAB, dtype=torch.float64)]
    for node, parent in enumerate(parents):
        depth = int(layout.depths[node + 1])
        values = w.at(w.head, length + depth - 1, tokens[parent + 1])
        tokens.append(draw(w, values, length + BASE, node, depth, parents[:node].count(parent)))
        q.append(values.softmax(-1, dtype=torch.float64))
    tree = layout.fill(root, torch.stack(tokens[1:], 1)) if parents else layout.fill(root, root[:, None][:, :0])
    siblings = max((parents.count(parent) for parent in parents), default=1)
    return Drafts(tree, DraftQ(torch.stack(q, 1), siblings) if draw in (sampled, by_position) else None)


def emitted(w: World, rule: Rule, parents: tuple[int, ...], draw: Drawer, judge: Verifier = verify) -> Tensor:
    """The first STEPS tokens [R, STEPS] of every row, over as many rounds as that takes."""
    out = torch.zeros(ROWS, STEPS * (len(parents) + 1) + 1, dtype=torch.int64)
    length = torch.zeros(ROWS, dtype=torch.int64)
    for _ in range(STEPS):
        root = out.gather(1, length[:, None])[:, 0]
        tree, q = drafts(w, parents, draw, root, length)
        values = w.at(w.target, length[:, None] + tree.depths, tree.tokens)
        verdict = judge(rule, tree, values, w.rows, length + BASE, q)
        steps = torch.arange(verdict.tokens.shape[1])
        place = length[:, None] + 1 + torch.where(steps < verdict.kept[:, None], steps, 0)
        out.scatter_(1, place.flip(1), torch.where(verdict.tokens < 0, verdict.tokens[:, :1], verdict.tokens).flip(1))
        length = length + verdict.kept
    return out[:, 1 : STEPS + 1]


def p_value(w: World, tokens: Tensor) -> float:
    """Chi-square of the joint counts of `tokens` [R, STEPS] against the target's exact distribution."""
    p = w.target.softmax(-1, dtype=torch.float64)
    exact = p[0, 0]
    for position in range(1, STEPS):
        exact = (exact.view(-1, VOCAB, 1) * p[position]).flatten()
    place = VOCAB ** torch.arange(STEPS - 1, -1, -1)
    counts = torch.bincount((tokens * place).sum(1), minlength=VOCAB**STEPS).double()
    expected = exact * len(tokens)
    if counts[expected == 0].any():
        return 0.0
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    live = expected > 0
    statistic = ((counts - expected)[live] ** 2 / expected[live]).sum()
    freedom = torch.tensor((int(live.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


# Every rule, shape and filter


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("rule", Rule)
def test_decoding_without_drafts_has_the_target_s_distribution(rule: Rule, name: str) -> None:
    w = world(FILTERS[name])
    assert p_value(w, emitted(w, rule, (), ranked)) > SUSPICIOUS


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draw", [sampled, ranked, repeated])
def test_rejection_is_lossless(draw: Drawer, shape: str, name: str) -> None:
    w = world(FILTERS[name])
    assert p_value(w, emitted(w, Rule.REJECTION, SHAPES[shape], draw)) > SUSPICIOUS


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("draw", [sampled, ranked])
def test_block_is_lossless(draw: Drawer, name: str) -> None:
    w = world(FILTERS[name])
    assert p_value(w, emitted(w, Rule.BLOCK, CHAIN, draw)) > SUSPICIOUS


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draw", [shared, ranked, repeated, sampled])
def test_coupled_emits_what_plain_sampling_does(draw: Drawer, shape: str, name: str) -> None:
    """Token for token; with the test of plain decoding above this is the distribution, too."""
    w = world(FILTERS[name])
    plain = emitted(w, Rule.COUPLED, (), ranked)
    assert torch.equal(emitted(w, Rule.COUPLED, SHAPES[shape], draw), plain)


# Heads that know nothing, or the wrong thing


def without_best(values: Tensor) -> Tensor:
    return values.scatter(-1, values.argmax(-1, keepdim=True), -math.inf)


def spikes(values: Tensor, rank: int) -> Tensor:
    chosen = values.topk(rank + 1).indices[..., rank:]
    return torch.full_like(values, -math.inf).scatter(-1, chosen, 0.0)


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "q = p": lambda target: target,
    "disjoint support": lambda target: torch.where(target.isinf(), 0.0, -math.inf),
    "always the best": lambda target: spikes(target, 0),
    "always the third": lambda target: spikes(target, 2),
    "q = 0 where p > 0": without_best,
    "uniform": torch.zeros_like,
    "upside down": lambda target: torch.where(target.isinf(), 0.0, -2 * target),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("rule", "shape"), [(Rule.REJECTION, CHAIN), (Rule.REJECTION, WIDE), (Rule.BLOCK, CHAIN)])
def test_adversarial_heads_change_nothing(rule: Rule, shape: tuple[int, ...], name: str) -> None:
    params = FILTERS["top-k"]  # leaves two tokens that the target never says
    w = world(params, HEADS[name](world(params).target))
    assert p_value(w, emitted(w, rule, shape, sampled)) > SUSPICIOUS


# Lossless is not enough: a verifier that accepts too little would pass as well


def first_round(w: World, rule: Rule, parents: tuple[int, ...], draw: Drawer) -> Tensor:
    """Tokens kept in the first round [R]."""
    none = torch.zeros(ROWS, dtype=torch.int64)
    tree, q = drafts(w, parents, draw, none, none)
    values = w.at(w.target, tree.depths, tree.tokens)
    return verify(rule, tree, values, w.rows, none + BASE, q).kept


def overlap(w: World) -> float:
    """sum min(p, q) at the first position: 1 - TV, the most that a single draft can be accepted."""
    p, q = (t[0, 0].softmax(-1, dtype=torch.float64) for t in (w.target, w.head))
    return float(torch.minimum(p, q).sum())


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
def test_one_draft_is_accepted_as_often_as_possible(rule: Rule) -> None:
    w = world(FILTERS["T=1"])
    accepted = float((first_round(w, rule, (-1,), sampled) > 1).double().mean())
    assert abs(accepted - overlap(w)) < 5 * 0.5 / math.sqrt(ROWS)


def test_a_coupled_draft_is_accepted_as_often_as_promised() -> None:
    """At least (1 - TV) / (1 + TV) with shared noise (Daliri et al. 2024), far above independent draws."""
    w = world(FILTERS["T=1"])
    accepted = float((first_round(w, Rule.COUPLED, (-1,), shared) > 1).double().mean())
    assert accepted > overlap(w) / (2 - overlap(w)) - 5 * 0.5 / math.sqrt(ROWS)


def test_block_accepts_more_than_rejection() -> None:
    w = world(FILTERS["T=1"])
    block, rejection = (first_round(w, rule, CHAIN, sampled).double().mean() for rule in (Rule.BLOCK, Rule.REJECTION))
    assert block > rejection


# Planted biases: the same test must reject each of them


def bonus_from_p(rule: Rule, tree: Tree, values: Tensor, rows: RowSampling, base: Tensor, q: DraftQ | None) -> Verdict:
    """The classic mistake: after a rejection, sample from the target instead of the residual."""
    verdict = verify(rule, tree, values, rows, base, q)
    end = verdict.kept[:, None] - 1
    last = verdict.path.gather(1, end)[..., None].expand(-1, -1, VOCAB)
    p = probabilities(values, rows).gather(1, last)[:, 0]
    noise = gumbel(fold(rows.seed, base), verdict.kept[:, None], Stream.RESIDUAL, torch.arange(VOCAB))[:, 0]
    return verdict._replace(tokens=verdict.tokens.scatter(1, end, (p.log() + noise).argmax(-1)[:, None]))


def favours_drafts(
    rule: Rule, tree: Tree, values: Tensor, rows: RowSampling, base: Tensor, q: DraftQ | None
) -> Verdict:
    """Coupled, but the second best token will do when it was drafted."""
    counter = base[:, None] + tree.depths
    samples = coupled_sample(values, rows, counter)
    noisy = values + gumbel(rows.seed, counter, Stream.TARGET, torch.arange(VOCAB))
    second = noisy.topk(2).indices[..., 1]
    child = torch.nn.functional.pad(tree.tokens[:, 1:], (0, 1), value=-1)
    return verify_coupled(tree, torch.where(child == second, second, samples))


def test_a_bonus_from_the_target_is_convicted() -> None:
    w = world(FILTERS["T=1"])
    for draw in (sampled, ranked):
        assert p_value(w, emitted(w, Rule.REJECTION, CHAIN, draw, bonus_from_p)) < SUSPICIOUS
    assert p_value(w, emitted(w, Rule.BLOCK, CHAIN, sampled, bonus_from_p)) < SUSPICIOUS


def test_a_verifier_that_favours_drafts_is_convicted() -> None:
    w = world(FILTERS["T=1"])
    assert p_value(w, emitted(w, Rule.COUPLED, CHAIN, ranked, favours_drafts)) < SUSPICIOUS


def test_block_with_stale_noise_is_convicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block looks at later tokens and their noise before it decides; the next round must not meet either again.

    Rejection never looks ahead, so the same mistakes do it no harm: the harness tells the two apart.
    """

    def reused(rule: Rule, tree: Tree, values: Tensor, rows: RowSampling, base: Tensor, q: DraftQ | None) -> Verdict:
        def noise(key: Tensor, tree: Tree) -> Tensor:
            counter = base[:, None] + torch.arange(tree.tokens.shape[1])
            return uniform(rows.seed, counter, Stream.ACCEPT, torch.tensor([0]))[..., 0]

        with monkeypatch.context() as patch:
            patch.setattr(speculator.verify, "_accept_noise", noise)
            return verify(rule, tree, values, rows, base, q)

    w = world(FILTERS["T=1"])
    assert p_value(w, emitted(w, Rule.BLOCK, CHAIN, by_position)) < SUSPICIOUS
    assert p_value(w, emitted(w, Rule.REJECTION, CHAIN, by_position)) > SUSPICIOUS
    w = world(FILTERS["T=1"], without_best(w.target))
    assert p_value(w, emitted(w, Rule.BLOCK, CHAIN, sampled, reused)) < SUSPICIOUS
    assert p_value(w, emitted(w, Rule.REJECTION, CHAIN, sampled, reused)) > SUSPICIOUS


def test_siblings_tried_without_renormalising_are_convicted(monkeypatch: pytest.MonkeyPatch) -> None:
    def trials(tree: Tree, p: Tensor, u: Tensor) -> Tensor:
        chance = speculator.verify._node_probs(tree, p)
        return speculator.verify._first_taken(u < chance, speculator.verify._earlier_siblings(tree))

    monkeypatch.setattr(speculator.verify, "_point_mass_trials", trials)
    w = world(FILTERS["T=1"])
    assert p_value(w, emitted(w, Rule.REJECTION, WIDE, ranked)) < SUSPICIOUS


def test_a_q_that_is_not_the_one_drawn_from_is_convicted() -> None:
    """The drafts were drawn with temperature 1, the q that came with them says 2."""

    def misled(rule: Rule, tree: Tree, values: Tensor, rows: RowSampling, base: Tensor, q: DraftQ | None) -> Verdict:
        assert q is not None
        flat = q.probs.sqrt() / q.probs.sqrt().sum(-1, keepdim=True).clamp(min=1e-9)
        return verify(rule, tree, values, rows, base, q._replace(probs=flat))

    w = world(FILTERS["T=1"])
    for rule in (Rule.REJECTION, Rule.BLOCK):
        assert p_value(w, emitted(w, rule, CHAIN, sampled, misled)) < SUSPICIOUS
