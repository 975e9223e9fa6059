"""Gluon kernels for Hopper on the CPU: a warpgroup is a thread, copies land at once, products come when awaited.

Owns: as much of the language as the MLA kernels use, over torch tensors. Copies as early and products as late as the
rules allow are the worst case for whoever overwrites a buffer that is still read; a wait that nobody ends is an error.
Must never know which kernel runs. It says nothing of layouts, swizzles or what a fence is for: those need the device.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATIENCE = 5.0  # seconds until a wait counts as a hang
KERNELS = ("target.kernels.mla", "target.kernels.mla_hopper", "target.kernels.mla_seesaw")


class Pointer:
    """An address into a tensor, and addresses of tensors of offsets; nothing outside may be touched."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory.view(-1), at
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)


class Shared:
    """Shared memory, filled with NaN at first."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.shape, self.dtype = memory, list(memory.shape), memory.dtype

    def index(self, at: Any) -> Shared:
        return Shared(self.memory[int(at)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.memory.permute(*order))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.memory.narrow(dim, start, length))

    def load(self, layout: object) -> Tensor:
        return self.memory.clone()

    def store(self, values: Tensor) -> None:
        self.memory.copy_(values)


class Barrier:
    """An mbarrier of count one: a phase ends with an arrival, or when all expected bytes are there."""

    def __init__(self) -> None:
        self.ended, self.missing, self.changed = 0, 0, threading.Condition()

    def expect(self, nbytes: int) -> None:
        assert self.missing == 0, "bytes are expected twice in one phase"
        self.missing = nbytes

    def land(self, nbytes: int) -> None:
        assert self.missing >= nbytes, "more bytes than were expected"
        self.missing -= nbytes
        if self.missing == 0:
            self.arrive()

    def arrive(self, count: int = 1) -> None:
        with self.changed:
            self.ended += 1
            self.changed.notify_all()

    def wait(self, phase: Any) -> None:
        _dawdle()
        with self.changed:
            assert self.changed.wait_for(lambda: self.ended % 2 != int(phase), PATIENCE), "a wait that nobody ends"


class Barriers:
    """Several of them, and one of them by index."""

    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, at: Any) -> Barrier:
        return self.all[int(at)]


class Descriptor:
    """Blocks of a matrix for the copy engine; rows past its end are zeros."""

    def __init__(self, matrix: Tensor, rows: int, columns: int) -> None:
        self.matrix, self.layout, self.dtype = matrix, None, matrix.dtype
        nbytes = rows * columns * matrix.element_size()
        self.block_type = SimpleNamespace(shape=[rows, columns], nbytes=nbytes)

    def copy(self, corner: list[Any], barrier: Barrier, into: Shared) -> None:
        (row, column), (rows, columns) = map(int, corner), self.block_type.shape
        found = self.matrix[row : row + rows, column : column + columns]
        into.memory.zero_()
        into.memory[: len(found)] = found
        barrier.land(self.block_type.nbytes)


class Product:
    """A product in flight; what it reads from shared memory it reads when it is awaited."""

    def __init__(self, a: Any, b: Shared, onto: Any, use_acc: bool) -> None:
        self.parts, self.use_acc = (a, b, onto), use_acc
        self.value: Tensor | None = None

    def finish(self) -> None:
        a, b, onto = self.parts
        self.value = _number(a) @ _number(b) + (_number(onto) if self.use_acc else 0)


def _number(x: Any) -> Tensor:
    found = x.value if isinstance(x, Product) else x.memory if isinstance(x, Shared) else x
    assert isinstance(found, Tensor), "a product that was not awaited"
    return found.float()


LOCAL = threading.local()


def _dawdle() -> None:
    chance = random.random()
    if chance < 0.3:
        time.sleep(2e-2 if chance < 0.02 else random.random() * 2e-4)


def _multiply(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(a, b, acc, use_acc)
    LOCAL.__dict__.setdefault("flying", []).append(product)
    return product if is_async else _await(0, [product])


def _await(pending: int, deps: list[Any]) -> Any:
    flying = LOCAL.__dict__.setdefault("flying", [])
    while len(flying) > pending:
        _dawdle()
        flying.pop(0).finish()
    found = tuple(one.value if isinstance(one, Product) else one for one in deps)
    return found[0] if len(found) == 1 else found


def _specialize(functions: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: object, registers: object) -> None:
    failures: list[BaseException] = []

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except BaseException as failure:  # handed to the caller's thread
            failures.append(failure)

    threads = [threading.Thread(target=run, args=one, daemon=True) for one in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    at = torch.as_tensor(pointer.at).long()
    mask = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    at, mask = torch.broadcast_tensors(at, mask)
    assert bool(((at >= 0) & (at < len(pointer.memory)) | ~mask).all()), "a load out of bounds"
    return torch.where(mask, pointer.memory[at.where(mask, 0)], torch.tensor(other, dtype=pointer.memory.dtype))


def _store(pointer: Pointer, values: Tensor, mask: Tensor) -> None:
    at, values, mask = torch.broadcast_tensors(torch.as_tensor(pointer.at).long(), values, mask)
    assert bool(((at >= 0) & (at < len(pointer.memory)) | ~mask).all()), "a store out of bounds"
    pointer.memory[at[mask]] = values[mask].to(pointer.memory.dtype)


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    if layout == "barrier":
        return Barriers(shape[0]) if len(shape) == 2 else Barrier()
    return Shared(torch.full(shape, float("nan")).to(dtype))


class Language(ModuleType):
    """`gluon.language` over tensors; `place` is the program's id."""

    int32, int64, float32, constexpr = torch.int32, torch.int64, torch.float32, staticmethod(lambda x: x)
    place: tuple[int, ...] = (0, 0)
    load, store, allocate_shared_memory = staticmethod(_load), staticmethod(_store), staticmethod(_allocate)
    warp_specialize, static_range, zeros_like = staticmethod(_specialize), range, torch.zeros_like
    exp2, log2, to_tensor = torch.exp2, torch.log2, torch.tensor
    NVMMADistributedLayout = NVMMASharedLayout = SliceLayout = DotOperandLayout = staticmethod(lambda *_: None)
    BlockedLayout = SwizzledSharedLayout = staticmethod(lambda *_: None)
    num_warps, thread_barrier = staticmethod(lambda: 4), staticmethod(lambda: None)
    convert_layout = staticmethod(lambda x, layout: x)
    arange = staticmethod(lambda start, end, layout: torch.arange(start, end))
    full = staticmethod(lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype))
    max, sum = staticmethod(lambda x, axis: x.amax(axis)), staticmethod(lambda x, axis: x.sum(axis))

    def program_id(self, axis: int) -> Tensor:
        return torch.tensor(self.place[axis])

    @staticmethod
    def maximum(a: Any, b: Any) -> Tensor:
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def minimum(a: Any, b: Any) -> Tensor:
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Tensor:
        return torch.where(torch.as_tensor(condition), a, b)


@contextmanager
def on_threads() -> Iterator[tuple[Language, dict[str, ModuleType]]]:
    """The language and the kernels' modules, imported over it; what was imported before is put back afterwards."""
    language, kept = Language("language"), dict(sys.modules)
    try:
        for name in [*KERNELS, *(n for n in kept if n.split(".")[0] == "triton")]:
            sys.modules.pop(name, None)
        sys.modules.update(_modules(language))
        yield language, {name: import_module(name) for name in KERNELS}
    finally:
        for name in [*KERNELS, *(n for n in sys.modules if n.split(".")[0] == "triton")]:
            sys.modules.pop(name, None)
        sys.modules.update({n: m for n, m in kept.items() if n in KERNELS or n.split(".")[0] == "triton"})


def _undecorated(function: Any = None, **options: Any) -> Any:
    """A decorator that leaves functions as they are, with or without options."""
    return function if function is not None else lambda f: f


def _modules(language: Language) -> dict[str, ModuleType]:
    """What the kernels import, by name."""
    barrier = SimpleNamespace(
        MBarrierLayout=lambda: "barrier", init=lambda barrier, count: None,
        expect=Barrier.expect, arrive=Barrier.arrive, wait=Barrier.wait,
    )  # fmt: skip
    tma = SimpleNamespace(async_copy_global_to_shared=Descriptor.copy)
    hopper: dict[str, Any] = dict(
        fence_async_shared=lambda: None, mbarrier=barrier, tma=tma, warpgroup_mma=_multiply, warpgroup_mma_wait=_await
    )
    nothing = dict.fromkeys(("gdc_wait", "gdc_launch_dependents"), lambda: None)
    gluon: dict[str, Any] = dict(jit=_undecorated, language=language)
    contents: dict[str, dict[str, Any]] = {
        "triton": dict(jit=_undecorated),
        "triton.language": dict(constexpr=lambda x: x),
        "triton.language.extra.cuda": nothing,
        "triton.tools.tensor_descriptor": dict(TensorDescriptor=None),
        "triton.experimental": dict(gluon=_module("triton.experimental.gluon", gluon)),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        "triton.experimental.gluon.nvidia.hopper": dict(TensorDescriptor=None),
    }
    parents = {name.rsplit(".", n)[0] for name in contents for n in range(1, name.count("."))}
    made = {name: _module(name, contents.get(name, {})) for name in sorted(parents | set(contents))}
    made["triton"].language = made["triton.language"]  # type: ignore[attr-defined]
    return made | {"triton.experimental.gluon.language": language}


def _module(name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents, __path__=[])
    return module
