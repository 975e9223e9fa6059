"""Every rank votes before a pass that contains a collective, so that ranks disagree with an error and never hang.

Owns: the questions, the ballots (fixed integers) and what a set of votes means. Must never know passes or models.
The failure it prevents: one rank skips a shape that the others enter, and start-up waits for ever with an empty log
(TensorRT-LLM #14986).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from graphs.errors import GraphError


class DisagreementError(GraphError):
    """Ranks voted differently; every rank raises the same text: who, what they have, what to do."""


class LostRankError(GraphError):
    """Ranks did not vote in time, or are gone. Later votes raise it again: the group cannot be used any more."""


class Question(IntEnum):
    """What a vote is about."""

    HAS_BATCH = 1
    DRAFT_LENGTH = 2
    READINESS = 3
    ENOUGH_MEMORY = 4


class Ballot(NamedTuple):
    """One rank's vote: integers only, always as many."""

    question: int
    subject: int  # hash of what is voted on, so that ranks at different shapes notice
    answer: int
    capacity: int = 0  # tokens or bytes that this rank has
    needed: int = 0  # tokens or bytes that the subject takes


class Voters(Protocol):
    """Carries ballots between ranks."""

    rank: int
    size: int

    def gather(self, ballot: Ballot, about: str) -> list[Ballot]:
        """All ranks' ballots in rank order; LostRankError when one is missing."""
        ...


class Alone:
    """A single process: its vote decides."""

    rank, size = 0, 1

    def gather(self, ballot: Ballot, about: str) -> list[Ballot]:
        return [ballot]


class Group:
    """Votes over a process group of torch.distributed, as int64 tensors sent to each peer.

    Give it a group of its own: sharing the model's group would pair a vote with a collective of the model when ranks
    have drifted apart. `device` is where the group's backend wants its tensors (cpu for gloo, cuda for nccl).
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu", timeout: float = 10.0
    ) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._device, self._timeout, self._lost = group, device, timeout, ""

    @classmethod
    def apart(cls, timeout: float = 10.0) -> Group:
        """A gloo group of all ranks for votes alone; call it on every rank, after init_process_group."""
        try:
            group = dist.new_group(timeout=timedelta(seconds=timeout), backend="gloo")
        except RuntimeError as error:
            why = _first_line(error)
            raise LostRankError(f"rank {dist.get_rank()}: a rank was lost before ranks could vote ({why})") from None
        return cls(group, "cpu", timeout)

    def gather(self, ballot: Ballot, about: str) -> list[Ballot]:
        if self._lost:
            raise LostRankError(self._lost)
        mine = torch.tensor(ballot, dtype=torch.int64, device=self._device)
        boxes = [mine if peer == self.rank else torch.empty_like(mine) for peer in range(self.size)]
        failed = self._exchange(mine, boxes) if self.size > 1 else {}
        if failed:
            self._lost = _lost_text(self.rank, self.size, failed, about)
            raise LostRankError(self._lost)
        return [Ballot(*box.tolist()) for box in boxes]

    def _exchange(self, mine: Tensor, boxes: Sequence[Tensor]) -> dict[tuple[int, ...], str]:
        """Send to and receive from every peer until the deadline; which peers failed, and why.

        Point to point rather than a gather, because a gather fails without saying who is missing.
        """
        peers = [peer for peer in range(self.size) if peer != self.rank]
        try:
            works = self._post(mine, boxes, peers)
        except RuntimeError as error:
            return {tuple(peers): _first_line(error)}
        whose = [(peer,) for peer in peers for _ in range(2)] if len(works) == 2 * len(peers) else [tuple(peers)]
        deadline = time.monotonic() + self._timeout
        ends = ((who, _wait(work, deadline)) for who, work in zip(whose, works, strict=True))
        return {who: why for who, why in ends if why}

    def _post(self, mine: Tensor, boxes: Sequence[Tensor], peers: Sequence[int]) -> list[dist.Work]:
        swaps = [
            dist.P2POp(op, tensor, group=self._group, group_peer=peer)
            for peer in peers
            for op, tensor in ((dist.isend, mine), (dist.irecv, boxes[peer]))
        ]
        works: list[dist.Work] = dist.batch_isend_irecv(swaps)
        return works


def _wait(work: dist.Work, deadline: float) -> str:
    """Why the work did not complete by the deadline; "" when it did."""
    left = max(deadline - time.monotonic(), 0.001)
    try:
        work.wait(timedelta(seconds=left))
    except RuntimeError as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _lost_text(rank: int, size: int, failed: dict[tuple[int, ...], str], about: str) -> str:
    missing = sorted({peer for who in failed for peer in who})
    who = "rank" if len(missing) == 1 else "one of the ranks" if any(len(who) > 1 for who in failed) else "ranks"
    return (
        f"rank {rank} of {size} got no vote on {about} from {who} {_listed(missing)}: ended, or waiting elsewhere "
        f"({next(iter(failed.values()))}); restart all ranks, and look for the first error in the log of that one"
    )


class Agreement:
    """Asks all ranks one question at a time; every rank gets the same answer or raises the same DisagreementError.

    Call it on every rank in the same order, before building or running anything that contains a collective.
    """

    def __init__(self, voters: Voters) -> None:
        self.voters = voters

    def has_batch(self, shape: object, has: bool, capacity: int, needed: int) -> bool:
        """Whether to run `shape` (all ranks can) or to skip it (none can; a single rank is free to).

        `capacity` and `needed` are tokens of KV cache: what this rank has in all, what the shape takes.
        """
        about = f"a batch of {shape}"
        votes = self._gather(Question.HAS_BATCH, about, int(has), capacity, needed)
        if _unanimous(votes):
            return has
        raise DisagreementError(
            f"{about} fits on some ranks only: {_by_answer(votes, _tokens)}; give all ranks the same KV cache "
            f"(at most {min(v.capacity for v in votes)} tokens), or leave out shapes that take more than that"
        )

    def draft_length(self, length: int) -> int:
        """The draft length of the next pass, which must be the same everywhere: it decides how many passes follow."""
        votes = self._gather(Question.DRAFT_LENGTH, "the draft length", length)
        if _unanimous(votes):
            return length
        raise DisagreementError(
            f"ranks want different draft lengths: {_by_answer(votes, lambda v: str(v.answer))}; "
            "decide it on one rank and send it, or use a fixed length"
        )

    def ready(self, captured: bool, shape: object = "this batch") -> bool:
        """Whether all ranks replay `shape` or all run it eagerly; replay on some ranks only is refused."""
        about = f"graphs for {shape}"
        votes = self._gather(Question.READINESS, about, int(captured))
        if _unanimous(votes):
            return captured
        raise DisagreementError(
            f"{about} are ready on some ranks only: {_by_answer(votes, _yes_or_no)}; "
            "switch graphs off, or find out in the log of the ranks without why capture failed"
        )

    def enough_memory(self, shape: object, enough: bool, free: int, needed: int = 0) -> bool:
        """Whether capturing `shape` goes on: True when no rank ran out of memory, False when all did.

        Vote after the allocations of a pass and before its first collective; `free` and `needed` are bytes.
        """
        about = f"memory to capture {shape}"
        votes = self._gather(Question.ENOUGH_MEMORY, about, int(enough), free, needed)
        if _unanimous(votes):
            return enough
        raise DisagreementError(
            f"{about} is there on some ranks only: {_by_answer(votes, _bytes)}; "
            "leave more memory free (a lower utilisation), or capture fewer shapes"
        )

    def _gather(self, question: Question, about: str, answer: int, capacity: int = 0, needed: int = 0) -> list[Ballot]:
        ballot = Ballot(question, zlib.crc32(about.encode()), answer, capacity, needed)
        votes = self.voters.gather(ballot, about)
        _check_subject(votes)
        return votes


def _check_subject(votes: Sequence[Ballot]) -> None:
    """All ranks must be asked the same, in the same order; otherwise they have drifted apart already."""
    if len({(vote.question, vote.subject) for vote in votes}) == 1:
        return
    asked = "; ".join(
        f"rank {rank} on {Question(vote.question).name.lower().replace('_', ' ')} [{vote.subject:08x}]"
        for rank, vote in enumerate(votes)
    )
    raise DisagreementError(
        f"ranks vote on different things: {asked}; give all ranks the same configuration and shapes, in the same order"
    )


def _unanimous(votes: Sequence[Ballot]) -> bool:
    return len({vote.answer for vote in votes}) == 1


Shown = Callable[[Ballot], str]


def _tokens(vote: Ballot) -> str:
    return f"{'yes' if vote.answer else 'no'}, room for {vote.capacity} tokens where {vote.needed} are needed"


def _bytes(vote: Ballot) -> str:
    need = f" where {vote.needed / 2**20:.1f} are needed" if vote.needed else ""
    return f"{'yes' if vote.answer else 'no'}, {vote.capacity / 2**20:.1f} MiB free{need}"


def _yes_or_no(vote: Ballot) -> str:
    return "yes" if vote.answer else "no"


def _by_answer(votes: Sequence[Ballot], shown: Shown) -> str:
    """`rank 1: no, ...; ranks 0, 2: yes, ...`: ranks that say the same together, the smallest answer first."""
    said: dict[str, list[int]] = {}
    for rank, vote in sorted(enumerate(votes), key=lambda item: (item[1].answer, item[0])):
        said.setdefault(shown(vote), []).append(rank)
    return "; ".join(f"rank{'s' if len(who) > 1 else ''} {_listed(who)}: {text}" for text, who in said.items())


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
