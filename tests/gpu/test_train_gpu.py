"""Training on a CUDA device: losses compiled and recorded, and the chunk kernel of gated deltas beside torch."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from test_deltanet_chunks_kernel import rule, song
from test_train_recording import Pair
from test_train_recording import some_rows as toy_rows

from speculator.train.finite import finite_loss
from speculator.train.head import Rows, head_loss
from speculator.train.model import new_head, new_target, target_config
from speculator.train.pretrain import language_loss
from speculator.train.recipe import bundled_recipe, load_recipe
from speculator.train.recording import RecordedLoss, record_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
ROWS, LENGTH = 4, 128


def some_rows() -> Rows:
    """Two documents a row and padding."""
    documents = torch.tensor([0] * 50 + [1] * 60 + [-1] * 18, dtype=torch.int16, device="cuda").expand(ROWS, -1)
    positions = torch.cat((torch.arange(50), torch.arange(60), torch.zeros(18, dtype=torch.int64))).cuda()
    tokens = torch.randint(5, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).cuda()
    return Rows(tokens, documents.contiguous(), positions.expand(ROWS, -1).contiguous(), documents == 1)


@pytest.mark.parametrize("name", ["toy-moe", "toy-hybrid"])
def test_joint_losses_survive_being_fast(name: str) -> None:
    """Otherwise training falls back to eager passes, at half the speed."""
    recipe = load_recipe(bundled_recipe(name))
    model = new_target(target_config(recipe.target, 512), seed=1).cuda()
    head = new_head(model, recipe.head, recipe.taps, 1)
    none, labels = (torch.tensor(x, device="cuda") for x in (0.0, 0.5))

    def loss(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.ones(ROWS, LENGTH - 1, device="cuda")
        likely, _ = language_loss(model, rows.tokens, weights, weights)
        joint, agreement = head_loss(head, model, rows, recipe.head, none, labels)
        return likely + joint, agreement

    chosen = finite_loss(loss, (model, head), (some_rows(),), compiled=True)
    assert chosen is not loss
    torch.testing.assert_close(chosen(some_rows())[0], loss(some_rows())[0], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", ["toy", "toy-moe", "toy-hybrid"])
def test_a_recorded_loss_has_the_gradients_of_the_eager_one_while_parameters_move(name: str) -> None:
    pair = Pair(name, "cuda")
    inputs = (Rows(*(part.cuda() for part in toy_rows(0))), pair.acceptance)
    recorded = RecordedLoss(pair.joint, pair.modules, inputs, record_cuda)
    for seed in (1, 2, 3):
        pair.step()  # what gates counted so far is forgotten
        found, gradients, counts = pair.backward(recorded, seed), pair.take_gradients(), pair.counts()
        wanted = pair.backward(pair.joint, seed)
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)
        torch.testing.assert_close(pair.counts(), [2 * count for count in counts], rtol=0, atol=2)  # near ties may turn
        parameters = {key: p for module in pair.modules for key, p in module.named_parameters()}
        assert gradients.keys() == {key for key, p in parameters.items() if p.grad is not None}
        for key, gradient in gradients.items():
            assert (gradient - parameters[key].grad).norm() <= 0.01 * gradient.norm(), key


@pytest.mark.parametrize("name", ["square", "wide values", "one head"])
def test_the_chunk_kernel_is_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("highest")
    parts = [part.detach().cuda().requires_grad_() for part in song(name, 150)]
    weights = torch.randn(parts[2].shape, device="cuda")
    ours = rule(*parts)
    monkeypatch.setenv("SPECULATOR_ATTENTION", "torch")
    theirs = rule(*parts)
    assert "chunks" in str(ours.grad_fn) and "chunks" not in str(theirs.grad_fn)
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)
    for one, other in zip(*(torch.autograd.grad((x * weights).sum(), parts) for x in (ours, theirs)), strict=True):
        assert (one - other).norm() < 0.01 * other.norm()
