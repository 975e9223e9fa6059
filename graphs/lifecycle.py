"""The life of a set of graphs: warm-up, capture, serving, release, and what a batch gets at each time.

Owns: the order largest first, all or nothing, readiness and its reason, and that nothing is captured while serving.
Must never know what a graph is or how one is recorded.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from graphs.errors import CaptureError
from graphs.graph import Counts, Releasable, Tally
from graphs.recorder import Recorder, told_in_words
from graphs.shape import GraphShape, Ladder, Variant

G = TypeVar("G", bound=Releasable)
Progress = Callable[[int, int, GraphShape], None]


class Lifecycle(ABC, Generic[G]):
    """`recorder` None means that graphs are not wanted. Wanted and ready are two facts: `ready` is set only when every
    shape of the ladder was captured; until then `reason` says why not."""

    def __init__(self, name: str, recorder: Recorder | None, ladder: Ladder) -> None:
        self.name, self.recorder, self.ladder = name, recorder, ladder
        self._tally = Tally(name, logging.WARNING if recorder else logging.INFO)
        self._graphs: dict[GraphShape, G] = {}
        self._ready = self._warmed = self._serving = False
        self.reason = self._reason_at_rest

    @abstractmethod
    def _warm(self, recorder: Recorder, shape: GraphShape) -> None:
        """Run one shape eager."""

    @abstractmethod
    def _capture(self, recorder: Recorder, shape: GraphShape) -> G:
        """Warm up and record one shape; what was recorded before an error is released here."""

    def _forget(self) -> None:
        """Drop what goes with released graphs."""
        return None

    @property
    def wanted(self) -> bool:
        return self.recorder is not None

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def graphs(self) -> Mapping[GraphShape, G]:
        """What was captured."""
        return MappingProxyType(self._graphs)

    @property
    def counts(self) -> Counts:
        """Replayed passes, and eager ones by reason."""
        return self._tally.counts

    @property
    def _reason_at_rest(self) -> str:
        return "not captured yet" if self.wanted else "graphs are off"

    def warm_up(self, progress: Progress | None = None) -> None:
        """Run every shape eager, largest first, so that every workspace has its final size before any capture.

        With several managers on one device, warm up all before the first is captured. `progress(done, total, shape)` is
        called before each shape. Without a recorder nothing happens. CaptureError while serving and when memory ends.
        """
        self._only_before_serving("warm-up")
        if self.recorder is not None:
            with told_in_words():
                for shape in self._each(progress):
                    self._warm(self.recorder, shape)
            self._warmed = True

    def capture(self, progress: Progress | None = None) -> None:
        """Record every shape, after a warm-up if there was none; ready afterwards.

        When one shape fails, all are released and the error is raised. CaptureError while serving.
        """
        self._only_before_serving("capture")
        if self.recorder is None:
            return
        if not self._warmed:
            self.warm_up()
        self.release()
        try:
            with told_in_words():
                self._capture_all(self.recorder, progress)
        except BaseException as error:
            self.release()
            self.reason = f"capture failed: {error}"
            raise
        self._ready, self.reason = True, ""

    def withhold(self, reason: str) -> None:
        """Nothing is captured for now, since what the pass needs is not there yet: a prompt warm-up has no cache, say.

        What is picked runs eager with this reason, counted and logged once. A later capture may do better.
        """
        self._only_before_serving("withholding")
        self.release()
        if self.wanted:
            self.reason = reason

    def _capture_all(self, recorder: Recorder, progress: Progress | None) -> None:
        for shape in self._each(progress):
            self._graphs[shape] = self._capture(recorder, shape)

    def _each(self, progress: Progress | None) -> Iterator[GraphShape]:
        """Shapes largest first, each announced when its turn comes."""
        for done, shape in enumerate(self.ladder.largest_first()):
            if progress:
                progress(done, len(self.ladder), shape)
            yield shape

    def serve(self) -> None:
        """From here on nothing is captured: a capture would stall every session and take memory that is in use."""
        self._serving = True

    def _only_before_serving(self, what: str) -> None:
        if self._serving:
            raise CaptureError(f"{self.name}: no {what} while serving")

    def _pick(self, rows: int, query_len: int, variant: Variant = ()) -> G | None:
        shape = self.ladder.fit(rows, query_len, variant) if self._ready else None
        if shape is None:
            self._tally.eager(self.ladder.misfit(rows, query_len, variant) if self._ready else self.reason)
            return None
        return self._graphs[shape]

    def release(self) -> None:
        """Give all recordings back to the pool; what is picked afterwards runs eager."""
        for graph in self._graphs.values():
            graph.release()
        self._graphs.clear()
        self._forget()
        self._ready, self.reason = False, self._reason_at_rest

    def close(self) -> None:
        """Release everything; the recorder, which several managers may share, is closed by its owner."""
        self.release()
        self._warmed, self.reason = False, "closed"
