"""Gates choose as published, experts compute what a loop over them computes, and nothing reads a value on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from graphs.tape import TapeRecorder
from target import moe as module
from target.config_moe import MoeConfig
from target.moe import Experts, Gate, MoE, can_group

SIZE = 16
V3 = MoeConfig(
    experts=12, top_k=3, inner_size=8, gate="sigmoid", normalise=True, scale=2.5, groups=4, top_groups=2, shared_size=16
)
V2 = MoeConfig(experts=12, top_k=3, inner_size=8, gate="softmax", normalise=False, scale=16.0, groups=4, top_groups=2)
QWEN = MoeConfig(experts=6, top_k=2, inner_size=8, gate="softmax", normalise=True)
CONFIGS = pytest.mark.parametrize("config", [V3, V2, QWEN], ids=["v3", "v2", "qwen"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_moe(config: MoeConfig, size: int = SIZE, seed: int = 0) -> MoE:
    generator = torch.Generator().manual_seed(seed)
    made = MoE(size, config)
    for tensor in made.state_dict().values():
        tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
    return made


def tokens(count: int, size: int = SIZE, seed: int = 1) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


# the gate, against what the papers say, one token at a time


def choose(x: Tensor, gate: Gate) -> dict[int, float]:
    """Expert -> weight of one token x [size]."""
    moe, logits = gate.moe, gate.weight @ x
    scores = (logits.softmax(0) if moe.gate == "softmax" else logits.sigmoid()).tolist()
    bias = [0.0] * moe.experts if gate.correction is None else gate.correction.tolist()
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = moe.experts // moe.groups
    groups = [range(g * size, (g + 1) * size) for g in range(moe.groups)]
    counted = 2 if moe.gate == "sigmoid" else 1
    value = [sum(sorted((choice[e] for e in group), reverse=True)[:counted]) for group in groups]
    kept = sorted(range(moe.groups), key=lambda g: -value[g])[: moe.top_groups]
    allowed = [e for g in kept for e in groups[g]]
    best = sorted(allowed, key=lambda e: -choice[e])[: moe.top_k]
    total = sum(scores[e] for e in best) if moe.normalise else 1.0
    return {e: scores[e] / total * moe.scale for e in best}


@CONFIGS
def test_the_gate_chooses_as_published(config: MoeConfig) -> None:
    gate, x = random_moe(config).gate, tokens(200)
    weights, experts = gate(x)
    for row, token in enumerate(x):
        expected = choose(token, gate)
        got = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        assert got.keys() == expected.keys()
        assert all(abs(got[e] - expected[e]) < 1e-5 * config.scale for e in expected)


def test_groups_and_the_correction_change_the_choice() -> None:
    """Otherwise the test above shows nothing."""
    gate, x = random_moe(V3).gate, tokens(200)
    chosen = gate(x)[1].sort().values
    free = copy.deepcopy(gate)
    free.moe = MoeConfig(**{**vars(V3), "groups": 1, "top_groups": 1})
    plain = copy.deepcopy(gate)
    assert plain.correction is not None
    plain.correction.zero_()
    for other in (free, plain):
        assert (other(x)[1].sort().values != chosen).any(1).float().mean() > 0.2


def test_experts_of_dropped_groups_are_never_chosen() -> None:
    """Also where every corrected score is below zero, so that a mask of zeros would win."""
    gate, x = random_moe(V3).gate, tokens(200)
    before = gate(x)
    assert gate.correction is not None
    gate.correction -= 9.0  # the same for all: no choice may change
    after = gate(x)
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(after[1], before[1])
    assert (after[1] // 3).unique(dim=1).shape[0] == 200 and max(len(set(row)) for row in (after[1] // 3).tolist()) <= 2


def test_the_gate_computes_in_float32_whatever_the_model_runs_in() -> None:
    exact = random_moe(V3).gate
    with torch.no_grad():
        exact.weight.copy_(exact.weight.bfloat16())
    narrow, x = copy.deepcopy(exact).to(torch.bfloat16), tokens(200).bfloat16()
    weights, experts = narrow(x)
    assert weights.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip((weights, experts), exact(x.float()), strict=True))


def test_the_correction_keeps_its_digits_when_the_model_is_cast() -> None:
    gate = random_moe(V3).gate
    assert gate.correction is not None
    before = gate.correction.clone()
    cast = gate.to(torch.bfloat16)
    assert cast.weight.dtype == torch.bfloat16 and cast.correction is not None
    assert cast.correction.dtype == torch.float32 and torch.equal(cast.correction, before)
    with torch.device("meta"):
        empty = Gate(SIZE, V3)
    built = empty.to(torch.bfloat16).to_empty(device="cpu").correction
    assert built is not None and (built.dtype, built.device.type) == (torch.float32, "cpu")


# experts


def loop(x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    """The oracle: expert by expert, on the tokens that chose it."""
    out = torch.zeros_like(x)
    for e, (gate_up, down) in enumerate(zip(experts.gate_up, experts.down, strict=True)):
        rows, places = torch.nonzero(chosen == e, as_tuple=True)
        gate, up = (x[rows] @ gate_up.T).chunk(2, dim=-1)
        out = out.index_add(0, rows, (F.silu(gate) * up @ down.T) * weights[rows, places, None])
    return out


Run = Callable[[Experts, Tensor, Tensor, Tensor], Tensor]
WAYS: dict[str, Run] = {"as chosen": Experts.forward, "grouped": Experts._grouped, "dense": Experts._dense}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 2, 7, 64])
@CONFIGS
def test_experts_are_a_loop_over_experts(config: MoeConfig, count: int, way: str) -> None:
    made, x = random_moe(config), tokens(count)
    weights, chosen = made.gate(x)
    if count <= 2:
        assert len(chosen.unique()) < config.experts  # some have no token at all
    got = WAYS[way](made.experts, x, weights, chosen)
    torch.testing.assert_close(got, loop(x, weights, chosen, made.experts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chosen", [[[0, 1]] * 5, [[5, 4]] * 5, [[3, 0]]], ids=["the first", "the last", "one token"])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_that_all_choose_alike(way: str, chosen: list[list[int]]) -> None:
    made, ids = random_moe(QWEN), torch.tensor(chosen)
    x, weights = tokens(len(ids)), torch.rand(ids.shape)
    torch.testing.assert_close(WAYS[way](made.experts, x, weights, ids), loop(x, weights, ids, made.experts))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_loop(way: str) -> None:
    made, towards = random_moe(QWEN), tokens(9, seed=5)

    def gradients(run: Run) -> list[Tensor]:
        x = tokens(9).requires_grad_()
        weights, chosen = made.gate(x)
        wanted = [x, made.gate.weight, made.experts.gate_up, made.experts.down]
        return list(torch.autograd.grad(run(made.experts, x, weights, chosen), wanted, towards))

    expected = gradients(lambda experts, x, weights, chosen: loop(x, weights, chosen, experts))
    for got, reference in zip(gradients(WAYS[way]), expected, strict=True):
        assert reference.abs().max() > 0.01
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [1, 3000])
def test_chunks_bound_the_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    made, x = random_moe(QWEN), tokens(50)
    weights, chosen = made.gate(x)
    whole = made.experts._dense(x, weights, chosen)
    sizes: list[int] = []
    one = Experts._all_experts
    monkeypatch.setattr(Experts, "_all_experts", lambda self, x, *rest: (sizes.append(len(x)), one(self, x, *rest))[1])
    monkeypatch.setattr(module, "CHUNK_BYTES", limit)
    torch.testing.assert_close(made.experts._dense(x, weights, chosen), whole)
    each = 6 * 16 * 4
    assert sum(sizes) == 50 and max(sizes) == max(limit // each, 1) < 50


@pytest.mark.parametrize(("size", "inner"), [(16, 5), (6, 8)])
def test_sizes_that_grouped_matmuls_do_not_take(size: int, inner: int) -> None:
    config = MoeConfig(experts=6, top_k=2, inner_size=inner, gate="softmax", normalise=True)
    made, x = random_moe(config, size), tokens(20, size)
    assert not can_group(x, inner) and can_group(tokens(1), 8)
    weights, chosen = made.gate(x)
    expected = loop(x, weights, chosen, made.experts)
    torch.testing.assert_close(made.experts(x, weights, chosen), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_rounds_once_per_expert(way: str) -> None:
    made, x = random_moe(QWEN), tokens(40).bfloat16()
    weights, chosen = made.gate(x.float())
    expected = loop(x.float(), weights, chosen, made.experts)
    got = WAYS[way](copy.deepcopy(made.experts).to(torch.bfloat16), x, weights, chosen)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.01 * expected.norm()


# the block


@CONFIGS
def test_the_block_adds_the_shared_expert(config: MoeConfig) -> None:
    made, x = random_moe(config), tokens(12)
    routed = loop(x, *made.gate(x), made.experts)
    expected = routed if made.shared is None else routed + made.shared(x)
    assert (made.shared is None) == (config.shared_size == 0)
    torch.testing.assert_close(made(x.view(3, 4, SIZE)), expected.view(3, 4, SIZE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_no_value_is_read_and_no_shape_depends_on_one(way: str) -> None:
    """Fake tensors have no values: what needs one raises, as it would while a graph is recorded."""
    made, x = random_moe(V3).to(torch.bfloat16), tokens(7).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x = fake.from_tensor(x)
        weights, chosen = made.gate(x)
        assert WAYS[way](made.experts, x, weights, chosen).shape == (7, SIZE)
        with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
            loop(x, weights, chosen, made.experts)


@pytest.mark.parametrize("way", WAYS)
def test_a_replay_routes_anew(way: str) -> None:
    """Recorded with some tokens and replayed with others, over poisoned memory: equal to the eager pass."""
    made, x = random_moe(V3), tokens(6)

    def body() -> Tensor:
        weights, chosen = made.gate(x)
        return WAYS[way](made.experts, x, weights, chosen)

    with torch.inference_mode():
        first = made.gate(x)[1]
        out, recording = TapeRecorder(poison_between_replays=True).record(body)
        for seed in range(2, 6):
            x.copy_(tokens(6, seed=seed))
            recording.replay()
            assert torch.equal(out, body())
            assert not torch.equal(made.gate(x)[1], first)


@CONFIGS
def test_routing_under_autocast_is_that_of_serving(config: MoeConfig) -> None:
    gate, x = random_moe(config).gate, tokens(64)
    with torch.autocast("cpu", torch.bfloat16):
        weights, experts = gate(x)
    expected, chosen = gate(x)
    assert torch.equal(experts, chosen) and torch.equal(weights, expected)
