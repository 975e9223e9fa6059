"""Optimizers and schedules that end in time.

Owns: Muon for matrices beside AdamW for the rest, progress by steps or seconds, the learning-rate curve. Must never
know losses or data.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from speculator.train.experts import Balance
from speculator.train.recipe import Learning

# rows are tokens, experts or channels: AdamW fits them better
CLASSES = ("embed.weight", "lm_head.weight", "gate.weight", "attention.conv")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Matrices of one shape are updated together, and so are stacks of them (experts), each matrix for itself. The update
    is scaled by sqrt(max(1, rows / columns)).
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for same in shapes.values():
                self._update(same, group)

    def _update(self, same: list[Tensor], group: dict[str, Any]) -> None:
        gradient = torch.stack([p.grad for p in same if p.grad is not None])
        memory = self.state[same[0]].setdefault("momentum", torch.zeros_like(gradient))
        memory.lerp_(gradient, 1 - group["momentum"])
        moved = gradient.lerp(memory, group["momentum"])
        update = orthogonalise(moved.flatten(0, -3)).view_as(moved).to(same[0].dtype)
        scale = math.sqrt(max(1.0, update.shape[-2] / update.shape[-1]))
        torch._foreach_mul_(same, 1 - group["lr"] * group["decay"])
        torch._foreach_add_(same, list(update), alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """[N, rows, columns] -> near U V^T of each, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = x.mT if tall else x
    return result


class Optimizers:
    """Muon and AdamW of one model as one, and the balance of its experts: `step` with a progress in 0..1."""

    def __init__(self, model: nn.Module, learning: Learning) -> None:
        self.learning = learning
        self.balance = Balance(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        matrices, rest = split_parameters(model) if learning.muon else ([], self.parameters)
        fused = rest[0].is_cuda
        decay = learning.weight_decay if learning.muon == 0 else learning.weight_decay / 10
        self._each: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=decay, fused=fused), learning.adam)
        ]
        if matrices:
            self._each.append((Muon(matrices, 0.0, decay=learning.weight_decay), learning.muon))

    def step(self, progress: float) -> None:
        nn.utils.clip_grad_norm_(self.parameters, self.learning.clip)
        factor = curve(progress, self.learning)
        for optimizer, peak in self._each:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.balance.step(self.learning.balance * factor)

    def state(self) -> dict[str, float]:
        """For a log line: how unevenly the experts were used last."""
        return {} if self.balance.excess is None else {"excess": float(self.balance.excess)}


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices for Muon, everything else)."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inner = parameter.dim() > 1 and not name.endswith(CLASSES)
            (matrices if inner else rest).append(parameter)
    return matrices, rest


def curve(progress: float, learning: Learning) -> float:
    """Factor on the peak rate at a progress in 0..1."""
    if progress < learning.warmup:
        return max(progress / learning.warmup, 0.02)
    left = (1 - progress) / (1 - learning.warmup)
    if learning.cosine:
        left = 0.5 * (1 - math.cos(math.pi * left))
    return learning.final + (1 - learning.final) * left


class Budget:
    """Progress in 0..1 by steps or by seconds, whichever is further; compilation in the first steps costs no rate."""

    def __init__(
        self, steps: int, seconds: float, settle: int = 3, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps, self.seconds, self.settle, self._clock = steps, seconds, settle, clock
        self._begin = clock()
        self._settled: float | None = None

    def elapsed(self) -> float:
        return self._clock() - self._begin

    def pace(self, step: int, tokens: int) -> dict[str, float]:
        """For a log line: seconds that the first steps took, compilation with them, and tokens a second since then.

        `tokens` are those of a step.
        """
        if self._settled is None:
            return {}
        since = max(self.elapsed() - self._settled, 1e-6)
        return {"settled": self._settled, "tokens_per_second": (step - self.settle) * tokens / since}

    def progress(self, step: int) -> float:
        by_steps = step / self.steps
        if step < self.settle:
            return by_steps if self.elapsed() < self.seconds else 1.0
        if self._settled is None:
            self._settled = self.elapsed()
        span = max(self.seconds - self._settled, 1e-6)
        return min(1.0, max(by_steps, (self.elapsed() - self._settled) / span))
