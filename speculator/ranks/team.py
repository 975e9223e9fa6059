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
from speculator.errors import ConfigError
from speculator.ranks.channel import Channel
from speculator.ranks.link import RankLink
from speculator.ranks.pulse import Pulse
from target.experts import EXPERTS
from target.parallel import TENSOR, Axis, Mesh, lines_of
from target.pipeline import PIPELINE, WHOLE, Stage

FOREVER = timedelta(days=7)  # a rank that waits for work is no fault; the watch on the gang ends the wait
VOTE_SECONDS = 20.0
NEXT_SHAPE = "the next graph"


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

        `axis` is what `tensor` ranks divide: every layer, or only its experts.
        """
        backend, limit = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=stall)
        sizes = {PIPELINE: pipeline, axis: tensor} if pipeline > 1 else {axis: tensor}
        mesh = Mesh.build(sizes, backend, limit)
        orders = dist.new_group(timeout=FOREVER, backend="gloo")
        votes = near = Agreement(Group.apart(VOTE_SECONDS if pipeline == 1 else stall))  # stages load other things
        link = None
        if pipeline > 1:
            link = RankLink.build(mesh, backend, limit, device)
            near = Agreement(stage_voters(sizes, limit))
        here = (dist.get_rank(), dist.get_world_size(), device)
        return cls(*here, mesh, votes, Channel(orders), lost, pulse or Pulse(), near, link)

    @property
    def stage(self) -> Stage:
        return self.link.stage if self.link else WHOLE

    @property
    def experts(self) -> Axis | None:
        """The axis that divides experts among ranks with sessions of their own; None where ranks share all sessions."""
        return self.mesh.axes.get(EXPERTS)

    def smallest(self, value: int, about: str) -> int:
        """The least of all ranks' values."""
        return min(self.each(value, about))

    def each(self, value: int, about: str) -> list[int]:
        """All ranks' values, by rank."""
        ballot = Ballot(Question.HAS_BATCH, zlib.crc32(about.encode()), 1, capacity=value)
        return [vote.capacity for vote in self.agreement.voters.gather(ballot, about)]

    def same(self, value: str, about: str) -> None:
        """ConfigError that names the ranks where `value` is another than on rank 0."""
        ballot = Ballot(Question.HAS_BATCH, zlib.crc32(about.encode()), zlib.crc32(value.encode()))
        votes = self.agreement.voters.gather(ballot, about)
        others = [str(rank) for rank, vote in enumerate(votes) if vote.answer != votes[0].answer]
        if others:
            who = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(others)} have"
            raise ConfigError(f"{who} another {about} than rank 0: give all ranks the same")

    def capture(self, record: Callable[[Callable[[str, int, int], None]], None]) -> str:
        """Record on every rank, shape by shape: why it failed on all of them, "" when it did on none.

        `record` gets the progress to report, which it calls before each shape. DisagreementError when only some ranks
        failed, LostRankError when others do not vote. Stages record other passes, so they agree on the end alone.
        """
        why = self._capture_near(record)
        if self.link is not None:
            self.pulse.rest("waiting for the other stages")
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
    return Group(axis.process_group, timeout=VOTE_SECONDS) if axis.size > 1 else Alone()
