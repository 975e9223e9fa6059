"""What a recorded round leaves in its one buffer, and the copy that brings it to the host.

Owns: the layout of that buffer and when it may be read. Must never know how it was computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Columns of the buffer [R, W] int64, in order; real numbers are float64 bits."""

    path: int  # tokens of the longest accepted path, root included
    nodes: int  # drafted nodes

    @property
    def columns(self) -> tuple[tuple[int, type], ...]:
        """Widths, 0 for one value a row, and kinds of tokens, kept, path, logprobs, finite, and of the drafts."""
        committed = ((self.path, int), (0, int), (self.path, int), (self.path, float), (0, int))
        return committed + (((self.nodes, int), (self.nodes, int), (self.nodes, float)) if self.nodes else ())

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts [R] or [R, width], in the order of the columns -> [R, W]."""
        return torch.cat([_words(part).view(part.shape[0], -1) for part in parts], dim=1)

    def unpack(self, buffer: Tensor) -> Iterator[list[Any]]:
        """Host buffer [R, W] -> for each column its R values, or lists of values."""
        parts = buffer.split([max(width, 1) for width, _ in self.columns], dim=1)
        for part, (width, kind) in zip(parts, self.columns, strict=True):
            values = part.contiguous().view(torch.float64) if kind is float else part
            yield (values if width else values[:, 0]).tolist()


def _words(part: Tensor) -> Tensor:
    return part.double().view(torch.int64) if part.is_floating_point() else part.long()


class Outcome(NamedTuple):
    """Which steps a round answers, and what their callers want of it."""

    steps: Sequence[int]  # indices into the step list
    rows: Sequence[int]
    wants: Sequence[int]  # drafted nodes that count
    ids: Sequence[int]  # of the drafts; 0 where none is wanted


class Flight:
    """A round under way: its result travels to memory of its own, so the next round may start before it is read."""

    def __init__(self, layout: Layout, result: Tensor, outcome: Outcome) -> None:
        self._layout, self.outcome = layout, outcome
        self._arrived: torch.cuda.Event | None = None
        if not result.is_cuda:
            self._host = result.clone()
            return
        self._host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        self._host.copy_(result, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def land(self) -> list[list[Any]]:
        """Wait for the round, and its columns as lists; the first rows are those of the outcome."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return list(self._layout.unpack(self._host[: len(self.outcome.steps)]))
