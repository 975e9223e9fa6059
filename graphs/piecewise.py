"""Prompt prefill in segments: the pass is cut at attention, which runs eager between graphs.

Owns: the cutting, the tensors handed over at the cuts, and the guard for code that acts on the host. Must never know
the model: it runs the model's own forward with an `attend` of its own. Graphs are keyed by the number of tokens
alone, whatever the rows are, since only attention knows where one row ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphs.errors import CaptureError, SideEffectError
from graphs.graph import BuildInputs, Tally
from graphs.lifecycle import Lifecycle
from graphs.recorder import Recorder, Recording, raise_capture_error
from graphs.shape import GraphShape, Ladder
from graphs.state import fill

Attend = Callable[..., Tensor]
Forward = Callable[[Mapping[str, Tensor], Attend], Any]
BuildAttend = Callable[[GraphShape], Attend]


class Inside(Enum):
    """Where a prompt pass is."""

    NOTHING = "no capture"
    WARMUP = "the warm-up of a prefill capture"
    CAPTURE = "a prefill capture"


class CaptureGuard:
    """Says whether code runs inside a prefill capture.

    Given to whatever has effects on the host: files it writes, counts it keeps, messages it sends. Made-up tokens pass
    by in a warm-up, and in a recorded segment there are no values at all, nor does a replay run the code again.
    """

    def __init__(self) -> None:
        self.where = Inside.NOTHING

    @property
    def inside(self) -> bool:
        return self.where is not Inside.NOTHING

    def consume(self, what: str) -> None:
        """To be called by a side effect before it acts; SideEffectError inside a capture."""
        if self.inside:
            raise SideEffectError(f"{what} has effects on the host and must not run inside {self.where.value}")

    @contextmanager
    def entered(self, where: Inside) -> Iterator[None]:
        before, self.where = self.where, where
        try:
            yield
        finally:
            self.where = before


class Cut(NamedTuple):
    """One call of attention between two segments: its arguments as they are handed over, and where its result goes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor


class HandOver:
    """Persistent tensors at the cuts; every cut of every bucket uses the same memory, one is open at a time."""

    def __init__(self) -> None:
        self._stores: dict[tuple[object, torch.dtype, torch.device], Tensor] = {}

    def like(self, place: object, tensor: Tensor) -> Tensor:
        """A contiguous tensor of the same shape and type for one place of the call (an argument, the result)."""
        key = place, tensor.dtype, tensor.device
        store = self._stores.get(key)
        if store is None or store.numel() < tensor.numel():
            store = self._stores[key] = _persistent(tensor)
        return store[: tensor.numel()].view(tensor.shape)

    @property
    def bytes(self) -> int:
        return sum(store.numel() * store.element_size() for store in self._stores.values())


@torch.inference_mode(False)
def _persistent(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)


class PiecewiseGraph:
    """The segments of one token bucket. Use: `load(...)`, `replay(attend)`, read `outputs`."""

    def __init__(self, shape: GraphShape, inputs: Mapping[str, Tensor], tally: Tally) -> None:
        self.shape, self.inputs, self._tally = shape, inputs, tally
        self.segments: list[Recording] = []
        self.cuts: list[Cut] = []
        self.outputs: Any = None

    def load(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy a batch of this many tokens or fewer into the inputs, in place, the rest becomes 0."""
        fill(self.inputs, inputs, {})

    def replay(self, attend: Attend) -> Any:
        """Replay the segments with `attend` between them and return `outputs`, which the next replay overwrites.

        `attend` gets what the model's own call gave: tensors of the whole bucket and everything else as it was. It may
        return fewer tokens than the bucket has (along every dimension), the rest then counts as 0.
        """
        for segment, cut in zip(self.segments, self.cuts, strict=False):
            segment.replay()
            fill({"result": cut.result}, {"result": attend(*cut.args, **cut.kwargs)}, {})
        self.segments[-1].replay()
        self._tally.replay()
        return self.outputs

    def release(self) -> None:
        for segment in self.segments:
            segment.release()


class PiecewiseManager(Lifecycle[PiecewiseGraph]):
    """Segmented graphs of a prompt pass, one for each token bucket; one manager for the target, one for the head.

    `forward(inputs, attend)` is the model's own pass over [1, N] tokens; `build_attend(shape)` gives an attention for
    the warm-up. The ladder is this pass's own: shapes of 1 row of N tokens.
    """

    def __init__(
        self,
        name: str,
        recorder: Recorder | None,
        ladder: Ladder,
        forward: Forward,
        build_inputs: BuildInputs,
        build_attend: BuildAttend,
        guard: CaptureGuard | None = None,
    ) -> None:
        super().__init__(name, recorder, ladder)
        self.guard, self.hand_over = guard or CaptureGuard(), HandOver()
        self._forward, self._build_inputs, self._build_attend = forward, build_inputs, build_attend

    def pick(self, tokens: int) -> PiecewiseGraph | None:
        """The smallest bucket that holds the tokens; None, counted and logged with its reason, to run eager."""
        return self._pick(1, tokens)

    def _warm(self, recorder: Recorder, shape: GraphShape) -> None:
        self._learn(recorder, shape)

    def _learn(self, recorder: Recorder, shape: GraphShape) -> list[Tensor]:
        """Run the pass; where each call of attention will put its result."""
        learner = _Learner(self._build_attend(shape), self.hand_over)
        inputs = self._build_inputs(shape)
        with self.guard.entered(Inside.WARMUP):
            recorder.warm(lambda: self._forward(inputs, learner))
        return learner.results

    def _capture(self, recorder: Recorder, shape: GraphShape) -> PiecewiseGraph:
        results = self._learn(recorder, shape)
        graph = PiecewiseGraph(shape, self._build_inputs(shape), self._tally)
        try:
            with self.guard.entered(Inside.CAPTURE):
                self._record(recorder, graph, _Cutter(recorder, graph, results, self.hand_over))
        except BaseException as error:
            recorder.abort()
            graph.release()
            raise_capture_error(error)
            raise
        return graph

    def _record(self, recorder: Recorder, graph: PiecewiseGraph, cutter: _Cutter) -> None:
        recorder.begin()
        graph.outputs = self._forward(graph.inputs, cutter)
        graph.segments.append(recorder.end(graph.outputs))
        cutter.finish()

    def close(self) -> None:
        """Release everything, the tensors at the cuts too."""
        super().close()
        self.hand_over = HandOver()


class _Learner:
    """Attention of the warm-up: runs, and remembers what each call returned. All hand-over memory is taken here."""

    def __init__(self, attend: Attend, hand_over: HandOver) -> None:
        self._attend, self._hand_over = attend, hand_over
        self.results: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        result = self._attend(*args, **kwargs)
        for place, value in _places(args, kwargs):
            self._hand_over.like(place, value)
        self.results.append(self._hand_over.like("result", result))
        return result


class _Cutter:
    """Attention of the recorded pass: ends a segment, notes the call, and begins the next segment."""

    def __init__(self, recorder: Recorder, graph: PiecewiseGraph, results: list[Tensor], hand_over: HandOver) -> None:
        self._recorder, self._graph, self._results, self._hand_over = recorder, graph, results, hand_over

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        handed = self._hand(args, kwargs)
        result = self._next_result()
        self._graph.segments.append(self._recorder.end())
        self._graph.cuts.append(Cut(*handed, result))
        self._recorder.begin()
        return result.clone()  # the next cut writes there again, and the model may keep what it got

    def _hand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors copied into persistent ones, inside the segment that ends here."""
        places = {place: self._hand_over.like(place, value).copy_(value) for place, value in _places(args, kwargs)}
        positional = tuple(places.get(place, value) for place, value in enumerate(args))
        return positional, {name: places.get(name, value) for name, value in kwargs.items()}

    def _next_result(self) -> Tensor:
        call = len(self._graph.cuts)
        if call >= len(self._results):
            raise CaptureError(f"the pass attends more often than in its warm-up, where it did {call} times")
        return self._results[call]

    def finish(self) -> None:
        if len(self._graph.cuts) < len(self._results):
            counts = f"{len(self._graph.cuts)} times, {len(self._results)} times in its warm-up"
            raise CaptureError(f"the pass attends less often than before: {counts}")


def _places(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[object, Tensor]]:
    """The tensor arguments by position or name."""
    named = [*enumerate(args), *kwargs.items()]
    nested = [place for place, value in named if isinstance(value, list | tuple | dict) and _has_tensor(value)]
    if nested:
        raise CaptureError(f"attention takes tensors inside argument {nested[0]!r}; they must be arguments themselves")
    return [(place, value) for place, value in named if isinstance(value, Tensor)]


def _has_tensor(nest: Any) -> bool:
    return any(isinstance(value, Tensor) for value in (nest.values() if isinstance(nest, dict) else nest))


def in_rows(attend: Attend, rows: int, length: int, bucket: int) -> Attend:
    """An attention over [R, T, ...] as one over a bucket [1, N, ...] that begins with the R x T tokens, row by row.

    Tensors of a bucket's shape are cut, all else is passed on; what is returned has R x T tokens.
    """

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != (1, bucket):
            return value
        return value[0, : rows * length].unflatten(0, (rows, length))

    def flat(*args: Any, **kwargs: Any) -> Tensor:
        return attend(*map(cut, args), **{name: cut(value) for name, value in kwargs.items()}).flatten(0, 1)[None]

    return flat
