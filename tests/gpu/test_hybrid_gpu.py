"""Hybrid targets on a CUDA device: the kernel beside torch, bits of commits, engines, recorded passes."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from engines import Driver
from hybrid_models import VOCAB, hybrid_head, hybrid_target
from test_deltanet_kernel import filled, part, song
from torch import Tensor

from speculator.engine import Engine
from speculator.recurrent import RecurrentRows
from speculator.types import DraftShape, EngineInfo, SamplingParams
from target.cache import PagedCache
from target.config_hybrid import DeltaNetConfig
from target.decoder import Decoder
from target.deltanet import GatedDeltaNet, HybridAttend
from target.fused import FUSED, FUSED_PDL
from target.layers import TORCH
from target.states import StateCache, StatePass, TorchRule, rule_for
from tests.unit.test_recorded import record, replayed_share

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
PUBLISHED = DeltaNetConfig(16, 32, 128, 128, kernel=4, layers=frozenset({0}), grouped=False)  # of Qwen3-Next
PROMPTS = [[5, 9, 33, 2], list(range(1, 40)), [7], [60, 1] * 9]
PARAMS = [SamplingParams(), SamplingParams(temperature=0.9, seed=11)] * 2
CHAIN = DraftShape(4)


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> None:
    torch.set_float32_matmul_precision("highest")


def test_the_kernel_is_torch_at_published_sizes() -> None:
    slots, inputs = torch.tensor([4, 2, 0, 5], device="cuda"), song(PUBLISHED, 4, 5, device="cuda")
    accepted, found, stores = torch.tensor([5, 1, 0, 3], device="cuda"), [], []
    for rule in (rule_for(torch.device("cuda")), TorchRule()):
        states = filled(PUBLISHED, rule, device="cuda")
        run = StatePass(states, slots)
        found.append(run.recur(0, inputs))
        run.commit(accepted)
        stores.append(states.matrices)
    assert type(rule_for(torch.device("cuda"))).__name__ == "TritonRule"
    for ours, theirs in (found, stores):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_commits_are_decoding_bit_for_bit() -> None:
    """2,000 rounds at published sizes, with wrong drafts in them, against one token after the other."""
    length, generator = 60, torch.Generator().manual_seed(1)
    inputs, one = song(PUBLISHED, 1, length, device="cuda"), torch.tensor([2], device="cuda")
    states, plain = filled(PUBLISHED, rule_for(torch.device("cuda")), device="cuda"), list[Tensor]()
    first = [store[:, 2].clone() for store in (states.windows, states.matrices)]
    for t in range(length - 8):
        plain.append(states.matrices[:, 2].clone())
        run = StatePass(states, one)
        run.recur(0, part(inputs, t, 1))
        run.commit(torch.ones_like(one))
    at = 0
    begin(states, first)
    for round_ in range(2000):
        width = int(torch.randint(1, 9, (), generator=generator))
        accepted = int(torch.randint(0, width + 1, (), generator=generator))
        drafted = part(inputs, at, width)
        drafted.mixed[:, accepted:] += 1
        run = StatePass(states, one)
        run.recur(0, drafted)
        run.commit(torch.full_like(one, accepted))
        at += accepted
        if at >= len(plain):
            at = 0
            begin(states, first)
        assert torch.equal(states.matrices[:, 2], plain[at]), round_


@pytest.mark.parametrize("grouped", [False, True])
def test_a_fused_layer_is_torch_at_published_sizes(grouped: bool) -> None:
    """Also under dependent launches, which change no bit."""
    from target.kernels.deltanet import TritonRule

    torch.manual_seed(0)
    made = GatedDeltaNet(0, 2048, replace(PUBLISHED, grouped=grouped), 1e-6).to("cuda", torch.bfloat16)
    made, x, slots = made.requires_grad_(False), torch.randn(3, 5, 2048, device="cuda").bfloat16(), torch.arange(1, 4)
    ways = ((TorchRule(), TORCH), (TritonRule(), FUSED), (TritonRule(pdl=True), FUSED_PDL))
    found, stores = [], []
    for rule, pieces in ways:
        made.pieces = made.norm.pieces = pieces
        states = filled(PUBLISHED, rule, device="cuda", dtype=torch.bfloat16)
        for accepted in ([2, 5, 0], [1, 3, 5]):
            run = StatePass(states, slots.to("cuda"))
            found.append(made(x, x, x, HybridAttend(lambda *_: x, run.recur)))
            run.commit(torch.tensor(accepted, device="cuda"))
        stores.append(states.matrices)
    for at in (0, 1):
        torch.testing.assert_close(found[at + 2], found[at], rtol=2e-2, atol=2e-2)
        assert torch.equal(found[at + 2], found[at + 4])
    torch.testing.assert_close(stores[1], stores[0], rtol=1e-2, atol=1e-2)
    assert torch.equal(stores[1], stores[2])


def begin(states: StateCache, first: list[Tensor]) -> None:
    for store, kept in zip((states.windows, states.matrices), first, strict=True):
        store[:, 2] = kept


def engine_of(target: Decoder, head: bool) -> Engine:
    drafter = hybrid_head(target, "mtp").to("cuda") if head else None
    groups = [target.cache_layers] + ([drafter.cache_layers] if drafter else [])
    info = EngineInfo(
        "tiny", "tiny", "mtp" if head else "none", VOCAB, (), 512, 4, 16, 200, 160, 16, max_branching=1
    )  # fmt: skip
    return Engine(info, target, drafter, PagedCache(groups, 200, 16, torch.float32, "cuda"))


@pytest.mark.parametrize("family", ["dense", "next"])
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
def test_tokens_are_those_of_plain_decoding(family: str, recorded: bool) -> None:
    target = hybrid_target(family).to("cuda")
    texts = []
    for head in (False, True):
        engine = engine_of(target, head)
        passes = record(engine, CHAIN) if head and recorded else None
        driver = Driver(engine, scatter=1)
        sessions = driver.start(PROMPTS, PARAMS, CHAIN if head else None)
        driver.rounds(sessions, 40, [CHAIN if head else None] * 4)
        texts.append([s.produced[:40] for s in sessions])
        assert passes is None or (passes.verifying.counts.replayed > 10 and replayed_share(passes) > 0.5)
        for row in range(4):
            engine.close(row)
        assert isinstance(engine.recurrent, RecurrentRows) and not engine.recurrent.cache.matrices.any()
    assert texts[0] == texts[1]
