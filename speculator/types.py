"""Small host-side records shared by server, scheduler, session and engine.

Owns: the words of the service as plain values. Must never import torch, grpc or protobuf.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MASK_BITS = 64  # of an ancestor mask
MOST_NODES = MASK_BITS - 1  # drafted nodes of one tree: with its root they fill a mask


class Rule(enum.Enum):
    """How drafted tokens are accepted; every rule keeps the target's distribution."""

    COUPLED = "coupled"  # accepted iff equal to the target's own sample; text depends on the seed alone
    REJECTION = "rejection"  # Leviathan et al. 2023; point-mass siblings on trees
    BLOCK = "block"  # joint verification of a chain, Sun et al. 2024


class FinishReason(enum.Enum):
    """Why a session stopped; RUNNING means it has not."""

    RUNNING = "running"
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the target samples. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0, penalty 1 are off.

    Applied in this order: repetition penalty, temperature, top-k, top-p, min-p (the order of transformers).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    rule: Rule = Rule.COUPLED


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """Bounds on committed output. `max_new_tokens` None means up to the context limit."""

    max_new_tokens: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class DraftShape:
    """The shape of a draft.

    `branching` 1 is a chain of `depth` tokens. `branching` k > 1 is the dynamic tree of EAGLE-2/3: `depth` levels
    (EAGLE's own `depth` plus one), top-k `branching`, the best `nodes` drafted nodes kept (EAGLE's total_token - 1).
    A non-empty `parents` is a static tree: node i hangs below parents[i] (-1 is the last committed token) and the
    r-th child of a node takes its r-th best token. Depth 0 drafts nothing but keeps the head warm.
    """

    depth: int = 5
    nodes: int = 0
    branching: int = 1
    parents: tuple[int, ...] = ()

    @property
    def is_chain(self) -> bool:
        return self.branching <= 1 and not self.parents

    @property
    def scratch(self) -> int:
        """Nodes of a dynamic tree that its last level has to tell apart: at most MASK_BITS; of other shapes 0."""
        return max(0, self.depth - 2) * self.branching if self.branching > 1 else 0


class Distribution(NamedTuple):
    """A drafting distribution q of one node in full support; `logprobs` are natural logarithms summing to 1."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafted tree below the last committed token; `parents[i] < i`, -1 is the last committed token.

    `q` None means every node is a point mass (a deterministic drafter), unless the engine itself drafted it by
    sampling and keeps q on the device under `draft_id`.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # log q(token | parent path), empty when unknown
    q: tuple[Distribution, ...] | None = None
    draft_id: int = 0  # 0: made by a client

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self.parents) - 1))


class Feed(NamedTuple):
    """Tokens the caller decided on (a prompt chunk, or Extend), to be run through target and head.

    `tokens` occupy positions base-1.. of the sequence, where the first one is the last token that the caches do not
    hold yet. `following` is the known token after the last of `tokens` (the head pairs feature t with token t+1);
    None asks the target to sample it, which commits it.
    """

    tokens: Sequence[int]
    following: int | None


class Bounds(NamedTuple):
    """What ends a sequence: its length in tokens, or any of these tokens once committed."""

    limit: int
    stops: frozenset[int]


class Step(NamedTuple):
    """One session's part of one engine step. `cached` tokens of the sequence are in the KV cache before it.

    A step `ahead` goes on where the recorded round of its row that is under way will end: `cached`, `root` and the
    draft are known to the device alone and not read, and where that round ends the sequence nothing is done.
    """

    row: int
    cached: int
    pages: Sequence[int]  # page table of the session, covers everything this step may write
    feed: Feed | None = None
    root: int = 0  # last committed token, when `draft` is given
    draft: Draft | None = None  # verify this
    propose: DraftShape | None = None  # then draft this
    bounds: Bounds | None = None  # what a step ahead of this one has to know
    ahead: bool = False


class Extent(NamedTuple):
    """The largest batch of one pass over all ranks that run it together: what its graph must hold."""

    rows: int
    queries: int
    tokens: int  # rows times queries of the rank where these are most
    trees: bool = False  # some rank's drafts are no chains


class StepResult(NamedTuple):
    """What a step committed and drafted."""

    tokens: tuple[int, ...] = ()  # accepted path and bonus token, or the sampled token after a feed
    logprobs: tuple[float, ...] = ()  # log p of the target before temperature and filters, aligned with `tokens`
    accepted: tuple[int, ...] = ()  # node indices of the accepted path
    draft: Draft | None = None


class StepTimes(NamedTuple):
    """Seconds of device work in one engine step."""

    feed: float = 0.0
    verify: float = 0.0
    draft: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine can do; constant for its life."""

    target_model: str
    draft_model: str
    draft_method: str  # "eagle", "eagle3", "none"
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_context: int  # tokens of one session, prompt and output
    max_rows: int
    page_size: int
    total_pages: int
    scratch_tokens: int  # tokens beyond the committed ones that a step may write
    prefill_chunk: int
    max_nodes: int = MOST_NODES  # drafted nodes of one tree
    max_depth: int = 16
    max_branching: int = 16
    default_shape: DraftShape = field(default_factory=DraftShape)
    default_rule: Rule = Rule.COUPLED
    tensor_parallel: int = 1  # ranks that share the target
    rank_pages: tuple[int, ...] = ()  # of each rank that has sessions of its own, its null page included; else empty
    invariant: bool = False  # no draft may choose among tokens
    pipeline_parallel: int = 1  # stages that share its layers; so many groups of sessions may be under way at once
