"""Who holds which memory: the objects and storages that can be reached from a plan.

Owns: walking an unknown plan, and the register of what recorded passes hold. Must never know what a plan means.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# What plans may have in common: it cannot be written to, or it is code or weights.
_INERT = (
    str, bytes, int, float, complex, type(None), range, slice, type, ModuleType, FunctionType, BuiltinFunctionType,
    MethodType, enum.Enum, nn.Module, torch.dtype, torch.device, torch.Size,
)  # fmt: skip


class Parts(dict[object, str]):
    """Keys of objects and memory -> where they are reached. `kept` keeps them alive, so that no key is given twice."""

    def __init__(self, found: Mapping[object, str] | None = None, kept: Iterable[object] = ()) -> None:
        super().__init__(found or {})
        self.kept = list(kept)

    @property
    def tensors(self) -> Iterator[Tensor]:
        return (thing for thing in self.kept if isinstance(thing, Tensor))


def storage_key(tensor: Tensor) -> object:
    """The same for all tensors that lie in one allocation."""
    return "storage", str(tensor.device), tensor.untyped_storage().data_ptr()


def parts_of(root: Mapping[str, object], shared: Iterable[object] = ()) -> Parts:
    """Everything that can be written to and reached from the named objects, `shared` and what lies behind it left out.

    Followed are attributes, slots, containers and the arguments of `functools.partial`; not followed are bound
    methods, modules and frozen records of numbers.
    """
    walk = _Walk(shared)
    for name, thing in root.items():
        walk.visit(thing, name)
    return walk.parts


class _Walk:
    def __init__(self, shared: Iterable[object]) -> None:
        self.parts = Parts()
        things = list(shared)
        behind = parts_of({"shared": things}) if things else self.parts
        self._shared_storages = set(behind)
        self._seen = {id(thing) for thing in behind.kept}

    def visit(self, thing: object, path: str) -> None:
        if isinstance(thing, _INERT) or id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        self.parts.kept.append(thing)
        if isinstance(thing, Tensor):
            self._tensor(thing, path)
            return
        if _writable(thing):
            self.parts[("object", id(thing))] = path
        for name, inner in _inside(thing):
            self.visit(inner, path + name)

    def _tensor(self, tensor: Tensor, path: str) -> None:
        key = storage_key(tensor)
        if tensor.numel() and key not in self._shared_storages:
            self.parts.setdefault(key, path)


def _writable(thing: object) -> bool:
    if isinstance(thing, tuple | frozenset):
        return False
    dataclass = getattr(type(thing), "__dataclass_params__", None)
    return dataclass is None or not dataclass.frozen


def _inside(thing: object) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in thing.items())
    elif isinstance(thing, tuple | list | set | frozenset):
        yield from ((f"[{index}]", value) for index, value in enumerate(thing))
    else:
        yield from _attributes(thing)


def _attributes(thing: object) -> Iterator[tuple[str, Any]]:
    """Instance attributes, slots, and what a `functools.partial` holds."""
    if isinstance(thing, partial):
        yield from (("(partial)", part) for part in (thing.func, thing.args, thing.keywords))
    yield from ((f".{name}", value) for name, value in getattr(thing, "__dict__", {}).items())
    slots = (slot for kind in type(thing).__mro__ for slot in _names(getattr(kind, "__slots__", ())))
    yield from ((f".{slot}", getattr(thing, slot, None)) for slot in slots)


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


class Owners:
    """What the plans of recorded passes hold, over all managers of one recorder.

    A lazily planned object that a recorded pass has initialised holds memory that only that recording fills. Another
    pass that takes it, run or recorded, plans nothing and reads what is not there; so it is refused.
    """

    def __init__(self) -> None:
        self._held: dict[str, Parts] = {}

    def __iter__(self) -> Iterator[tuple[str, Parts]]:
        return iter(self._held.items())

    def hold(self, name: str, parts: Parts) -> None:
        self._held[name] = parts

    def drop(self, name: str) -> None:
        self._held.pop(name, None)
