"""What the service answers, as plain values.

Owns: the records that leave the worker for the server, and the acceptance counts they carry.
Must never import torch, grpc or protobuf, nor know how a session works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from speculator.types import Draft, FinishReason, Rule


class Timing(NamedTuple):
    """Where the time of one work item went, in seconds; `batch` is how many sessions shared its last engine step."""

    queue: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    batch: int = 0


@dataclass(slots=True)
class Acceptance:
    """Acceptance counts of one session or of the whole server.

    `rounds[j]` counts rounds that accepted j drafted tokens, `judged[d]` those that judged d levels: the depth of the
    draft, or less where a stop token or the length limit ended the text inside it.
    """

    rounds: list[int] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)
    draft_tokens: int = 0
    output_tokens: int = 0

    def record(self, nodes: int, judged: int, accepted: int) -> None:
        """Counts one round that verified `nodes` drafted tokens."""
        if accepted >= len(self.rounds) or judged >= len(self.judged):
            self._grow(accepted, judged)
        self.rounds[accepted] += 1
        self.judged[judged] += 1
        self.draft_tokens += nodes

    def _grow(self, accepted: int, judged: int) -> None:
        self.rounds += [0] * (accepted + 1 - len(self.rounds))
        self.judged += [0] * (judged + 1 - len(self.judged))

    def copy(self) -> Acceptance:
        return Acceptance(list(self.rounds), list(self.judged), self.draft_tokens, self.output_tokens)

    @property
    def steps(self) -> int:
        return sum(self.rounds)

    @property
    def accepted_tokens(self) -> int:
        return sum(j * count for j, count in enumerate(self.rounds))

    @property
    def accepted_at(self) -> list[int]:
        """How many rounds accepted a token at each depth; index 0 is depth 1."""
        return _at_least(self.rounds)

    @property
    def drafted_at(self) -> list[int]:
        """How many rounds judged a token at each depth; index 0 is depth 1."""
        return _at_least(self.judged)


def _at_least(counts: list[int]) -> list[int]:
    return [sum(counts[depth:]) for depth in range(1, len(counts))]


class SessionView(NamedTuple):
    """Committed state of a session at one moment. `expires_in` is in seconds; `tokens` is None when not asked for."""

    session_id: str
    length: int
    finish: FinishReason
    expires_in: float
    stats: Acceptance
    tokens: tuple[int, ...] | None = None


class Created(NamedTuple):
    """A session is open. `next_token` is its first sampled token, None when the caller asked to commit none."""

    session: SessionView
    next_token: int | None
    timing: Timing
    replayed: bool = False


class Proposed(NamedTuple):
    """A draft below the first `base` tokens, kept by the server under `draft_id`."""

    draft_id: int
    base: int
    draft: Draft
    timing: Timing


class Verified(NamedTuple):
    """What one verification committed; `accepted` are node indices of the accepted path."""

    accepted: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    length: int
    finish: FinishReason
    rule: Rule
    next_draft: Proposed | None
    timing: Timing
    replayed: bool = False


class Extended(NamedTuple):
    """The caller's tokens are committed."""

    length: int
    finish: FinishReason
    next_draft: Proposed | None
    timing: Timing
    replayed: bool = False


class Generated(NamedTuple):
    """One committed step of a server-side loop. `session` is set on the first and on the last one."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    accepted: int
    finish: FinishReason
    timing: Timing
    session: SessionView | None = None


class Usage(NamedTuple):
    """What the scheduler holds at one moment."""

    active: int
    finished: int
    queued: int
    used_pages: int
    reserved_pages: int
    total_pages: int


Answer = Created | Proposed | Verified | Extended | Generated
