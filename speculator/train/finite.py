"""A loss that is compiled where its gradients survive that.

Must never know what is trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from speculator.train.report import DivergedError

Loss = Callable[..., tuple[Tensor, Tensor]]  # the loss, and something to watch


def finite_loss(eager: Loss, modules: Sequence[nn.Module], inputs: tuple[Any, ...], compiled: bool) -> Loss:
    """`eager`, compiled where wanted if its gradients on `inputs` are finite then; DivergedError if eager's are not.

    torch 2.11 compiles some backward passes of masked attention into NaN: better slow than lost.
    """
    tried: list[Loss] = [torch.compile(eager, dynamic=False)] if compiled else []
    for loss in (*tried, eager):
        begin = time.monotonic()
        value = loss(*inputs)[0]
        value.backward()
        broken = _not_finite(modules)
        for module in modules:
            module.zero_grad(set_to_none=True)
        how, seconds = "compiled" if loss is not eager else "eager", time.monotonic() - begin
        print(f"[{how} loss] {float(value.detach()):.4g}, first gradients after {seconds:.1f} s", flush=True)
        if not broken:
            return loss
        print(f"[{how} loss] gradients are not finite: {', '.join(broken)}", flush=True)
    raise DivergedError(f"the loss has gradients that are not finite, first those of {broken[0]}")


def _not_finite(modules: Sequence[nn.Module]) -> list[str]:
    named = [pair for module in modules for pair in module.named_parameters()]
    return [name for name, parameter in named if parameter.grad is not None and not parameter.grad.isfinite().all()]
