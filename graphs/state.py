"""Attention states: everything one pass's kernels read besides weights and inputs, and who owns its memory.

Owns: the buffers of a state, their refresh in place, fresh plans over them, and the check that two states are apart.
Must never know what a plan means, nor which kernels read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphs.errors import SharedStorageError, StateError
from graphs.owners import Parts, parts_of, storage_key
from graphs.shape import GraphShape

Buffers = Mapping[str, Tensor]
MakePlan = Callable[[Buffers], Any]


class AttentionState:
    """Buffers allocated for one shape, and a plan over them.

    `values` are copied: a state never is a view of what its builder wrote into. `make_plan(buffers)` is called at once
    and may return an object that plans itself on first use. `pads` says what the rest of a buffer holds when a smaller
    batch is put into it (0 where not named). `shared` names what plans may have in common with the plans of other
    states by design (the KV cache and its owner, say); what is reached only through it is not compared.
    """

    def __init__(
        self,
        shape: GraphShape,
        values: Buffers,
        make_plan: MakePlan,
        pads: Mapping[str, float] | None = None,
        shared: Iterable[object] = (),
    ) -> None:
        self._take(shape, {name: _own(value) for name, value in values.items()}, dict(pads or {}), tuple(shared))
        self._built = {name: buffer.clone() for name, buffer in self.buffers.items()}
        self._make_plan = make_plan
        self.plan = make_plan(self.buffers)

    def _take(self, shape: GraphShape, buffers: Buffers, pads: Mapping[str, float], shared: tuple[object, ...]) -> None:
        unknown = sorted(set(pads) - set(buffers))
        if unknown:
            raise StateError(f"padding is given for {', '.join(unknown)}, the state has {', '.join(buffers) or 'none'}")
        self.shape, self.pads, self.shared = shape, pads, shared
        self.buffers: Buffers = MappingProxyType(dict(buffers))
        self._retired: list[Any] = []

    def refresh(self, values: Buffers) -> None:
        """Copy a batch of this shape or smaller into the buffers, in place; every buffer must be given.

        A value fills the corner of its buffer, the rest gets the padding. Nothing is allocated and no address changes,
        so this may run while a pass is recorded.
        """
        missing = sorted(set(self.buffers) - set(values))
        if missing:
            raise StateError(f"a refresh must give every buffer, missing: {', '.join(missing)}")
        fill(self.buffers, values, self.pads)

    def reset(self) -> None:
        """Put back what the buffers held when the state was built, whatever passes have done to them since."""
        for name, buffer in self.buffers.items():
            buffer.copy_(self._built[name])

    def replan(self) -> None:
        """Take a new plan over the same buffers; the old one stays alive, since a recording may have its addresses."""
        self._retired.append(self.plan)
        self.plan = self._new_plan(self._make_plan, self.plan)

    def fresh(self, make_plan: MakePlan | None = None, shape: GraphShape | None = None) -> AttentionState:
        """The same buffers with a plan that no pass has used, for another kind of shape where `shape` is given.

        What is shared is what a refresh writes: it then holds for both. What is not shared is the plan: one that was
        initialised by another pass would be taken as it is, and its planning would not be recorded.
        """
        twin = AttentionState.__new__(AttentionState)
        twin._take(shape or self.shape, self.buffers, self.pads, self.shared)
        twin._built, twin._make_plan = self._built, make_plan or self._make_plan
        twin.plan = self._new_plan(twin._make_plan, self.plan)
        return twin

    def _new_plan(self, make_plan: MakePlan, before: Any) -> Any:
        """Plan again; SharedStorageError when the result has parts of the plan before."""
        plan = make_plan(self.buffers)
        old, new = (parts_of({"plan": thing}, (*self.shared, *self.buffers.values())) for thing in (before, plan))
        check_apart(new, old, "the new plan and the one before")
        return plan

    def storages(self) -> frozenset[object]:
        """Keys of all memory the state holds, buffers and the plans' tensors."""
        return frozenset(storage_key(tensor) for tensor in self._tensors() if tensor.numel())

    def plan_parts(self) -> Parts:
        """The objects and memory that only the plans hold, by where they are; the state's own buffers left out."""
        own = {storage_key(buffer) for buffer in self.buffers.values()}
        found = parts_of({"plan": self.plan, "earlier plans": self._retired}, self.shared)
        return Parts({key: path for key, path in found.items() if key not in own}, found.kept)

    def parts(self) -> Parts:
        """As `plan_parts`, with the buffers."""
        buffers = {storage_key(buffer): f"buffer {name!r}" for name, buffer in self.buffers.items() if buffer.numel()}
        plans = self.plan_parts()
        return Parts({**plans, **buffers}, plans.kept)

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.buffers.values()
        yield from parts_of({"plan": self.plan, "earlier plans": self._retired}, self.shared).tensors


class AttentionStatePair(NamedTuple):
    """Two states of one shape: passes that run use `warmup`, the pass that is recorded uses `captured`."""

    warmup: AttentionState
    captured: AttentionState

    def check(self) -> None:
        """Raise SharedStorageError when the two share memory, a plan or an object inside their plans."""
        check_apart(self.captured.parts(), self.warmup.parts(), "warm-up and captured state")


def check_apart(one: Parts, other: Parts, names: str) -> None:
    """SharedStorageError when two sets of parts meet; the text names the first few places."""
    both = [f"{one[key]} is {other[key]}" for key in one if key in other]
    if both:
        raise SharedStorageError(f"{names} share what only one of them may use: {'; '.join(both[:3])}")


def fill(buffers: Buffers, values: Buffers, pads: Mapping[str, float]) -> None:
    """Copy each value into the corner of its buffer and pad the rest; StateError before anything is written."""
    for name, value in values.items():
        _check_value(name, buffers, value)
    pairs = [(buffers[name], value, pads.get(name, 0)) for name, value in values.items()]
    small = [(buffer, pad) for buffer, value, pad in pairs if value.shape != buffer.shape]
    sources = [value.clone() if storage_key(value) == storage_key(buffer) else value for buffer, value, _ in pairs]
    places = [buffer[tuple(slice(size) for size in value.shape)] for buffer, value, _ in pairs]
    _pad(small)
    _copy(places, sources)


def _pad(buffers: list[tuple[Tensor, float]]) -> None:
    """One kernel a type for all that is padded with 0, where launches count."""
    zeroed: dict[torch.dtype, list[Tensor]] = {}
    for buffer, pad in buffers:
        if pad == 0 and buffer.is_cuda:
            zeroed.setdefault(buffer.dtype, []).append(buffer)
        else:
            buffer.fill_(pad)
    for group in zeroed.values():
        torch._foreach_zero_(group)


def _copy(places: list[Tensor], sources: list[Tensor]) -> None:
    """One kernel a type for all copies within a device, where launches count and torch can."""
    together: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for place, source in zip(places, sources, strict=True):
        if place.is_cuda and source.is_cuda:
            group = together.setdefault(place.dtype, ([], []))
            group[0].append(place)
            group[1].append(source)
        else:
            place.copy_(source, non_blocking=True)
    for to, given in together.values():
        torch._foreach_copy_(to, given)


def _check_value(name: str, buffers: Buffers, value: Tensor) -> None:
    if name not in buffers:
        raise StateError(f"there is no buffer {name!r}, only {', '.join(buffers) or 'none'}")
    buffer = buffers[name]
    if value.dtype != buffer.dtype:
        raise StateError(f"buffer {name!r} holds {buffer.dtype}, got {value.dtype}")
    if value.dim() != buffer.dim() or any(v > b for v, b in zip(value.shape, buffer.shape, strict=True)):
        raise StateError(f"buffer {name!r} of {list(buffer.shape)} cannot hold {list(value.shape)}")


@torch.inference_mode(False)
def _own(value: Tensor) -> Tensor:
    """A copy that may be written to in any mode."""
    return value.detach().clone(memory_format=torch.contiguous_format)
