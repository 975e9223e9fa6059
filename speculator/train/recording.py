"""A loss and its gradients as one recorded graph of the device: the same kernels, launched at once.

For losses of so many small kernels that the host cannot launch them as fast as they end. Must never know what is
trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Loss = Callable[..., tuple[Tensor, Tensor]]  # the loss, and something to watch
Recorded = tuple[Tensor, Tensor, Sequence[Tensor | None]]  # these two and the gradients, written anew by each replay
Record = Callable[[Callable[[], Recorded]], tuple[Recorded, Callable[[], None]]]

WARM = 3  # runs before a recording: libraries choose kernels and take workspaces in the first ones


def record_cuda(run: Callable[[], Recorded]) -> tuple[Recorded, Callable[[], None]]:
    """What `run` gives as a CUDA graph with a pool of its own, and its replay; RuntimeError where it waits for it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay


class RecordedLoss:
    """`eager` of static shapes with its gradients to the parameters of `modules`.

    Parameters, and what else `eager` reads beside its inputs, must stay where they are in memory. Draws no random
    numbers. Gradients live until the next call, so that backward comes before it.
    """

    def __init__(self, eager: Loss, modules: Sequence[nn.Module], inputs: tuple[Any, ...], record: Record) -> None:
        """`inputs` are tensors or tuples of tensors, none of which is differentiated."""
        self._inputs = tree_map(torch.clone, inputs)
        learning = [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]

        def run() -> Recorded:
            value, watched = eager(*self._inputs)
            return value.detach(), watched, torch.autograd.grad(value, learning, allow_unused=True)

        (self._value, self._watched, gradients), self._replay = record(run)
        pairs = [(p, g) for p, g in zip(learning, gradients, strict=True) if g is not None]
        self._parameters, self._gradients = [p for p, _ in pairs], [g for _, g in pairs]
        self.calls = 0

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        for mine, given in zip(tree_leaves(self._inputs), tree_leaves(inputs), strict=True):
            if mine.shape != given.shape:
                raise ValueError(f"the loss was recorded with {list(mine.shape)}, not {list(given.shape)}")
            mine.copy_(given)
        return _Replay.apply(self, *self._parameters)  # type: ignore[no-any-return, no-untyped-call]

    def replay(self) -> tuple[Tensor, Tensor]:
        """Loss and what is watched of the inputs copied last; their gradients are written too."""
        self._replay()
        self.calls += 1
        return self._value.clone(), self._watched.clone()

    def gradients(self, call: int, weight: Tensor) -> list[Tensor]:
        """Of a weight [] times the loss of that call. RuntimeError where a later one has overwritten them."""
        if call != self.calls:
            raise RuntimeError("backward of a recorded loss comes before its next call")
        return list(torch._foreach_mul(self._gradients, weight))


class _Replay(torch.autograd.Function):
    """The forward pass computes gradients too; the backward pass weighs them."""

    @staticmethod
    def forward(ctx: Any, loss: RecordedLoss, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        value, watched = loss.replay()
        ctx.loss, ctx.call = loss, loss.calls
        ctx.mark_non_differentiable(watched)
        return value, watched

    @staticmethod
    def backward(ctx: Any, weight: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.loss.gradients(ctx.call, weight)
