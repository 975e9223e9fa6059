"""Broken twins: a backend wrapped so that it breaks one rule, as real engines have done. The kit must reject them.

Owns: one wrapper for each way of breaking a rule. Must never know the wrapped backend, nor how it is caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphs.conformance import rules
from graphs.conformance.backend import Backend, Batch
from graphs.conformance.harness import Kit, over, values_of


class Twin(Backend):
    """The wrapped backend, unchanged; plans are wrapped so that a twin remembers the batch they were made over."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.traits = backend, backend.traits

    def make_cache(self, pages: int, page_size: int) -> Any:
        return self.backend.make_cache(pages, page_size)

    def write(self, cache: Any, layer: int, slots: Tensor, entries: Tensor) -> None:
        self.backend.write(cache, layer, slots, entries)

    def plan(self, cache: Any, batch: Batch) -> Any:
        return Wrapped(self.backend.plan(cache, batch), batch)

    def run(self, plan: Any, layer: int, q: Tensor, *given: Any) -> Tensor:
        return self.backend.run(plan.plan, layer, q, *given)

    def refresh(self, plan: Any, batch: Batch) -> None:
        self.backend.refresh(plan.plan, batch)

    def decisions(self, batch: Batch) -> tuple[object, ...]:
        return self.backend.decisions(batch)

    def shared(self, cache: Any) -> Iterable[object]:
        return self.backend.shared(cache)


class Wrapped(NamedTuple):
    plan: Any
    batch: Batch


def _copy(values: Batch, into: Batch) -> Batch:
    """The values in the tensors of `into`; what the host knows comes along."""
    buffers = values_of(into)
    for name, value in values_of(values).items():
        buffers[name].copy_(value)
    return over(buffers, values)


def _clone(batch: Batch) -> Batch:
    return over({name: value.clone() for name, value in values_of(batch).items()}, batch)


class SharedPlan(Twin):
    """R1: one plan per shape, kept and handed out again, with its buffers properly filled."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._kept: dict[object, Wrapped] = {}

    def plan(self, cache: Any, batch: Batch) -> Any:
        key = id(cache), batch.tokens.shape, batch.ancestors is None
        if key in self._kept:
            _copy(batch, self._kept[key].batch)
            return self._kept[key]
        own = _clone(batch)
        self._kept[key] = Wrapped(self.backend.plan(cache, own), own)
        return self._kept[key]

    def refresh(self, plan: Any, batch: Batch) -> None:
        self.backend.refresh(plan.plan, _copy(batch, plan.batch))


class SharedScratch(Twin):
    """R2: plans are views of one scratch, which the next build overwrites."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._scratch: dict[str, Tensor] = {}

    def plan(self, cache: Any, batch: Batch) -> Any:
        views = {name: self._view(name, value) for name, value in values_of(batch).items()}
        viewed = _copy(batch, over(views, batch))
        return Wrapped(self.backend.plan(cache, viewed), viewed)

    def _view(self, name: str, value: Tensor) -> Tensor:
        if name not in self._scratch or self._scratch[name].numel() < value.numel():
            self._scratch[name] = torch.zeros_like(value).flatten()
        return self._scratch[name][: value.numel()].view(value.shape)

    def refresh(self, plan: Any, batch: Batch) -> None:
        self.backend.refresh(plan.plan, _copy(batch, plan.batch))


class MutatedLengths(Twin):
    """R2: a pass writes into the lengths it was given."""

    def run(self, plan: Any, layer: int, q: Tensor, *given: Any) -> Tensor:
        out = super().run(plan, layer, q, *given)
        if layer == self.traits.layers - 1:
            plan.batch.context.add_(1)
        return out


class StaleAddresses(Twin):
    """R3: the plan is made over copies, and nobody refreshes those."""

    def plan(self, cache: Any, batch: Batch) -> Any:
        own = _clone(batch)
        return Wrapped(self.backend.plan(cache, own), own)

    def refresh(self, plan: Any, batch: Batch) -> None:
        self.backend.refresh(plan.plan, plan.batch)


class HostBranch(Twin):
    """R4: short batches take another branch, which looks at the first few tokens only and is not declared."""

    def plan(self, cache: Any, batch: Batch) -> Any:
        border = max(rules.SHORT) + batch.tokens.shape[1]
        bound = border if batch.longest <= border else batch.longest
        cut = batch._replace(context=batch.context.clamp(max=bound))
        return Bounded(self.backend.plan(cache, cut), cut, bound)

    def refresh(self, plan: Any, batch: Batch) -> None:
        plan.batch.context.copy_(batch.context.clamp(max=plan.bound))
        self.backend.refresh(plan.plan, batch._replace(context=plan.batch.context))


class Bounded(NamedTuple):
    plan: Any
    batch: Batch
    bound: int


class StaleSteps(Twin):
    """R5: nothing is planned again when lengths change."""

    def refresh(self, plan: Any, batch: Batch) -> None:
        pass


NOTHING_LAZY = "nothing in this backend is initialised on first use, so a shared plan does no harm to the numbers"
NOTHING_PLANNED = "this backend's refresh does nothing that the numbers depend on, so leaving it out does no harm"


@dataclass(frozen=True)
class Breach:
    """A twin and the check that must reject it; `unseen` says when it cannot, "" when it always can."""

    twin: Callable[[Backend], Backend]
    check: Callable[[Kit], None]
    unseen: str = ""
    harmful: bool = False  # reads memory that was never filled: a kernel on a real device could be lost in it

    def __str__(self) -> str:
        return f"{getattr(self.twin, '__name__', self.twin)}-{self.check.__name__}"


BREACHES = (
    Breach(SharedPlan, rules.states_share_nothing),
    Breach(SharedPlan, rules.recorded_after_a_run, NOTHING_LAZY),
    Breach(SharedPlan, rules.run_after_a_recording, NOTHING_LAZY, harmful=True),
    Breach(SharedPlan, rules.two_recordings, NOTHING_LAZY, harmful=True),
    Breach(SharedScratch, rules.states_keep_their_contents),
    Breach(MutatedLengths, rules.passes_leave_their_inputs),
    Breach(StaleAddresses, rules.replays_read_what_was_refreshed),
    Breach(HostBranch, rules.host_decisions_hold),
    Breach(StaleSteps, rules.eager_steps_see_each_other, NOTHING_PLANNED),
    Breach(StaleSteps, rules.recorded_steps_see_each_other, NOTHING_PLANNED),
)
