"""The lossless promise on a CUDA device in float32: the same tokens with any draft, and as on the CPU."""

from __future__ import annotations

import pytest
import torch
from engines import Driver, tiny_engine, tiny_head, tiny_target

from speculator.types import DraftShape, Rule, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[5, 9, 33, 2], list(range(1, 40)), [7], [60, 1] * 9]
SHAPES = {
    "chain5": DraftShape(depth=5),
    "static": DraftShape(depth=3, parents=(-1, -1, -1, 0, 0, 1, 3, 3, 5)),
    "tree60": DraftShape(depth=8, nodes=59, branching=10),
}
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.9, seed=11),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, seed=4),
    SamplingParams(repetition_penalty=1.4),
]


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    torch.set_float32_matmul_precision("highest")


def texts(device, shape, params, count=40):
    target = tiny_target().to(device)
    head = tiny_head(target, "eagle3") if shape else None
    driver = Driver(tiny_engine(target, head), scatter=1)
    sessions = driver.start(PROMPTS, params, shape)
    driver.rounds(sessions, count, [shape] * len(sessions))
    return [s.produced[:count] for s in sessions]


@pytest.mark.parametrize("shape", SHAPES)
def test_speculation_changes_nothing(shape):
    assert texts("cuda", SHAPES[shape], PARAMS) == texts("cuda", None, PARAMS)


def test_the_cpu_writes_the_same():
    assert texts("cuda", SHAPES["tree60"], PARAMS) == texts("cpu", None, PARAMS)


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
def test_greedy_is_greedy_under_every_rule(rule):
    greedy = [SamplingParams(rule=rule)] * len(PROMPTS)
    assert texts("cuda", SHAPES["chain5"], greedy) == texts("cuda", None, [SamplingParams()] * len(PROMPTS))
