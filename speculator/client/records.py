"""What a client says and hears, as plain values.

Owns: the records of the client library's public face. Must never import torch, grpc or protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple, TypedDict
from uuid import uuid4

from speculator.types import Draft, FinishReason, Rule

Prompt = str | Sequence[int]


# ---- what a client says


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the target samples; None keeps the server's default, temperature 0 is greedy, `seed` is 0..2**64 - 1."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    rule: Rule | None = None


@dataclass(frozen=True, slots=True)
class Stopping:
    """When the output ends; `max_new_tokens` None is up to the context limit."""

    max_new_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a draft; None keeps the session's, see `types.DraftShape` for the words."""

    depth: int | None = None
    nodes: int | None = None
    branching: int | None = None
    parents: tuple[int, ...] = ()


class GenerateOptions(TypedDict, total=False):
    """What may be said about a generation; what is not said stays with the server."""

    sampling: Sampling
    stopping: Stopping
    shape: Shape
    speculate: bool
    model: str


class SessionOptions(GenerateOptions, total=False):
    """What may be said about a session; see Opening."""

    session_id: str
    prefill_only: bool
    idle_timeout: float | None


@dataclass(frozen=True, slots=True)
class Opening:
    """Everything a session is made of; with its token ids in place of the prompt, the same session again.

    `prefill_only` commits nothing beyond the prompt. `idle_timeout` is in seconds.
    """

    prompt: Prompt
    session_id: str = ""
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    shape: Shape = Shape()
    speculate: bool = True
    prefill_only: bool = False
    idle_timeout: float | None = None
    model: str = ""

    def named(self) -> Opening:
        """With a session id, so that asking twice opens one session."""
        return self if self.session_id else replace(self, session_id=str(uuid4()))

    def resumed(self, tokens: Sequence[int], prompt_length: int) -> Opening:
        """The opening of the same session after it has come to `tokens`, `prompt_length` of which were its prompt."""
        left = self.stopping.max_new_tokens
        if left is not None:
            left -= len(tokens) - prompt_length
        stopping = replace(self.stopping, max_new_tokens=left)
        return replace(self, prompt=tuple(tokens), stopping=stopping, prefill_only=True)


# ---- what a client hears


class Timing(NamedTuple):
    """Server-side seconds of one step; `batch` sessions shared it.

    `total` is from its arrival to its answer, on a Draft stream; 0 elsewhere.
    """

    queue: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    batch: int = 0
    total: float = 0.0


class Stats(NamedTuple):
    """Acceptance counts. `histogram` maps accepted drafts to rounds; index 0 of the position lists is depth 1."""

    rounds: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    output_tokens: int = 0
    histogram: Mapping[int, int] = {}
    accepted_at: tuple[int, ...] = ()
    drafted_at: tuple[int, ...] = ()

    @property
    def accept_length(self) -> float:
        """Tokens committed per target pass, bonus included."""
        return 1.0 + self.accepted_tokens / self.rounds if self.rounds else 0.0

    @property
    def rates(self) -> tuple[float, ...]:
        """Acceptance rate by position: rounds that accepted this deep / rounds that drafted this deep."""
        pairs = zip_longest(self.accepted_at, self.drafted_at, fillvalue=0)  # the deepest may never be accepted
        return tuple(accepted / drafted if drafted else 0.0 for accepted, drafted in pairs)


class SessionState(NamedTuple):
    """Committed state of a session. `expires_at` is in seconds since the epoch; `tokens` None when not asked for."""

    session_id: str
    model: str
    length: int
    finish: FinishReason
    expires_at: float
    stats: Stats
    instance_id: str
    tokens: tuple[int, ...] | None = None


class Created(NamedTuple):
    """A session is open; `next_token` is its first token, committed, None after `prefill_only`."""

    session: SessionState
    next_token: int | None
    cached_prompt_tokens: int
    timing: Timing
    replayed: bool


class Proposed(NamedTuple):
    """A draft below the first `base_length` tokens; `draft.draft_id` names it to Verify."""

    base_length: int
    draft: Draft
    timing: Timing


class Verified(NamedTuple):
    """What one verification committed; `accepted` are node indices of the accepted path."""

    accepted: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    length: int
    finish: FinishReason
    rule: Rule | None
    next_draft: Proposed | None
    timing: Timing
    replayed: bool


class Extended(NamedTuple):
    """The caller's tokens are committed."""

    length: int
    finish: FinishReason
    next_draft: Proposed | None
    timing: Timing
    replayed: bool


class Chunk(NamedTuple):
    """One committed step of Generate; the first `accepted` of `tokens` were drafted, the others are the target's own.

    `stats` comes with the last chunk, `session` with the first one, `text` when the prompt came as text.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    accepted: int
    finish: FinishReason
    text: str
    timing: Timing
    stats: Stats | None
    session: SessionState | None


class Round(NamedTuple):
    """What one step of a Session committed; the first `accepted` of `tokens` were drafted.

    The first round holds the token sampled right after the prompt.
    """

    tokens: tuple[int, ...]
    accepted: int
    logprobs: tuple[float, ...]
    finish: FinishReason
    timing: Timing


class Limits(NamedTuple):
    """What a server takes; tokens, nodes, levels, items, sessions, bytes."""

    context: int
    nodes: int
    depth: int
    batch_items: int
    sessions: int
    message_bytes: int


class ServerInfo(NamedTuple):
    """Who answers and within which limits."""

    version: str
    instance_id: str
    target_model: str
    target_revision: str
    draft_model: str
    draft_method: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer_sha256: str
    limits: Limits
    default_rule: Rule | None
    default_shape: Shape
    schema_revision: int
    minimum_client_revision: int
    draft_revision: str  # empty also where the server is older than revision 3


class ServerStats(NamedTuple):
    """Totals of a server since its start, and what it holds now."""

    stats: Stats
    running_sessions: int
    queued_requests: int
    used_kv_blocks: int
    total_kv_blocks: int
