"""The unary calls and Generate, over a real socket."""

from __future__ import annotations

import asyncio
import math

import grpc
import pytest

from speculator.errors import EngineFailedError
from speculator.types import SamplingParams
from speculator.v1 import drafter_pb2 as pb
from tests.fakes import EOS, FakeEngine, FakeTokenizer, info, plain
from tests.service import PROMPT, Service, bound, create, details, reason, serving, until

Code = grpc.StatusCode
EMPTY = pb.DraftTree()


def verify(name: str, base: int, **more: object) -> pb.VerifyRequest:
    more = more or {"tree": EMPTY}
    return pb.VerifyRequest(session_id=name, base_length=base, **more)


async def generate(service: Service, **more: object) -> list[pb.GenerateResponse]:
    return [part async for part in service.stub.Generate(pb.GenerateRequest(**more))]


# ---- what works ----


async def test_a_clients_loop() -> None:
    async with serving() as s:
        created = await s.stub.CreateSession(create("a"))
        assert (created.session.session_id, created.session.committed_length) == ("a", 5)
        assert (created.session.model, created.session.instance_id) == ("fake-target", "here")
        assert not created.replayed and created.session.expire_time.seconds > 0
        out, length = [created.next_token_id], 5
        draft = await s.stub.Propose(pb.ProposeRequest(session_id="a", base_length=5, return_logprobs=True))
        assert draft.base_length == 5 and len(draft.tree.token_ids) == len(draft.tree.logprobs) == 4
        assert draft.tree.distribution == pb.DRAFT_DISTRIBUTION_SERVER_SIDE and not draft.tree.parent_indices
        while len(out) < 30:
            more = pb.DraftParams(max_depth=3)
            answer = await s.stub.Verify(verify("a", length, draft_id=draft.draft_id, propose_next=more))
            out += answer.committed_token_ids
            assert len(answer.accepted_indices) == len(answer.committed_token_ids) - 1
            assert not answer.committed_logprobs and answer.timing.batch_size == 1
            assert answer.verification_rule == pb.VERIFICATION_RULE_COUPLED
            length, draft = answer.committed_length, answer.next_draft
            assert draft.base_length == length and len(draft.tree.token_ids) == 3
        assert out == plain(PROMPT, len(out))
        seen = await s.stub.GetSession(pb.GetSessionRequest(session_id="a", include_token_ids=True))
        assert list(seen.token_ids) == [*PROMPT, *out]
        stats = (await s.stub.DeleteSession(pb.DeleteSessionRequest(session_id="a"))).stats
        assert stats.num_steps == sum(stats.acceptance_histogram.values())
        assert stats.num_accepted_draft_tokens == sum(j * n for j, n in stats.acceptance_histogram.items())
        assert stats.num_accepted_draft_tokens == sum(stats.accepted_at_position)
        assert stats.num_draft_tokens == sum(stats.drafted_at_position)
        assert stats.num_output_tokens == len(out)


async def test_a_missing_session_is_deleted_without_complaint() -> None:
    async with serving() as s:
        await s.stub.DeleteSession(pb.DeleteSessionRequest(session_id="none"))


async def test_logprobs_come_when_asked_for() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        answer = await s.stub.Verify(
            verify("a", 5, tree=EMPTY, return_logprobs=True, propose_next=pb.DraftParams(max_depth=2))
        )
        assert len(answer.committed_logprobs) == 1 and len(answer.next_draft.tree.logprobs) == 2


async def test_trees_travel_both_ways() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        shape = pb.DraftParams(static_parents=[-1, -1, 0, 1])
        draft = await s.stub.Propose(pb.ProposeRequest(session_id="a", base_length=5, draft=shape))
        assert list(draft.tree.parent_indices) == [-1, -1, 0, 1]
        right = plain(PROMPT, 3)
        tree = pb.DraftTree(token_ids=[99, right[1], right[2]], parent_indices=[-1, -1, 1])
        answer = await s.stub.Verify(verify("a", 5, tree=tree))
        assert list(answer.accepted_indices) == [1, 2] and list(answer.committed_token_ids[:2]) == right[1:]


async def test_a_sparse_distribution_reaches_the_engine() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        tree = pb.DraftTree(
            token_ids=[5],
            distribution=pb.DRAFT_DISTRIBUTION_SPARSE,
            support_counts=[2],
            support_token_ids=[5, 6],
            support_logprobs=[math.log(0.25), math.log(0.75)],
        )
        await s.stub.Verify(verify("a", 5, tree=tree))
        draft = s.engine.steps[-1][0].draft
        assert draft is not None and draft.q is not None
        assert list(draft.q[0].token_ids) == [5, 6] and math.exp(draft.q[0].logprobs[1]) == pytest.approx(0.75)


async def test_sampling_parameters_reach_the_engine() -> None:
    async with serving() as s:
        sampling = pb.SamplingParams(
            temperature=0.5, top_p=0.75, top_k=9, min_p=0.25, seed=2**64 - 1, repetition_penalty=1.5,
            verification_rule=pb.VERIFICATION_RULE_REJECTION,
        )  # fmt: skip
        await s.stub.CreateSession(create("a", sampling=sampling))
        seen = s.engine.rows[0].sampling
        assert (seen.temperature, seen.top_p, seen.top_k, seen.min_p) == (0.5, 0.75, 9, 0.25)
        assert (seen.seed, seen.repetition_penalty) == (-1, 1.5)
        answer = await s.stub.Verify(verify("a", 5))
        assert answer.verification_rule == pb.VERIFICATION_RULE_REJECTION


async def test_unset_parameters_are_the_servers() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        assert s.engine.rows[0].sampling == SamplingParams()
        await s.stub.CreateSession(create("b", sampling=pb.SamplingParams(temperature=0.0, seed=7)))
        assert s.engine.rows[1].sampling == SamplingParams(seed=7)


async def test_extend_and_resume() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a", prefill_only=True))
        more = pb.DraftParams(max_depth=2)
        request = pb.ExtendRequest(session_id="a", base_length=4, token_ids=[9, 9], propose_next=more)
        answer = await s.stub.Extend(request)
        assert answer.committed_length == 6 and len(answer.next_draft.tree.token_ids) == 2
        again = await s.stub.Extend(request)
        assert again.replayed and again.next_draft.draft_id == answer.next_draft.draft_id
        resumed = await s.stub.CreateSession(create("b", (*PROMPT, 9, 9)))
        done = await s.stub.Verify(verify("a", 6, draft_id=answer.next_draft.draft_id))
        assert done.committed_token_ids[0] == resumed.next_token_id


async def test_a_lost_answer_is_told_again() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        s.engine.gate.clear()
        s.engine.entered.clear()
        call = s.stub.Verify(verify("a", 5, tree=EMPTY, propose_next=pb.DraftParams()))
        await asyncio.wait([asyncio.ensure_future(call.initial_metadata())], timeout=0.2)
        await asyncio.to_thread(s.engine.entered.wait)
        call.cancel()
        s.engine.gate.set()
        await until(lambda: s.core.in_flight == 0)
        answer = await s.stub.Verify(verify("a", 5, tree=EMPTY, propose_next=pb.DraftParams()))
        assert answer.replayed and answer.committed_length == 6 and answer.next_draft.base_length == 6
        once_more = await s.stub.Verify(verify("a", 5))
        assert once_more.SerializeToString() == answer.SerializeToString()


async def test_create_again_is_replayed() -> None:
    async with serving() as s:
        first = await s.stub.CreateSession(create("a"))
        again = await s.stub.CreateSession(create("a"))
        assert again.replayed and again.next_token_id == first.next_token_id


async def test_text_needs_a_tokenizer_and_gets_one() -> None:
    async with serving(tokenizer=FakeTokenizer()) as s:
        created = await s.stub.CreateSession(pb.CreateSessionRequest(text="hé"))
        assert created.session.committed_length == len(FakeTokenizer().encode("hé")) + 1
        long = await s.stub.CreateSession(pb.CreateSessionRequest(text="a" * 100))
        assert long.session.committed_length == 101
    async with serving() as s:
        with pytest.raises(grpc.aio.AioRpcError, match="no tokenizer"):
            await s.stub.CreateSession(pb.CreateSessionRequest(text="hé"))


# ---- generate ----


@pytest.mark.parametrize("baseline", [False, True])
async def test_generate(baseline: bool) -> None:
    async with serving() as s:
        parts = await generate(s, session=create("g", stopping=bound(30)), disable_speculation=baseline)
        assert [t for part in parts for t in part.token_ids] == plain(PROMPT, 30)
        assert [part.HasField("session") for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.HasField("stats") for part in parts] == [False] * (len(parts) - 1) + [True]
        assert parts[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert parts[-1].stats.num_output_tokens == 30
        assert sum(part.num_accepted for part in parts) == parts[-1].stats.num_accepted_draft_tokens
        assert (parts[-1].stats.num_draft_tokens == 0) == baseline
        assert all(len(part.logprobs) == len(part.token_ids) for part in parts)
        assert s.core.usage()[:5] == (0, 0, 0, 0, 0)


async def test_generate_stops_at_eos_and_at_once() -> None:
    engine = FakeEngine(hits=(1.0,))
    engine.eos_after = {8}
    async with serving(engine) as s:
        parts = await generate(s, session=create("g", stopping=bound(30)))
        assert [t for part in parts for t in part.token_ids] == [*plain(PROMPT, 4), EOS]
        assert parts[-1].finish_reason == pb.FINISH_REASON_STOP
        engine.eos_after = {4}
        (only,) = await generate(s, session=create("h", stopping=bound(30)))
        assert list(only.token_ids) == [EOS] and only.HasField("session") and only.HasField("stats")


async def test_generated_text_is_whole_characters() -> None:
    text = "aé€𝄞z"
    wanted = FakeTokenizer().encode(text)
    engine = FakeEngine(hits=(0.0,))
    engine._target = lambda prefix, row: ([*wanted, EOS])[min(len(prefix) - 4, len(wanted))]  # type: ignore[method-assign]
    async with serving(engine, tokenizer=FakeTokenizer()) as s:
        prompt = FakeTokenizer().decode(PROMPT)
        request = pb.CreateSessionRequest(text=prompt, stopping=bound(60))
        parts = await generate(s, session=request)
        assert "".join(part.text for part in parts) == text
        assert all("\ufffd" not in part.text for part in parts)
        by_ids = await generate(s, session=create("g", stopping=bound(5)))
        assert not any(part.text for part in by_ids)


async def test_deleting_a_generation_ends_its_stream() -> None:
    async with serving() as s:
        s.engine.delay = 0.005
        call = aiter(s.stub.Generate(pb.GenerateRequest(session=create("g"))))
        await anext(call)
        await s.stub.DeleteSession(pb.DeleteSessionRequest(session_id="g"))
        parts = [part async for part in call]
        assert parts[-1].finish_reason == pb.FINISH_REASON_CANCELLED


async def test_a_client_that_leaves_frees_its_generation() -> None:
    engine = FakeEngine()
    engine.delay = 0.005
    async with serving(engine) as s:
        call = s.stub.Generate(pb.GenerateRequest(session=create("g")))
        await call.read()
        call.cancel()
        await until(lambda: s.core.usage()[:5] == (0, 0, 0, 0, 0))


async def test_a_generation_past_its_deadline_frees_its_place() -> None:
    engine = FakeEngine()
    engine.delay = 0.02
    async with serving(engine) as s:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in s.stub.Generate(pb.GenerateRequest(session=create("g")), timeout=0.1):
                pass
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        await until(lambda: s.core.usage()[:5] == (0, 0, 0, 0, 0))


async def test_a_generation_with_a_taken_id_is_refused() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(s, session=create("a"))
        assert reason(caught.value) == "SESSION_EXISTS"


# ---- what is refused: status, reason, details, and the server goes on ----

SPARSE = pb.DRAFT_DISTRIBUTION_SPARSE
BAD_CREATES = {
    "no input": (pb.CreateSessionRequest(), "token_ids"),
    "empty ids": (create(tokens=()), "token_ids"),
    "foreign token": (create(tokens=(5, 101)), "token_ids[1]"),
    "huge token": (create(tokens=(2**32 - 1,)), "token_ids[0]"),
    "bad id": (create("no spaces please"), "session_id"),
    "long id": (create("x" * 65), "session_id"),
    "other model": (create(model="gpt-5"), "model"),
    "temperature": (create(sampling=pb.SamplingParams(temperature=-1.0)), "sampling.temperature"),
    "nan": (create(sampling=pb.SamplingParams(temperature=math.nan)), "sampling.temperature"),
    "top_p": (create(sampling=pb.SamplingParams(top_p=0.0)), "sampling.top_p"),
    "rule": (create(sampling=pb.SamplingParams(verification_rule=9)), "sampling.verification_rule"),
    "no output": (create(stopping=bound(0)), "stopping.max_new_tokens"),
    "stop token": (create(stopping=pb.StoppingParams(stop_token_ids=[500])), "stopping.stop_token_ids[0]"),
    "too deep": (create(draft=pb.DraftParams(max_depth=17)), "draft.max_depth"),
    "too wide": (create(draft=pb.DraftParams(branching=40)), "draft.branching"),
    "too many": (create(draft=pb.DraftParams(branching=4, max_nodes=64, max_depth=6)), "draft.max_nodes"),
    "bad parents": (create(draft=pb.DraftParams(static_parents=[-1, 3])), "draft.static_parents[1]"),
    "q wanted": (create(draft=pb.DraftParams(distribution=SPARSE)), "draft.distribution"),
    "block tree": (
        create(
            sampling=pb.SamplingParams(verification_rule=pb.VERIFICATION_RULE_BLOCK), draft=pb.DraftParams(branching=2)
        ),
        "draft",
    ),
    "one token": (create(tokens=(5,), prefill_only=True), "token_ids"),
}


@pytest.mark.parametrize("case", BAD_CREATES)
async def test_bad_creates(case: str) -> None:
    request, field = BAD_CREATES[case]
    async with serving() as s:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.stub.CreateSession(request)
        assert caught.value.code() is Code.INVALID_ARGUMENT
        found = details(caught.value)
        (violation,) = found["BadRequest"].field_violations
        assert violation.field == field and violation.description == caught.value.details()
        assert found["ErrorInfo"].domain == "speculator.v1"
        await s.works()


BAD_TREES = {
    "no draft": ({}, "INVALID_ARGUMENT"),
    "parent": ({"tree": pb.DraftTree(token_ids=[5, 6], parent_indices=[-1, 1])}, "INVALID_TREE"),
    "parents": ({"tree": pb.DraftTree(token_ids=[5, 6], parent_indices=[-1])}, "INVALID_TREE"),
    "token": ({"tree": pb.DraftTree(token_ids=[101])}, "INVALID_ARGUMENT"),
    "nodes": ({"tree": pb.DraftTree(token_ids=[5] * 64, parent_indices=[-1] * 64)}, "INVALID_TREE"),
    "depth": ({"tree": pb.DraftTree(token_ids=[5] * 17)}, "INVALID_TREE"),
    "server's": (
        {"tree": pb.DraftTree(token_ids=[5], distribution=pb.DRAFT_DISTRIBUTION_SERVER_SIDE)},
        "INVALID_TREE",
    ),
    "unsaid support": ({"tree": pb.DraftTree(token_ids=[5], support_counts=[1])}, "INVALID_TREE"),
    "counts": (
        {"tree": pb.DraftTree(token_ids=[5], distribution=SPARSE, support_counts=[2**32 - 1])},
        "INVALID_TREE",
    ),
    "truncated": (
        {
            "tree": pb.DraftTree(
                token_ids=[5], distribution=SPARSE, support_counts=[1], support_token_ids=[5], support_logprobs=[-1.0]
            )
        },
        "INVALID_TREE",
    ),
    "nan": ({"tree": pb.DraftTree(token_ids=[5], logprobs=[math.nan])}, "INVALID_TREE"),
    "certain beyond 1": ({"tree": pb.DraftTree(token_ids=[5], logprobs=[1000.0])}, "INVALID_TREE"),
    "unknown distribution": ({"tree": pb.DraftTree(token_ids=[5], distribution=9)}, "INVALID_TREE"),
    "unknown draft": ({"draft_id": 77}, "DRAFT_NOT_FOUND"),
}


@pytest.mark.parametrize("case", BAD_TREES)
async def test_bad_drafts(case: str) -> None:
    draft, why = BAD_TREES[case]
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.stub.Verify(pb.VerifyRequest(session_id="a", base_length=5, **draft))
        assert reason(caught.value) == why
        answer = await s.stub.Verify(verify("a", 5))
        assert answer.committed_length == 6 and not answer.replayed


async def test_states_that_refuse() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        await s.stub.CreateSession(create("off", disable_speculation=True))
        await s.stub.CreateSession(create("short", stopping=bound(1)))
        cases = [
            (s.stub.Verify(verify("none", 5)), Code.NOT_FOUND, "SESSION_NOT_FOUND"),
            (s.stub.GetSession(pb.GetSessionRequest(session_id="none")), Code.NOT_FOUND, "SESSION_NOT_FOUND"),
            (s.stub.Verify(verify("a", 4)), Code.ABORTED, "POSITION_MISMATCH"),
            (s.stub.Propose(pb.ProposeRequest(session_id="a", base_length=9)), Code.ABORTED, "POSITION_MISMATCH"),
            (s.stub.CreateSession(create("a", (9, 9))), Code.ALREADY_EXISTS, "SESSION_EXISTS"),
            (
                s.stub.Propose(pb.ProposeRequest(session_id="off", base_length=5)),
                Code.FAILED_PRECONDITION,
                "SPECULATION_DISABLED",
            ),
            (s.stub.Verify(verify("short", 5)), Code.FAILED_PRECONDITION, "SESSION_FINISHED"),
        ]
        for call, code, why in cases:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert (caught.value.code(), reason(caught.value)) == (code, why)
        await s.works()


async def test_details_help_the_caller() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        with pytest.raises(grpc.aio.AioRpcError) as stale:
            await s.stub.Verify(verify("a", 4))
        assert details(stale.value)["ErrorInfo"].metadata["committed_length"] == "5"
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await s.stub.Verify(verify("none", 5))
        assert details(missing.value)["ResourceInfo"].resource_name == "none"
        with pytest.raises(grpc.aio.AioRpcError) as long:
            await s.stub.CreateSession(create("b", (5,) * 300))
        assert details(long.value)["ErrorInfo"].reason == "PROMPT_TOO_LONG"
        assert details(long.value)["ErrorInfo"].metadata["max_prompt_tokens"] == "255"


async def test_a_busy_session_says_so() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        s.engine.gate.clear()
        s.engine.entered.clear()
        other = asyncio.ensure_future(s.stub.CreateSession(create("b")))
        await asyncio.to_thread(s.engine.entered.wait)
        first = asyncio.ensure_future(s.stub.Verify(verify("a", 5)))
        await until(lambda: s.core.in_flight == 2)
        second = asyncio.ensure_future(s.stub.Verify(verify("a", 5)))
        await until(lambda: s.core.in_flight == 3)
        s.engine.gate.set()
        assert (await first).committed_length == 6
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await second
        assert (caught.value.code(), reason(caught.value)) == (Code.ABORTED, "SESSION_BUSY")
        await other


async def test_a_full_server_says_when_to_come_back() -> None:
    async with serving(FakeEngine(info(max_rows=1))) as s:
        await s.stub.CreateSession(create("a"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.stub.CreateSession(create("b"))
        assert (caught.value.code(), reason(caught.value)) == (Code.RESOURCE_EXHAUSTED, "SERVER_FULL")
        assert details(caught.value)["RetryInfo"].retry_delay.nanos > 0
        assert ("grpc-retry-pushback-ms", "500") in tuple(caught.value.trailing_metadata())


async def test_nan_and_out_of_memory_are_errors_of_one_call() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        s.engine.bad_rows = {0}
        with pytest.raises(grpc.aio.AioRpcError) as nan:
            await s.stub.Verify(verify("a", 5))
        assert (nan.value.code(), reason(nan.value)) == (Code.INTERNAL, "NON_FINITE_LOGITS")
        s.engine.bad_rows = set()
        s.engine.raise_next = [EngineFailedError("out of memory")]
        with pytest.raises(grpc.aio.AioRpcError) as oom:
            await s.stub.Verify(verify("a", 5))
        assert reason(oom.value) == "ENGINE_FAILED"
        assert (await s.stub.Verify(verify("a", 5))).committed_length == 6


async def test_a_deadline_before_the_commit_leaves_the_session_as_it_was() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        s.engine.gate.clear()
        s.engine.entered.clear()
        other = asyncio.ensure_future(s.stub.CreateSession(create("b")))
        await asyncio.to_thread(s.engine.entered.wait)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.stub.Verify(verify("a", 5), timeout=0.05)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        s.engine.gate.set()
        await other
        await until(lambda: s.core.in_flight == 0)
        answer = await s.stub.Verify(verify("a", 5))
        assert answer.committed_length == 6 and not answer.replayed


# ---- bytes that are no message ----


async def test_bytes_that_do_not_parse() -> None:
    async with serving() as s:
        for data in (b"\xff\xff\xff", b'"\x02\xff\xfe', b"\x0a\x05a"):
            call = s.channel.unary_unary("/speculator.v1.DrafterService/CreateSession")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(data)
            assert caught.value.code() is Code.INVALID_ARGUMENT and "does not parse" in caught.value.details()
        await s.works()


async def test_an_oversized_message_is_refused() -> None:
    async with serving(max_message_bytes=4096) as s:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.stub.CreateSession(create("a", [5] * 5000))
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        await s.works()


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving() as s:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.channel.unary_unary("/speculator.v1.DrafterService/Fly")(b"")
        assert caught.value.code() is Code.UNIMPLEMENTED
        await s.works()


async def test_a_bug_in_a_method_tells_nothing_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeTokenizer):
        def encode(self, text: str) -> list[int]:
            raise ZeroDivisionError("secret")

    async with serving(tokenizer=Broken()) as s:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.stub.CreateSession(pb.CreateSessionRequest(text="hi"))
        assert caught.value.code() is Code.INTERNAL and "secret" not in caught.value.details()
        await s.works()
