"""One round ahead, as clients see it: the bundled pair over gRPC, readers that leave, and texts that do not change."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from speculator.bundled import Pair
from speculator.client import AsyncClient, Sampling, Stopping
from speculator.config import ServerConfig
from speculator.core import DrafterCore
from speculator.local import generate
from speculator.server import Server
from speculator.types import SamplingParams, Step
from tests.e2e.test_bundled import RECORDED, engine_of, pair, prompts

__all__ = ["pair"]
FEW = ("draft.depth=2", "graphs.depths=", "engine.max_context=128", "graphs.mode=round")
TOKENS = 30


async def test_generations_over_grpc_are_a_round_ahead_and_say_the_same(pair: Pair) -> None:
    """Twelve generations, four at a time: to their token limit, to a stop token, or left by their reader."""
    engine, single, asked = engine_of(pair, 4, *RECORDED, *FEW), engine_of(pair, 1), prompts(pair, 12)
    sampling = [SamplingParams(0.9 * (i % 2), seed=i) for i in range(12)]
    whole = [[t for s in generate(single, p, TOKENS, s_) for t in s] for p, s_ in zip(asked, sampling, strict=True)]
    stops = [frozenset({text[9]}) if i % 3 == 1 else frozenset[int]() for i, text in enumerate(whole)]
    ahead, launch = list[int](), engine.launch

    def noted(steps: Sequence[Step]) -> Any:
        flight = launch(steps)
        ahead.append(flight is not None and steps[0].ahead)
        return flight

    engine.launch = noted  # type: ignore[method-assign]
    core = DrafterCore(engine)
    server = Server(core, ServerConfig(port=0, metrics_port=0))
    await server.start()
    turns, draw = asyncio.Semaphore(4), random.Random(1)
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:

            async def one(number: int) -> list[int]:
                async with turns:
                    stopping = Stopping(TOKENS, tuple(stops[number]), ignore_eos=True)
                    given = Sampling(sampling[number].temperature, seed=number)
                    heard, leaves = list[int](), draw.randint(1, 20) if number % 3 == 2 else TOKENS
                    stream = client.generate(asked[number], sampling=given, stopping=stopping)
                    async for chunk in stream:
                        heard += chunk.tokens
                        if len(heard) > leaves:
                            break
                    return heard

            texts = await asyncio.gather(*(one(i) for i in range(12)))
            for _ in range(200):
                stats = await client.stats()
                if not stats.running_sessions:
                    break
                await asyncio.sleep(0.01)
            assert (stats.running_sessions, stats.used_kv_blocks) == (0, 0)
    finally:
        await server.stop()
    for number, (text, expected) in enumerate(zip(texts, whole, strict=True)):
        end = next((i + 1 for i, t in enumerate(expected) if t in stops[number]), TOKENS)
        assert text == expected[: len(text) if number % 3 == 2 else end]
    core._worker.scheduler.check()
    assert sum(ahead) > 3
