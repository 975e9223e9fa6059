"""Sessions and generations that outlive answers, connections and servers: no token lost, none told twice."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import status_pb2

from speculator import errors
from speculator.client import (
    AsyncClient,
    Client,
    ConnectionLostError,
    Draft,
    DraftStream,
    FinishReason,
    Sampling,
    Session,
    Shape,
    Stopping,
)
from speculator.client.errors import from_status
from speculator.config import ServerConfig
from speculator.status import status_of
from speculator.types import SamplingParams
from tests.fakes import next_token, plain
from tests.rpc.client_hosts import Host, Proxy, Victim, proxied

PROMPT = (2, 7, 1, 8, 2, 8)
FORTY = Stopping(max_new_tokens=40)
SEEDED = Sampling(temperature=0.9, seed=5)
EXPECTED = plain(PROMPT, 40, SamplingParams(temperature=0.9, seed=5))


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def opened(steps: Client | DraftStream, rounds: int = 3) -> Session:
    """A session some rounds into its text."""
    session = steps.session(PROMPT, session_id="s", sampling=SEEDED, stopping=FORTY)
    for _ in range(rounds):
        session.step()
    return session


def finish(session: Session) -> None:
    """Run to the end: the text is that of plain decoding, and the rounds told it once."""
    before = list(session.output)
    told = [token for part in session for token in part.tokens]
    assert before + told == list(session.output) == EXPECTED
    assert session.finish is FinishReason.LENGTH


def lose_the_next_answer(host: Host, proxy: Proxy, act: Callable[[], object], then: Callable[[], None]) -> None:
    """Let `act` reach the server and commit, keep its answer back, cut the line, and do `then` before it is mended."""
    steps = len(host.engine.steps)
    proxy.mute.set()
    actor = threading.Thread(target=act)
    actor.start()
    wait_until(lambda: len(host.engine.steps) > steps and host.core.in_flight == 0)
    then()
    proxy.mute.clear()
    proxy.cut()
    actor.join(20)
    assert not actor.is_alive()


def wait_until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not met():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_lost_answer_is_asked_for_again(host: Host, streamed: bool) -> None:
    with proxied(host) as proxy, Client(proxy.address, timeout=10) as client, client.draft_stream() as stream:
        session = opened(stream if streamed else client)
        lose_the_next_answer(host, proxy, session.step, lambda: None)
        assert session.resumes == 0  # the server still knew it, and repeated its answer
        finish(session)
        assert client.get("s").length == len(PROMPT) + 40


@pytest.mark.parametrize("streamed", [False, True])
def test_a_server_that_dies_between_commit_and_answer(host: Host, streamed: bool) -> None:
    with Host() as other, proxied(host) as proxy, Client(proxy.address, timeout=10) as client:
        with client.draft_stream() as stream:
            session = opened(stream if streamed else client)

            def die() -> None:
                proxy.upstream = other.port

            lose_the_next_answer(host, proxy, session.step, die)
            assert session.resumes == 1
            finish(session)
            assert other.engine.steps


def test_the_answer_to_open_is_lost(host: Host) -> None:
    with proxied(host) as proxy, Client(proxy.address, timeout=10) as client, client.draft_stream() as stream:
        client.server_info()  # connected
        session = stream.session(PROMPT, sampling=SEEDED, stopping=FORTY)
        lose_the_next_answer(host, proxy, session.step, lambda: None)
        finish(session)
        assert len(host.core._worker.scheduler.sessions) == 1


@pytest.mark.parametrize("gone", [False, True])
def test_the_answer_to_extend_is_lost(host: Host, gone: bool) -> None:
    with Host() as other, proxied(host) as proxy, Client(proxy.address, timeout=10) as client:
        with client.session(PROMPT, prefill_only=True, stopping=FORTY) as session:
            session.propose()

            def die() -> None:
                proxy.upstream = other.port if gone else host.port

            lose_the_next_answer(host, proxy, lambda: session.extend([5, 6]), die)
            assert session.output == (5, 6)
            assert session.resumes == gone
            text = [token for part in session for token in part.tokens]
            assert text == plain((*PROMPT, 5, 6), 38)


def test_an_expired_session_is_made_again(host: Host) -> None:
    with Client(host.address, timeout=10) as client:
        session = opened(client)
        for _ in range(3):
            client.delete("s")
            session.step()
        assert session.resumes == 3
        finish(session)


def test_a_session_without_speculation_is_made_again(host: Host) -> None:
    with Client(host.address, timeout=10) as client:
        session = client.session(PROMPT, session_id="s", sampling=SEEDED, stopping=FORTY, speculate=False)
        list(itertools.islice(session, 5))
        client.delete("s")
        finish(session)
        assert session.resumes == 1


def test_a_stale_copy_on_another_server_is_replaced(host: Host) -> None:
    with Host() as other, proxied(host) as proxy, Client(proxy.address, timeout=10) as client:
        session = opened(client)
        proxy.upstream = other.port
        proxy.cut()
        session.step()
        session.step()
        proxy.upstream = host.port  # where a copy is that has not seen these two steps
        proxy.cut()
        finish(session)
        assert session.resumes == 2


def test_somebody_else_drives_the_session(host: Host) -> None:
    with Client(host.address, timeout=10) as client:
        session = opened(client)
        base = client.verify("s", len(session.tokens), Draft()).length
        client.verify("s", base, Draft())  # one more than the answer that is kept for us
        with pytest.raises(errors.PositionMismatchError):
            session.step()


def test_a_lost_draft_is_proposed_again(host: Host) -> None:
    with Client(host.address, timeout=10) as client:
        session = opened(client)
        client.propose("s", len(session.tokens), Shape(depth=1))  # replaces the draft that the session holds
        finish(session)


def test_a_busy_session_is_waited_for(host: Host) -> None:
    with Client(host.address, timeout=10) as client:
        session = opened(client)
        host.engine.gate.clear()
        with pytest.raises(errors.DeadlineExceededError):
            client.propose("s", len(session.tokens), Shape(depth=2), timeout=0.1)
        threading.Timer(0.2, host.engine.gate.set).start()
        finish(session)


def test_an_engine_failure_is_told_and_the_session_goes_on(host: Host) -> None:
    with Client(host.address, timeout=10) as client:
        session = opened(client)
        host.engine.raise_next = [errors.NumericalError("not finite"), errors.NumericalError("not finite")]
        with pytest.raises(errors.NumericalError):
            session.step()
        host.engine.raise_next = []
        finish(session)


def test_patience_ends(host: Host) -> None:
    with proxied(host) as proxy, Client(proxy.address, timeout=5, patience=0.3) as client:
        session = opened(client)
        proxy.upstream = 1
        proxy.cut()
        with pytest.raises(ConnectionLostError):
            session.step()
        proxy.upstream = host.port
        finish(session)  # nothing of it was lost


@pytest.mark.parametrize("speculate", [True, False])
def test_a_generation_goes_on_after_its_stream_broke(host: Host, speculate: bool) -> None:
    host.engine.delay = 0.01
    with Host() as other, proxied(host) as proxy, Client(proxy.address, timeout=10) as client:
        chunks = client.generate(PROMPT, sampling=SEEDED, stopping=FORTY, speculate=speculate)
        got = [token for chunk in itertools.islice(chunks, 3) for token in chunk.tokens]
        proxy.upstream = other.port
        proxy.cut()
        got += [token for chunk in chunks for token in chunk.tokens]
        assert got == EXPECTED
        assert other.engine.steps


def test_a_generation_from_text_cannot_go_on(host: Host) -> None:
    host.engine.delay = 0.01
    with proxied(host) as proxy, Client(proxy.address, timeout=10) as client:
        chunks = client.generate("text", stopping=FORTY)
        next(chunks)
        proxy.cut()
        with pytest.raises(ConnectionLostError):
            list(chunks)


def test_draining_under_load_loses_nothing() -> None:
    first = Host(config=ServerConfig(port=0, metrics_port=0, drain_grace_s=0.3))
    first.engine.delay = 0.005
    prompts = [(n + 1, *PROMPT) for n in range(6)]
    with Host() as second, Client(first.address, timeout=10) as warm, proxied(first) as proxy:
        warm.server_info()
        with Client(proxy.address, timeout=10) as client, client.draft_stream() as stream:
            with ThreadPoolExecutor(len(prompts)) as pool:
                spoken = [pool.submit(speak, stream, prompt) for prompt in prompts]
                wait_until(lambda: len(first.engine.steps) > 5)
                proxy.upstream = second.port  # where a load balancer sends new connections
                first.drain()
                assert [text.result(20) for text in spoken] == [plain(prompt, 80) for prompt in prompts]
            assert second.engine.steps


def speak(stream: DraftStream, prompt: tuple[int, ...]) -> list[int]:
    session = stream.session(prompt, stopping=Stopping(max_new_tokens=80))
    list(session)
    return list(session.output)


def test_an_idle_stream_lets_a_draining_server_go() -> None:
    host = Host(config=ServerConfig(port=0, metrics_port=0, drain_grace_s=20.0))
    with Client(host.address, timeout=5, patience=0.0) as client, client.draft_stream() as stream:
        stream.create(PROMPT)
        begin = time.monotonic()
        host.drain()
        assert time.monotonic() - begin < 10.0  # long before the grace ends
        with pytest.raises(errors.SpeculatorError):
            stream.create(PROMPT)


# ---- kill -9


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    victim = Victim(delay=0.01)
    yield victim
    victim.kill()


def test_kill_the_server_under_blocking_sessions(victim: Victim) -> None:
    prompts = [(n + 1, *PROMPT) for n in range(4)]
    with Client(victim.address, timeout=10) as client, client.draft_stream() as stream:
        with ThreadPoolExecutor(8) as pool:
            spoken = [pool.submit(run_session, steps, prompt) for prompt in prompts for steps in (client, stream)]
            time.sleep(0.2)
            victim.kill()
            victim.start()
            results = [text.result(30) for text in spoken]
    assert [text for text, _ in results] == [plain(prompt, 100) for prompt in prompts for _ in range(2)]
    assert all(resumes == 1 for _, resumes in results)


def run_session(steps: Client | DraftStream, prompt: tuple[int, ...]) -> tuple[list[int], int]:
    session = steps.session(prompt, stopping=Stopping(max_new_tokens=100))
    list(session)
    return list(session.output), session.resumes


async def test_kill_the_server_under_async_sessions(victim: Victim) -> None:
    prompts = [(n + 1, *PROMPT) for n in range(4)]
    async with AsyncClient(victim.address, timeout=10) as client, client.draft_stream() as stream:

        async def session(prompt: tuple[int, ...]) -> list[int]:
            session = stream.session(prompt, stopping=Stopping(max_new_tokens=100))
            async for _ in session:
                pass
            assert session.resumes == 1
            return list(session.output)

        async def generation(prompt: tuple[int, ...]) -> list[int]:
            chunks = client.generate(prompt, stopping=Stopping(max_new_tokens=100))
            return [token async for chunk in chunks for token in chunk.tokens]

        work = [asyncio.create_task(act(prompt)) for prompt in prompts for act in (session, generation)]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(victim.kill)
        await asyncio.to_thread(victim.start)
        assert await asyncio.gather(*work) == [plain(prompt, 100) for prompt in prompts for _ in range(2)]


def test_the_expected_text_depends_on_the_seed() -> None:
    assert EXPECTED != plain(PROMPT, 40)
    assert next_token(PROMPT, SamplingParams(temperature=0.9, seed=5)) == EXPECTED[0]


def test_a_cancellation_that_nobody_asked_for_is_a_lost_connection() -> None:
    """As gRPC answers calls that reach a server on its way out; one with a reason of the service stays what it is."""
    bare = status_pb2.Status(code=grpc.StatusCode.CANCELLED.value[0], message="CANCELLED")
    assert type(from_status(bare)) is ConnectionLostError
    ours = status_of(errors.StepCancelledError("the caller left"))
    assert type(from_status(ours)) is errors.StepCancelledError
