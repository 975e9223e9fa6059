"""What a rank needs of the others while the engine is built and runs: its mesh, votes, and the way of orders.

Owns: the process groups, and that facts of one rank (memory, a failed capture) become decisions of all. Must never
know processes, sockets or the service.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from graphs.agreement import (
    Agreement,
    Alone,
    Ballot,
    DisagreementError,
    Group,
    LostRankError,
    Question,
    Voters,
)
from graphs.errors import GraphError
from speculator.ranks.channel import Channel
from speculator.ranks.link import RankLink
from speculator.ranks.pulse import Pulse
from target.experts import EXPERTS
from target.parallel import PARTS, TENSOR, Axis, Mesh, lines_of
from target.pipeline import PIPELINE, WHOLE, Stage

FOREVER = timedelta(days=7)  # a rank that waits for work is no fault; the watch on the gang ends the wait
NEXT_SHAPE = "the next graph"


class Awaited:
    """Voters that wait for each other, and say so."""

    def __init__(self, voters: Voters, pulse: Pulse) -> None:
        self.rank, self.size = voters.rank, voters.size
        self._voters, self._pulse = voters, pulse

    def gather(self, ballot: Ballot, about: str) -> list[Ballot]:
        with self._pulse.waiting():
            return self._voters.gather(ballot, about)


@dataclass(frozen=True)
class Team:
    """One rank's view of all; `lost` hears in one sentence why the ranks cannot go on."""

    rank: int
    size: int
    device: torch.device
    mesh: Mesh
    agreement: Agreement
    channel: Channel
    lost: Callable[[str], str]
    pulse: Pulse
    near: Agreement  # of the ranks that compute each pass together: those of a stage
    link: RankLink | None = None  # between stages, where there are several

    @classmethod
    def build(
        cls,
        tensor: int,
        device: torch.device,
        stall: float,
        lost: Callable[[str], str],
        pulse: Pulse | None = None,
        pipeline: int = 1,
        axis: str = TENSOR,
    ) -> Team:
        """Over the default process group; call it on every rank. PlanError when the mesh needs other many ranks.

        Collectives and votes fail by themselves after `stall` seconds. `axis` is what `tensor` ranks divide: every
        layer, or only its experts.
        """
        backend, limit = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=stall)
        sizes = {PIPELINE: pipeline, axis: tensor} if pipeline > 1 else {axis: tensor}
        pulse, mesh = pulse or Pulse(), Mesh.build(sizes, backend, limit)
        for line in mesh.axes.values():
            line.on_collectives(pulse.waiting)
        orders = dist.new_group(timeout=FOREVER, backend="gloo")
        votes = near = Agreement(Awaited(Group.apart(stall), pulse))
        link = None
        if pipeline > 1:
            link = RankLink.build(mesh, backend, limit, device, pulse)
            near = Agreement(Awaited(stage_voters(sizes, limit), pulse))
        here = (dist.get_rank(), dist.get_world_size(), device)
        return cls(*here, mesh, votes, Channel(orders), lost, pulse, near, link)

    @property
    def stage(self) -> Stage:
        return self.link.stage if self.link else WHOLE

    @property
    def experts(self) -> Axis | None:
        """The axis that divides experts among ranks with sessions of their own; None where ranks share all sessions."""
        return self.mesh.axes.get(EXPERTS)

    def heed(self, *models: nn.Module | None) -> None:
        """Every attention and MLP that a pass comes to is progress of this rank."""
        parts = [part for model in models if model is not None for part in model.modules() if isinstance(part, PARTS)]
        for part in parts:
            part.register_forward_pre_hook(lambda module, inputs: self.pulse.on())

    def smallest(self, value: int, about: str) -> int:
        """The least of all ranks' values."""
        return min(self.each(value, about))

    def each(self, value: int, about: str) -> list[int]:
        """All ranks' values, by rank."""
        ballot = Ballot(Question.HAS_BATCH, zlib.crc32(about.encode()), 1, capacity=value)
        return [vote.capacity for vote in self.agreement.voters.gather(ballot, about)]

    def capture(self, record: Callable[[Callable[[str, int, int], None]], None]) -> str:
        """Record on every rank, shape by shape: why it failed on all of them, "" when it did on none.

        `record` gets the progress to report, which it calls before each shape. DisagreementError when only some ranks
        failed, LostRankError when others do not vote. Stages record other passes, so they agree on the end alone.
        """
        why = self._capture_near(record)
        if self.link is not None:
            self.agreement.enough_memory("all graphs", not why, self._free)
        return why

    @property
    def _free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def _capture_near(self, record: Callable[[Callable[[str, int, int], None]], None]) -> str:
        free = self._free

        def vote(what: str, done: int, total: int) -> None:
            self.near.enough_memory(NEXT_SHAPE, True, free)

        try:
            record(vote)
        except (DisagreementError, LostRankError):
            raise
        except GraphError as error:
            self.near.enough_memory(NEXT_SHAPE, False, free)
            return str(error)
        self.near.enough_memory(NEXT_SHAPE, True, free)
        return ""


def stage_voters(sizes: Mapping[str, int], limit: timedelta) -> Voters:
    """Those of this rank's stage; call it on every rank."""
    axis = lines_of(sizes, TENSOR, "gloo", limit)
    return Group(axis.process_group, timeout=limit.total_seconds()) if axis.size > 1 else Alone()
