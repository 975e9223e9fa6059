"""What training adds to mixtures of experts: an equal load without a loss of its own, and inputs in their precision.

Owns: counting what each gate chooses, and moving its correction against the counts (Wang et al. 2024, arXiv
2408.15664). Must never know losses or files. Nothing is read on the host, so a compiled loss stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from target.moe import Experts, Gate

LOAD = "load"  # [E] float32 buffer of a watched gate: how often each expert was chosen since the last step


def prepare_experts(model: nn.Module) -> None:
    """Make a model's experts ready to learn; once, before it is compiled. A model without any stays as it is."""
    for gate in _corrected(model):
        assert gate.correction is not None
        gate.register_buffer(LOAD, torch.zeros_like(gate.correction), persistent=False)
        gate.register_forward_hook(_count)
    for experts in (m for m in model.modules() if isinstance(m, Experts)):
        experts.register_forward_pre_hook(_as_stored)


def _count(gate: nn.Module, inputs: Any, chosen: tuple[Tensor, Tensor]) -> None:
    """In passes that train only."""
    if torch.is_grad_enabled():
        load = gate.get_buffer(LOAD)
        ids = torch.arange(load.shape[0], device=load.device)
        load.add_((chosen[1].flatten()[:, None] == ids).sum(0))


def _as_stored(experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped matmuls know no autocast: what autocast made narrower is widened to what they take."""
    x, weights, chosen = inputs
    return x.to(experts.get_parameter("down").dtype), weights.float(), chosen


def _corrected(model: nn.Module) -> list[Gate]:
    return [m for m in model.modules() if isinstance(m, Gate) and m.correction is not None]


class Balance:
    """The prepared gates of a model; one without any is balanced."""

    def __init__(self, model: nn.Module) -> None:
        self._gates = [gate for gate in _corrected(model) if LOAD in dict(gate.named_buffers(recurse=False))]
        self.excess: Tensor | None = None  # by how much the busiest expert exceeded the mean, mean over gates

    @torch.no_grad()
    def step(self, speed: float) -> None:
        """Move each correction by `speed`: up for experts chosen less often than the mean, down for the others."""
        excess = []
        for gate in self._gates:
            load, correction = gate.get_buffer(LOAD), gate.correction
            assert correction is not None
            correction.add_((load.mean() - load).sign(), alpha=speed)
            excess.append(load.max() / load.mean().clamp(min=1) - 1)
            load.zero_()
        self.excess = torch.stack(excess).mean() if excess else None
