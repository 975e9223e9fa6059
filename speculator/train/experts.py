"""What training adds to mixtures of experts: an equal load without a loss of its own, and all experts in one product.

Owns: counting what each gate chooses, and moving its correction against the counts (Wang et al. 2024, arXiv
2408.15664). Must never know losses or files. Nothing is read on the host, so a compiled loss stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target.moe import Experts, Gate, MoE

LOAD = "load"  # [E] float32 buffer of a watched gate: how often each expert was chosen since the last step


def prepare_experts(model: nn.Module) -> None:
    """Make a model's experts ready to learn; once, before it is compiled. A model without any stays as it is."""
    for gate in _corrected(model):
        assert gate.correction is not None
        gate.register_buffer(LOAD, torch.zeros_like(gate.correction), persistent=False)
        gate.register_forward_hook(_count)
    for mixture in [m for m in model.modules() if isinstance(m, MoE)]:
        mixture.experts = MergedExperts(mixture.experts)


class MergedExperts(Experts):
    """All experts as one gated MLP whose inner units count as much as their expert does, which is 0 where not chosen.

    E / top_k times the work of the chosen ones, in two plain products of static shapes in autocast's type: for few
    small experts that is faster than sorting. The parameters are those of `experts`, under the same names.
    """

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.gate_up, self.down = experts.gate_up, experts.down

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [N, size], weights [N, k] float32 and experts [N, k] int64 of a Gate -> [N, size]."""
        ids = torch.arange(self.gate_up.shape[0], device=x.device)
        share = (weights[..., None] * (experts[..., None] == ids)).sum(1)  # no scatter: compiled, it would be atomics
        gate, up = F.linear(x, self.gate_up.flatten(0, 1)).unflatten(-1, (len(ids), -1)).chunk(2, dim=-1)
        inner = (F.silu(gate) * up * share[..., None]).to(x.dtype)
        return F.linear(inner.flatten(-2), self.down.transpose(0, 1).flatten(1))


def _count(gate: nn.Module, inputs: Any, chosen: tuple[Tensor, Tensor]) -> None:
    """In passes that train only."""
    if torch.is_grad_enabled():
        load = gate.get_buffer(LOAD)
        ids = torch.arange(load.shape[0], device=load.device)
        load.add_((chosen[1].flatten()[:, None] == ids).sum(0))


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
