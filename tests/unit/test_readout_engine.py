"""Engines whose models read the vocabulary matrix: the torch twin stands in for the kernel, and nothing changes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from speculator.errors import NumericalError
from speculator.heads.base import DraftHead
from speculator.sampling import gumbel_of
from speculator.types import DraftShape, Rule, SamplingParams
from target.decoder import Decoder
from target.products import Product
from target.readout import Asked, Readout, Reads, read_logits
from tests.unit.engines import tiny_engine
from tests.unit.test_recorded import pair
from tests.unit.test_recorded import record as record_passes
from tests.unit.test_round import CHAIN, GREEDY, NOISE, TREE, play, record, same

MIXED = [SamplingParams(), SamplingParams(temperature=0.9, seed=1), SamplingParams(temperature=1.2, seed=2)]
FILTERED = [SamplingParams(), SamplingParams(temperature=0.9, seed=1, top_k=8), SamplingParams(repetition_penalty=1.3)]
GIVEN = DraftShape(3, parents=(-1, -1, 0, 0, 2))
WAYS = [
    ("eagle3", CHAIN, "eager"),
    ("eagle3", TREE, "eager"),
    ("eagle3", GIVEN, "eager"),
    ("mtp2", CHAIN, "eager"),
    ("eagle3", TREE, "passes"),
    ("eagle3", CHAIN, "rounds"),
    ("eagle3", TREE, "rounds"),
]


class Twin:
    """Answers by torch, and counts."""

    def __init__(self) -> None:
        self.answers = 0

    def __call__(self, x: Tensor, weight: Tensor, product: Product, asked: Asked) -> Readout:
        assert x.dim() == 2
        self.answers += 1
        return read_logits(product(x, weight, None), asked, gumbel_of)


def reading(*models: nn.Module) -> Twin:
    twin = Twin()
    for module in (m for model in models for m in model.modules() if isinstance(m, Reads)):
        module.reader = twin
    return twin


def unwritten() -> Any:
    """Writing logits fails while this lasts."""
    wrong = mock.Mock(side_effect=AssertionError("logits were written"))
    return mock.patch.multiple(Decoder, logits=wrong), mock.patch.multiple(DraftHead, logits=wrong)


@pytest.mark.parametrize("params", [GREEDY, NOISE, MIXED], ids=["greedy", "noise", "mixed"])
@pytest.mark.parametrize("kind, shape, way", WAYS)
def test_everything_said_is_the_same_and_no_logits_are_written(
    kind: str, shape: DraftShape, way: str, params: list[SamplingParams]
) -> None:
    expected = play(tiny_engine(*pair(kind)), params, shape)
    target, head = pair(kind)
    twin, (no_target, no_head) = reading(target, head), unwritten()
    engine = tiny_engine(target, head)
    if way == "passes":
        record_passes(engine, shape)
    if way == "rounds":
        record(engine, shape)
    with no_target, no_head:
        assert same(play(engine, params, shape), expected)
    assert twin.answers


@pytest.mark.parametrize("shape", [CHAIN, TREE])
def test_filters_and_penalties_change_nothing(shape: DraftShape) -> None:
    expected = play(tiny_engine(*pair("eagle3")), FILTERED, shape)
    target, head = pair("eagle3")
    reading(target, head)
    assert same(play(tiny_engine(target, head), FILTERED, shape), expected)


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
def test_other_rules_have_logits_written(rule: Rule) -> None:
    params = [SamplingParams(temperature=0.9, seed=1, rule=rule), SamplingParams(rule=rule), SamplingParams()]
    expected = play(tiny_engine(*pair("eagle3")), params, CHAIN)
    target, head = pair("eagle3")
    reading(target, head)
    assert same(play(tiny_engine(target, head), params, CHAIN), expected)


def test_recorded_trees_rank_without_the_targets_noise_where_the_rule_is_another() -> None:
    params = [SamplingParams(temperature=0.9, seed=3, rule=Rule.REJECTION), SamplingParams(temperature=0.9, seed=1)]
    expected = play(tiny_engine(*pair("eagle3")), params, TREE)
    target, head = pair("eagle3")
    reading(target, head)
    engine = tiny_engine(target, head)
    rounds = record(engine, TREE, rows=2, every_rule=True)
    assert same(play(engine, params, TREE), expected)
    assert rounds.counts.share == 1.0 and rounds.counts.replayed > 10


def test_a_logit_that_is_not_finite_fails_the_step() -> None:
    target, head = pair("eagle3")
    reading(target, head)
    engine = tiny_engine(target, head)
    with torch.no_grad():
        target.head_weight[5] = float("nan")
    with pytest.raises(NumericalError):
        play(engine, NOISE, CHAIN)
