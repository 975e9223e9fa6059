"""What gRPC and the worker cost: one fused step on the Draft stream beside a raw echo of the same bytes.

Owns: the two servers, each in a process of its own, and the clock. Must never import torch: the engine is a fake, so
that the ratio tells about the service alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import grpc

from speculator.bench.fake import TOKEN, EchoEngine
from speculator.bench.outputs import check_files
from speculator.bench.provenance import cpu_name, provenance
from speculator.config import ServerConfig
from speculator.core import DrafterCore
from speculator.security import Handler
from speculator.server import Server, new_loop, options
from speculator.stream import Context
from speculator.v1 import drafter_pb2 as pb

ECHO = "/echo.Echo/Echo"
MAX_TOKENS = 1 << 18
BLOCK = 50  # exchanges before the other server has its turn
SETTLE = 5  # first ones of a block, not counted: the other process has gone cold
WARM_BLOCKS = 10
Behaviour: TypeAlias = "Callable[[object, Context], Coroutine[Any, Any, None]]"
Call: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"  # generic in the library's stubs only


class Exchange(NamedTuple):
    """Seconds of one exchange."""

    wire: float
    whole: float


# ---- servers, in their own processes ----


def _serve(which: str, uvloop: bool, port: Connection) -> None:
    config = ServerConfig(port=0, metrics_port=0, uvloop="on" if uvloop else "off")
    with asyncio.Runner(loop_factory=lambda: new_loop(config)) as runner:
        runner.run(SERVERS[which](config, port))


async def _serve_drafts(config: ServerConfig, port: Connection) -> None:
    server = Server(DrafterCore(EchoEngine()), config)
    await server.start()
    port.send(server.port)
    await asyncio.Event().wait()


async def _serve_echo(config: ServerConfig, port: Connection) -> None:
    await _serve_raw(config, port, _echo)


async def _serve_relay(config: ServerConfig, port: Connection) -> None:
    await _serve_raw(config, port, _relay)


async def _serve_raw(config: ServerConfig, port: Connection, behaviour: Behaviour) -> None:
    server = grpc.aio.server(options=options(config))
    handler: Handler = grpc.stream_stream_rpc_method_handler(behaviour)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Echo": handler}),))
    bound = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    port.send(bound)
    await asyncio.Event().wait()


async def _echo(requests: object, context: Context) -> None:
    while (data := await context.read()) is not grpc.aio.EOF:
        await context.write(data)


async def _relay(requests: object, context: Context) -> None:
    """An echo that passes through a second thread: the least that a device thread can cost."""
    loop, inbox = asyncio.get_running_loop(), SimpleQueue[Any]()
    back: asyncio.Queue[bytes] = asyncio.Queue()

    def relay() -> None:
        while (data := inbox.get()) is not None:
            loop.call_soon_threadsafe(back.put_nowait, data)

    threading.Thread(target=relay, daemon=True).start()
    while (data := await context.read()) is not grpc.aio.EOF:
        inbox.put(data)
        await context.write(await back.get())
    inbox.put(None)


SERVERS: dict[str, Callable[[ServerConfig, Connection], Coroutine[Any, Any, None]]] = {
    "step": _serve_drafts,
    "relay": _serve_relay,
    "echo": _serve_echo,
}


# ---- clients: both build a request, write bytes, read bytes and read the answer; only the bytes are on the clock ----


class StepClient:
    """Each exchange verifies the draft of the one before and asks for the next."""

    method = "/speculator.v1.DrafterService/Draft"

    async def begin(self, call: Call) -> None:
        stopping = pb.StoppingParams(max_new_tokens=MAX_TOKENS)
        spec = pb.CreateSessionRequest(token_ids=pb.TokenIds(ids=[TOKEN] * 16), stopping=stopping)
        session = (await _ask(call, pb.DraftRequest(correlation_id=1, create_session=spec))).create_session.session
        self._id, self._length = session.session_id, session.committed_length
        propose = pb.ProposeRequest(session_id=self._id, base_length=self._length)
        self._draft = (await _ask(call, pb.DraftRequest(correlation_id=2, propose=propose))).propose.draft_id

    def request(self, number: int) -> bytes:
        next_draft = pb.DraftParams(max_depth=5)
        verify = pb.VerifyRequest(
            session_id=self._id, base_length=self._length, draft_id=self._draft, propose_next=next_draft
        )
        return pb.DraftRequest(correlation_id=number, verify=verify).SerializeToString()

    def answer(self, data: bytes) -> None:
        verify = pb.DraftResponse.FromString(data).verify
        assert len(verify.committed_token_ids) == 6, "the step failed"
        self._length, self._draft = verify.committed_length, verify.next_draft.draft_id


class EchoClient(StepClient):
    """Does the same work around the exchange, but sends the bytes of an answered step and gets them back."""

    method = ECHO

    async def begin(self, call: Call) -> None:
        self._data = _sample().SerializeToString()
        self._id, self._length, self._draft = str(uuid.uuid4()), 17, 1

    def request(self, number: int) -> bytes:
        super().request(number)
        return self._data


async def _ask(call: Call, request: pb.DraftRequest) -> pb.DraftResponse:
    await call.write(request.SerializeToString())
    response = pb.DraftResponse.FromString(await _read(call))
    assert not response.HasField("status"), f"the step failed: {response.status.message}"
    return response


async def _read(call: Call) -> bytes:
    data = await call.read()
    assert isinstance(data, bytes), "the stream ended"
    return data


def _sample() -> pb.DraftResponse:
    tree = pb.DraftTree(token_ids=[TOKEN] * 5, distribution=pb.DRAFT_DISTRIBUTION_SERVER_SIDE)
    verify = pb.VerifyResponse(
        accepted_indices=range(5),
        committed_token_ids=[TOKEN] * 6,
        committed_length=30_000,
        next_draft=pb.ProposeResponse(draft_id=5_000, tree=tree, base_length=30_000),
        timing=pb.Timing(queue_us=20, draft_us=1, verify_us=1, batch_size=1),
        verification_rule=pb.VERIFICATION_RULE_COUPLED,
    )
    return pb.DraftResponse(correlation_id=5_000, verify=verify)


CLIENTS: dict[str, type[StepClient]] = {"step": StepClient, "relay": EchoClient, "echo": EchoClient}


# ---- the clock ----


def measure(exchanges: int = 2000, repeats: int = 5, uvloop: bool = False) -> dict[str, Any]:
    """Latencies in microseconds of steps, of as many echoes, and of echoes through a thread, and ratios of medians.

    Steps and echoes take turns in blocks of `BLOCK`, so that both meet the machine in the same mood. Each repeat has
    fresh servers, because where the kernel puts their threads stays for their life; figures are medians of repeats.
    `wire` is from the last byte given to gRPC to the first one got back; `whole` has the client's messages in it.
    """
    runs = [_repeat(exchanges, uvloop) for _ in range(repeats)]
    rows: dict[str, Any] = {name: round(median(run[name] for run in runs), 3) for name in runs[0]}
    rows |= {
        "ratio_p50_runs": [round(run["ratio_p50"], 3) for run in runs],
        "bytes": len(_sample().SerializeToString()),
    }
    cpus = f"{cpu_name()}, {os.cpu_count()} CPUs"
    return rows | {"uvloop": uvloop, "load": os.getloadavg(), "provenance": provenance(cpus)}


def _repeat(exchanges: int, uvloop: bool) -> dict[str, float]:
    config = ServerConfig(uvloop="on" if uvloop else "off")
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        ports = {which: stack.enter_context(_server(context, which, uvloop)) for which in SERVERS}
        runner = stack.enter_context(asyncio.Runner(loop_factory=lambda: new_loop(config)))
        return _summary(runner.run(_take_turns(ports, exchanges, config)))


@contextlib.contextmanager
def _server(context: SpawnContext, which: str, uvloop: bool) -> Iterator[int]:
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(which, uvloop, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


async def _take_turns(ports: dict[str, int], exchanges: int, config: ServerConfig) -> dict[str, list[Exchange]]:
    found: dict[str, list[Exchange]] = {which: [] for which in ports}
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for which, port in ports.items():
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options(config))
            await stack.enter_async_context(channel)
            clients[which] = await _connect(CLIENTS[which](), channel)
        for block in range(WARM_BLOCKS + exchanges // BLOCK):
            for which, (client, call) in clients.items():
                times = [await _exchange(client, call, block * BLOCK + i) for i in range(BLOCK)]
                found[which] += times[SETTLE:] if block >= WARM_BLOCKS else []
        for _, call in clients.values():
            call.cancel()
    return found


async def _connect(client: StepClient, channel: grpc.aio.Channel) -> tuple[StepClient, Call]:
    call: Call = channel.stream_stream(client.method)()
    await client.begin(call)
    return client, call


async def _exchange(client: StepClient, call: Call, number: int) -> Exchange:
    begin = time.perf_counter()
    data = client.request(number)
    sent = time.perf_counter()
    await call.write(data)
    back = await _read(call)
    got = time.perf_counter()
    client.answer(back)
    return Exchange(got - sent, time.perf_counter() - begin)


def _summary(found: dict[str, list[Exchange]]) -> dict[str, float]:
    rows: dict[str, float] = {}
    for which, times in found.items():
        wire, whole = sorted(one.wire for one in times), sorted(one.whole for one in times)
        rows |= {f"{which}_p50_us": _at(wire, 0.5), f"{which}_p99_us": _at(wire, 0.99)}
        rows |= {f"{which}_whole_p50_us": _at(whole, 0.5)}
    rows["ratio_p50"] = rows["step_p50_us"] / rows["echo_p50_us"]
    rows["ratio_p50_to_relay"] = rows["step_p50_us"] / rows["relay_p50_us"]
    rows["ratio_whole_p50"] = rows["step_whole_p50_us"] / rows["echo_whole_p50_us"]
    return rows


def _at(ordered: list[float], part: float) -> float:
    return round(ordered[int(len(ordered) * part)] * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--exchanges", type=int, default=2000, help="steps, and as many echoes, of one repeat")
    parser.add_argument("--repeats", type=int, default=5, help="times that both servers are started afresh")
    parser.add_argument("--uvloop", action="store_true", help="uvloop instead of asyncio, on both sides of both")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    given = parser.parse_args()
    check_files(given.json)
    found = measure(given.exchanges, given.repeats, given.uvloop)
    print(json.dumps(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
