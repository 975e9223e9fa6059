"""Balance of experts, all of them in one product, and losses as a GPU runs them: compiled, in half precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from speculator.heads.base import DraftHead
from speculator.train.experts import LOAD, Balance, prepare_experts
from speculator.train.head import Rows, head_loss
from speculator.train.model import new_head, new_target, target_config
from speculator.train.optim import Optimizers
from speculator.train.pretrain import language_loss
from speculator.train.recipe import Head, Learning, MlaRecipe, MoeRecipe, TargetRecipe
from target.config_moe import MoeConfig
from target.decoder import Decoder
from target.moe import Gate, MoE

SIZES = TargetRecipe(
    hidden_size=32, layers=2, heads=4, intermediate_size=48,
    mla=MlaRecipe(rank=16, nope_dim=8, rope_dim=4, value_dim=8, q_rank=12),
    moe=MoeRecipe(experts=4, top_k=2, inner_size=16),
)  # fmt: skip
HEAD = Head(kind="mtp", seconds=1, steps=1, rows=2, length=20, unroll=3, acceptance=0.3, alive=0.5)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pair() -> tuple[Decoder, DraftHead]:
    model = new_target(target_config(SIZES, 64), seed=0)
    return model, new_head(model, HEAD, (), seed=1)


def some_rows() -> Rows:
    tokens = torch.randint(5, 64, (2, 20), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([[0] * 20, [0] * 9 + [1] * 11], dtype=torch.int16)
    positions = torch.cat((torch.arange(20)[None], torch.cat((torch.arange(9), torch.arange(11)))[None]))
    return Rows(tokens, documents, positions, torch.ones(2, 20, dtype=torch.bool))


def loads(*models: torch.nn.Module) -> list[Tensor]:
    return [m.get_buffer(LOAD).clone() for model in models for m in model.modules() if isinstance(m, Gate)]


def mixture() -> MoE:
    """A mixture whose gate all but never chooses the last two experts, where the first input is 1."""
    moe = MoE(16, MoeConfig(experts=8, top_k=2, inner_size=8, gate="sigmoid", normalise=True))
    with torch.no_grad():
        moe.gate.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(0))
        moe.gate.weight[6:, 0] = -5.0
    return moe


def lopsided() -> MoE:
    """The same, ready to learn."""
    moe = mixture()
    prepare_experts(moe)
    return moe


def test_the_correction_brings_idle_experts_to_work_and_leaves_the_weights_alone() -> None:
    moe, x = lopsided(), torch.randn(1, 400, 16, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1.0
    before, balance, excess = moe.gate.weight.clone(), Balance(moe), list[float]()
    for step in range(600):
        moe(x)
        if step in (0, 599):
            load = loads(moe)[0]
            assert (load[6:] < 20).all() if step == 0 else (load > 60).all()  # 100 is the mean
        balance.step(0.002)
        assert balance.excess is not None
        excess.append(float(balance.excess))
    assert excess[0] > 0.5 and excess[-1] < 0.2
    weights, chosen = moe.gate(x[0])
    scores = (x[0] @ before.T).sigmoid().gather(1, chosen)  # the correction is no part of what the chosen count
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True))


def test_only_passes_that_train_are_counted() -> None:
    moe = lopsided()
    with torch.no_grad():
        moe(torch.rand(1, 5, 16))
    assert loads(moe)[0].sum() == 0
    moe(torch.rand(1, 5, 16))
    assert loads(moe)[0].sum() == 10
    Balance(moe).step(0.0)
    assert loads(moe)[0].sum() == 0


def test_counts_are_no_part_of_what_is_saved_and_copies_keep_working() -> None:
    moe = lopsided()
    assert not any(LOAD in name for name in moe.state_dict())
    x, half = torch.rand(1, 64, 16), copy.deepcopy(moe).to(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(half(x.bfloat16()).float(), moe(x), atol=0.02, rtol=0.05)


def test_optimizers_balance_at_the_pace_of_the_schedule() -> None:
    model, _ = pair()
    optimizers = Optimizers(model, Learning(balance=0.01, warmup=0.0, final=0.0))
    tokens = torch.randint(5, 64, (2, 21))
    gate = next(m for m in model.modules() if isinstance(m, Gate))
    assert gate.correction is not None
    for progress, pace in ((0.0, 0.01), (0.5, 0.005)):
        language_loss(model, tokens, torch.ones(2, 20), torch.zeros(2, 20))[0].backward()
        before = gate.correction.clone()
        optimizers.step(progress)
        moved = (gate.correction - before).abs()
        torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], pace))
        assert len(moved[moved > 0]) and optimizers.state()["excess"] > 0


def test_a_joint_loss_teaches_the_target_and_its_tables() -> None:
    model, head = pair()
    head_loss(head, model, some_rows(), HEAD, torch.tensor(0.0), labels=torch.tensor(1.0))[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(load.sum() > 0 for load in loads(model, head))
    model, head = pair()
    model.requires_grad_(False)
    head_loss(head, model, some_rows(), HEAD, torch.tensor(0.0))[0].backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in head.parameters())
    assert [bool(load.sum() > 0) for load in loads(model, head)] == [False, True]


def test_experts_in_training_are_those_that_are_served() -> None:
    """In values, in gradients of input, gate and experts, and under the same names."""
    served, x = mixture(), torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(4))
    trained = copy.deepcopy(served)
    prepare_experts(trained)
    assert list(trained.state_dict()) == list(served.state_dict())
    outs, grads = [], []
    for moe in (served, trained):
        own = x.clone().requires_grad_()
        outs.append(moe(own))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), [own, *moe.parameters()]))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-8)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


class HalfPrecision(torch.autocast):
    """Autocast as it is on a GPU, on the CPU."""

    def __init__(self, device: str, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
        super().__init__(device, torch.bfloat16, enabled or dtype is not None)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", HalfPrecision)


def losses(model: Decoder, head: DraftHead, rows: Rows) -> tuple[Tensor, Tensor]:
    weights = torch.ones(2, 19)
    likely, unlikely = language_loss(model, rows.tokens, weights, weights)
    return likely + unlikely + head_loss(head, model, rows, HEAD, torch.tensor(0.3), labels=torch.tensor(1.0))[
        0
    ], likely


def outcome(run: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Loss, gradients and loads of one joint step of a fresh pair."""
    model, head = pair()
    value, _ = run(model, head, some_rows())
    value.backward()
    gradients = [p.grad for m in (model, head) for p in m.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    return value.detach(), [g for g in gradients if g is not None], loads(model, head)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.usefixtures("as_on_a_gpu")
def test_losses_compile_whole_and_equal_eager_ones() -> None:
    eager = outcome(losses)
    compiled = outcome(torch.compile(losses, dynamic=False, fullgraph=True, backend="eager"))
    torch.testing.assert_close(compiled, eager)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_half_precision_moves_the_loss_little(request: pytest.FixtureRequest) -> None:
    exact = outcome(losses)[0]
    request.getfixturevalue("as_on_a_gpu")
    torch.testing.assert_close(outcome(losses)[0], exact, atol=0.1, rtol=0.02)
