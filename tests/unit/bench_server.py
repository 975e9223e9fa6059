"""A server on loopback around any engine, for tests of what is measured over gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from speculator import __version__
from speculator.config import ServerConfig
from speculator.core import DrafterCore
from speculator.server import Server
from speculator.translate import About

ABOUT = About(version=__version__, model="toy", instance_id="here", target_revision="rev")


class Loopback:
    """A server whose event loop runs on a thread; its engine may be any that the worker takes."""

    def __init__(self, engine: Any, about: About = ABOUT) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._open = True
        self.server: Server = self._run(self._start(engine, about))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def _start(self, engine: Any, about: About) -> Server:
        core = DrafterCore(engine)
        server = Server(core, ServerConfig(port=0, metrics_port=0), about=about)
        await server.start()
        return server

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def close(self) -> None:
        """Ends it at once, whatever is under way."""
        if self._open:
            self._open = False
            self._run(self.server.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


@contextmanager
def serving(engine: Any, **about: str) -> Iterator[Loopback]:
    """A server until the block ends."""
    made = Loopback(engine, replace(ABOUT, **about))  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()
