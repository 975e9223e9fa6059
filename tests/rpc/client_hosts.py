"""Servers that tests of the client start, cut off, kill and replace.

Owns: a server on a thread of its own, a server in a process of its own, and a proxy that loses answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import threading
from collections.abc import Coroutine, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from speculator.config import ServerConfig
from speculator.core import DrafterCore
from speculator.server import Server
from speculator.types import EngineInfo
from tests.fakes import INFO, FakeEngine, FakeTokenizer


class Host:
    """A fake-engined server whose event loop runs on a thread, for clients that block."""

    def __init__(self, about: EngineInfo = INFO, config: ServerConfig | None = None, **core: Any) -> None:
        self.engine = FakeEngine(about)
        self.config = config or ServerConfig(port=0, metrics_port=0)
        self._core_options = core
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._open = True
        self.server: Server = self.run(self._start())

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def core(self) -> DrafterCore:
        return self.server._core

    async def _start(self) -> Server:
        core = DrafterCore(self.engine, **self._core_options)
        server = Server(core, self.config, tokenizer=FakeTokenizer())
        await server.start()
        return server

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do something on the server's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def drain(self) -> None:
        self.run(self.server.drain())
        self._end()

    def close(self) -> None:
        if self._open:
            self.engine.gate.set()
            self.run(self.server.stop())
            self._end()

    def _end(self) -> None:
        self._open = False
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(port: int, delay: float, pipe: Connection) -> None:
    async def run() -> None:
        engine = FakeEngine()
        engine.delay = delay
        server = Server(DrafterCore(engine), ServerConfig(port=port, metrics_port=0), tokenizer=FakeTokenizer())
        await server.start()
        pipe.send(server.port)
        await asyncio.Event().wait()

    asyncio.run(run())


class Victim:
    """A fake-engined server in a process, to be killed; `start` again serves on the same port, with no memory."""

    def __init__(self, delay: float) -> None:
        self.port, self._delay = 0, delay
        self._process: BaseProcess | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(self.port, self._delay, there), daemon=True)
        self._process.start()
        self.port = here.recv()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.join()


class Proxy:
    """Passes bytes between a client and the server at `upstream`, which may change.

    While `mute` is set, what the server answers is kept back. `cut` ends all connections, and loses what was kept.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.mute = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        for end in list(self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._join(near)

    def _join(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self.upstream))
        except OSError:
            near.close()
            return
        self._sockets |= {near, far}
        threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
        threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        kept = b""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                kept += data
                if not (answers and self.mute.is_set()):
                    sink.sendall(kept)
                    kept = b""
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextlib.contextmanager
def proxied(host: Host) -> Iterator[Proxy]:
    proxy = Proxy(host.port)
    try:
        yield proxy
    finally:
        proxy.close()
