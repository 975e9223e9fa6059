"""The Triton kernels of chunked gated deltas beside their torch twin, on the interpreter: results and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gqa import interpreted, on_the_interpreter  # noqa: F401
from torch import Tensor

from target import deltanet_chunks
from target.deltanet import DeltaRows
from target.deltanet_chunks import chunked_delta_rule

SIZES = {"square": (2, 4, 16, 16), "wide values": (1, 3, 16, 32), "one head": (1, 1, 32, 16)}


def song(name: str, length: int, rows: int = 2) -> tuple[Tensor, ...]:
    """q, k, v, decay and beta; some tokens forget all, some keys are alike."""
    key_heads, heads, keys, values = SIZES[name]
    made = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, rows, length, key_heads, keys, generator=made).unbind()
    k[:, length // 3 : length // 2] = k[:, :1]
    v = torch.randn(rows, length, heads, values, generator=made)
    decay, beta = torch.rand(2, rows, length, heads, generator=made).unbind()
    decay = decay**0.1
    decay[0, length // 2] = 0
    decay[-1, length - 1 :, 0] = 0
    parts = (torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1), v, decay, beta)
    return tuple(part.requires_grad_() for part in parts)


def rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    return chunked_delta_rule(q, DeltaRows(v, k, v, decay, beta))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function where the kernel is chosen."""

    def call(run: Any, *parts: Any) -> Any:
        with monkeypatch.context() as here:
            here.setattr(deltanet_chunks, "kernels_need", lambda device: "")
            return run(*parts)

    return call


@on_the_interpreter
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("length", [1, 32, 75])
def test_results_and_gradients_are_those_of_torch(kernel: Any, name: str, length: int) -> None:
    parts = song(name, length)
    weights = torch.randn(parts[2].shape, generator=torch.Generator().manual_seed(1))
    outs = [kernel(rule, *parts), rule(*parts)]
    assert "chunks" in str(outs[0].grad_fn) and "chunks" not in str(outs[1].grad_fn)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad((out * weights).sum(), parts) for out in outs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@on_the_interpreter
def test_a_compiled_loss_takes_the_kernel_whole(kernel: Any) -> None:
    def loss(*parts: Tensor) -> Tensor:
        return rule(*parts).square().sum()

    parts = song("square", 40)
    compiled = torch.compile(loss, dynamic=False, fullgraph=True, backend="aot_eager")
    values = [kernel(compiled, *parts), loss(*parts)]
    torch.testing.assert_close(*values)
    for ours, theirs in zip(*(torch.autograd.grad(v, parts) for v in values), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@on_the_interpreter
def test_sizes_that_no_kernel_takes_are_left_to_torch(kernel: Any) -> None:
    q, k, v, decay, beta = song("square", 5)
    torch.testing.assert_close(
        kernel(rule, q[..., :8], k[..., :8], v, decay, beta), rule(q[..., :8], k[..., :8], v, decay, beta)
    )
    sizes = ((16, 64), (128, 128), (16, 24))
    assert [kernel(deltanet_chunks._kernel_runs, q.device, *s) for s in sizes] == [True, False, False]
