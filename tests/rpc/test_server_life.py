"""The server as a process: health, reflection, metrics, back-pressure, draining, TLS, tokens."""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from speculator.config import Config, ServerConfig
from speculator.core import DrafterCore
from speculator.errors import ConfigError
from speculator.server import Server, check_listening, new_loop, serve
from speculator.v1 import admin_pb2
from speculator.v1 import drafter_pb2 as pb
from tests.fakes import FakeEngine, info, plain
from tests.service import PROMPT, Service, bound, create, details, free_port, plain_channel, reason, serving, until

Code = grpc.StatusCode
Health = health_pb2.HealthCheckResponse
DRAFTER = "speculator.v1.DrafterService"


async def health(channel: grpc.aio.Channel, name: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status


def verify(name: str, base: int) -> pb.VerifyRequest:
    return pb.VerifyRequest(session_id=name, base_length=base, tree=pb.DraftTree())


# ---- health, reflection, admin ----


async def test_health_by_service() -> None:
    async with serving() as s:
        for name in ("", "speculator.v1.DrafterService", "speculator.v1.AdminService"):
            assert await health(s.channel, name) == Health.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(s.channel, "nobody")
        assert caught.value.code() is Code.NOT_FOUND


async def test_health_tells_of_a_dead_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as s:

        def broken() -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(s.core._worker.scheduler, "next_steps", broken)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.stub.CreateSession(create("a"))
        assert reason(caught.value) == "ENGINE_FAILED"
        while await health(s.channel) != Health.NOT_SERVING:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("wanted", ["auto", "off"])
async def test_reflection(wanted: str) -> None:
    async with serving(reflection=wanted) as s:
        stub = reflection_pb2_grpc.ServerReflectionStub(s.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]))
        if wanted == "off":
            with pytest.raises(grpc.aio.AioRpcError):
                await anext(aiter(call))
            return
        names = {service.name async for answer in call for service in answer.list_services_response.service}
        assert {"speculator.v1.DrafterService", "speculator.v1.AdminService", "grpc.health.v1.Health"} <= names


async def test_server_info() -> None:
    async with serving() as s:
        answer = await s.admin.GetServerInfo(admin_pb2.GetServerInfoRequest())
        assert (answer.version, answer.instance_id) == ("0.0.test", "here")
        assert (answer.target_revision, answer.draft_revision) == ("rev", "head-rev")
        assert (answer.target_model, answer.draft_model, answer.draft_method) == ("fake-target", "fake-head", "eagle3")
        assert (answer.vocab_size, list(answer.eos_token_ids)) == (101, [0])
        assert answer.limits == admin_pb2.Limits(
            max_context_length=256, max_tree_nodes=63, max_tree_depth=16, max_batch_items=0, max_sessions=8,
            max_message_bytes=33554432,
        )  # fmt: skip
        assert answer.default_rule == pb.VERIFICATION_RULE_COUPLED
        assert (answer.default_draft.max_depth, answer.default_draft.max_nodes) == (4, 4)


async def test_server_info_says_how_many_ranks_share_what() -> None:
    async with serving(FakeEngine(info(tensor_parallel=2, pipeline_parallel=3))) as s:
        answer = await s.admin.GetServerInfo(admin_pb2.GetServerInfoRequest())
        assert (answer.tensor_parallel_size, answer.pipeline_parallel_size) == (2, 3)


async def test_sessions_are_listed_in_pages() -> None:
    async with serving() as s:
        for name in "abcde":
            await s.stub.CreateSession(create(name))
        found, token = [], ""
        while True:
            answer = await s.admin.ListSessions(admin_pb2.ListSessionsRequest(page_size=2, page_token=token))
            found += [session.session_id for session in answer.sessions]
            token = answer.next_page_token
            if not token:
                break
        assert found == list("abcde")
        with pytest.raises(grpc.aio.AioRpcError):
            await s.admin.ListSessions(admin_pb2.ListSessionsRequest(page_size=-1))


async def test_stats() -> None:
    async with serving() as s:
        await s.stub.CreateSession(create("a"))
        await s.stub.Verify(verify("a", 5))
        answer = await s.admin.GetStats(admin_pb2.GetStatsRequest())
        assert (answer.running_sessions, answer.queued_requests, answer.stats.num_steps) == (1, 0, 1)
        assert answer.stats.num_output_tokens == 2 and 0 < answer.used_kv_blocks <= answer.total_kv_blocks == 699


# ---- metrics ----


def scrape(port: int) -> dict[str, dict[str, float]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        family.name: {
            "|".join([s.name, *(value for _, value in sorted(s.labels.items()))]): s.value for s in family.samples
        }
        for family in text_string_to_metric_families(text)
    }


def output_tokens(found: dict[str, dict[str, float]]) -> float:
    return found.get("speculator_output_tokens", {}).get("speculator_output_tokens_total", 0.0)


async def test_metrics() -> None:
    async with serving(metrics_port=free_port()) as s:
        parts = [p async for p in s.stub.Generate(pb.GenerateRequest(session=create("g", stopping=bound(30))))]
        await s.stub.CreateSession(create("a"))
        with pytest.raises(grpc.aio.AioRpcError):
            await s.stub.Verify(verify("a", 99))
        handled = f"grpc_server_handled_total|ABORTED|Verify|{DRAFTER}|unary"
        found: dict[str, dict[str, float]] = {}
        while (
            handled not in found.get("grpc_server_handled", {}) or output_tokens(found) < 31
        ):  # counted a little later
            found = await asyncio.to_thread(scrape, s.server.metrics_port)
            await asyncio.sleep(0.01)
        stats = parts[-1].stats
        assert found["speculator_steps"] == {"speculator_steps_total": stats.num_steps}
        assert found["speculator_draft_tokens"]["speculator_draft_tokens_total"] == stats.num_draft_tokens
        accepted = found["speculator_accepted_draft_tokens"]["speculator_accepted_draft_tokens_total"]
        assert accepted == stats.num_accepted_draft_tokens
        assert output_tokens(found) == 31
        by_position = found["speculator_accepted_tokens_at_position"]
        assert list(by_position.values()) == list(stats.accepted_at_position)
        assert list(by_position)[0] == "speculator_accepted_tokens_at_position_total|1"
        drafted = found["speculator_drafted_tokens_at_position"]
        assert list(drafted.values()) == list(stats.drafted_at_position)
        steps = found["speculator_step_accepted_tokens"]
        assert steps["speculator_step_accepted_tokens_count"] == stats.num_steps
        assert steps["speculator_step_accepted_tokens_sum"] == stats.num_accepted_draft_tokens
        assert found["speculator_rejected"] == {"speculator_rejected_total|POSITION_MISMATCH": 1}
        assert found["speculator_sessions"] == {"speculator_sessions|active": 1, "speculator_sessions|finished": 0}
        assert sum(found["speculator_kv_blocks"].values()) == 699
        for name in ("queue_seconds", "draft_seconds", "verify_seconds", "batch_size", "build_info"):
            assert found[f"speculator_{name}"]
        calls = found["grpc_server_handled"]
        assert calls[handled] == 1
        assert calls[f"grpc_server_handled_total|OK|CreateSession|{DRAFTER}|unary"] == 1
        assert calls[f"grpc_server_handled_total|OK|Generate|{DRAFTER}|server_stream"] == 1
        assert found["grpc_server_started"][f"grpc_server_started_total|Verify|{DRAFTER}|unary"] == 1
        assert found["grpc_server_handling_seconds"]


async def test_two_servers_in_one_process_keep_their_numbers_apart() -> None:
    async with serving(metrics_port=free_port()) as a, serving(metrics_port=free_port()) as b:
        await a.works()
        assert (await asyncio.to_thread(scrape, a.server.metrics_port))["speculator_steps"]["speculator_steps_total"]
        assert not (await asyncio.to_thread(scrape, b.server.metrics_port))["speculator_steps"][
            "speculator_steps_total"
        ]


# ---- load ----


async def test_ten_times_too_much_work_is_refused_politely() -> None:
    engine = FakeEngine(info(max_rows=64, total_pages=64 * 82 + 1))
    async with serving(engine, max_queued_steps=6) as s:
        engine.gate.clear()
        calls = [asyncio.ensure_future(s.stub.CreateSession(create(f"s{i}"))) for i in range(60)]
        await until(lambda: sum(call.done() for call in calls) == 54)
        assert await health(s.channel) == Health.SERVING, "health answers under overload"
        for call in calls:
            if call.done():
                error = call.exception()
                assert isinstance(error, grpc.aio.AioRpcError) and error.code() is Code.RESOURCE_EXHAUSTED
                assert {"ErrorInfo", "RetryInfo"} <= set(details(error))
                assert any(key == "grpc-retry-pushback-ms" for key, _ in error.trailing_metadata())
        engine.gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(answer, pb.CreateSessionResponse) for answer in answers) == 6
        assert s.core.totals.rejected == {"SERVER_FULL": 54}
        await s.works()


async def test_idle_streams_take_no_work_place() -> None:
    async with serving(max_queued_steps=2) as s:
        streams = [s.stub.Draft() for _ in range(10)]
        await until(lambda: len(s.server._drafter.streams) == 10)
        await s.works()
        for stream in streams:
            stream.cancel()


# ---- draining ----


async def loop(s: Service, name: str, heard: list[int]) -> grpc.aio.AioRpcError:
    """Steps until the server refuses; keeps what it was told was committed."""
    created = await s.stub.CreateSession(create(name, stopping=bound(240)))
    heard.append(created.next_token_id)
    while True:
        try:
            answer = await s.stub.Verify(verify(name, len(PROMPT) + len(heard)))
        except grpc.aio.AioRpcError as error:
            return error
        heard += answer.committed_token_ids


async def test_draining_under_load_loses_nothing() -> None:
    engine = FakeEngine()
    engine.delay = 0.002
    async with serving(engine, drain_grace_s=0.3) as s:
        texts: list[list[int]] = [[] for _ in range(6)]
        clients = [asyncio.ensure_future(loop(s, f"s{i}", text)) for i, text in enumerate(texts)]
        stream = s.stub.Draft()
        await stream.write(pb.DraftRequest(correlation_id=1, create_session=create("on-stream")))
        assert (await stream.read()).HasField("create_session")
        await until(lambda: all(len(text) > 3 for text in texts))
        draining = asyncio.ensure_future(s.server.drain())
        notice = await stream.read()
        assert notice.correlation_id == 0 and notice.HasField("draining")
        assert await health(s.channel) == Health.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await s.stub.CreateSession(create("new"))
        assert (refused.value.code(), reason(refused.value)) == (Code.UNAVAILABLE, "DRAINING")
        await stream.write(pb.DraftRequest(correlation_id=2, verify=verify("on-stream", 5)))
        assert (await stream.read()).verify.committed_length == 6, "open sessions go on for the grace"
        await draining
        assert await stream.code() is Code.UNAVAILABLE
        for text, ended in zip(texts, await asyncio.gather(*clients), strict=True):
            assert ended.code() is Code.UNAVAILABLE
            assert text == plain(PROMPT, len(text)), "every commit was heard of, in order"
        committed = {name: len(session.tokens) for name, session in s.core._worker.scheduler.sessions.items()}
        for i, text in enumerate(texts):
            assert committed[f"s{i}"] == len(PROMPT) + len(text), "nothing was committed that nobody heard of"


async def test_a_step_that_outlasts_the_grace_is_still_answered() -> None:
    async with serving(drain_grace_s=0.05) as s:
        await s.stub.CreateSession(create("a"))
        s.engine.gate.clear()
        s.engine.entered.clear()
        last = asyncio.ensure_future(s.stub.Verify(verify("a", 5)))
        await asyncio.to_thread(s.engine.entered.wait)
        draining = asyncio.ensure_future(s.server.drain())
        await asyncio.sleep(1.5)  # more than the grace and all that follows it
        s.engine.gate.set()
        assert (await last).committed_length == 6
        await draining


async def test_a_generation_longer_than_the_grace_is_ended_and_can_go_on_elsewhere() -> None:
    engine = FakeEngine(info(max_context=4096, total_pages=1200))
    engine.delay = 0.01
    async with serving(engine, drain_grace_s=0.3) as s:
        call = s.stub.Generate(pb.GenerateRequest(session=create("a", stopping=bound(4000))))
        steps, tokens = aiter(call), list[int]()
        tokens += (await anext(steps)).token_ids
        draining = asyncio.create_task(s.server.drain())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for step in steps:
                tokens += step.token_ids
        assert (caught.value.code(), reason(caught.value)) == (Code.UNAVAILABLE, "DRAINING")
        await asyncio.wait_for(draining, 10)
        assert tokens == plain(PROMPT, len(tokens)) and 1 < len(tokens) < 4000


async def test_an_idle_server_drains_at_once() -> None:
    async with serving(drain_grace_s=60) as s:
        await asyncio.wait_for(s.server.drain(), 10)


async def test_serve_ends_on_sigterm() -> None:
    ports: list[int] = []
    config = Config(server=ServerConfig(port=0, metrics_port=0, drain_grace_s=5))
    running = asyncio.create_task(
        serve(DrafterCore(FakeEngine()), config, ready=lambda server: ports.append(server.port))
    )
    await until(lambda: bool(ports))
    async with plain_channel(ports[0]) as channel:
        assert await health(channel) == Health.SERVING
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 10)
        with pytest.raises(grpc.aio.AioRpcError):
            await health(channel)


async def test_a_taken_port_is_a_clear_error() -> None:
    async with serving() as s:
        other = Server(DrafterCore(FakeEngine()), ServerConfig(port=s.server.port, metrics_port=0))
        with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1"):
            await other.start()
        await other.stop()


async def test_a_taken_metrics_port_is_a_clear_error() -> None:
    async with serving(metrics_port=free_port()) as s:
        config = ServerConfig(port=0, metrics_port=s.server.metrics_port)
        other = Server(DrafterCore(FakeEngine()), config)
        with pytest.raises(ConfigError, match="metrics"):
            await other.start()
        await other.stop()


def test_what_cannot_work_is_known_before_models_are_loaded(tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            check_listening(ServerConfig(**{"port": 0, "metrics_port": 0, **options}))

    check_listening(ServerConfig(port=0, metrics_port=0))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(rf"cannot listen on 127.0.0.1:{port} \(server.port\): Address already in use", port=port)
        refused(r"\(server.metrics_port\): Address already in use", metrics_port=port)
    refused("server.host no host is no address and no name", host="no host", insecure=True)
    junk = tmp_path / "junk.pem"
    junk.write_bytes(b"\xff\xfe")
    refused("token file .*junk.pem cannot be read as UTF-8 text", token_file=str(junk))
    refused("tls_cert .*junk.pem and .* cannot be used", tls_cert=str(junk), tls_key=str(junk))


def test_files_of_another_certificate_are_named(authority: Authority) -> None:
    (cert, key), (_, other) = authority.issue("server"), authority.issue("other")
    tls = {"port": 0, "metrics_port": 0, "tls_cert": cert}
    check_listening(ServerConfig(**tls, tls_key=key, tls_client_ca=authority.file))
    with pytest.raises(ConfigError, match="other.key cannot be used: .*MISMATCH"):
        check_listening(ServerConfig(**tls, tls_key=other))
    with pytest.raises(ConfigError, match="tls_client_ca .*server.key cannot be used"):
        check_listening(ServerConfig(**tls, tls_key=key, tls_client_ca=key))


def test_the_loop_is_as_configured() -> None:
    for choice in ("auto", "off", "on"):
        made = new_loop(ServerConfig(uvloop=choice))
        assert ("uvloop" in type(made).__module__) == (choice != "off")
        made.close()


# ---- who may call ----


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "tokens"
    path.write_text("# two callers\nalpha-secret\n\n  beta-secret  \n")
    return str(path)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_calls_need_a_token_and_health_does_not(token_file: str) -> None:
    async with serving(token_file=token_file) as s:
        assert await health(s.channel) == Health.SERVING
        wrong = [(), bearer("gamma"), bearer(""), (("authorization", "alpha-secret"),), bearer("alpha-secre")]
        for metadata in wrong:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await s.stub.CreateSession(create("a"), metadata=metadata)
            assert (caught.value.code(), reason(caught.value)) == (Code.UNAUTHENTICATED, "UNAUTHENTICATED")
        stream = s.stub.Draft(metadata=bearer("gamma"))
        assert await stream.code() is Code.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as admin:
            await s.admin.GetStats(admin_pb2.GetStatsRequest())
        assert admin.value.code() is Code.UNAUTHENTICATED
        for token in ("alpha-secret", "beta-secret"):
            await s.stub.CreateSession(create(token), metadata=bearer(token))


async def test_calls_without_a_token_are_counted(token_file: str) -> None:
    async with serving(token_file=token_file, metrics_port=free_port()) as s:
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError):
                await s.stub.CreateSession(create("a"), metadata=bearer("gamma"))
        assert await s.stub.Draft(metadata=bearer("gamma")).code() is Code.UNAUTHENTICATED
        nothing = s.channel.unary_unary("/speculator.v1.DrafterService/Nothing")
        with pytest.raises(grpc.aio.AioRpcError):
            await nothing(b"")
        calls = (await asyncio.to_thread(scrape, s.server.metrics_port))["grpc_server_handled"]
        refused = {label.split("|")[2]: n for label, n in calls.items() if label.split("|")[1] == "UNAUTHENTICATED"}
        assert refused == {"CreateSession": 2, "Draft": 1}


async def test_sessions_belong_to_their_token(token_file: str) -> None:
    async with serving(token_file=token_file) as s:
        await s.stub.CreateSession(create("a"), metadata=bearer("alpha-secret"))
        name = pb.GetSessionRequest(session_id="a")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.stub.GetSession(name, metadata=bearer("beta-secret"))
        assert (caught.value.code(), reason(caught.value)) == (Code.PERMISSION_DENIED, "SESSION_OF_ANOTHER_CALLER")
        with pytest.raises(grpc.aio.AioRpcError):
            await s.stub.DeleteSession(pb.DeleteSessionRequest(session_id="a"), metadata=bearer("beta-secret"))
        listed = await s.admin.ListSessions(admin_pb2.ListSessionsRequest(), metadata=bearer("beta-secret"))
        assert not listed.sessions
        stream = s.stub.Draft(metadata=bearer("beta-secret"))
        await stream.write(pb.DraftRequest(correlation_id=1, verify=verify("a", 5)))
        assert reason((await stream.read()).status) == "SESSION_OF_ANOTHER_CALLER"
        stream.cancel()
        assert (await s.stub.GetSession(name, metadata=bearer("alpha-secret"))).session.committed_length == 5


async def test_secrets_are_not_logged(token_file: str, caplog: pytest.LogCaptureFixture) -> None:
    # only ours: at DEBUG, grpcio logs a server that was never started from its own destructor, which frees it twice
    caplog.set_level("DEBUG", logger="speculator")
    async with serving(token_file=token_file) as s:
        await s.stub.CreateSession(create("a"), metadata=bearer("alpha-secret"))
        with pytest.raises(grpc.aio.AioRpcError):
            await s.stub.CreateSession(create("b"), metadata=bearer("wrong-secret"))
    assert "secret" not in caplog.text


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("# nobody\n")
    config = ServerConfig(port=0, metrics_port=0, token_file=str(tmp_path / "tokens"))
    with pytest.raises(ConfigError, match="holds no token"):
        Server(DrafterCore(FakeEngine()), config)


# ---- TLS ----


class Authority:
    """A certificate authority that lives for one test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {folder.name}")])
        self.certificate = self._sign(self._name, self._key.public_key(), ca=True)
        self.file = self._write("ca.pem", self.pem)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, common_name: str) -> tuple[str, str]:
        """Paths of a certificate for localhost and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        certificate = self._sign(name, key.public_key(), ca=False).public_bytes(serialization.Encoding.PEM)
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        secret = self._write(f"{common_name}.key", key.private_bytes(*form))
        return self._write(f"{common_name}.pem", certificate), secret

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePublicKey, ca: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(self._name, name, key, x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(hours=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name: str, data: bytes) -> str:
        (self._folder / name).write_bytes(data)
        return str(self._folder / name)


@pytest.fixture
def authority(tmp_path: Path) -> Iterator[Authority]:
    (tmp_path / "one").mkdir()
    yield Authority(tmp_path / "one")


def secure(root: bytes, pair: tuple[str, str] | None = None):
    def connect(port: int) -> grpc.aio.Channel:
        key, chain = (Path(pair[1]).read_bytes(), Path(pair[0]).read_bytes()) if pair else (None, None)
        trust = grpc.ssl_channel_credentials(root, key, chain)
        return grpc.aio.secure_channel(f"localhost:{port}", trust, options=[("grpc.use_local_subchannel_pool", 1)])

    return connect


async def test_tls(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    (tmp_path / "two").mkdir()
    stranger = Authority(tmp_path / "two")
    async with serving(host="localhost", tls_cert=cert, tls_key=key, connect=secure(authority.pem)) as s:
        await s.works()
        async with plain_channel(s.server.port) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await health(channel)
        async with secure(stranger.pem)(s.server.port) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health(channel)
            assert caught.value.code() is Code.UNAVAILABLE


async def test_mutual_tls_names_the_caller(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    anna, ben = authority.issue("anna"), authority.issue("ben")
    (tmp_path / "two").mkdir()
    mallory = Authority(tmp_path / "two").issue("anna")
    options = {"host": "localhost", "tls_cert": cert, "tls_key": key, "tls_client_ca": authority.file}
    async with serving(connect=secure(authority.pem, anna), **options) as s:
        await s.stub.CreateSession(create("a"))
        for pair in (None, mallory):
            async with secure(authority.pem, pair)(s.server.port) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await health(channel)
                assert caught.value.code() is Code.UNAVAILABLE
        async with secure(authority.pem, ben)(s.server.port) as channel:
            other = Service(s.engine, s.core, s.server, channel)
            with pytest.raises(grpc.aio.AioRpcError) as denied:
                await other.stub.GetSession(pb.GetSessionRequest(session_id="a"))
            assert denied.value.code() is Code.PERMISSION_DENIED
        await s.stub.GetSession(pb.GetSessionRequest(session_id="a"))


def test_another_address_needs_tls_or_a_word() -> None:
    with pytest.raises(ConfigError, match="insecure"):
        ServerConfig(host="0.0.0.0")
    ServerConfig(host="0.0.0.0", insecure=True)


async def test_metrics_say_which_passes_were_replayed() -> None:
    async with serving(metrics_port=free_port()) as s:
        s.engine.passes_run = lambda: {"target verify": (7, 2)}
        found = await asyncio.to_thread(scrape, s.server.metrics_port)
        assert found["speculator_passes"] == {
            "speculator_passes_total|replayed|target verify": 7.0,
            "speculator_passes_total|eager|target verify": 2.0,
        }
