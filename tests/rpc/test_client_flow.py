"""The client without a server: flows against scripted answers, errors from every kind of status, options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from speculator import errors
from speculator.client import ConnectionLostError, Created, Distribution, Proposed, RemoteError, SessionState, Verified
from speculator.client import wire as wire
from speculator.client.channel import Endpoint, Tls, read_token
from speculator.client.errors import BY_REASON, from_status
from speculator.client.flow import GenerateFlow, SessionFlow, Wait
from speculator.client.records import Chunk, Opening, Sampling, Shape, Stats, Stopping, Timing
from speculator.status import status_of
from speculator.types import Draft, FinishReason, Rule

PROMPT = (3, 1, 4)
RUNNING = FinishReason.RUNNING
UNAVAILABLE = ConnectionLostError("gone")


def created(next_token: int | None = 5, finish: FinishReason = RUNNING) -> Created:
    return Created(SessionState("s", "", 4, finish, 0.0, Stats(), ""), next_token, 0, Timing(), False)


def proposed(draft_id: int = 1) -> Proposed:
    return Proposed(4, Draft((6, 7), (-1, 0), draft_id=draft_id), Timing())


def verified(tokens: Sequence[int] = (6, 8), finish: FinishReason = RUNNING) -> Verified:
    accepted = tuple(range(len(tokens) - 1))
    return Verified(accepted, tuple(tokens), (), 0, finish, Rule.COUPLED, proposed(2), Timing(), False)


def play(flow: Any, answers: Sequence[object]) -> tuple[Any, list[str]]:
    """What a flow comes to when its calls are answered so, and the calls it made; every answer must be used."""
    left, calls = list(answers), []
    try:
        effect = next(flow)
        while True:
            if isinstance(effect, Wait):
                assert 0 < effect.seconds < 2
                effect = next(flow)
                continue
            calls.append(effect.method.path.rpartition("/")[2])
            assert left, f"one call too many: {calls}"
            answer = left.pop(0)
            effect = flow.throw(answer) if isinstance(answer, BaseException) else flow.send(answer)
    except StopIteration as end:
        assert not left, f"answers that nobody asked for: {left}"
        return end.value, calls


def opened(**options: Any) -> SessionFlow:
    flow = SessionFlow(Opening(PROMPT, "s", **options), patience=5.0)
    play(flow.open(), [created(None if options.get("prefill_only") else 5)])
    return flow


def test_a_quiet_session_makes_one_call_a_round() -> None:
    flow = SessionFlow(Opening(PROMPT), patience=5.0)
    first, calls = play(flow.step(), [created()])
    assert (first.tokens, calls) == ((5,), ["CreateSession"])
    second, calls = play(flow.step(), [proposed(), verified()])
    assert (second.tokens, second.accepted, calls) == ((6, 8), 1, ["Propose", "Verify"])
    third, calls = play(flow.step(), [verified((6, 7, 9))])
    assert (third.tokens, calls) == ((6, 7, 9), ["Verify"])
    assert flow.tokens == [*PROMPT, 5, 6, 8, 6, 7, 9]
    assert flow.counts.rounds == [0, 1, 1]


@pytest.mark.parametrize("error", [UNAVAILABLE, errors.DrainingError("leaving"), errors.SessionBusyError("busy")])
def test_a_step_without_an_answer_is_asked_for_again(error: errors.SpeculatorError) -> None:
    flow = opened()
    done, calls = play(flow.step(), [proposed(), error, error, verified()])
    assert (done.tokens, calls) == ((6, 8), ["Propose", "Verify", "Verify", "Verify"])
    assert flow.resumes == 0


def test_a_lost_session_is_made_again_and_commits_nothing_by_it() -> None:
    flow = opened(stopping=Stopping(max_new_tokens=10))
    gone = errors.SessionNotFoundError("who?")
    done, calls = play(flow.step(), [proposed(), gone, created(None), proposed(7), verified()])
    assert calls == ["Propose", "Verify", "CreateSession", "Propose", "Verify"]
    assert (flow.tokens, flow.resumes, done.tokens) == ([*PROMPT, 5, 6, 8], 1, (6, 8))


def test_what_a_lost_session_is_made_from() -> None:
    opening = Opening(PROMPT, "s", Sampling(seed=3), Stopping(10, (9,)), Shape(depth=2))
    again = wire.create(opening.resumed([*PROMPT, 5, 6], len(PROMPT))).request
    assert list(again.token_ids.ids) == [*PROMPT, 5, 6]
    assert again.prefill_only and again.session_id == "s"
    assert (again.stopping.max_new_tokens, list(again.stopping.stop_token_ids)) == (8, [9])
    assert (again.sampling.seed, again.draft.max_depth) == (3, 2)


def test_making_it_again_is_repeated_as_well() -> None:
    flow = opened()
    gone = errors.SessionNotFoundError("who?")
    answers = [
        gone,
        UNAVAILABLE,
        errors.ServerFullError("full", retry_after=0.1),
        created(None),
        proposed(),
        verified(),
    ]
    _, calls = play(flow.step(), answers)
    assert calls == ["Propose", *["CreateSession"] * 3, "Propose", "Verify"]


def test_a_stale_copy_makes_way() -> None:
    flow = opened()
    behind = errors.PositionMismatchError("behind", committed_length="3")
    taken = errors.SessionExistsError("taken")
    _, calls = play(flow.step(), [behind, taken, Stats(), created(None), proposed(), verified()])
    assert calls == ["Propose", "CreateSession", "DeleteSession", "CreateSession", "Propose", "Verify"]


@pytest.mark.parametrize(
    "error",
    [
        errors.PositionMismatchError("ahead", committed_length="9"),
        errors.EngineFailedError("broken"),
        errors.DeadlineExceededError("late"),
        errors.UnauthenticatedError("who are you"),
        errors.InvalidArgumentError("no"),
    ],
)
def test_other_trouble_is_told_and_changes_nothing(error: errors.SpeculatorError) -> None:
    flow = opened()
    with pytest.raises(type(error)):
        play(flow.step(), [proposed(), error])
    assert flow.tokens == [*PROMPT, 5]
    done, calls = play(flow.step(), [verified()])
    assert (done.tokens, calls) == ((6, 8), ["Verify"])  # with the same base and draft as before


def test_an_id_that_is_taken_is_told() -> None:
    flow = SessionFlow(Opening(PROMPT, "s"), patience=5.0)
    with pytest.raises(errors.SessionExistsError):
        play(flow.step(), [errors.SessionExistsError("taken")])


def test_patience_is_bounded() -> None:
    flow = SessionFlow(Opening(PROMPT), patience=0.0)
    with pytest.raises(ConnectionLostError):
        play(flow.step(), [UNAVAILABLE])


def test_every_session_has_an_id_so_that_its_create_can_be_repeated() -> None:
    one, two = SessionFlow(Opening(PROMPT), 1.0), SessionFlow(Opening(PROMPT), 1.0)
    assert one.session_id and one.session_id != two.session_id


def test_text_becomes_ids_before_the_first_round_ends() -> None:
    flow = SessionFlow(Opening("text", "s"), patience=5.0)
    known = created().session._replace(tokens=(1, 2, 3, 5))
    gone = errors.SessionNotFoundError("who?")
    done, calls = play(flow.step(), [created(), gone, created(), known])
    assert calls == ["CreateSession", "GetSession", "CreateSession", "GetSession"]
    assert (done.tokens, flow.tokens, flow.prompt_length) == ((5,), [1, 2, 3, 5], 3)


def chunk(*tokens: int, finish: FinishReason = RUNNING) -> Chunk:
    return Chunk(tokens, (), 0, finish, "", Timing(), None, None)


def test_a_generation_is_taken_up_where_it_broke() -> None:
    flow = GenerateFlow(Opening(PROMPT, stopping=Stopping(max_new_tokens=5)), patience=5.0)
    flow.take(chunk(7))
    flow.take(chunk(8, 9))
    assert flow.put_right(UNAVAILABLE).seconds < 1
    asked = flow.call().request.session
    assert (list(asked.token_ids.ids), asked.stopping.max_new_tokens) == ([*PROMPT, 7, 8, 9], 2)
    assert not asked.prefill_only
    flow.take(chunk(1, 2, finish=FinishReason.LENGTH))
    assert flow.finished


def test_a_stream_that_just_ends_is_no_end_of_text() -> None:
    flow = GenerateFlow(Opening(PROMPT), patience=0.0)
    with pytest.raises(ConnectionLostError):
        flow.ended()


# ---- errors


@pytest.mark.parametrize("kind", sorted(BY_REASON.values(), key=lambda kind: kind.__name__))
def test_an_error_comes_back_as_it_was_sent(kind: type[errors.SpeculatorError]) -> None:
    sent = kind("one clear sentence", committed_length="7")
    if isinstance(sent, errors.InvalidArgumentError):
        sent.field = "tree"
    if isinstance(sent, errors.ServerFullError):
        sent.retry_after = 1.25
    got = from_status(status_of(sent))
    assert type(got) is kind
    assert (got.message, got.metadata) == (sent.message, sent.metadata)
    assert vars(got) == vars(sent)


def test_every_error_of_the_service_can_come_back() -> None:
    def leaves(kind: type) -> set[type]:
        return {kind}.union(*(leaves(child) for child in kind.__subclasses__()))

    ours = {kind for kind in leaves(errors.SpeculatorError) if kind.__module__ == "speculator.errors"}
    assert set(BY_REASON.values()) == ours


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", ConnectionLostError),
        (grpc.StatusCode.INTERNAL, "The actor died unexpectedly before finishing this task", ConnectionLostError),
        (grpc.StatusCode.INTERNAL, "something else", RemoteError),
        (grpc.StatusCode.UNIMPLEMENTED, "no such method", RemoteError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "late", errors.DeadlineExceededError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max", errors.InvalidArgumentError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many", RemoteError),
    ],
)
def test_a_status_from_elsewhere(code: grpc.StatusCode, text: str, kind: type) -> None:
    got = from_status(status_pb2.Status(code=code.value[0], message=text))
    assert type(got) is kind
    assert text in got.message


def test_a_reason_of_another_domain_is_not_ours() -> None:
    status = status_of(errors.SessionNotFoundError("who?"))
    status.details[0].value = status.details[0].value.replace(b"speculator.v1", b"elsewhere.v1.")
    assert type(from_status(status)) is RemoteError


# ---- messages


def test_a_draft_survives_the_wire() -> None:
    q = (Distribution((6, 7), (-0.5, -1.0)), Distribution((8,), (0.0,)))
    draft = Draft((6, 8), (-1, 0), q=q)
    assert wire.read_tree(wire.tree(draft), 0) == draft
    assert wire.read_tree(wire.tree(Draft((6, 7, 8), (-1, -1, 1))), 5) == Draft((6, 7, 8), (-1, -1, 1), draft_id=5)


def test_what_is_not_said_stays_unsaid() -> None:
    said = wire.create(Opening(PROMPT)).request
    assert not any(said.sampling.HasField(name) for name in ("temperature", "top_k", "top_p", "min_p", "seed"))
    assert not said.stopping.HasField("max_new_tokens") and not said.HasField("idle_timeout")
    said = wire.create(Opening(PROMPT, sampling=Sampling(temperature=0.0), shape=Shape(depth=0))).request
    assert said.sampling.HasField("temperature") and said.draft.HasField("max_depth")
    assert not wire.verify("s", 3, 1, None).request.HasField("propose_next")
    assert wire.verify("s", 3, 1, Shape()).request.HasField("propose_next")


def test_a_reason_of_a_later_version_is_an_end() -> None:
    assert wire.read_finish(0) is RUNNING
    assert wire.read_finish(99) is FinishReason.STOP


# ---- options


def test_the_channel_notices_a_frozen_server_and_retries_what_may_be_retried() -> None:
    options = dict(Endpoint(max_message_bytes=1 << 20).options)
    assert options["grpc.http2.ping_timeout_ms"] <= 5000
    assert options["grpc.max_receive_message_length"] == 1 << 20
    policy = json.loads(options["grpc.service_config"])["methodConfig"][0]["retryPolicy"]
    assert "UNAVAILABLE" in policy["retryableStatusCodes"]


def test_metadata_names_the_caller_and_the_session() -> None:
    rows = dict(Endpoint(token="sesame").metadata("s-1"))
    assert rows == {"authorization": "Bearer sesame", "x-session-id": "s-1", "session_id": "s-1"}
    assert Endpoint().metadata() == ()


def test_silence_says_how_was_asked() -> None:
    assert Endpoint("a:1").silence(2.0) == "no server at a:1 after 2 s, asked in plain text"
    assert Endpoint("a:1", tls=Tls()).silence(0.5) == "no server at a:1 after 0.5 s, asked over TLS"


def test_a_token_file(tmp_path) -> None:
    file = tmp_path / "token"
    file.write_text("# a comment\n\n  sesame \nother\n")
    assert read_token(file) == "sesame"
    file.write_text("# nothing\n")
    with pytest.raises(errors.ConfigError, match="no token"):
        read_token(file)
