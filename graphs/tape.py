"""TapeRecorder: a recorder for the CPU with CUDA's rules, so that every rule is tested without a GPU.

Owns: noting operations instead of running them, poisoning what was not computed, and running the tape in place. Must
never know what is recorded. While it records:
- views run (a view is what shares memory with its input), everything else is noted and not executed; its results hold
  poison: NaN, the smallest integer, True;
- reading a value on the host, a shape that depends on data, a copy from fresh host data and storage that is resized
  raise CaptureError, as CUDA would raise;
- random operations raise too, although CUDA could record them: replays of a tape would not advance like a graph's.
Host tensors cannot be told from device tensors here, so reading any tensor counts as reading the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphs.errors import CaptureError
from graphs.owners import Owners, storage_key
from graphs.recorder import Recording, record_body

T = TypeVar("T")
_aten = torch.ops.aten

_UNFILLED = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_REALLOCATING = {_aten.resize_, _aten.resize_as_, _aten.set_}
# Composite, but what their kernels write passes no dispatcher.
_WHOLE = {_aten.fbgemm_linear_fp16_weight_fp32_activation}
# Calls that reach the data of a CPU tensor without passing the dispatcher.
_PYTHON_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__repr__, Tensor.cpu}
_PYTHON_COPIES = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}


class Operation(NamedTuple):
    """One noted call; `results` are the recorded tensors that a replay writes into, None where the call mutates."""

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Tensor | None, ...]

    def run(self) -> None:
        made = self.func(*self.args, **self.kwargs)
        if not self.results:
            return
        for result, value in zip(self.results, _leaves(made), strict=True):
            if result is not None:
                result.copy_(value)


class TapeRecording:
    """A list of operations that replays in place, on the memory it was recorded with."""

    def __init__(self, operations: list[Operation], made: list[Tensor], keep: object, poison: bool) -> None:
        self.operations: list[Operation] | None = operations
        self._made, self._poison = made, poison
        self._kept = {storage_key(tensor) for tensor in _tensors(keep)}

    @torch.inference_mode()
    def replay(self) -> None:
        if self.operations is None:
            raise CaptureError("this recording was released")
        if self._poison:
            poison(self._made)
        for operation in self.operations:
            operation.run()

    def release(self) -> None:
        self.operations, self._made = None, []

    @property
    def bytes(self) -> int:
        return sum({storage_key(t): t.untyped_storage().nbytes() for t in self._made}.values())

    def free(self) -> list[Tensor]:
        """What no later pass may read: everything made inside that was not kept."""
        return [tensor for tensor in self._made if storage_key(tensor) not in self._kept]

    def touches(self, tensor: Tensor) -> bool:
        """Whether any operation reads or writes this memory; if not, the address of a refreshed buffer is not baked."""
        key = storage_key(tensor)
        return any(
            storage_key(t) == key for op in self.operations or () for t in _tensors((op.args, op.kwargs, op.results))
        )


class TapeRecorder:
    """Records on the CPU. `poison_between_replays` fills everything a recording computes with NaN before it replays."""

    def __init__(self, poison_between_replays: bool = False) -> None:
        self.owners = Owners()
        self._poison = poison_between_replays
        self._recordings: list[TapeRecording] = []
        self._modes: tuple[_Noting, ExitStack] | None = None
        self._poisoned: set[object] = set()

    @property
    def recording(self) -> bool:
        return self._modes is not None

    @property
    def pool_bytes(self) -> int:
        return sum(recording.bytes for recording in self._recordings)

    def warm(self, body: Callable[[], T]) -> T:
        return body()

    def begin(self) -> None:
        if self._modes is not None:
            raise CaptureError("a recording is under way already")
        noting, stack = _Noting(self._poisoned), ExitStack()
        stack.enter_context(noting)
        stack.enter_context(_Watching())
        self._modes = noting, stack

    def end(self, keep: object = None) -> TapeRecording:
        noting = self._leave()
        if noting is None:
            raise CaptureError("no recording is under way")
        recording = TapeRecording(noting.operations, noting.made, keep, self._poison)
        self._recordings.append(recording)
        return recording

    def abort(self) -> None:
        self._leave()

    def _leave(self) -> _Noting | None:
        if self._modes is None:
            return None
        noting, stack = self._modes
        self._modes = None
        stack.close()
        return noting

    def record(self, body: Callable[[], T]) -> tuple[T, Recording]:
        return record_body(self, body)

    def poison(self) -> Recording:
        return _FreePoison(self._recordings)

    def close(self) -> None:
        self.abort()
        for recording in self._recordings:
            recording.release()
        self._recordings.clear()


class _FreePoison:
    """Fills what every recording left free."""

    def __init__(self, recordings: Iterable[TapeRecording]) -> None:
        self._recordings = recordings

    def replay(self) -> None:
        poison(tensor for recording in self._recordings for tensor in recording.free())

    def release(self) -> None:
        self._recordings = ()


@torch.inference_mode()
def poison(tensors: Iterable[Tensor]) -> None:
    """Fill tensors with NaN, the smallest integer, or True."""
    for tensor in tensors:
        if tensor.numel():
            _poison(tensor)


def _poison(tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).min)


class _Watching(TorchFunctionMode):
    """Refuses what reaches a tensor's data, or brings new data, without passing the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PYTHON_READS:
            raise CaptureError(f"{func.__name__} reads a tensor on the host while it is recorded")
        if func in _PYTHON_COPIES and not (args and isinstance(args[0], Tensor) and func is torch.as_tensor):
            raise CaptureError(f"{func.__name__} copies fresh host data, which is not pinned, while a pass is recorded")
        if func in _INDEXING and _holds_list(args[1]):
            raise CaptureError("an index given as a list is copied from the host while a pass is recorded")
        return func(*args, **(kwargs or {}))


def _holds_list(index: object) -> bool:
    if isinstance(index, tuple):
        return any(map(_holds_list, index))
    return isinstance(index, list) or type(index).__module__ == "numpy"


class _Noting(TorchDispatchMode):
    """Notes operations; `made` are the results whose memory belongs to the recording."""

    def __init__(self, poisoned: set[object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.made: list[Tensor] = []
        self._poisoned = poisoned  # memory of all recordings, which may hold poison: one may read what another made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # in inference mode composite operations arrive whole; their parts must be seen, host reads above all
        if _is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        _refuse(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._mutating(func, args, kwargs)
        return self._functional(func, args, kwargs)

    def _functional(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        inputs = {storage_key(tensor) for tensor in _tensors((args, kwargs))}
        results, safe = self._dry_run(func, args, kwargs)
        leaves = _leaves(results)
        if leaves and all(storage_key(leaf) in inputs | safe for leaf in leaves):
            return func(*args, **kwargs) if safe else results
        self._note(func, args, kwargs, [None if storage_key(leaf) in inputs else leaf for leaf in leaves])
        return results

    def _mutating(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Note it; the result is the mutated argument itself. Extra results come from a run on copies."""
        written = _written(func, args, kwargs)
        returns = func._schema.returns
        if all(_alias(slot) for slot in returns):
            self._note(func, args, kwargs, [])
            return _as_returned([written[_alias(slot)] for slot in returns])
        copied = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        result, _ = self._dry_run(func, *copied)
        made = result if len(returns) > 1 else (result,)
        self._note(
            func, args, kwargs, [None if _alias(slot) else leaf for slot, leaf in zip(returns, made, strict=True)]
        )
        return _as_returned([written.get(_alias(slot), leaf) for slot, leaf in zip(returns, made, strict=True)])

    def _note(self, func: OpOverload, args: Any, kwargs: Any, results: list[Tensor | None]) -> None:
        """Append to the tape, with tensors as they are now: their shape may be changed in place later."""
        args, kwargs, results = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs, results))
        if func.overloadpacket not in _UNFILLED:
            self.operations.append(Operation(func, args, kwargs, tuple(results)))
        made = [result for result in results if result is not None]
        poison(made)
        self.made += made
        self._poisoned |= {storage_key(tensor) for tensor in made}

    def _dry_run(self, func: OpOverload, args: Any, kwargs: Any) -> tuple[Any, set[object]]:
        """Run for the shapes alone; also the memory of stand-ins, since a poisoned integer is no index.

        A stand-in is 0, a valid index, else 1, a valid divisor.
        """
        for value in (0, 1):
            safe: set[object] = set()
            given = pytree.tree_map_only(Tensor, partial(self._stand_in, value, safe), (args, kwargs))
            try:
                return func(*given[0], **given[1]), safe
            except (RuntimeError, IndexError, ZeroDivisionError):
                if value or not safe:
                    raise
        raise AssertionError("unreachable")

    def _stand_in(self, value: int, safe: set[object], tensor: Tensor) -> Tensor:
        whole = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        if whole or storage_key(tensor) not in self._poisoned:
            return tensor
        substitute = torch.full_like(tensor, value)
        safe.add(storage_key(substitute))
        return substitute


@cache
def _is_composite(func: OpOverload) -> bool:
    """Whether running it on the CPU means running other operations."""
    has = partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    if func.overloadpacket in _WHOLE:
        return False
    return has(DispatchKey.CompositeImplicitAutograd) and not has(DispatchKey.CPU)


def _refuse(func: OpOverload, args: Any, kwargs: dict[str, Any]) -> None:
    """CaptureError for what CUDA, or a tape, cannot record."""
    packet, tags = func.overloadpacket, func.tags
    if torch.Tag.data_dependent_output in tags:
        raise CaptureError(f"{packet} reads a value on the host while a pass is recorded")
    if packet in (_aten.index, _aten.index_put, _aten.index_put_):
        _refuse_masks(func, args)
    elif torch.Tag.dynamic_output_shape in tags and kwargs.get("output_size") is None:
        raise CaptureError(f"{packet} has a shape that depends on data, which a recorded pass cannot have")
    if packet is _aten.lift_fresh and args[0].dim():  # a plain number is a constant of the kernel
        raise CaptureError("fresh host data, which is not pinned, is copied while a pass is recorded")
    if packet in _REALLOCATING:
        raise CaptureError(f"{packet} gives a tensor other memory while a pass is recorded")
    if torch.Tag.nondeterministic_seeded in tags and not _without_dropout(func, args, kwargs):
        raise CaptureError(f"{packet} draws random numbers, which a tape does not replay; use counter-based noise")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors((args, kwargs))):
        raise CaptureError("a recorded pass has no backward: record under no_grad or inference_mode")


def _refuse_masks(func: OpOverload, args: Any) -> None:
    """A boolean index has a shape that depends on data, except where a single value is written through it."""
    masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    fill = len(args) > 2 and args[2].numel() == 1 and not (len(args) > 3 and args[3])
    if masked and not fill:
        raise CaptureError(f"{func.overloadpacket} with a mask has a shape that depends on data")


def _without_dropout(func: OpOverload, args: Any, kwargs: dict[str, Any]) -> bool:
    """Attention is marked as random for its dropout alone."""
    for position, slot in enumerate(func._schema.arguments):
        if slot.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", slot.default_value)
            return bool(given == 0)
    return False


def _written(func: OpOverload, args: Any, kwargs: dict[str, Any]) -> dict[object, Any]:
    """Alias sets of the arguments that are written -> the arguments."""
    named = {slot.name: value for slot, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return {_alias(slot): named[slot.name] for slot in func._schema.arguments if _alias(slot) and slot.name in named}


def _alias(slot: Any) -> object:
    return None if slot.alias_info is None else frozenset(slot.alias_info.before_set)


def _as_returned(values: list[Any]) -> Any:
    """As an operation returns them: nothing, one, or a tuple."""
    return tuple(values) if len(values) > 1 else values[0] if values else None


def _leaves(results: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def _tensors(nest: Any) -> list[Tensor]:
    return _leaves(nest)
