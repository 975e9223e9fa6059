"""Between the client's records and protobuf messages.

Owns: how each call is asked and its answer read, and the table of calls. Must never import torch, open a connection
or keep anything between calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

from google.protobuf import duration_pb2
from google.protobuf.message import Message

from speculator.answers import Acceptance
from speculator.client.records import (
    Chunk,
    Created,
    Extended,
    Limits,
    Opening,
    Proposed,
    Sampling,
    ServerInfo,
    ServerStats,
    SessionState,
    Shape,
    Stats,
    Stopping,
    Timing,
    Verified,
)
from speculator.errors import InvalidArgumentError
from speculator.types import Distribution, Draft, FinishReason, Rule
from speculator.v1 import admin_pb2, drafter_pb2

Answer = TypeVar("Answer", covariant=True)
Built = TypeVar("Built", bound=Message)

RULES: dict[Rule, drafter_pb2.VerificationRule] = {
    Rule.COUPLED: drafter_pb2.VERIFICATION_RULE_COUPLED,
    Rule.REJECTION: drafter_pb2.VERIFICATION_RULE_REJECTION,
    Rule.BLOCK: drafter_pb2.VERIFICATION_RULE_BLOCK,
}
RULES_READ = {number: rule for rule, number in RULES.items()}
FINISHES: dict[int, FinishReason] = {
    drafter_pb2.FINISH_REASON_UNSPECIFIED: FinishReason.RUNNING,
    drafter_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    drafter_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    drafter_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}


# ---- calls


@dataclass(frozen=True, slots=True)
class Method(Generic[Answer]):
    """One call: where it goes, what comes back, and under which name it travels on the Draft stream, if it can.

    `keyed` says that its request names a session.
    """

    path: str
    response: type[Message]
    read: Callable[[Any], Answer]
    item: str = ""
    keyed: bool = True


class Call(NamedTuple, Generic[Answer]):
    """One call to make."""

    method: Method[Answer]
    request: Any  # the method's own message

    @property
    def session_id(self) -> str:
        """The session that the call is about, "" when it is about none."""
        return str(self.request.session_id) if self.method.keyed else ""


# ---- parts of requests


def _build(kind: type[Built], **fields: Any) -> Built:
    """A message of the fields that are not None; InvalidArgumentError where a value does not fit its field."""
    try:
        return kind(**{name: value for name, value in fields.items() if value is not None})
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"{kind.__name__}: {error}") from error


def duration(seconds: float | None) -> duration_pb2.Duration | None:
    if seconds is None:
        return None
    if not math.isfinite(seconds):
        raise InvalidArgumentError(f"a time in seconds must be finite, not {seconds}")
    whole = int(seconds)
    return _build(duration_pb2.Duration, seconds=whole, nanos=int((seconds - whole) * 1e9))


def sampling(asked: Sampling) -> drafter_pb2.SamplingParams:
    return _build(
        drafter_pb2.SamplingParams,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=asked.seed,
        repetition_penalty=asked.repetition_penalty,
        verification_rule=None if asked.rule is None else RULES[asked.rule],
    )


def stopping(asked: Stopping) -> drafter_pb2.StoppingParams:
    return _build(
        drafter_pb2.StoppingParams,
        max_new_tokens=asked.max_new_tokens,
        stop_token_ids=asked.stop_token_ids,
        ignore_eos=asked.ignore_eos,
    )


def shape(asked: Shape | None) -> drafter_pb2.DraftParams | None:
    if asked is None:
        return None
    return _build(
        drafter_pb2.DraftParams,
        max_depth=asked.depth,
        max_nodes=asked.nodes,
        branching=asked.branching,
        static_parents=asked.parents,
    )


def tree(draft: Draft) -> drafter_pb2.DraftTree:
    """A draft of the caller's own; with `q` its distributions travel in full support."""
    q = draft.q or ()
    kind = drafter_pb2.DRAFT_DISTRIBUTION_SPARSE if q else drafter_pb2.DRAFT_DISTRIBUTION_POINT_MASS
    return _build(
        drafter_pb2.DraftTree,
        token_ids=draft.tokens,
        parent_indices=draft.parents,
        distribution=kind,
        support_counts=[len(part.token_ids) for part in q],
        support_token_ids=[token for part in q for token in part.token_ids],
        support_logprobs=[value for part in q for value in part.logprobs],
    )


# ---- answers


def read_finish(number: int) -> FinishReason:
    """A reason that only a later version knows is an end all the same."""
    return FINISHES.get(number, FinishReason.STOP)


def read_timing(timing: drafter_pb2.Timing) -> Timing:
    queue, draft, verify = timing.queue_us / 1e6, timing.draft_us / 1e6, timing.verify_us / 1e6
    return Timing(queue, draft, verify, timing.batch_size, timing.total_us / 1e6)


def read_stats(stats: drafter_pb2.AcceptanceStats) -> Stats:
    return Stats(
        stats.num_steps,
        stats.num_draft_tokens,
        stats.num_accepted_draft_tokens,
        stats.num_output_tokens,
        dict(stats.acceptance_histogram),
        tuple(stats.accepted_at_position),
        tuple(stats.drafted_at_position),
    )


def tallied(counts: Acceptance) -> Stats:
    """The counts that a client kept by itself."""
    return Stats(
        counts.steps,
        counts.draft_tokens,
        counts.accepted_tokens,
        counts.output_tokens,
        {accepted: rounds for accepted, rounds in enumerate(counts.rounds) if rounds},
        tuple(counts.accepted_at),
        tuple(counts.drafted_at),
    )


def read_session(session: drafter_pb2.Session) -> SessionState:
    return SessionState(
        session.session_id,
        session.model,
        session.committed_length,
        read_finish(session.finish_reason),
        session.expire_time.seconds + session.expire_time.nanos / 1e9,
        read_stats(session.stats),
        session.instance_id,
    )


def read_created(answer: drafter_pb2.CreateSessionResponse) -> Created:
    return Created(
        read_session(answer.session),
        answer.next_token_id,
        answer.cached_prompt_tokens,
        read_timing(answer.timing),
        answer.replayed,
    )


def read_prefilled(answer: drafter_pb2.CreateSessionResponse) -> Created:
    return read_created(answer)._replace(next_token=None)


def read_got(answer: drafter_pb2.GetSessionResponse) -> SessionState:
    return read_session(answer.session)._replace(tokens=tuple(answer.token_ids) or None)


def read_deleted(answer: drafter_pb2.DeleteSessionResponse) -> Stats:
    return read_stats(answer.stats)


def read_tree(tree: drafter_pb2.DraftTree, draft_id: int) -> Draft:
    tokens = tuple(tree.token_ids)
    parents = tuple(tree.parent_indices) or tuple(range(-1, len(tokens) - 1))
    return Draft(tokens, parents, tuple(tree.logprobs), _read_support(tree), draft_id)


def _read_support(tree: drafter_pb2.DraftTree) -> tuple[Distribution, ...] | None:
    if not tree.support_counts:
        return None
    ids, logprobs, start, parts = tuple(tree.support_token_ids), tuple(tree.support_logprobs), 0, []
    for count in tree.support_counts:
        parts.append(Distribution(ids[start : start + count], logprobs[start : start + count]))
        start += count
    return tuple(parts)


def read_proposed(answer: drafter_pb2.ProposeResponse) -> Proposed:
    return Proposed(answer.base_length, read_tree(answer.tree, answer.draft_id), read_timing(answer.timing))


def read_verified(answer: drafter_pb2.VerifyResponse) -> Verified:
    return Verified(
        tuple(answer.accepted_indices),
        tuple(answer.committed_token_ids),
        tuple(answer.committed_logprobs),
        answer.committed_length,
        read_finish(answer.finish_reason),
        RULES_READ.get(answer.verification_rule),
        read_proposed(answer.next_draft) if answer.HasField("next_draft") else None,
        read_timing(answer.timing),
        answer.replayed,
    )


def read_extended(answer: drafter_pb2.ExtendResponse) -> Extended:
    return Extended(
        answer.committed_length,
        read_finish(answer.finish_reason),
        read_proposed(answer.next_draft) if answer.HasField("next_draft") else None,
        read_timing(answer.timing),
        answer.replayed,
    )


def read_chunk(answer: drafter_pb2.GenerateResponse) -> Chunk:
    return Chunk(
        tuple(answer.token_ids),
        tuple(answer.logprobs),
        answer.num_accepted,
        read_finish(answer.finish_reason),
        answer.text,
        read_timing(answer.timing),
        read_stats(answer.stats) if answer.HasField("stats") else None,
        read_session(answer.session) if answer.HasField("session") else None,
    )


def read_shape(shape: drafter_pb2.DraftParams) -> Shape:
    return Shape(
        shape.max_depth if shape.HasField("max_depth") else None,
        shape.max_nodes if shape.HasField("max_nodes") else None,
        shape.branching if shape.HasField("branching") else None,
        tuple(shape.static_parents),
    )


def read_limits(limits: admin_pb2.Limits) -> Limits:
    return Limits(
        limits.max_context_length,
        limits.max_tree_nodes,
        limits.max_tree_depth,
        limits.max_batch_items,
        limits.max_sessions,
        limits.max_message_bytes,
    )


def read_info(answer: admin_pb2.GetServerInfoResponse) -> ServerInfo:
    return ServerInfo(
        answer.version,
        answer.instance_id,
        answer.target_model,
        answer.target_revision,
        answer.draft_model,
        answer.draft_method,
        answer.vocab_size,
        tuple(answer.eos_token_ids),
        answer.tokenizer_sha256,
        read_limits(answer.limits),
        RULES_READ.get(answer.default_rule),
        read_shape(answer.default_draft),
        answer.schema_revision,
        answer.minimum_client_revision,
        answer.draft_revision,
    )


def read_server_stats(answer: admin_pb2.GetStatsResponse) -> ServerStats:
    return ServerStats(
        read_stats(answer.stats),
        answer.running_sessions,
        answer.queued_requests,
        answer.used_kv_blocks,
        answer.total_kv_blocks,
    )


# ---- the calls


DRAFTER, ADMIN = "/speculator.v1.DrafterService/", "/speculator.v1.AdminService/"
CREATE = Method(f"{DRAFTER}CreateSession", drafter_pb2.CreateSessionResponse, read_created, "create_session")
PREFILL = replace(CREATE, read=read_prefilled)
GET = Method(f"{DRAFTER}GetSession", drafter_pb2.GetSessionResponse, read_got)
DELETE = Method(f"{DRAFTER}DeleteSession", drafter_pb2.DeleteSessionResponse, read_deleted, "delete_session")
PROPOSE = Method(f"{DRAFTER}Propose", drafter_pb2.ProposeResponse, read_proposed, "propose")
VERIFY = Method(f"{DRAFTER}Verify", drafter_pb2.VerifyResponse, read_verified, "verify")
EXTEND = Method(f"{DRAFTER}Extend", drafter_pb2.ExtendResponse, read_extended, "extend")
DRAFT = f"{DRAFTER}Draft"
GENERATE = Method(f"{DRAFTER}Generate", drafter_pb2.GenerateResponse, read_chunk, keyed=False)
INFO = Method(f"{ADMIN}GetServerInfo", admin_pb2.GetServerInfoResponse, read_info, keyed=False)
STATS = Method(f"{ADMIN}GetStats", admin_pb2.GetStatsResponse, read_server_stats, keyed=False)


def create(opening: Opening) -> Call[Created]:
    text = opening.prompt if isinstance(opening.prompt, str) else None
    ids = None if isinstance(opening.prompt, str) else _build(drafter_pb2.TokenIds, ids=list(opening.prompt))
    request = _build(
        drafter_pb2.CreateSessionRequest,
        session_id=opening.session_id,
        model=opening.model,
        text=text,
        token_ids=ids,
        sampling=sampling(opening.sampling),
        stopping=stopping(opening.stopping),
        draft=shape(opening.shape),
        idle_timeout=duration(opening.idle_timeout),
        disable_speculation=not opening.speculate,
        prefill_only=opening.prefill_only,
    )
    return Call(PREFILL if opening.prefill_only else CREATE, request)


def get(session_id: str, tokens: bool) -> Call[SessionState]:
    return Call(GET, _build(drafter_pb2.GetSessionRequest, session_id=session_id, include_token_ids=tokens))


def delete(session_id: str) -> Call[Stats]:
    return Call(DELETE, _build(drafter_pb2.DeleteSessionRequest, session_id=session_id))


def propose(session_id: str, base: int, asked: Shape | None) -> Call[Proposed]:
    request = _build(
        drafter_pb2.ProposeRequest,
        session_id=session_id,
        base_length=base,
        draft=shape(asked),
        return_logprobs=True,
    )
    return Call(PROPOSE, request)


def verify(session_id: str, base: int, draft: Draft | int, next_shape: Shape | None) -> Call[Verified]:
    """`draft` is one of the server's by id (or as proposed), or one of the caller's; an empty one verifies nothing."""
    kept = draft if isinstance(draft, int) else draft.draft_id
    request = _build(
        drafter_pb2.VerifyRequest,
        session_id=session_id,
        base_length=base,
        draft_id=kept or None,
        tree=None if isinstance(draft, int) or kept else tree(draft),
        return_logprobs=True,
        propose_next=shape(next_shape),
    )
    return Call(VERIFY, request)


def extend(session_id: str, base: int, tokens: Sequence[int], next_shape: Shape | None) -> Call[Extended]:
    request = _build(
        drafter_pb2.ExtendRequest,
        session_id=session_id,
        base_length=base,
        token_ids=list(tokens),
        propose_next=shape(next_shape),
    )
    return Call(EXTEND, request)


def generate(opening: Opening) -> Call[Chunk]:
    off = not opening.speculate
    request = _build(drafter_pb2.GenerateRequest, session=create(opening).request, disable_speculation=off)
    return Call(GENERATE, request)


def server_info() -> Call[ServerInfo]:
    return Call(INFO, admin_pb2.GetServerInfoRequest())


def server_stats() -> Call[ServerStats]:
    return Call(STATS, admin_pb2.GetStatsRequest())


def to_bytes(request: Message) -> bytes:
    return request.SerializeToString()
