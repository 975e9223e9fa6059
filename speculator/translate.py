"""Between protobuf messages and plain records.

Owns: what each field of the wire means. Must never import torch, hold state, or decide anything a record could.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import lru_cache

from google.protobuf import duration_pb2, timestamp_pb2

from speculator.answers import Acceptance, Created, Extended, Generated, Proposed, SessionView, Timing, Verified
from speculator.drafts import ShapeRequest
from speculator.errors import InvalidArgumentError, InvalidTreeError
from speculator.session import Job, Kind, SessionSpec
from speculator.types import Distribution, Draft, DraftShape, FinishReason, Rule, SamplingParams, StoppingParams
from speculator.v1 import drafter_pb2 as pb

RULES_OUT = {
    Rule.COUPLED: pb.VERIFICATION_RULE_COUPLED,
    Rule.REJECTION: pb.VERIFICATION_RULE_REJECTION,
    Rule.BLOCK: pb.VERIFICATION_RULE_BLOCK,
}
RULES: dict[int, Rule] = {number: rule for rule, number in RULES_OUT.items()}
FINISHES = {
    FinishReason.RUNNING: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}
UINT32_MAX = 2**32 - 1
INT64_SPAN = 2**64


@dataclass(frozen=True, slots=True)
class About:
    """Who is answering: told to clients, never used to decide."""

    version: str = ""
    model: str = ""
    instance_id: str = ""
    target_revision: str = ""
    tokenizer_sha256: str = ""
    draft_revision: str = ""


# ---- in ----


def spec_of(
    request: pb.CreateSessionRequest, tokens: tuple[int, ...], owner: str, defaults: SamplingParams
) -> SessionSpec:
    """The session a create request asks for; raises InvalidArgumentError for a word this version does not know."""
    return SessionSpec(
        request.session_id,
        owner,
        tokens,
        sampling_of(request.sampling, defaults),
        stopping_of(request.stopping),
        shape_of(request.draft),
        not request.disable_speculation,
        request.prefill_only,
        idle_timeout=seconds_of(request.idle_timeout) if request.HasField("idle_timeout") else None,
    )


def sampling_of(params: pb.SamplingParams, default: SamplingParams) -> SamplingParams:
    """Unset fields keep the default. A seed is 64 bits, held as a signed number."""

    def pick(name: str, otherwise: float) -> float:
        return getattr(params, name) if params.HasField(name) else otherwise

    seed = params.seed if params.HasField("seed") else default.seed % INT64_SPAN
    rule = default.rule
    if params.verification_rule != pb.VERIFICATION_RULE_UNSPECIFIED:
        rule = _rule(params.verification_rule)
    return SamplingParams(
        pick("temperature", default.temperature),
        int(pick("top_k", default.top_k)),
        pick("top_p", default.top_p),
        pick("min_p", default.min_p),
        pick("repetition_penalty", default.repetition_penalty),
        seed - INT64_SPAN if seed >= INT64_SPAN // 2 else seed,
        rule,
    )


def _rule(number: int) -> Rule:
    if number not in RULES:
        raise InvalidArgumentError(
            f"verification_rule {number} is unknown to this server", field="sampling.verification_rule"
        )
    return RULES[number]


def stopping_of(params: pb.StoppingParams) -> StoppingParams:
    bound = params.max_new_tokens if params.HasField("max_new_tokens") else None
    return StoppingParams(bound, frozenset(params.stop_token_ids), params.ignore_eos)


def shape_of(params: pb.DraftParams) -> ShapeRequest:
    """Raises InvalidArgumentError when q is asked for: the server keeps it under the draft's id."""
    return _shape(params.SerializeToString())


@lru_cache(maxsize=256)  # clients ask for the same few shapes in every step
def _shape(data: bytes) -> ShapeRequest:
    params = pb.DraftParams.FromString(data)
    if params.distribution not in (pb.DRAFT_DISTRIBUTION_UNSPECIFIED, pb.DRAFT_DISTRIBUTION_SERVER_SIDE):
        raise InvalidArgumentError(
            "the server keeps the distribution of its drafts; ask for SERVER_SIDE or leave it unset",
            field="draft.distribution",
        )
    return ShapeRequest(
        params.max_depth if params.HasField("max_depth") else None,
        params.max_nodes if params.HasField("max_nodes") else None,
        params.branching if params.HasField("branching") else None,
        tuple(params.static_parents),
    )


def draft_of(tree: pb.DraftTree) -> Draft:
    """A draft made by a client; raises InvalidTreeError where its parts do not fit together."""
    tokens = tuple(tree.token_ids)
    parents = tuple(tree.parent_indices) or tuple(range(-1, len(tokens) - 1))
    return Draft(tokens, parents, tuple(tree.logprobs), _support(tree))


def _support(tree: pb.DraftTree) -> tuple[Distribution, ...] | None:
    if tree.distribution == pb.DRAFT_DISTRIBUTION_SERVER_SIDE:
        raise InvalidTreeError("a tree that the server drafted is named by draft_id, not sent", field="tree")
    if tree.distribution not in pb.DraftDistribution.values():
        raise InvalidTreeError(f"distribution {tree.distribution} is unknown to this server", field="tree.distribution")
    sparse = tree.distribution == pb.DRAFT_DISTRIBUTION_SPARSE
    if not sparse and (tree.support_counts or tree.support_token_ids):
        raise InvalidTreeError("a support is given, but distribution is not SPARSE", field="tree.distribution")
    if not sparse:
        return None
    total = sum(tree.support_counts)
    if not total == len(tree.support_token_ids) == len(tree.support_logprobs):
        raise InvalidTreeError(
            f"support_counts add up to {total}, with {len(tree.support_token_ids)} support_token_ids and "
            f"{len(tree.support_logprobs)} support_logprobs",
            field="tree.support_counts",
        )
    return tuple(_slices(tree))


def _slices(tree: pb.DraftTree) -> list[Distribution]:
    ids, logprobs, start, parts = list(tree.support_token_ids), list(tree.support_logprobs), 0, []
    for count in tree.support_counts:
        parts.append(Distribution(ids[start : start + count], logprobs[start : start + count]))
        start += count
    return parts


def seconds_of(duration: duration_pb2.Duration) -> float:
    return float(duration.seconds) + duration.nanos / 1e9


# ---- work items ----


def propose_job(body: pb.ProposeRequest, owner: str, deadline: float = math.inf) -> Job:
    return Job(Kind.PROPOSE, body.session_id, owner, deadline, body.base_length, shape=shape_of(body.draft))


def verify_job(body: pb.VerifyRequest, owner: str, deadline: float = math.inf) -> Job:
    """Raises InvalidArgumentError when the request names no draft, InvalidTreeError when its parts do not fit."""
    draft, draft_id = None, body.draft_id
    if not draft_id and body.WhichOneof("draft") != "draft_id":
        if not body.HasField("tree"):
            raise InvalidArgumentError("give draft_id or tree; an empty tree commits one token", field="draft")
        draft = draft_of(body.tree)
    shape = shape_of(body.propose_next) if body.HasField("propose_next") else None
    return Job(Kind.VERIFY, body.session_id, owner, deadline, body.base_length, draft, draft_id, shape)


def extend_job(body: pb.ExtendRequest, owner: str, deadline: float = math.inf) -> Job:
    shape = shape_of(body.propose_next) if body.HasField("propose_next") else None
    tokens = tuple(body.token_ids)
    return Job(Kind.EXTEND, body.session_id, owner, deadline, body.base_length, shape=shape, tokens=tokens)


# ---- out ----


def session_pb(view: SessionView, about: About) -> pb.Session:
    expires = time.time() + view.expires_in
    whole = math.floor(expires)
    return pb.Session(
        session_id=view.session_id,
        model=about.model,
        committed_length=view.length,
        finish_reason=FINISHES[view.finish],
        expire_time=timestamp_pb2.Timestamp(seconds=whole, nanos=int((expires - whole) * 1e9)),
        stats=stats_pb(view.stats),
        instance_id=about.instance_id,
    )


def stats_pb(stats: Acceptance) -> pb.AcceptanceStats:
    return pb.AcceptanceStats(
        num_steps=stats.steps,
        num_draft_tokens=stats.draft_tokens,
        num_accepted_draft_tokens=stats.accepted_tokens,
        acceptance_histogram={j: count for j, count in enumerate(stats.rounds) if count},
        num_output_tokens=stats.output_tokens,
        accepted_at_position=stats.accepted_at,
        drafted_at_position=stats.drafted_at,
    )


def fill_timing(message: pb.Timing, timing: Timing) -> None:
    queue, draft, verify, message.batch_size = timing
    message.queue_us = min(UINT32_MAX, int(queue * 1e6))
    message.draft_us = min(UINT32_MAX, int(draft * 1e6))
    message.verify_us = min(UINT32_MAX, int(verify * 1e6))


def fill_total(message: pb.Timing, seconds: float) -> None:
    message.total_us = min(UINT32_MAX, int(seconds * 1e6))


def shape_pb(shape: DraftShape) -> pb.DraftParams:
    return pb.DraftParams(
        max_depth=shape.depth,
        max_nodes=shape.nodes or shape.depth,
        branching=shape.branching,
        static_parents=shape.parents,
    )


# `fill_*` write an answer into a message in place, given the request it answers: building submessages apart and
# copying them in costs twice as much.


def fill_created(
    message: pb.CreateSessionResponse, answer: Created, request: pb.CreateSessionRequest, about: About
) -> None:
    message.session.CopyFrom(session_pb(answer.session, about))
    message.next_token_id = answer.next_token or 0
    message.replayed = answer.replayed
    fill_timing(message.timing, answer.timing)


def fill_proposed(message: pb.ProposeResponse, answer: Proposed, request: pb.ProposeRequest, about: About) -> None:
    fill_draft(message, answer, request.return_logprobs)
    fill_timing(message.timing, answer.timing)


def fill_draft(message: pb.ProposeResponse, answer: Proposed, logprobs: bool) -> None:
    """A draft alone; inside another answer it goes without a timing of its own."""
    message.draft_id = answer.draft_id
    message.base_length = answer.base
    draft, tree = answer.draft, message.tree
    tree.token_ids.extend(draft.tokens)
    tree.distribution = pb.DRAFT_DISTRIBUTION_SERVER_SIDE
    if not draft.is_chain:
        tree.parent_indices.extend(draft.parents)
    if logprobs:
        tree.logprobs.extend(draft.logprobs)


def fill_verified(message: pb.VerifyResponse, answer: Verified, request: pb.VerifyRequest, about: About) -> None:
    message.accepted_indices.extend(answer.accepted)
    message.committed_token_ids.extend(answer.tokens)
    message.committed_length = answer.length
    message.verification_rule = RULES_OUT[answer.rule]
    if request.return_logprobs:
        message.committed_logprobs.extend(answer.logprobs)
    if answer.finish is not FinishReason.RUNNING:
        message.finish_reason = FINISHES[answer.finish]
    if answer.next_draft is not None:
        fill_draft(message.next_draft, answer.next_draft, request.return_logprobs)
    if answer.replayed:
        message.replayed = True
    fill_timing(message.timing, answer.timing)


def fill_extended(message: pb.ExtendResponse, answer: Extended, request: pb.ExtendRequest, about: About) -> None:
    message.committed_length = answer.length
    message.finish_reason = FINISHES[answer.finish]
    message.replayed = answer.replayed
    if answer.next_draft is not None:
        fill_draft(message.next_draft, answer.next_draft, False)
    fill_timing(message.timing, answer.timing)


def fill_deleted(
    message: pb.DeleteSessionResponse, answer: Acceptance | None, request: pb.DeleteSessionRequest, about: About
) -> None:
    message.SetInParent()
    if answer is not None:
        message.stats.CopyFrom(stats_pb(answer))


def generated_pb(answer: Generated, first: bool, text: str, about: About) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        token_ids=answer.tokens,
        logprobs=answer.logprobs,
        num_accepted=answer.accepted,
        finish_reason=FINISHES[answer.finish],
        text=text,
    )
    fill_timing(response.timing, answer.timing)
    if answer.session is not None and first:
        response.session.CopyFrom(session_pb(answer.session, about))
    if answer.session is not None and answer.finish is not FinishReason.RUNNING:
        response.stats.CopyFrom(stats_pb(answer.session.stats))
    return response
