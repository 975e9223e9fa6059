"""Losses recorded with their gradients, on a recorder that, as CUDA's, computes nothing until it is replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from speculator.train.experts import LOAD
from speculator.train.finite import finite_loss
from speculator.train.head import Rows, head_loss
from speculator.train.model import new_head, new_target, target_config
from speculator.train.optim import Optimizers
from speculator.train.pretrain import language_loss
from speculator.train.recipe import bundled_recipe, load_recipe
from speculator.train.recording import Loss, Recorded, RecordedLoss

R, L = 2, 12


def tape(run: Callable[[], Recorded]) -> tuple[Recorded, Callable[[], None]]:
    kept = run()
    for tensor in tree_leaves(kept):
        tensor.fill_(float("nan"))

    @torch.enable_grad()
    def again() -> None:
        for old, new in zip(tree_leaves(kept), tree_leaves(run()), strict=True):
            old.copy_(new)

    return kept, again


def refuse(run: Callable[[], Recorded]) -> tuple[Recorded, Callable[[], None]]:
    raise RuntimeError("operation not permitted when stream is capturing\nsecond line")


def some_rows(seed: int) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    documents = torch.tensor([[0] * 5 + [1] * 5 + [-1] * 2]).expand(R, -1)
    positions = torch.tensor([[*range(5), *range(5), 0, 0]]).expand(R, -1)
    return Rows(torch.randint(5, 64, (R, L), generator=draw), documents, positions, documents == 1)


class Pair:
    """A toy of a pair, and one step of training both as a joint phase does it."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        recipe = load_recipe(bundled_recipe(name))
        self.model = new_target(target_config(recipe.target, 64), seed=1).to(device)
        self.head = new_head(self.model, recipe.head, recipe.taps, 1)
        self.modules = (self.head, self.model)
        self.acceptance, self._labels = torch.tensor([0.0, 0.5], device=device).unbind()
        self._shape = replace(recipe.head, unroll=2)
        self._optimizers = [Optimizers(module, recipe.head.learning) for module in self.modules]

    def joint(self, rows: Rows, acceptance: Tensor) -> tuple[Tensor, Tensor]:
        return head_loss(self.head, self.model, rows, self._shape, acceptance, self._labels)

    def backward(self, loss: Loss, seed: int) -> list[Tensor]:
        """(loss, agreement); gradients of the target's own loss come first."""
        rows = Rows(*(part.to(self.acceptance.device) for part in some_rows(seed)))
        weights = torch.ones(R, L - 1, device=rows.tokens.device)
        language_loss(self.model, rows.tokens, weights, weights)[0].backward()
        value, agreement = loss(rows, self.acceptance + seed / 10)
        (value * 0.3).backward()
        return [value.detach(), agreement]

    def take_gradients(self) -> dict[str, Tensor]:
        """Those there are, by name; none is left behind."""
        named = [pair for module in self.modules for pair in module.named_parameters()]
        taken = {name: p.grad for name, p in named if p.grad is not None}
        for module in self.modules:
            module.zero_grad(set_to_none=True)
        return taken

    def counts(self) -> list[Tensor]:
        """How often gates chose each expert since the last step."""
        named = [pair for module in self.modules for pair in module.named_buffers()]
        return [buffer.clone() for name, buffer in named if name.endswith(f".{LOAD}")]

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step(0.5)


def test_a_recorded_loss_trains_as_the_eager_one() -> None:
    ours = Pair("toy-moe")
    recorded = RecordedLoss(ours.joint, ours.modules, (some_rows(0), ours.acceptance), tape)
    theirs = copy.deepcopy(ours)  # after the recording, which counts what gates choose
    start = copy.deepcopy(theirs.head.state_dict())
    for seed in (1, 2, 3):
        torch.testing.assert_close(ours.backward(recorded, seed), theirs.backward(theirs.joint, seed))
        ours.step()
        theirs.step()
    for one, other in zip(ours.modules, theirs.modules, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(start[name], p) for name, p in ours.head.named_parameters())


def test_what_a_recorded_loss_cannot_answer_for() -> None:
    module = torch.nn.Linear(3, 1)
    frozen = torch.nn.Linear(3, 1).requires_grad_(False)

    def loss(rows: Tensor) -> tuple[Tensor, Tensor]:
        return (module(rows) * frozen(rows)).sum(), rows.sum()

    recorded = RecordedLoss(loss, (module, frozen), (torch.ones(2, 3),), tape)
    first, _ = recorded(torch.ones(2, 3))
    value, watched = recorded(torch.full((2, 3), 2.0))
    assert not watched.requires_grad and watched == 12 and value != first
    with pytest.raises(RuntimeError, match="before its next call"):
        first.backward()
    with pytest.raises(ValueError, match=r"recorded with \[2, 3\], not \[1, 3\]"):
        recorded(torch.ones(1, 3))


@pytest.mark.parametrize(("record", "best"), [(tape, RecordedLoss), (refuse, type(lambda: 0))])
def test_a_loss_that_compiles_into_nan_is_recorded_where_it_can_be(
    record: Callable[..., tuple[Recorded, Callable[[], None]]],
    best: type,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = torch.nn.Linear(3, 1)

    def loss(rows: Tensor) -> tuple[Tensor, Tensor]:
        return module(rows).sum(), rows

    def broken(rows: Tensor) -> tuple[Tensor, Tensor]:
        return module(rows).sum() * float("nan"), rows

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: broken)
    found = finite_loss(loss, (module,), (torch.ones(2, 3),), compiled=True, record=record)
    assert isinstance(found, best) and module.weight.grad is None
    said = capsys.readouterr().out
    assert ("[recorded loss] refused: operation not permitted" in said) == (record is refuse)
    assert ("[eager loss]" in said) == (record is refuse) and "second line" not in said
