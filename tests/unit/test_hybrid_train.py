"""Training of hybrids: packed documents that leave no state behind, losses as a GPU runs them, recipes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speculator.heads.base import DraftHead
from speculator.train.attention import packed_attend
from speculator.train.head import Rows, head_loss
from speculator.train.model import new_head, new_target, target_config
from speculator.train.optim import split_parameters
from speculator.train.pretrain import language_loss
from speculator.train.recipe import DeltaRecipe, Head, RecipeError, TargetRecipe, bundled_recipe, load_recipe
from target.attention.dense import dense_attend
from target.decoder import Decoder
from target.deltanet import GatedDeltaNet
from target.deltanet_chunks import CHUNK, UnitLowerInverse, unit_lower_inverse

SIZES = TargetRecipe(
    hidden_size=32, layers=4, heads=4, kv_heads=2, head_dim=8, intermediate_size=48,
    delta=DeltaRecipe(key_heads=2, value_heads=4, key_dim=8, value_dim=8),
)  # fmt: skip
HEAD = Head(kind="mtp", seconds=1, steps=1, rows=2, length=20, unroll=3, acceptance=0.3, alive=0.5)
LENGTHS = [5, CHUNK - 3, 1, 70, 2]  # documents that begin and end anywhere in a chunk


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pair() -> tuple[Decoder, DraftHead]:
    model = new_target(target_config(SIZES, 64), seed=0)
    return model, new_head(model, HEAD, (), seed=1)


def packed_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, document numbers and positions [1, T] of LENGTHS in a row."""
    tokens = torch.randint(5, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    documents = torch.cat([torch.full((n,), i, dtype=torch.int16) for i, n in enumerate(LENGTHS)])
    return tokens, documents[None], torch.cat([torch.arange(n) for n in LENGTHS])[None]


def test_packed_documents_are_those_that_stand_alone() -> None:
    """In values and in gradients of every weight."""
    model, (tokens, documents, positions) = pair()[0], packed_rows()
    weights = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(3))
    together = model(tokens, positions, packed_attend(documents, model.config)).final[0]
    each = [model(part, torch.arange(part.shape[1])[None], dense_attend(model.config)).final[0]
            for part in tokens.split(LENGTHS, dim=1)]  # fmt: skip
    torch.testing.assert_close(together, torch.cat(each), rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad((out * weights).sum(), list(model.layers.parameters()))
             for out in (together, torch.cat(each))]  # fmt: skip
    for ours, alone in zip(*grads, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-4)


def test_what_stands_before_a_document_does_not_matter() -> None:
    model, (tokens, documents, positions) = pair()[0], packed_rows()
    changed, start = tokens.clone(), sum(LENGTHS[:3])
    changed[:, :start] = (tokens[:, :start] + 7) % 64
    outs = [model(t, positions, packed_attend(documents, model.config)).final[:, start:] for t in (tokens, changed)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alike", [0.0, 0.9, 1.0])
def test_the_inverse_holds_where_keys_are_alike(alike: float) -> None:
    noise = torch.rand(3, CHUNK, CHUNK, generator=torch.Generator().manual_seed(1)) * 2 - 1
    lower = (alike + (1 - alike) * noise).tril(-1)
    exact = torch.linalg.inv(torch.eye(CHUNK, dtype=torch.float64) + lower.double())
    ours = unit_lower_inverse(lower).double()
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_the_gradient_of_the_inverse_is_that_of_its_steps() -> None:
    lower = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = [lower.clone().requires_grad_(), lower.clone().requires_grad_()]
    weights = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for part, inverse in zip(parts, (UnitLowerInverse.apply, unit_lower_inverse), strict=True):
        (inverse(part.tril(-1)) * weights).sum().backward()
    assert parts[0].grad is not None
    torch.testing.assert_close(parts[0].grad, parts[1].grad)


class HalfPrecision(torch.autocast):
    """Autocast as it is on a GPU, on the CPU."""

    def __init__(self, device: str, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
        super().__init__(device, torch.bfloat16, enabled or dtype is not None)


def some_rows() -> Rows:
    tokens = torch.randint(5, 64, (2, 20), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([[0] * 20, [0] * 9 + [1] * 11], dtype=torch.int16)
    positions = torch.cat((torch.arange(20)[None], torch.cat((torch.arange(9), torch.arange(11)))[None]))
    return Rows(tokens, documents, positions, torch.ones(2, 20, dtype=torch.bool))


def losses(model: Decoder, head: DraftHead, rows: Rows) -> Tensor:
    weights = torch.ones(2, 19)
    likely, _ = language_loss(model, rows.tokens, weights, weights)
    return likely + head_loss(head, model, rows, HEAD, torch.tensor(0.3), labels=torch.tensor(1.0))[0]


def outcome(run: Any) -> tuple[Tensor, list[Tensor]]:
    model, head = pair()
    value = run(model, head, some_rows())
    value.backward()
    return value.detach(), [p.grad for m in (model, head) for p in m.parameters()]  # type: ignore[misc]


def test_losses_compile_whole_and_equal_eager_ones() -> None:
    eager = outcome(losses)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = outcome(torch.compile(losses, dynamic=False, fullgraph=True, backend="eager"))
    torch.testing.assert_close(compiled, eager)
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in eager[1])


def test_half_precision_moves_the_loss_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrence itself stays in float32."""
    exact, dtypes = outcome(losses)[0], set()
    monkeypatch.setattr(torch, "autocast", HalfPrecision)
    inverse = unit_lower_inverse
    monkeypatch.setattr("target.deltanet_chunks.unit_lower_inverse", lambda x: (dtypes.add(x.dtype), inverse(x))[1])
    torch.testing.assert_close(outcome(losses)[0], exact, atol=0.1, rtol=0.02)
    assert dtypes == {torch.float32}


def test_new_targets_start_with_memories_of_many_lengths() -> None:
    model, head = pair()
    layer = next(m for m in model.modules() if isinstance(m, GatedDeltaNet))
    decay = (-layer.a_log.exp() * torch.nn.functional.softplus(layer.dt_bias)).exp()
    assert decay[0] > 0.99 and decay[-1] < 0.3
    assert [isinstance(m.attention, GatedDeltaNet) for m in model.layers] == [True, True, True, False]
    matrices, rest = split_parameters(model)
    assert all(p.dim() == 2 for p in matrices) and sum(p.dim() == 3 for p in rest) == 3
    assert not any(isinstance(m, GatedDeltaNet) for m in head.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("value_heads = 4", "value_heads = 3"), "value_heads 3 is no multiple of key_heads 2"),
        (("value_dim = 16 }", "value_dim = 16, every = 9 }"), "every 9 of 4 layers leaves no layers of both kinds"),
        (("value_dim = 16 }", "value_dim = 16, every = 1 }"), "every 1 of 4 layers"),
        (("layers = 4", "layers = 4\nmla = { rank = 8, nope_dim = 8, rope_dim = 4, value_dim = 8 }\n"
          "moe = { experts = 4, top_k = 2, inner_size = 8 }"), "delta goes with neither mla nor moe"),
        (("head_dim = 16\n", ""), "missing keys head_dim, kv_heads"),
        (("key_heads = 2, ", ""), "delta: missing keys key_heads"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_go_together_are_named(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    text = bundled_recipe("toy-hybrid").read_text("utf-8")
    assert change[0] in text
    (tmp_path / "r.toml").write_text(text.replace(*change), "utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.toml")
