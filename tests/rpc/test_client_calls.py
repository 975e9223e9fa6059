"""The client against a real server with a fake engine: calls, sessions, streams, generation, errors, security."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from speculator import errors
from speculator.client import (
    AsyncClient,
    Client,
    ConnectionLostError,
    Distribution,
    Draft,
    FinishReason,
    Rule,
    Sampling,
    SessionState,
    Shape,
    Stopping,
    Tls,
    read_token,
)
from speculator.config import ServerConfig
from speculator.types import SamplingParams
from tests.fakes import INFO, FakeTokenizer, info, next_token, plain
from tests.rpc.client_hosts import Host, proxied

PROMPT = (3, 1, 4, 1, 5)
TEN = Stopping(max_new_tokens=10)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def client(host: Host) -> Iterator[Client]:
    with Client(host.address, timeout=10.0, patience=5.0) as client:
        yield client
        assert_nothing_held(host)


def assert_nothing_held(host: Host) -> None:
    """Every session that a test opened is closed, and rows and pages are back."""
    end = time.monotonic() + 5
    while (usage := host.core.usage()).active and time.monotonic() < end:
        time.sleep(0.01)
    assert (usage.active, usage.queued, usage.used_pages, usage.reserved_pages) == (0, 0, 0, 0)


# ---- calls


def test_each_call_gives_a_typed_answer(client: Client) -> None:
    created = client.create(PROMPT, session_id="typed", stopping=TEN)
    expected = plain(PROMPT, 10)
    assert isinstance(created.session, SessionState)
    assert (created.next_token, created.session.length, created.replayed) == (expected[0], 6, False)
    assert client.create(PROMPT, session_id="typed", stopping=TEN).replayed

    proposed = client.propose("typed", 6, Shape(depth=3))
    assert (proposed.base_length, len(proposed.draft.tokens), proposed.draft.parents) == (6, 3, (-1, 0, 1))
    assert len(proposed.draft.logprobs) == 3
    verified = client.verify("typed", 6, proposed.draft, Shape())
    assert list(verified.tokens) == expected[1 : 1 + len(verified.tokens)]
    assert len(verified.tokens) == len(verified.accepted) + 1 == len(verified.logprobs)
    assert (verified.rule, verified.finish, verified.replayed) == (Rule.COUPLED, FinishReason.RUNNING, False)
    assert verified.next_draft is not None and verified.next_draft.base_length == verified.length
    assert client.verify("typed", 6, proposed.draft, Shape()).replayed

    extended = client.extend("typed", verified.length, [9, 9])
    assert (extended.length, extended.next_draft) == (verified.length + 2, None)
    state = client.get("typed", tokens=True)
    assert state.tokens == (*PROMPT, expected[0], *verified.tokens, 9, 9)
    assert state.expires_at > time.time()
    assert client.delete("typed").rounds == 1
    assert client.delete("typed").rounds == 0  # nothing there is no error


def test_a_tree_and_its_distributions_reach_the_server(client: Client) -> None:
    first = client.create(PROMPT, session_id="tree", stopping=TEN).next_token
    assert first is not None
    right = next_token([*PROMPT, first], SamplingParams())
    wrong = 1 + right % 100
    q = tuple(Distribution((token, 100 - token), (-0.6931472, -0.6931472)) for token in (wrong, right))
    verified = client.verify("tree", 6, Draft((wrong, right), (-1, -1), q=q))
    assert verified.accepted == (1,)
    assert verified.tokens[0] == right
    half = (Distribution((wrong, right), (-0.6931472, -3.0)),)
    with pytest.raises(errors.InvalidTreeError, match="sums to"):
        client.verify("tree", verified.length, Draft((wrong,), (-1,), q=half))
    client.delete("tree")


def test_server_info_and_stats(host: Host, client: Client) -> None:
    about = client.server_info()
    assert (about.target_model, about.vocab_size, about.eos_token_ids) == (INFO.target_model, INFO.vocab_size, (0,))
    assert about.limits.nodes == INFO.max_nodes
    assert about.default_shape.depth == 4
    before = client.stats()
    with client.session(PROMPT, stopping=TEN) as session:
        list(session)
    after = client.stats()
    assert after.stats.output_tokens - before.stats.output_tokens == 10
    assert after.total_kv_blocks == INFO.total_pages - 1


def test_a_repeated_create_is_one_session(host: Host) -> None:
    with proxied(host) as proxy, Client(proxy.address, timeout=10) as client:
        client.server_info()  # connected
        proxy.mute.set()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.create, PROMPT, stopping=TEN)
            end = time.monotonic() + 5
            while (host.core.in_flight or not host.core.usage().active) and time.monotonic() < end:
                time.sleep(0.01)
            proxy.mute.clear()
            proxy.cut()
            created = asked.result(10)
        assert created.replayed  # gRPC asked again by itself
        assert host.core.usage().active == 1
        client.delete(created.session.session_id)


def test_prefill_only_has_no_next_token(client: Client) -> None:
    assert client.create(PROMPT, session_id="prefilled", prefill_only=True).next_token is None
    assert client.get("prefilled").length == len(PROMPT)
    client.delete("prefilled")


# ---- sessions


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, SamplingParams()),
        ({"shape": Shape(depth=2)}, SamplingParams()),
        ({"shape": Shape(depth=3, branching=2, nodes=6)}, SamplingParams()),
        ({"shape": Shape(parents=(-1, -1, 0, 1))}, SamplingParams()),
        ({"shape": Shape(depth=0)}, SamplingParams()),
        ({"speculate": False}, SamplingParams()),
        ({"sampling": Sampling(temperature=0.7, seed=11)}, SamplingParams(temperature=0.7, seed=11)),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_session_says_what_plain_decoding_says(client: Client, options: dict, sampling, streamed: bool) -> None:
    with (
        client.draft_stream() as stream,
        (stream if streamed else client).session(PROMPT, stopping=Stopping(max_new_tokens=40), **options) as session,
    ):
        rounds = list(session)
        assert list(session.output) == plain(PROMPT, 40, sampling)
        assert [token for part in rounds for token in part.tokens] == list(session.output)
        assert session.tokens == (*PROMPT, *session.output)
        assert session.finish is FinishReason.LENGTH
        assert (session.resumes, rounds[0].accepted, len(rounds[0].tokens)) == (0, 0, 1)
        with pytest.raises(errors.SessionFinishedError):
            session.step()


def test_a_session_counts_as_its_server_does(client: Client) -> None:
    with client.session(PROMPT, stopping=Stopping(max_new_tokens=60)) as session:
        list(session)
        theirs = client.get(session.session_id).stats
        assert session.stats == theirs
        assert theirs.accept_length == pytest.approx(1 + theirs.accepted_tokens / theirs.rounds)
        assert 0 < theirs.rates[0] <= 1 and len(theirs.rates) == 4


def test_a_stop_inside_a_draft_counts_as_its_server_counts_it(host: Host, client: Client) -> None:
    try:
        for end in range(10, 18):
            host.engine.eos_after = {end}
            with client.session(PROMPT) as session:
                list(session)
                assert (session.finish, session.output[-1]) == (FinishReason.STOP, 0)
                assert session.stats == client.get(session.session_id).stats
    finally:
        host.engine.eos_after = set()


def test_a_session_opens_on_text_and_knows_its_tokens(client: Client) -> None:
    ids = FakeTokenizer().encode("hello")
    with client.session("hello", stopping=TEN) as session:
        list(session)
        assert session.tokens == (*ids, *plain(ids, 10))


def test_a_session_verifies_drafts_of_its_own_and_proposed_ones(client: Client) -> None:
    expected = plain(PROMPT, 40)
    with client.session(PROMPT, stopping=Stopping(max_new_tokens=40)) as session:
        assert session.step().tokens == (expected[0],)
        mine = session.verify(Draft(tuple(expected[1:4]), (-1, 0, 1)))
        assert (mine.accepted, mine.tokens) == (3, tuple(expected[1:5]))
        proposed = session.propose(Shape(depth=2))
        theirs = session.verify(proposed.draft, Shape())
        assert list(theirs.tokens) == expected[5 : 5 + len(theirs.tokens)]
        list(session)
        assert list(session.output) == expected


def test_a_caller_may_decide_what_is_committed(client: Client) -> None:
    with client.session(PROMPT, prefill_only=True, stopping=TEN) as session:
        draft = session.propose().draft
        assert draft.tokens and session.output == ()
        assert session.extend([7, 8]) is FinishReason.RUNNING
        assert session.step().tokens[0] == next_token([*PROMPT, 7, 8], SamplingParams())
        assert session.output[:2] == (7, 8)


# ---- the stream


def test_many_sessions_share_a_stream(client: Client) -> None:
    prompts = [(n + 1, *PROMPT) for n in range(INFO.max_rows)]
    with client.draft_stream() as stream, ThreadPoolExecutor(len(prompts)) as pool:

        def speak(prompt: tuple[int, ...]) -> list[int]:
            with stream.session(prompt, stopping=Stopping(max_new_tokens=30)) as session:
                list(session)
                return list(session.output)

        assert list(pool.map(speak, prompts)) == [plain(prompt, 30) for prompt in prompts]


def test_an_item_that_fails_leaves_the_stream_alone(client: Client) -> None:
    with client.draft_stream() as stream:
        with pytest.raises(errors.SessionNotFoundError):
            stream.propose("nobody", 3)
        with pytest.raises(errors.InvalidArgumentError):
            stream.create([999])
        assert stream.create(PROMPT, session_id="fine").session.length == 6
        assert stream.delete("fine").output_tokens == 1


def test_an_item_that_takes_too_long_leaves_the_stream_alone(host: Host, client: Client) -> None:
    with client.draft_stream() as stream:
        stream.create(PROMPT, session_id="slow")
        host.engine.gate.clear()
        with pytest.raises(errors.DeadlineExceededError):
            stream.propose("slow", 6, timeout=0.1)
        host.engine.gate.set()
        assert retry_busy(lambda: stream.propose("slow", 6)).base_length == 6
        stream.delete("slow")


def test_a_server_that_says_nothing_at_all(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speculator.client.stream.SLACK", 0.05)
    with proxied(host) as proxy, Client(proxy.address) as client, client.draft_stream() as stream:
        stream.create(PROMPT, session_id="silent")
        proxy.mute.set()
        with pytest.raises(errors.DeadlineExceededError):
            stream.propose("silent", 6, timeout=0.05)
        assert not stream._open().pending.items
        proxy.mute.clear()
        assert retry_busy(lambda: stream.propose("silent", 6)).base_length == 6
        stream.delete("silent")


def test_a_call_that_takes_too_long(host: Host, client: Client) -> None:
    client.create(PROMPT, session_id="late")
    host.engine.gate.clear()
    with pytest.raises(errors.DeadlineExceededError):
        client.propose("late", 6, timeout=0.1)
    host.engine.gate.set()
    client.delete("late")


def retry_busy(ask):
    for _ in range(100):
        try:
            return ask()
        except errors.SessionBusyError:
            time.sleep(0.02)
    raise AssertionError("the session stays busy")


def test_a_closed_stream_fails_what_waits(host: Host, client: Client) -> None:
    stream = client.draft_stream()
    stream.create(PROMPT, session_id="waiting")
    host.engine.gate.clear()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            stream.propose("waiting", 6)
        except errors.SpeculatorError as error:
            caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    host.engine.entered.clear()
    host.engine.entered.wait(5)
    stream.close()
    waiter.join(5)
    host.engine.gate.set()
    assert [type(error) for error in caught] == [errors.StepCancelledError]
    client.delete("waiting")


# ---- generation


@pytest.mark.parametrize("speculate", [True, False])
def test_generate(client: Client, speculate: bool) -> None:
    chunks = list(client.generate(PROMPT, stopping=Stopping(max_new_tokens=30), speculate=speculate))
    assert [token for chunk in chunks for token in chunk.tokens] == plain(PROMPT, 30)
    assert chunks[0].session is not None and chunks[-1].stats is not None
    assert chunks[-1].finish is FinishReason.LENGTH
    assert any(chunk.accepted for chunk in chunks) is speculate
    assert chunks[-1].stats.accepted_tokens == sum(chunk.accepted for chunk in chunks)


def test_generate_from_text_streams_text(client: Client) -> None:
    chunks = list(client.generate("hi", stopping=Stopping(max_new_tokens=30)))
    ids = [token for chunk in chunks for token in chunk.tokens]
    assert "".join(chunk.text for chunk in chunks) == FakeTokenizer().decode(ids)


def test_leaving_a_generation_frees_its_session(host: Host, client: Client) -> None:
    chunks = client.generate(PROMPT, stopping=Stopping(max_new_tokens=200))
    assert list(itertools.islice(chunks, 2))
    chunks.close()
    assert_nothing_held(host)


# ---- errors


def wrong(client: Client, what: str) -> None:
    calls = {
        "token": lambda: client.create([5, 101]),
        "negative": lambda: client.create([5, -1]),
        "words": lambda: client.create(["five"]),  # type: ignore[list-item]
        "empty": lambda: client.create([]),
        "lone surrogate": lambda: client.create("\ud800"),
        "long": lambda: client.create([1] * 300),
        "temperature": lambda: client.create(PROMPT, sampling=Sampling(temperature=-1.0)),
        "parent": lambda: client.verify("errors", 6, Draft((1, 2), (-1, 1))),
        "stale": lambda: client.verify("errors", 3, Draft()),
        "draft": lambda: client.verify("errors", 6, 77),
        "unknown": lambda: client.propose("nobody", 6),
        "taken": lambda: client.create((9, *PROMPT), session_id="errors"),
        "idle": lambda: client.create(PROMPT, idle_timeout=float("inf")),
        "huge": lambda: client.create([1] * (9 << 20)),
    }
    calls[what]()


@pytest.mark.parametrize(
    ("what", "kind", "field"),
    [
        ("token", errors.InvalidArgumentError, "token_ids[1]"),
        ("negative", errors.InvalidArgumentError, ""),
        ("words", errors.InvalidArgumentError, ""),
        ("empty", errors.InvalidArgumentError, "token_ids"),
        ("lone surrogate", errors.InvalidArgumentError, ""),
        ("long", errors.PromptTooLongError, "token_ids"),
        ("temperature", errors.InvalidArgumentError, "sampling.temperature"),
        ("parent", errors.InvalidTreeError, "tree.parent_indices[1]"),
        ("stale", errors.PositionMismatchError, None),
        ("draft", errors.DraftNotFoundError, None),
        ("unknown", errors.SessionNotFoundError, None),
        ("taken", errors.SessionExistsError, None),
        ("idle", errors.InvalidArgumentError, ""),
    ],
)
def test_wrong_input_raises_its_own_error(client: Client, what: str, kind: type, field: str | None) -> None:
    client.create(PROMPT, session_id="errors")
    with pytest.raises(errors.SpeculatorError) as caught:
        wrong(client, what)
    assert type(caught.value) is kind
    assert caught.value.message
    if isinstance(caught.value, errors.InvalidArgumentError):
        assert caught.value.field == field
    if isinstance(caught.value, errors.PositionMismatchError):
        assert caught.value.metadata["committed_length"] == "6"
    assert client.get("errors").length == 6  # the server goes on
    client.delete("errors")


def test_a_message_beyond_the_limit(host: Host) -> None:
    with (
        Client(host.address, max_message_bytes=2000) as client,
        pytest.raises(errors.InvalidArgumentError, match="large"),
    ):
        client.create([1] * 5000)
    with Host(config=ServerConfig(port=0, metrics_port=0, max_message_bytes=2000)) as small:
        with Client(small.address) as client, pytest.raises(errors.InvalidArgumentError, match="large"):
            client.create([1] * 5000)


def test_nobody_listens() -> None:
    with Client("127.0.0.1:1", patience=0.0, timeout=2.0) as client:
        with pytest.raises(ConnectionLostError):
            client.create(PROMPT)
        with pytest.raises(ConnectionLostError, match="127.0.0.1:1"):
            client.wait_ready(0.1)
        with pytest.raises(ConnectionLostError):
            list(client.generate(PROMPT))
        with client.draft_stream() as stream, pytest.raises(ConnectionLostError):
            stream.create(PROMPT)


def test_a_full_server_is_asked_again_when_it_says() -> None:
    with Host(info(max_rows=1)) as host, Client(host.address, timeout=10.0) as client:
        client.create(PROMPT, session_id="first")
        threading.Timer(0.2, client.delete, ("first",)).start()
        assert client.create(PROMPT, session_id="second").session.length == 6


def test_a_full_server_raises_in_the_end() -> None:
    with Host(info(max_rows=1)) as host, Client(host.address, patience=0.3) as client:
        client.create(PROMPT, session_id="first")
        with client.draft_stream() as stream, pytest.raises(errors.ServerFullError) as caught:
            stream.session(PROMPT).step()
        assert caught.value.retry_after == 0.5


# ---- security


def test_bearer_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# who may call\nsesame\n")
    with Host(config=ServerConfig(port=0, metrics_port=0, token_file=str(file))) as host:
        with Client(host.address, token=read_token(file)) as client, client.draft_stream() as stream:
            assert client.server_info().vocab_size == INFO.vocab_size
            assert stream.create(PROMPT).session.length == 6
            assert list(client.generate(PROMPT, stopping=TEN))[-1].finish is FinishReason.LENGTH
        with Client(host.address, token="wrong") as client, client.draft_stream() as stream:
            for ask in (client.server_info, lambda: stream.create(PROMPT), lambda: list(client.generate(PROMPT))):
                with pytest.raises(errors.UnauthenticatedError):
                    ask()


def test_tls(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    files = {name: str(tmp_path / f"{name}.pem") for name in ("ca", "cert", "key")}
    config = ServerConfig(
        port=0, metrics_port=0, tls_cert=files["cert"], tls_key=files["key"], tls_client_ca=files["ca"]
    )
    with Host(config=config) as host:
        with Client(host.address, tls=Tls(**files, server_name="localhost")) as client:
            assert client.create(PROMPT).session.length == 6
        with Client(host.address, tls=Tls(ca=files["ca"], server_name="localhost"), timeout=3.0) as client:
            with pytest.raises(ConnectionLostError):  # it does not say who it is
                client.create(PROMPT)


def test_missing_files_are_named() -> None:
    with pytest.raises(errors.ConfigError, match="/nowhere/ca.pem"):
        Client(tls=Tls(ca="/nowhere/ca.pem"))
    with pytest.raises(errors.ConfigError, match="test_client_calls.py is no PEM file"):
        Client(tls=Tls(ca=__file__))
    with pytest.raises(errors.ConfigError, match="both or neither"):
        Tls(cert="cert.pem")


def make_certificates(folder: Path) -> None:
    """ca.pem, and cert.pem with key.pem for localhost signed by it, good for servers and clients."""
    import datetime

    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text: str):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def build(subject: str, key, issuer_key, ca: bool):
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("test ca"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(issuer_key, hashes.SHA256())
        )

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(build("test ca", ca_key, ca_key, True).public_bytes(pem))
    (folder / "cert.pem").write_bytes(build("localhost", key, ca_key, False).public_bytes(pem))
    form, lock = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, form, lock))


# ---- the asyncio twin


async def test_the_async_client_does_the_same(host: Host) -> None:
    async with AsyncClient(host.address, timeout=10.0) as client:
        await client.wait_ready()
        assert (await client.server_info()).vocab_size == INFO.vocab_size
        created = await client.create(PROMPT, session_id="async", stopping=TEN)
        proposed = await client.propose("async", created.session.length)
        verified = await client.verify("async", 6, proposed.draft, Shape())
        extended = await client.extend("async", verified.length, [9])
        assert (await client.get("async", tokens=True)).length == extended.length
        await client.delete("async")
        assert (await client.stats()).running_sessions == 0
        chunks = [chunk async for chunk in client.generate(PROMPT, stopping=TEN)]
        assert [token for chunk in chunks for token in chunk.tokens] == plain(PROMPT, 10)
        with pytest.raises(errors.SessionNotFoundError):
            await client.propose("async", 6)


async def test_async_sessions_share_a_stream(host: Host) -> None:
    prompts = [(n + 1, *PROMPT) for n in range(INFO.max_rows)]
    async with AsyncClient(host.address, timeout=10.0) as client, client.draft_stream() as stream:

        async def speak(prompt: tuple[int, ...]) -> list[int]:
            async with stream.session(prompt, stopping=Stopping(max_new_tokens=30)) as session:
                async for _ in session:
                    pass
                return list(session.output)

        spoken = await asyncio.gather(*(speak(prompt) for prompt in prompts))
        assert spoken == [plain(prompt, 30) for prompt in prompts]
    assert_nothing_held(host)


async def test_cancelling_one_waiter_leaves_the_async_stream_alone(host: Host) -> None:
    async with AsyncClient(host.address, timeout=10.0) as client, client.draft_stream() as stream:
        await stream.create(PROMPT, session_id="given-up")
        host.engine.gate.clear()
        waiter = asyncio.create_task(stream.propose("given-up", 6))
        await asyncio.sleep(0.05)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        with pytest.raises(errors.DeadlineExceededError):
            await stream.propose("given-up", 6, timeout=0.1)
        host.engine.gate.set()
        await stream.delete("given-up")
        assert (await stream.create(PROMPT, session_id="after")).session.length == 6
        await stream.delete("after")


async def test_async_nobody_listens() -> None:
    async with AsyncClient("127.0.0.1:1", patience=0.0, timeout=2.0) as client:
        with pytest.raises(ConnectionLostError):
            await client.create(PROMPT)
        with pytest.raises(ConnectionLostError):
            await client.wait_ready(0.1)
        with pytest.raises(ConnectionLostError):
            [chunk async for chunk in client.generate(PROMPT)]
        async with client.draft_stream() as stream:
            with pytest.raises(ConnectionLostError):
                await stream.create(PROMPT)


def test_grpc_itself_is_not_what_callers_catch(host: Host) -> None:
    with Client(host.address) as client, pytest.raises(errors.SpeculatorError) as caught:
        client.get("nobody")
    assert not isinstance(caught.value, grpc.RpcError)
