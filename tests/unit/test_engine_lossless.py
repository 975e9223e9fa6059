"""The headline promise: speculation changes nothing that is committed, whatever drafts, whatever shares the batch."""

from __future__ import annotations

import random

import pytest
import torch
from engines import VOCAB, Driver, Sequence_, tiny_engine, tiny_head, tiny_target

from speculator.types import Draft, DraftShape, Rule, SamplingParams

PROMPTS = [[5, 9, 33, 2], list(range(1, 40)), [7], [60, 1, 60, 1, 60, 1, 3, 17, 22, 41, 8, 8, 8, 8, 8, 8, 8, 8]]
COUNT = 40
STATIC = DraftShape(depth=3, parents=(-1, -1, -1, 0, 0, 1, 3, 3, 5))
SHAPES = {
    "depth0": DraftShape(depth=0),
    "chain1": DraftShape(depth=1),
    "chain5": DraftShape(depth=5),
    "chain16": DraftShape(depth=16),
    "static": STATIC,
    "tree": DraftShape(depth=4, nodes=14, branching=4),
    "tree60": DraftShape(depth=8, nodes=59, branching=10),
}
SAMPLED = SamplingParams(temperature=0.9, seed=11)
PARAMS = {
    "greedy": SamplingParams(),
    "sampled": SAMPLED,
    "filtered": SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, seed=4),
    "penalty": SamplingParams(repetition_penalty=1.4),
    "penalty-sampled": SamplingParams(temperature=1.1, repetition_penalty=1.3, seed=5),
}
HEADS = {
    "eagle": dict(kind="eagle"),
    "eagle3": dict(kind="eagle3"),
    "eagle3-two-layers": dict(kind="eagle3", num_layers=2, norm_output=True),
    "eagle3-draft-vocabulary": dict(kind="eagle3", draft_vocab_size=20, d2t=True),
}


@pytest.fixture(scope="module")
def target():
    torch.set_num_threads(1)
    return tiny_target()


def plain(target, prompts, params, count=COUNT):
    driver = Driver(tiny_engine(target, None))
    sessions = driver.start(prompts, params, None)
    driver.rounds(sessions, count, [None] * len(sessions))
    return [s.produced[:count] for s in sessions]


def speculate(target, head, prompts, params, shapes, count=COUNT, scatter=1, drafter=None):
    driver = Driver(tiny_engine(target, head), scatter)
    sessions = driver.start(prompts, params, shapes[0])
    driver.rounds(sessions, count, shapes, drafter)
    return [s.produced[:count] for s in sessions], sessions


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_coupled_output_does_not_depend_on_the_draft(target, shape, params):
    given = [PARAMS[params]] * len(PROMPTS)
    head = tiny_head(target, "eagle3")
    out, _ = speculate(target, head, PROMPTS, given, [SHAPES[shape]] * len(PROMPTS))
    assert out == plain(target, PROMPTS, given)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", ["chain5", "tree"])
def test_every_head_kind(target, head, shape):
    given = [SamplingParams(), SAMPLED, SamplingParams(), SAMPLED]
    out, _ = speculate(target, tiny_head(target, **HEADS[head]), PROMPTS, given, [SHAPES[shape]] * 4)
    assert out == plain(target, PROMPTS, given)


def test_a_batch_of_different_shapes_and_parameters(target):
    given = list(PARAMS.values())[:4]
    shapes = [SHAPES["chain5"], SHAPES["tree"], STATIC, SHAPES["depth0"]]
    out, _ = speculate(target, tiny_head(target, "eagle3"), PROMPTS, given, shapes)
    assert out == plain(target, PROMPTS, given)


def test_each_row_alone_equals_its_row_in_the_batch(target):
    given = [SamplingParams(), SAMPLED, SamplingParams(), SAMPLED]
    together = plain(target, PROMPTS, given)
    alone = [plain(target, [prompt], [p])[0] for prompt, p in zip(PROMPTS, given, strict=True)]
    assert together == alone


def oracle(truth, rate):
    """A drafter that knows the text and is right with probability `rate` at each token."""
    rng = random.Random(0)

    def drafter(s: Sequence_) -> Draft:
        after = truth[s.row][len(s.produced) : len(s.produced) + 5]
        tokens = tuple(t if rng.random() < rate else (t + 1) % VOCAB for t in after)
        return Draft(tokens, tuple(range(-1, len(tokens) - 1)))

    return drafter


@pytest.mark.parametrize("params", ["greedy", "sampled", "penalty"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_exact_fakes(target, rate, params):
    given = [PARAMS[params]] * len(PROMPTS)
    truth = plain(target, PROMPTS, given, COUNT + 8)
    out, sessions = speculate(
        target, tiny_head(target, "eagle3"), PROMPTS, given, [None] * 4, drafter=oracle(truth, rate)
    )
    assert out == [t[:COUNT] for t in truth]
    accepted = [a for s in sessions for a in s.accepted]
    if rate == 0.0:
        assert set(accepted) == {0}
    if rate == 1.0:
        assert set(accepted) == {5}


def test_a_client_tree_takes_the_right_branch(target):
    truth = plain(target, PROMPTS, [SamplingParams()] * 4, COUNT + 8)

    def drafter(s: Sequence_) -> Draft:
        right = truth[s.row][len(s.produced) : len(s.produced) + 3]
        wrong = [(t + 1) % VOCAB for t in right]
        # two branches, the second one right: its keys and values must move next to the committed ones
        return Draft((wrong[0], right[0], wrong[1], right[1], right[2]), (-1, -1, 0, 1, 3))

    out, sessions = speculate(
        target, tiny_head(target, "eagle3"), PROMPTS, [SamplingParams()] * 4, [None] * 4, drafter=drafter
    )
    assert out == [t[:COUNT] for t in truth]
    assert {a for s in sessions for a in s.accepted} == {3}


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
@pytest.mark.parametrize("shape", ["chain5", "tree"])
def test_greedy_is_greedy_under_every_rule(target, rule, shape):
    if rule is Rule.BLOCK and shape == "tree":
        pytest.skip("block verification is defined for chains only")
    given = [SamplingParams(rule=rule)] * len(PROMPTS)
    out, _ = speculate(target, tiny_head(target, "eagle3"), PROMPTS, given, [SHAPES[shape]] * 4)
    assert out == plain(target, PROMPTS, [SamplingParams()] * len(PROMPTS))


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
def test_drawn_drafts_are_accepted_often_when_the_head_is_close(target, rule):
    """A head that repeats the target's last layer is close to it: q must be used, not taken as a point mass."""
    given = [SamplingParams(temperature=3.0, seed=s, rule=rule) for s in range(4)]
    _, sessions = speculate(target, tiny_head(target, "eagle3"), PROMPTS, given, [SHAPES["chain5"]] * 4)
    drawn = sum(a for s in sessions for a in s.accepted) / sum(len(s.accepted) for s in sessions)
    assert drawn > 0.8  # nearly uniform p and q: point masses would be accepted about once in VOCAB tries
