"""The Draft stream: many sessions on one call, order, errors and timeouts as items, endings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import status_pb2

from speculator.errors import DrainingError, InvalidArgumentError
from speculator.stream import DraftStream, Malformed
from speculator.translate import About
from speculator.v1 import drafter_pb2 as pb
from tests.fakes import FakeEngine, FakeTokenizer, info, plain
from tests.service import PROMPT, Service, bound, create, details, reason, serving, until

OK = grpc.StatusCode.OK


class Stream:
    """Sends numbered items; answers are kept by number and in order of arrival."""

    def __init__(self, service: Service) -> None:
        self._call = service.stub.Draft()
        self._number = 0
        self.order: list[int] = []
        self.answers: dict[int, pb.DraftResponse] = {}
        self.draining: list[pb.Draining] = []
        self._heard = asyncio.Condition()
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while (answer := await self._call.read()) is not grpc.aio.EOF:
            if answer.WhichOneof("response") == "draining":
                self.draining.append(answer.draining)
            else:
                self.order.append(answer.correlation_id)
                self.answers[answer.correlation_id] = answer
            async with self._heard:
                self._heard.notify_all()

    async def send(self, timeout: float | None = None, **item: object) -> int:
        self._number += 1
        request = pb.DraftRequest(correlation_id=self._number, **item)
        if timeout is not None:
            request.timeout.CopyFrom(duration_pb2.Duration(nanos=int(timeout * 1e9)))
        async with self._writing:
            await self._call.write(request)
        return request.correlation_id

    async def answer(self, number: int) -> pb.DraftResponse:
        async with self._heard:
            await self._heard.wait_for(lambda: number in self.answers or self._reader.done())
        return self.answers[number]

    async def ask(self, **item: object) -> pb.DraftResponse:
        return await self.answer(await self.send(**item))

    async def status(self, **item: object) -> status_pb2.Status:
        answer = await self.ask(**item)
        assert answer.WhichOneof("response") == "status"
        return answer.status

    async def close(self) -> grpc.StatusCode:
        await self._call.done_writing()
        await self._reader
        return await self._call.code()

    def cancel(self) -> None:
        self._call.cancel()
        self._reader.cancel()


@asynccontextmanager
async def streaming(engine: FakeEngine | None = None, **options: object) -> AsyncIterator[tuple[Service, Stream]]:
    async with serving(engine, **options) as service:
        stream = Stream(service)
        yield service, stream
        stream.cancel()


def verify(name: str, base: int, **more: object) -> pb.VerifyRequest:
    more = more if "draft_id" in more else {"tree": pb.DraftTree(), **more}
    return pb.VerifyRequest(session_id=name, base_length=base, **more)


async def run_session(stream: Stream, name: str, prompt: tuple[int, ...], count: int) -> list[int]:
    created = (await stream.ask(create_session=create(name, prompt))).create_session
    out, length = [created.next_token_id], created.session.committed_length
    more = pb.DraftParams()
    draft = (await stream.ask(propose=pb.ProposeRequest(session_id=name, base_length=length))).propose.draft_id
    while len(out) < count:
        answer = (await stream.ask(verify=verify(name, length, draft_id=draft, propose_next=more))).verify
        out += answer.committed_token_ids
        length, draft = answer.committed_length, answer.next_draft.draft_id
    assert (await stream.ask(delete_session=pb.DeleteSessionRequest(session_id=name))).delete_session.stats.num_steps
    return out


async def test_many_sessions_on_one_stream() -> None:
    engine = FakeEngine(info(max_rows=64, total_pages=64 * 82 + 1))
    engine.delay = 0.002
    async with streaming(engine) as (s, stream):
        prompts = [(1 + i, 2, 3 + i) for i in range(64)]
        texts = await asyncio.gather(*(run_session(stream, f"s{i}", p, 20) for i, p in enumerate(prompts)))
        for prompt, text in zip(prompts, texts, strict=True):
            assert text == plain(prompt, len(text))
        assert max(len(steps) for steps in engine.steps) > 8
        assert s.core.usage()[:5] == (0, 0, 0, 0, 0)
        assert await stream.close() is OK


async def test_items_of_a_session_are_answered_in_order() -> None:
    async with streaming() as (_, stream):
        numbers = [
            await stream.send(create_session=create("a")),
            await stream.send(propose=pb.ProposeRequest(session_id="a", base_length=5)),
            await stream.send(verify=verify("a", 5, draft_id=1)),
            await stream.send(extend=pb.ExtendRequest(session_id="a", base_length=1, token_ids=[5])),
            await stream.send(delete_session=pb.DeleteSessionRequest(session_id="a")),
            await stream.send(verify=verify("a", 9)),
        ]
        kinds = [(await stream.answer(n)).WhichOneof("response") for n in numbers]
        assert kinds == ["create_session", "propose", "verify", "status", "delete_session", "status"]
        assert stream.order == numbers


async def test_sessions_do_not_wait_for_each_other() -> None:
    engine = FakeEngine()
    engine.delay = 0.003
    async with streaming(engine) as (_, stream):
        long = await stream.send(create_session=create("long", [5] * 200))
        short = await stream.send(create_session=create("short"))
        await stream.answer(long)
        assert stream.order == [short, long]


async def test_a_failed_item_breaks_nothing() -> None:
    async with streaming() as (s, stream):
        await stream.ask(create_session=create("a"))
        bad_tree = pb.DraftTree(token_ids=[5], parent_indices=[4])
        assert reason(await stream.status(verify=verify("a", 5, tree=bad_tree))) == "INVALID_TREE"
        assert reason(await stream.status(verify=verify("a", 3))) == "POSITION_MISMATCH"
        assert reason(await stream.status(verify=verify("none", 3))) == "SESSION_NOT_FOUND"
        assert reason(await stream.status(create_session=create("a b"))) == "INVALID_ARGUMENT"
        assert reason(await stream.status(create_session=pb.CreateSessionRequest(text="x"))) == "INVALID_ARGUMENT"
        assert reason(await stream.status(extend=pb.ExtendRequest(session_id="a", base_length=5))) == "INVALID_ARGUMENT"
        assert reason(await stream.status()) == "INVALID_ARGUMENT"
        s.engine.bad_rows = {0}
        assert reason(await stream.status(verify=verify("a", 5))) == "NON_FINITE_LOGITS"
        s.engine.bad_rows = set()
        assert (await stream.ask(verify=verify("a", 5))).verify.committed_length == 6
        assert (await stream.ask(verify=verify("a", 5))).verify.replayed
        assert await stream.close() is OK


async def test_errors_carry_the_same_details_as_calls() -> None:
    async with streaming(FakeEngine(info(max_rows=1))) as (_, stream):
        await stream.ask(create_session=create("a"))
        full = await stream.status(create_session=create("b"))
        assert full.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert set(details(full)) == {"ErrorInfo", "RetryInfo"}
        wrong = await stream.status(create_session=create("b", (101,)))
        assert details(wrong)["BadRequest"].field_violations[0].field == "token_ids[0]"


async def test_text_on_the_stream() -> None:
    async with streaming(tokenizer=FakeTokenizer()) as (_, stream):
        created = await stream.ask(create_session=pb.CreateSessionRequest(text="hello"))
        assert created.create_session.session.committed_length == 1 + len(FakeTokenizer().encode("hello"))


async def test_a_late_item_is_told_in_time_and_commits_nothing_later() -> None:
    async with streaming() as (s, stream):
        await stream.ask(create_session=create("a"))
        s.engine.gate.clear()
        s.engine.entered.clear()
        other = await stream.send(create_session=create("b"))
        await asyncio.to_thread(s.engine.entered.wait)
        late = await stream.send(0.03, verify=verify("a", 5))
        behind = await stream.send(verify=verify("a", 5))
        answer = await stream.answer(late)
        assert answer.status.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert stream.order[-1] == late, "the client hears while the engine is still busy"
        s.engine.gate.set()
        await stream.answer(other)
        done = (await stream.answer(behind)).verify
        assert done.committed_length == 6 and not done.replayed


async def test_an_item_late_while_it_runs_is_replayed() -> None:
    async with streaming() as (s, stream):
        await stream.ask(create_session=create("a"))
        s.engine.gate.clear()
        s.engine.entered.clear()
        late = await stream.send(0.03, verify=verify("a", 5))
        await asyncio.to_thread(s.engine.entered.wait)
        assert (await stream.answer(late)).HasField("status")
        s.engine.gate.set()
        again = (await stream.ask(verify=verify("a", 5))).verify
        assert again.replayed and again.committed_length == 6


async def test_a_negative_timeout_is_too_late_at_once() -> None:
    async with streaming() as (_, stream):
        await stream.ask(create_session=create("a"))
        assert reason(await stream.status(timeout=-1.0, verify=verify("a", 5))) == "DEADLINE_EXCEEDED"
        assert (await stream.ask(verify=verify("a", 5))).verify.committed_length == 6


async def test_a_client_that_leaves_frees_what_waits() -> None:
    async with streaming() as (s, stream):
        await stream.ask(create_session=create("a"))
        s.engine.gate.clear()
        s.engine.entered.clear()
        await stream.send(create_session=create("", [5] * 100))
        await asyncio.to_thread(s.engine.entered.wait)
        await stream.send(verify=verify("a", 5))
        await until(lambda: s.core.in_flight == 2)
        stream.cancel()
        await until(lambda: not s.server._drafter.streams)
        s.engine.gate.set()
        await until(lambda: s.core.in_flight == 0)
        assert s.core.usage().active == 1
        assert (await s.stub.GetSession(pb.GetSessionRequest(session_id="a"))).session.committed_length == 5


async def test_half_close_answers_what_was_sent() -> None:
    async with streaming() as (s, stream):
        await stream.ask(create_session=create("a"))
        s.engine.delay = 0.03
        last = await stream.send(verify=verify("a", 5))
        assert await stream.close() is OK
        assert stream.answers[last].verify.committed_length == 6


async def test_a_message_that_does_not_parse_ends_the_stream_only() -> None:
    async with serving() as s:
        call = s.channel.stream_stream("/speculator.v1.DrafterService/Draft")()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
            raise grpc.aio.AioRpcError(await call.code(), None, await call.trailing_metadata(), await call.details())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await s.works()


class SlowPeer:
    """A call whose messages leave when told: one item that is refused at once, then bytes that do not parse."""

    def __init__(self) -> None:
        self.requests = [pb.DraftRequest(correlation_id=7), Malformed(ValueError("bytes"))]
        self.written: list[pb.DraftResponse] = []
        self.left = asyncio.get_running_loop().create_future()

    async def read(self) -> object:
        await asyncio.sleep(0)
        return self.requests.pop(0)

    async def write(self, message: pb.DraftResponse) -> None:
        await self.left
        self.written.append(message)


async def test_a_stream_that_ends_while_it_writes_ends_after_the_write() -> None:
    """gRPC takes no status while a message is on its way: the call would stay open for ever."""
    async with serving() as s:
        peer = SlowPeer()
        running = asyncio.ensure_future(DraftStream(s.core, peer, "", About(), None).run())  # type: ignore[arg-type]
        await asyncio.wait([running], timeout=0.2)
        assert not peer.requests and not running.done()
        peer.left.set_result(None)
        with pytest.raises(InvalidArgumentError, match="does not parse"):
            await asyncio.wait_for(running, 5)
        assert [message.correlation_id for message in peer.written] == [7]


async def test_a_finished_session_on_the_stream() -> None:
    async with streaming() as (_, stream):
        await stream.ask(create_session=create("a", stopping=bound(2)))
        answer = (await stream.ask(verify=verify("a", 5, propose_next=pb.DraftParams()))).verify
        assert answer.finish_reason == pb.FINISH_REASON_LENGTH and not answer.HasField("next_draft")
        assert reason(await stream.status(verify=verify("a", 6))) == "SESSION_FINISHED"


async def test_resume_on_the_stream() -> None:
    async with streaming() as (_, stream):
        text = [*PROMPT, *plain(PROMPT, 6)]
        created = (await stream.ask(create_session=create("a", text))).create_session
        assert created.next_token_id == plain(text, 1)[0]


async def test_a_slow_reader_is_not_buffered_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speculator.stream.MAX_OPEN", 8)
    async with serving() as s:
        call = s.stub.Draft()
        await call.write(pb.DraftRequest(correlation_id=1, create_session=create("a", [5] * 200)))
        assert (await call.read()).HasField("create_session")
        (stream,) = s.server._drafter.streams
        big = pb.DraftRequest(correlation_id=2, propose=pb.ProposeRequest(session_id="x" * 60_000))

        async def flood() -> None:
            for _ in range(200):
                await call.write(big)

        flooding = asyncio.create_task(flood())
        await until(lambda: len(stream._writer.waiting) >= 7)  # one more may be in the hands of the transport
        await asyncio.sleep(0.1)
        assert len(stream._writer.waiting) <= 8 and not flooding.done(), (
            "requests are left unread while answers pile up"
        )
        heard = 0
        while heard < 200:
            assert (await call.read()).HasField("status")
            heard += 1
        await flooding
        call.cancel()


async def test_a_client_that_leaves_requests_unread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("speculator.stream.MAX_OPEN", 2)
    async with streaming() as (s, stream):
        await stream.ask(create_session=create("a"))
        s.engine.gate.clear()
        s.engine.entered.clear()
        await stream.send(verify=verify("a", 5))
        await asyncio.to_thread(s.engine.entered.wait)
        for base in (6, 7, 8):
            await stream.send(verify=verify("a", base))
        (live,) = s.server._drafter.streams
        await until(lambda: live._room is not None)
        stream.cancel()
        await until(lambda: not s.server._drafter.streams)
        s.engine.gate.set()
        await until(lambda: s.core.in_flight == 0)
        assert (await s.stub.GetSession(pb.GetSessionRequest(session_id="a"))).session.committed_length == 6
    assert not [record for record in caplog.records if record.name.startswith("speculator")]


async def test_a_stream_that_comes_while_the_server_leaves_is_told_so() -> None:
    async with serving() as s:
        before = s.stub.Draft()
        await until(lambda: len(s.server._drafter.streams) >= 1)
        s.server._drafter.leave(DrainingError("the server is shutting down"))
        late = s.stub.Draft()
        for call in (before, late):
            assert await asyncio.wait_for(call.code(), 5) is grpc.StatusCode.UNAVAILABLE


async def test_a_thousand_bad_items_behind_a_slow_one() -> None:
    async with streaming() as (s, stream):
        s.engine.gate.clear()
        first = await stream.send(create_session=create("a"))
        bad = pb.ExtendRequest(session_id="a", base_length=5)
        numbers = [await stream.send(extend=bad) for _ in range(1000)]
        s.engine.gate.set()
        assert (await stream.answer(first)).HasField("create_session")
        assert reason((await stream.answer(numbers[-1])).status) == "INVALID_ARGUMENT"
        assert stream.order == [first, *numbers]


async def test_a_bug_behind_one_item_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeTokenizer):
        def encode(self, text: str) -> list[int]:
            raise ZeroDivisionError("secret")

    async with streaming(tokenizer=Broken()) as (_, stream):
        status = await stream.status(create_session=pb.CreateSessionRequest(session_id="a", text="hi"))
        assert status.code == grpc.StatusCode.INTERNAL.value[0] and "secret" not in status.message
        assert (await stream.ask(create_session=create("a"))).create_session.session.session_id == "a"


async def test_items_behind_a_client_that_left_never_start() -> None:
    async with streaming() as (s, stream):
        await stream.ask(create_session=create("a"))
        s.engine.gate.clear()
        s.engine.entered.clear()
        await stream.send(verify=verify("a", 5))
        await asyncio.to_thread(s.engine.entered.wait)
        for base in (6, 7):
            await stream.send(verify=verify("a", base))
        (live,) = s.server._drafter.streams
        await until(lambda: live._open == 3)
        stream.cancel()
        await until(lambda: not s.server._drafter.streams)
        s.engine.gate.set()
        await until(lambda: s.core.in_flight == 0)
        assert (await s.stub.GetSession(pb.GetSessionRequest(session_id="a"))).session.committed_length == 6
