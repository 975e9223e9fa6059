"""A loss in the fastest form whose gradients are finite: compiled, recorded or eager.

Must never know what is trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from speculator.train.recording import Loss, Record, RecordedLoss, record_cuda
from speculator.train.report import DivergedError


def finite_loss(
    eager: Loss, modules: Sequence[nn.Module], inputs: tuple[Any, ...], compiled: bool, record: Record = record_cuda
) -> Loss:
    """`eager`, compiled or else recorded where wanted and its gradients on `inputs` are finite then.

    torch 2.11 compiles some backward passes into NaN: better slow than lost. DivergedError if eager's are not finite.
    """
    fast: dict[str, Callable[[], Loss]] = {
        "compiled": lambda: torch.compile(eager, dynamic=False),
        "recorded": lambda: RecordedLoss(eager, modules, inputs, record),
    }
    for name, make in fast.items() if compiled else ():
        try:
            loss, broken = _tried(name, make, modules, inputs)
        except RuntimeError as error:
            print(f"[{name} loss] refused: {(str(error).splitlines() or [''])[0]}", flush=True)
            continue
        if not broken:
            return loss
    _, broken = _tried("eager", lambda: eager, modules, inputs)
    if broken:
        raise DivergedError(f"the loss has gradients that are not finite, first those of {broken[0]}")
    return eager


def _tried(
    name: str, make: Callable[[], Loss], modules: Sequence[nn.Module], inputs: tuple[Any, ...]
) -> tuple[Loss, list[str]]:
    """A loss, and the parameters whose gradients on `inputs` are not finite; no gradient is left behind."""
    begin = time.monotonic()
    try:
        loss = make()
        value = loss(*inputs)[0]
        value.backward()
        named = [pair for module in modules for pair in module.named_parameters()]
        broken = [key for key, p in named if p.grad is not None and not p.grad.isfinite().all()]
    finally:
        for module in modules:
            module.zero_grad(set_to_none=True)
    seconds = time.monotonic() - begin
    print(f"[{name} loss] {float(value.detach()):.4g}, first gradients after {seconds:.1f} s", flush=True)
    if broken:
        print(f"[{name} loss] gradients are not finite: {', '.join(broken)}", flush=True)
    return loss, broken
