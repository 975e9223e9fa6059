"""What a rank needs of the others while the engine is built and runs: its mesh, votes, and the way of orders.

Owns: the process groups, and that facts of one rank (memory, a failed capture) become decisions of all. Must never
know processes, sockets or the service.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from graphs.agreement import Agreement, Ballot, DisagreementError, Group, LostRankError, Question
from graphs.errors import GraphError
from speculator.errors import ConfigError
from speculator.ranks.channel import Channel
from speculator.ranks.pulse import Pulse
from target.experts import EXPERTS
from target.parallel import TENSOR, Axis, Mesh

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

    @classmethod
    def build(
        cls,
        tensor: int,
        device: torch.device,
        stall: float,
        lost: Callable[[str], str],
        pulse: Pulse | None = None,
        axis: str = TENSOR,
    ) -> Team:
        """Over the default process group; call it on every rank. PlanError when the mesh needs other many ranks.

        `axis` is what `tensor` ranks divide: every layer, or only its experts.
        """
        backend = "nccl" if device.type == "cuda" else "gloo"
        mesh = Mesh.build({axis: tensor}, backend, timedelta(seconds=stall))
        orders = dist.new_group(timeout=FOREVER, backend="gloo")
        votes = Agreement(Group.apart(VOTE_SECONDS))
        way = Channel(orders)
        return cls(dist.get_rank(), dist.get_world_size(), device, mesh, votes, way, lost, pulse or Pulse())

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
        failed, LostRankError when others do not vote.
        """
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

        def vote(what: str, done: int, total: int) -> None:
            self.agreement.enough_memory(NEXT_SHAPE, True, free)

        try:
            record(vote)
        except (DisagreementError, LostRankError):
            raise
        except GraphError as error:
            self.agreement.enough_memory(NEXT_SHAPE, False, free)
            return str(error)
        self.agreement.enough_memory(NEXT_SHAPE, True, free)
        return ""
