"""Recorders: what records a pass and plays it again; here the seam and the one for CUDA.

Owns: `Recorder`, `Recording` and `CudaRecorder` (torch.cuda.CUDAGraph, one pool for all recordings). Must never know
what is recorded.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from graphs.errors import CaptureError, CaptureMemoryError
from graphs.owners import Owners

T = TypeVar("T")


class Recording(Protocol):
    """A pass that was recorded and not run; its outputs mean something after the first replay."""

    def replay(self) -> None:
        """Run the pass on the memory it was recorded with; CaptureError after `release`."""

    def release(self) -> None:
        """Give its memory back to the pool."""


class Recorder(Protocol):
    """Records passes one after the other. All its recordings share one pool of memory and one register of owners.

    While `recording`, what the body does on the device is noted and not executed: its results are not there, nothing
    may read them on the host, and no memory outside the pool may be taken. What a recording returns or still has a
    name when it ends keeps its memory; the rest is free for later recordings and their replays.
    """

    owners: Owners

    @property
    def recording(self) -> bool: ...

    @property
    def pool_bytes(self) -> int:
        """Memory that the recordings hold on to, in bytes."""

    def warm(self, body: Callable[[], T]) -> T:
        """Run a body as it will be recorded, on the stream that will record it, but execute it."""

    def begin(self) -> None:
        """Start recording; CaptureError when one is under way. Imperative, since a prompt pass is cut inside."""

    def end(self, keep: object = None) -> Recording:
        """Stop recording. `keep` names tensors that later passes read, in any nesting of tuples, lists and dicts."""

    def abort(self) -> None:
        """Stop recording after an error and throw away what was noted; nothing when none is under way."""

    def record(self, body: Callable[[], T]) -> tuple[T, Recording]:
        """begin, body, end; always ended, and any error of torch inside becomes a CaptureError."""

    def poison(self) -> Recording:
        """A recording that fills the pool's free memory with NaN, for tests: whatever changes had no owner."""

    def close(self) -> None:
        """Release every recording and the pool."""


def record_body(recorder: Recorder, body: Callable[[], T]) -> tuple[T, Recording]:
    """`Recorder.record` in terms of begin, end and abort."""
    recorder.begin()
    try:
        result = body()
        return result, recorder.end(result)
    except BaseException as error:
        recorder.abort()
        raise_capture_error(error)
        raise


def raise_capture_error(error: BaseException) -> None:
    """Raise torch's errors as ours; others are left to the caller."""
    if isinstance(error, CaptureError) or not isinstance(error, RuntimeError):
        return
    if isinstance(error, torch.OutOfMemoryError):
        raise CaptureMemoryError(f"no memory left to record the pass: {_first_line(error)}") from error
    raise CaptureError(f"the pass cannot be recorded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextlib.contextmanager
def told_in_words() -> Iterator[None]:
    """A device that is full is a CaptureMemoryError also where a pass only runs; other errors stay as they are."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CaptureMemoryError(f"no memory left to run the pass: {_first_line(error)}") from error


class CudaRecording:
    """One torch.cuda.CUDAGraph and the tensors that must keep their addresses."""

    def __init__(self, graph: torch.cuda.CUDAGraph, keep: object, pool: tuple[int, int]) -> None:
        self._graph: torch.cuda.CUDAGraph | None = graph
        self.keep, self.pool = keep, pool

    @property
    def alive(self) -> bool:
        return self._graph is not None

    def replay(self) -> None:
        """Launch on the current stream."""
        if self._graph is None:
            raise CaptureError("this recording was released")
        self._graph.replay()

    def release(self) -> None:
        if self._graph is not None:
            self._graph.reset()
        self._graph, self.keep = None, None


class CudaRecorder:
    """Records CUDA graphs on a stream of its own into one shared pool.

    The error mode is "thread_local": forbidden calls of this thread break a recording, those of others do not. "global"
    would be stricter, but then NCCL's watchdog, which queries events at any time, could break one.
    Random numbers: torch's default generator is registered with each graph and moves on at every replay.
    """

    def __init__(self, device: torch.device | str = "cuda", error_mode: str = "thread_local") -> None:
        self.device = torch.device(device)
        self.owners = Owners()
        self._error_mode = error_mode
        self._recordings: list[CudaRecording] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._collecting = False
        self._pools: list[Any] = []
        self._renew()

    def _renew(self) -> None:
        with torch.cuda.device(self.device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
        self._pools.append(self._pool)
        self._used = False
        self._outside = torch.cuda.current_stream(self.device)

    @property
    def recording(self) -> bool:
        return self._graph is not None

    @property
    def pool_bytes(self) -> int:
        return sum(segment["total_size"] for segment in self._segments())

    def _living_pool(self) -> Any:
        """The pool, or a new one when all that was recorded there is gone: torch gives such a pool up for good."""
        if self._used and not any(recording.alive and recording.pool == self._pool for recording in self._recordings):
            self._renew()
        self._used = True
        return self._pool

    def _segments(self) -> list[dict[str, Any]]:
        segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()
        return [
            segment
            for segment in segments
            if tuple(segment["segment_pool_id"]) in {tuple(pool) for pool in self._pools}
        ]

    def warm(self, body: Callable[[], T]) -> T:
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            result = body()
        outside.wait_stream(self._stream)
        return result

    def begin(self) -> None:
        if self.recording:
            raise CaptureError("a recording is under way already")
        torch.cuda.synchronize(self.device)
        self._outside = torch.cuda.current_stream(self.device)
        self._random = self._generator.get_state()
        self._collecting = gc.isenabled()
        gc.disable()  # a graph or an event that dies while another is recorded calls into the driver
        pool = self._living_pool()
        torch.cuda.set_stream(self._stream)
        self._graph = torch.cuda.CUDAGraph()
        try:
            self._graph.capture_begin(pool=pool, capture_error_mode=self._error_mode)
        except BaseException:
            self._leave()
            raise

    def end(self, keep: object = None) -> CudaRecording:
        if self._graph is None:
            raise CaptureError("no recording is under way")
        graph = self._graph
        graph.capture_end()
        self._leave()
        recording = CudaRecording(graph, keep, self._pool)
        self._recordings.append(recording)
        return recording

    def _leave(self) -> None:
        self._graph = None
        torch.cuda.set_stream(self._outside)
        if self._collecting:
            gc.enable()

    def abort(self) -> None:
        graph = self._graph
        if graph is None:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nothing was recorded is no news here
                graph.capture_end()
        except RuntimeError:
            self._leave()
            self._mend()
        else:
            self._leave()
        with contextlib.suppress(RuntimeError):
            graph.reset()

    @property
    def _index(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    @property
    def _generator(self) -> torch.Generator:
        return torch.cuda.default_generators[self._index]

    def _mend(self) -> None:
        """CUDA broke a capture off, and torch does not know: its allocator and its random generator still wait for it.

        The allocator is told (the graph itself gives the pool back when it is reset); the generator gets its state of
        before in a new object; later recordings take a new pool and a new stream. Earlier recordings keep theirs.
        """
        with contextlib.suppress(RuntimeError):  # where torch did notice
            torch._C._cuda_endAllocateToPool(self._index, self._pool)
        fresh = torch.Generator(self.device)
        fresh.set_state(self._random)
        self._generator.graphsafe_set_state(fresh.graphsafe_get_state())
        self._renew()

    def record(self, body: Callable[[], T]) -> tuple[T, Recording]:
        return record_body(self, body)

    def poison(self) -> Recording:
        """Recorded into the same pool, it takes exactly the blocks that are free there; 0xFF is NaN in every format."""
        sizes = [block["size"] for segment in self._segments() for block in segment["blocks"] if _is_free(block)]
        _, recording = self.record(lambda: _fill_blocks(sizes or [1], self.device))
        return recording

    def close(self) -> None:
        self.abort()
        for recording in self._recordings:
            recording.release()
        self._recordings.clear()
        self._pools.clear()
        self._renew()
        torch.cuda.empty_cache()


def _is_free(block: dict[str, Any]) -> bool:
    return bool(block["state"] == "inactive")


def _fill_blocks(sizes: list[int], device: torch.device) -> None:
    held: list[Tensor] = []  # all at once, or the next would take the memory of the last
    for size in sorted(sizes, reverse=True):
        held.append(torch.full((size,), 0xFF, dtype=torch.uint8, device=device))
