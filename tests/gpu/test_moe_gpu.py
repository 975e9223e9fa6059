"""Mixtures of experts on CUDA: right, without a look at the device from the host, and the same when replayed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from target.config_moe import MoeConfig
from target.moe import MoE, can_group
from tests.gpu.sync import no_waiting
from tests.unit.test_moe import QWEN, V2, V3, loop, random_moe, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = pytest.mark.parametrize("config", [V3, V2, QWEN], ids=["v3", "v2", "qwen"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
COUNTS = pytest.mark.parametrize("count", [1, 5, 64, 700])


def on_device(made: MoE, dtype: torch.dtype) -> MoE:
    return copy.deepcopy(made).to(dtype).cuda().requires_grad_(False)


def oracle(made: MoE, x: Tensor) -> Tensor:
    """In float32 on the device, with the weights and the choice of the model under test."""
    exact = copy.deepcopy(made).float()
    shared = 0 if exact.shared is None else exact.shared(x.float())
    return loop(x.float(), *made.gate(x), exact.experts) + shared


@DTYPES
@COUNTS
@CONFIGS
def test_experts_are_a_loop_over_experts(config: MoeConfig, count: int, dtype: torch.dtype) -> None:
    made, x = on_device(random_moe(config), dtype), tokens(count).to("cuda", dtype)
    bound = 0.01 if dtype == torch.bfloat16 else 1e-5
    expected = oracle(made, x)
    assert (made(x).float() - expected).norm() < bound * expected.norm()


def test_bfloat16_takes_the_grouped_way_on_hopper() -> None:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("grouped matmuls read the host on this device")
    assert can_group(tokens(1).to("cuda", torch.bfloat16), 8)


def test_experts_without_tokens_and_many_experts() -> None:
    """One token among 256 experts, as in DeepSeek-V3."""
    many = dataclasses.replace(V3, experts=256, top_k=8, groups=8, top_groups=4)
    made, x = on_device(random_moe(many), torch.bfloat16), tokens(1).to("cuda", torch.bfloat16)
    expected = oracle(made, x)
    assert (made(x).float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@DTYPES
@CONFIGS
def test_nothing_waits_and_a_replay_routes_anew(config: MoeConfig, dtype: torch.dtype) -> None:
    """Recorded with some tokens, replayed with others: equal to the eager pass bit for bit."""
    made, x = on_device(random_moe(config), dtype), tokens(6).to("cuda", dtype)
    with torch.inference_mode():
        made(x)
        with no_waiting():
            made(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = made(x)
        chosen = made.gate(x)[1].clone()
        for seed in range(2, 8):
            x.copy_(tokens(6, seed=seed))
            graph.replay()
            assert torch.equal(out, made(x))
        assert not torch.equal(made.gate(x)[1], chosen)
