"""What stages of a pipeline send each other: hidden states to the next one, a step's outcome from the last to all.

Owns: the two process groups, the memory that receives, and how long sent memory must stay as it is. Must never know
models, engines or what a tensor means. Nothing here is recorded: sends and receives stay outside the graphs, so that a
graph knows no peers, and one may be replayed for another batch while what it gave the last time is on its way.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from speculator.ranks.pulse import Pulse
from target.parallel import Mesh, lines_of
from target.pipeline import PIPELINE, Stage

MOST_ANSWERS = 64  # outcomes on their way at once; then the last stage waits for the oldest
PASSES = 2  # of a step, prompts and drafts


class Link(Protocol):
    """One stage's view of the others. All shapes are known to both sides from the step alone."""

    stage: Stage

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the stage before handed on; its memory is received into again by the next call."""

    def send(self, tensor: Tensor) -> None:
        """Hand on to the next stage; `tensor` (contiguous) must stay as it is until `drain`."""

    def drain(self) -> None:
        """Wait until everything sent may be written over."""

    def finish(self) -> None:
        """Wait until everything sent has arrived, before this process may end."""

    def answer(self, outcome: Tensor) -> None:
        """On the last stage: tell all others, in the order of steps."""

    def answered(self, shape: tuple[int, ...]) -> Tensor:
        """On the others: the next outcome, int64; waits for it."""


class RankLink:
    """Over torch.distributed, between ranks of one line of the mesh. RuntimeError when a stage is gone.

    Forwards and backwards go by groups of their own: a send that waits for its receiver must not hold up the outcome
    for which that one waits. The first and the last stage may be neighbours.
    """

    def __init__(
        self, stage: Stage, forward: dist.ProcessGroup, back: dist.ProcessGroup, device: torch.device, pulse: Pulse
    ) -> None:
        self.stage, self._forward, self._back, self._device = stage, forward, back, device
        self._pulse = pulse
        self._received = torch.zeros(0, dtype=torch.uint8, device=device)
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._answers: deque[tuple[dist.Work, Tensor]] = deque()

    @classmethod
    def build(cls, mesh: Mesh, backend: str, timeout: timedelta, device: torch.device, pulse: Pulse) -> RankLink:
        """Along the mesh's pipeline; call it on every rank."""
        axis = mesh.axes[PIPELINE]
        sizes = {name: found.size for name, found in mesh.axes.items()}
        back = lines_of(sizes, PIPELINE, backend, timeout)
        return cls(Stage(axis.rank, axis.size), axis.process_group, back.process_group, device, pulse)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = prod(shape) * dtype.itemsize
        if self._received.numel() < count:
            self._received = torch.zeros(count, dtype=torch.uint8, device=self._device)
        place = self._received[:count].view(dtype).view(shape)
        with self._pulse.waiting():
            dist.recv(place, group=self._forward, group_src=self.stage.index - 1)
        return place

    def send(self, tensor: Tensor) -> None:
        self._drain(self._sent, PASSES * self.stage.size - 1)  # each stage may be at a step of its own
        self._post(self._sent, tensor, self._forward, self.stage.index + 1)

    def drain(self) -> None:
        self._drain(self._sent, 0)

    def finish(self) -> None:
        self.drain()
        self._drain(self._answers, 0)
        if self._device.type == "cuda":  # where waiting for a send only queues what follows behind it
            with self._pulse.waiting():
                torch.cuda.synchronize(self._device)

    def answer(self, outcome: Tensor) -> None:
        self._drain(self._answers, MOST_ANSWERS)
        for peer in range(self.stage.size - 1):
            self._post(self._answers, outcome, self._back, peer)

    def answered(self, shape: tuple[int, ...]) -> Tensor:
        place = torch.empty(shape, dtype=torch.int64, device=self._device)
        with self._pulse.waiting():
            dist.recv(place, group=self._back, group_src=self.stage.size - 1)
        return place

    def _post(self, sent: deque[tuple[dist.Work, Tensor]], tensor: Tensor, group: dist.ProcessGroup, peer: int) -> None:
        work = dist.isend(tensor, group=group, group_dst=peer)
        assert work is not None
        sent.append((work, tensor))

    def _drain(self, sent: deque[tuple[dist.Work, Tensor]], most: int) -> None:
        """Wait for the oldest until `most` or fewer are on their way."""
        while len(sent) > most:
            with self._pulse.waiting():
                sent.popleft()[0].wait()


class Loopback:
    """No other stage: what would be received is zero, and nothing is sent. For measuring a stage by itself."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self.stage, self._device = stage, device

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def send(self, tensor: Tensor) -> None:
        return None

    def drain(self) -> None:
        return None

    def finish(self) -> None:
        return None

    def answer(self, outcome: Tensor) -> None:
        return None

    def answered(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)
