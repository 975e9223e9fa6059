"""The gRPC face of the service: it only translates.

Owns: methods, limits of the transport, health, draining. Must never import torch, hold session state, or make a
decision that a caller without gRPC would need too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from speculator.config import Config, ServerConfig
from speculator.core import DrafterCore
from speculator.errors import ConfigError, DrainingError, InvalidArgumentError, SpeculatorError
from speculator.metrics import Call, CallMetrics, MetricsServer, ServiceMetrics
from speculator.security import Callers, Continuation, Guard, Handler, Tokens, credentials
from speculator.session import SessionSpec
from speculator.status import abort
from speculator.stream import Context, DraftStream, Malformed
from speculator.text import TextStream, Tokenizer
from speculator.translate import (
    RULES_OUT,
    About,
    extend_job,
    fill_created,
    fill_deleted,
    fill_extended,
    fill_proposed,
    fill_verified,
    generated_pb,
    propose_job,
    session_pb,
    shape_pb,
    spec_of,
    stats_pb,
    verify_job,
)
from speculator.types import SamplingParams
from speculator.v1 import admin_pb2, admin_pb2_grpc, drafter_pb2_grpc
from speculator.v1 import drafter_pb2 as pb

log = logging.getLogger(__name__)

SCHEMA_REVISION = 3
MINIMUM_CLIENT_REVISION = 1
SERVICES = ("speculator.v1.DrafterService", "speculator.v1.AdminService")
LONG_TEXT = 4096  # characters from which tokenizing leaves the event loop
MAX_PAGE = 500
LINGER = 0.1  # seconds of saying why, before the listener goes: a call caught by that hears no reason
Message = TypeVar("Message")


# ---- methods ----


class Drafter(drafter_pb2_grpc.DrafterServiceServicer):
    """DrafterService over a DrafterCore."""

    def __init__(
        self,
        core: DrafterCore,
        about: About,
        callers: Callers,
        tokenizer: Tokenizer | None,
        defaults: SamplingParams,
    ) -> None:
        self._core, self._about, self._callers = core, about, callers
        self._tokenizer, self._defaults = tokenizer, defaults
        self.streams: set[DraftStream] = set()
        self._leaving: SpeculatorError | None = None

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.CreateSessionResponse:
        spec = await self._spec(request, self._callers.owner(context))
        answer = await self._core.create(spec, _deadline(context))
        return self._filled(pb.CreateSessionResponse(), fill_created, answer, request)

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        owner = self._callers.owner(context)
        view = await self._core.get(request.session_id, owner, request.include_token_ids)
        return pb.GetSessionResponse(session=session_pb(view, self._about), token_ids=view.tokens or ())

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> pb.DeleteSessionResponse:
        stats = await self._core.delete(request.session_id, self._callers.owner(context))
        return self._filled(pb.DeleteSessionResponse(), fill_deleted, stats, request)

    async def Propose(self, request: pb.ProposeRequest, context: Context) -> pb.ProposeResponse:
        answer = await self._core.ask(propose_job(request, self._callers.owner(context), _deadline(context)))
        return self._filled(pb.ProposeResponse(), fill_proposed, answer, request)

    async def Verify(self, request: pb.VerifyRequest, context: Context) -> pb.VerifyResponse:
        answer = await self._core.ask(verify_job(request, self._callers.owner(context), _deadline(context)))
        return self._filled(pb.VerifyResponse(), fill_verified, answer, request)

    async def Extend(self, request: pb.ExtendRequest, context: Context) -> pb.ExtendResponse:
        answer = await self._core.ask(extend_job(request, self._callers.owner(context), _deadline(context)))
        return self._filled(pb.ExtendResponse(), fill_extended, answer, request)

    def _filled(self, message: Message, fill: Callable[..., None], *parts: Any) -> Message:
        fill(message, *parts, self._about)
        return message

    async def Draft(self, requests: object, context: Context) -> None:
        if self._leaving is not None:
            raise self._leaving
        stream = DraftStream(self._core, context, self._callers.owner(context), self._about, self._spec)
        self.streams.add(stream)
        try:
            await stream.run()
        finally:
            self.streams.discard(stream)

    def leave(self, error: SpeculatorError) -> None:
        """Ends all streams with `error`, also those whose call has arrived and whose turn comes later."""
        self._leaving = error
        for stream in list(self.streams):
            stream.end(error)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        spec = await self._spec(request.session, self._callers.owner(context))
        spec = replace(spec, speculate=spec.speculate and not request.disable_speculation)
        text = self._text_stream(request.session)
        first = True
        async with aclosing(self._core.generate(spec, _deadline(context))) as steps:
            async for step in steps:
                piece = text.push(step.tokens, last=step.session is not None and not first) if text else ""
                await context.write(generated_pb(step, first, piece, self._about))
                first = False

    def _text_stream(self, request: pb.CreateSessionRequest) -> TextStream | None:
        if self._tokenizer is None or request.WhichOneof("input") != "text":
            return None
        return TextStream(self._tokenizer)

    async def _spec(self, request: pb.CreateSessionRequest, owner: str) -> SessionSpec:
        if request.model and request.model != self._about.model:
            raise InvalidArgumentError(f"this server has {self._about.model!r}, not {request.model!r}", field="model")
        return spec_of(request, await self._tokens(request), owner, self._defaults)

    async def _tokens(self, request: pb.CreateSessionRequest) -> tuple[int, ...]:
        if request.WhichOneof("input") != "text":
            return tuple(request.token_ids.ids)
        if self._tokenizer is None:
            raise InvalidArgumentError("this server has no tokenizer; send token_ids", field="text")
        if len(request.text) < LONG_TEXT:
            return tuple(self._tokenizer.encode(request.text))
        return tuple(await asyncio.to_thread(self._tokenizer.encode, request.text))


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """AdminService over a DrafterCore."""

    def __init__(
        self, core: DrafterCore, about: About, callers: Callers, defaults: SamplingParams, config: ServerConfig
    ) -> None:
        self._core, self._about, self._callers, self._defaults, self._config = core, about, callers, defaults, config

    async def GetServerInfo(self, request: object, context: Context) -> admin_pb2.GetServerInfoResponse:
        info, about = self._core.info, self._about
        return admin_pb2.GetServerInfoResponse(
            version=about.version,
            schema_revision=SCHEMA_REVISION,
            minimum_client_revision=MINIMUM_CLIENT_REVISION,
            instance_id=about.instance_id,
            target_model=info.target_model,
            target_revision=about.target_revision,
            draft_model=info.draft_model,
            draft_method=info.draft_method,
            draft_revision=about.draft_revision,
            vocab_size=info.vocab_size,
            eos_token_ids=info.eos_token_ids,
            tokenizer_sha256=about.tokenizer_sha256,
            limits=self._limits(),
            tensor_parallel_size=info.tensor_parallel,
            pipeline_parallel_size=info.pipeline_parallel,
            default_rule=RULES_OUT[self._defaults.rule],
            default_draft=shape_pb(info.default_shape),
        )

    def _limits(self) -> admin_pb2.Limits:
        info = self._core.info
        return admin_pb2.Limits(
            max_context_length=self._core.context,
            max_tree_nodes=info.max_nodes,
            max_tree_depth=info.max_depth,
            max_sessions=info.max_rows,
            max_message_bytes=self._config.max_message_bytes,
        )

    async def ListSessions(
        self, request: admin_pb2.ListSessionsRequest, context: Context
    ) -> admin_pb2.ListSessionsResponse:
        if request.page_size < 0:
            raise InvalidArgumentError("page_size must be at least 0", field="page_size")
        count = min(request.page_size or 50, MAX_PAGE)
        views = await self._core.page(self._callers.owner(context), request.page_token, count + 1)
        return admin_pb2.ListSessionsResponse(
            sessions=[session_pb(view, self._about) for view in views[:count]],
            next_page_token=views[count - 1].session_id if len(views) > count else "",
        )

    async def GetStats(self, request: object, context: Context) -> admin_pb2.GetStatsResponse:
        usage = self._core.usage()
        return admin_pb2.GetStatsResponse(
            stats=stats_pb(await self._core.acceptance()),
            running_sessions=usage.active,
            queued_requests=self._core.in_flight,
            used_kv_blocks=usage.used_pages,
            total_kv_blocks=usage.total_pages,
        )


def _deadline(context: Context) -> float:
    left = context.time_remaining()
    return math.inf if left is None else time.monotonic() + left


# ---- every call passes here ----


class Edge(grpc.aio.ServerInterceptor):
    """Counts calls, turns errors into statuses, and messages that do not parse into errors."""

    def __init__(self, metrics: CallMetrics) -> None:
        self._metrics = metrics
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None or method.split("/")[1] not in SERVICES:
            return handler
        if method not in self._wrapped:
            self._wrapped[method] = self._wrap(handler, method)
        return self._wrapped[method]

    def refused(self, handler: Handler, method: str) -> None:
        """A call ended before it came here, for want of a token."""
        if method.split("/")[1] in SERVICES:
            with self._metrics.call(_kind(handler), method) as seen:
                seen.code = grpc.StatusCode.UNAUTHENTICATED.name

    def _wrap(self, handler: Handler, method: str) -> Handler:
        parse, serialize, kind = _forgiving(handler.request_deserializer), handler.response_serializer, _kind(handler)
        if handler.unary_unary is not None:
            inner = self._guarded(handler.unary_unary, kind, method)
            return grpc.unary_unary_rpc_method_handler(inner, parse, serialize)
        if handler.unary_stream is not None:
            inner = self._guarded(handler.unary_stream, kind, method)
            return grpc.unary_stream_rpc_method_handler(inner, parse, serialize)
        inner = self._guarded(handler.stream_stream, kind, method)
        return grpc.stream_stream_rpc_method_handler(inner, parse, serialize)

    def _guarded(self, behaviour: Any, kind: str, method: str) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            with self._metrics.call(kind, method) as seen:
                try:
                    return await _checked(behaviour, request, context, seen)
                except SpeculatorError as error:
                    seen.code = error.status
                    await abort(context, error)

        return call


def _kind(handler: Handler) -> str:
    """As gRPC dashboards call it."""
    if handler.unary_unary is not None:
        return "unary"
    return "server_stream" if handler.unary_stream is not None else "bidi_stream"


async def _checked(behaviour: Any, request: Any, context: Context, seen: Call) -> Any:
    if isinstance(request, Malformed):
        raise request.error
    try:
        answer = await behaviour(request, context)
    except (SpeculatorError, grpc.aio.AbortError):
        raise
    except Exception as error:
        log.exception("a method failed")
        raise SpeculatorError("internal error") from error
    seen.code = grpc.StatusCode.OK.name
    return answer


def _forgiving(parse: Callable[[bytes], Message] | None) -> Callable[[bytes], Message | Malformed]:
    assert parse is not None, "generated handlers always parse"

    def forgiving(data: bytes) -> Message | Malformed:
        try:
            return parse(data)
        except DecodeError as error:
            return Malformed(error)

    return forgiving


# ---- the process ----


def options(config: ServerConfig) -> list[tuple[str, int]]:
    """Channel arguments; keepalive finds a dead peer in seconds, where the defaults need a minute."""
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_streams),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.so_reuseport", 0),
    ]


class Server:
    """One listening service. `port` and `metrics_port` are the bound ones once `start` has returned."""

    def __init__(
        self,
        core: DrafterCore,
        config: ServerConfig,
        *,
        about: About | None = None,
        tokenizer: Tokenizer | None = None,
        defaults: SamplingParams | None = None,
    ) -> None:
        self.port = self.metrics_port = 0
        self._core, self._config = core, config
        self._about = about or About(model=core.info.target_model, instance_id=str(uuid.uuid4()))
        self._tokens = Tokens.from_file(config.token_file) if config.token_file else None
        callers = Callers(self._tokens, bool(config.tls_client_ca))
        defaults = defaults or SamplingParams()
        self._drafter = Drafter(core, self._about, callers, tokenizer, defaults)
        self._admin = Admin(core, self._about, callers, defaults, config)
        self._health = health.aio.HealthServicer()
        self._registry = CollectorRegistry()
        self._grpc: grpc.aio.Server | None = None
        self._metrics: MetricsServer | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Binds and serves; raises ConfigError when the address is taken."""
        self._core.on_dead = self._engine_died
        await self._core.start()
        self._grpc = self._build()
        self.port = self._bind(self._grpc)
        await self._grpc.start()
        self._start_metrics()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def _build(self) -> grpc.aio.Server:
        edge = Edge(CallMetrics(self._registry))
        guard = [] if self._tokens is None else [Guard(self._tokens, edge.refused)]
        server = grpc.aio.server(interceptors=[*guard, edge], options=options(self._config))
        drafter_pb2_grpc.add_DrafterServiceServicer_to_server(self._drafter, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.serve_reflection:
            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    def _bind(self, server: grpc.aio.Server) -> int:
        secret = credentials(self._config)
        try:
            if secret is not None:
                return server.add_secure_port(self._config.address, secret)
            return server.add_insecure_port(self._config.address)
        except RuntimeError as error:
            reason = str(error).partition(";")[0]  # the rest is about gRPC's own log
            raise ConfigError(f"cannot listen on {self._config.address}: {reason}") from error

    def _start_metrics(self) -> None:
        if not self._config.metrics_port:
            return
        about, info = self._about, self._core.info
        build = {"version": about.version, "target": info.target_model, "draft_method": info.draft_method}
        self._registry.register(ServiceMetrics(self._core, build, self._core.watch))
        try:
            self._metrics = MetricsServer(self._registry, self._config.host, self._config.metrics_port)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on port {self._config.metrics_port}: {error}") from error
        self.metrics_port = self._metrics.port

    async def _set_health(self, status: int) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, status)

    def _engine_died(self) -> None:
        task = asyncio.get_running_loop().create_task(self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def drain(self) -> None:
        """Leaves without losing anything: no new sessions, a notice on streams, then the rest of the grace for them.

        After the grace no new work item is taken, those under way are answered, and what is still open is ended.
        """
        grace = self._config.drain_grace_s
        self._core.drain()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        notice = pb.Draining(grace=duration_pb2.Duration(seconds=int(grace)))
        for stream in self._drafter.streams:
            stream.send(pb.DraftResponse(draining=notice))
        await self._until_idle(grace)
        self._core.close()
        await self._core.quiet()
        await asyncio.sleep(LINGER)
        await self.stop(1.0)

    async def _until_idle(self, grace: float) -> None:
        end = time.monotonic() + grace
        while time.monotonic() < end and (self._core.in_flight or self._drafter.streams):
            await asyncio.sleep(0.02)

    async def stop(self, grace: float = 0.0) -> None:
        """Stops listening, ends what is open after `grace` seconds, ends the worker."""
        self._drafter.leave(DrainingError("the server is shutting down; go to another one"))
        if self._grpc is not None:
            await self._grpc.stop(grace)
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.stop)
        await self._core.stop()


def check_listening(config: ServerConfig) -> None:
    """Raises ConfigError for files and addresses that a server could not use: to be asked before models are loaded."""
    credentials(config)
    if config.token_file:
        Tokens.from_file(config.token_file)
    for key, port in (("port", config.port), ("metrics_port", config.metrics_port)):
        _check_free(config.host, port, f"server.{key}")


def _check_free(host: str, port: int, key: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"server.host {host} is no address and no name that this machine knows") from error
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({key}): {error.strerror}") from error


async def serve(
    core: DrafterCore,
    config: Config,
    *,
    about: About | None = None,
    tokenizer: Tokenizer | None = None,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains. `ready` hears of the bound ports."""
    server = Server(core, config.server, about=about, tokenizer=tokenizer, defaults=config.sampling.params)
    wanted = asyncio.Event()
    await server.start()
    with _signals((signal.SIGTERM, signal.SIGINT), wanted.set):
        if ready is not None:
            ready(server)
        await wanted.wait()
        await server.drain()


@contextlib.contextmanager
def _signals(numbers: Iterable[signal.Signals], act: Callable[[], None]) -> Any:
    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def new_loop(config: ServerConfig) -> asyncio.AbstractEventLoop:
    """An event loop as configured: uvloop where it is asked for, or there; for asyncio.Runner(loop_factory=...)."""
    if config.uvloop == "off":
        return asyncio.new_event_loop()
    try:
        import uvloop
    except ImportError as error:
        if config.uvloop == "on":
            raise ConfigError("server.uvloop is on, but uvloop is not installed") from error
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
