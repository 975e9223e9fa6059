"""The demonstration: a server on loopback, sessions over gRPC, text in two colours, and a check against plain decoding.

Owns: the prompts, what is shown, and the verdict. Must never reach past the client into the server it started, but to
start and stop it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from speculator.cli.paint import Painter, Piece, Speech
from speculator.client import AsyncClient, AsyncDraftStream, AsyncSession, Sampling, Stats, Stopping
from speculator.config import Config
from speculator.core import DrafterCore
from speculator.server import Server
from speculator.text import Tokenizer
from speculator.tokenizer import FolderTokenizer
from speculator.types import FinishReason
from speculator.worker import EngineLike

PROMPTS = (
    "Why is the sky blue?",
    "Tom has 12 apples. He gives 5 of them to Mary and then buys 8 more. How many apples does Tom have now?",
    "Write a Python function that returns the sum of the even numbers in a list.",
    "Tell me a short story about a fox who wanted to learn to swim.",
    "What are the symptoms of a common cold, and what helps against it?",
)


@dataclass(frozen=True)
class Plan:
    """What to show: prompts as token ids beside their text, and how much of an answer to each."""

    texts: Sequence[str]
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    sampling: Sampling


class Spoken(NamedTuple):
    """One answer: its tokens, its acceptance, and its tokens by the server's own loop with and without drafts."""

    output: tuple[int, ...]
    stats: Stats
    generated: tuple[int, ...] = ()
    plain: tuple[int, ...] = ()

    @property
    def same(self) -> bool:
        return self.output == self.generated == self.plain


def plan(tokenizer: FolderTokenizer, texts: Sequence[str] = PROMPTS, new_tokens: int = 96, seed: int = 0) -> Plan:
    """The demonstration on `texts`, asked as questions where the tokenizer knows how."""
    prompts = [tokenizer.encode_chat(text) for text in texts]
    return Plan(texts, prompts, new_tokens, Sampling(temperature=0.0, seed=seed))


async def show(engine: EngineLike, tokenizer: Tokenizer, config: Config, plan: Plan, console: Console) -> int:
    """Runs the demonstration; exit code 0, or 1 when a text is not that of plain decoding."""
    async with _serving(engine, config) as address, AsyncClient(address) as client:
        await client.wait_ready()
        info = await client.server_info()
        console.print(f"Server on {address}: {info.target_model} with {info.draft_model or 'no head'}", highlight=False)
        async with client.draft_stream() as stream:
            spoken = await _speak(stream, tokenizer, plan, console)
        drafted, fast = await _generate(client, plan, speculate=True)
        plain, slow = await _generate(client, plan, speculate=False)
    answers = zip(spoken, drafted, plain, strict=True)
    spoken = [answer._replace(generated=fast, plain=slow) for answer, fast, slow in answers]
    _report(spoken, plan, console)
    _speeds(sum(map(len, plain)), fast, slow, console)
    return _verdict(spoken, plan, console)


@asynccontextmanager
async def _serving(engine: EngineLike, config: Config) -> AsyncIterator[str]:
    """A server of the engine on a free port of loopback."""
    core = DrafterCore(engine)
    local = replace(config.server, host="127.0.0.1", port=0, metrics_port=0)
    server = Server(core, replace(local, tls_cert="", tls_key="", tls_client_ca="", token_file=""))
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop()


# ---- speaking


async def _speak(stream: AsyncDraftStream, tokenizer: Tokenizer, plan: Plan, console: Console) -> list[Spoken]:
    """All prompts at once over one stream; shown one after the other, the first one as it comes."""
    stopping = Stopping(max_new_tokens=plan.new_tokens)
    sessions = [stream.session(ids, sampling=plan.sampling, stopping=stopping) for ids in plan.prompts]
    inboxes: list[asyncio.Queue[Piece | None]] = [asyncio.Queue() for _ in sessions]
    async with asyncio.TaskGroup() as group:
        running = [
            group.create_task(_run(session, Speech(tokenizer), inbox))
            for session, inbox in zip(sessions, inboxes, strict=True)
        ]
        group.create_task(_paint(plan.texts, inboxes, console))
    return [task.result() for task in running]


async def _run(session: AsyncSession, speech: Speech, inbox: asyncio.Queue[Piece | None]) -> Spoken:
    async with session:
        async for part in session:
            last = part.finish is not FinishReason.RUNNING
            for piece in speech.say(part.tokens, part.accepted, last):
                inbox.put_nowait(piece)
    inbox.put_nowait(None)
    return Spoken(session.output, session.stats)


async def _paint(texts: Sequence[str], inboxes: Sequence[asyncio.Queue[Piece | None]], console: Console) -> None:
    painter = Painter(console)
    console.print(painter.legend())
    for text, inbox in zip(texts, inboxes, strict=True):
        console.print()
        console.print(f"> {text}", style="bold", markup=False, highlight=False)
        while (piece := await inbox.get()) is not None:
            painter.paint(piece)
        painter.end()


async def _generate(client: AsyncClient, plan: Plan, speculate: bool) -> tuple[list[tuple[int, ...]], float]:
    """All prompts at once by the server's own loop; tokens of each, and seconds."""
    start = time.perf_counter()
    texts = await asyncio.gather(*(_text(client, prompt, plan, speculate) for prompt in plan.prompts))
    return texts, time.perf_counter() - start


async def _text(client: AsyncClient, prompt: Sequence[int], plan: Plan, speculate: bool) -> tuple[int, ...]:
    stopping = Stopping(max_new_tokens=plan.new_tokens)
    chunks = client.generate(prompt, sampling=plan.sampling, stopping=stopping, speculate=speculate)
    return tuple([token async for chunk in chunks for token in chunk.tokens])


# ---- telling


def _report(spoken: Sequence[Spoken], plan: Plan, console: Console) -> None:
    deepest = max((len(answer.stats.rates) for answer in spoken), default=0)
    table = Table(box=box.SIMPLE, title="Accept length, and acceptance by position", title_justify="left", expand=True)
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", ratio=1)
    for column in ("tokens", "rounds", "accept\nlength", *(f"at\n{i + 1}" for i in range(deepest))):
        table.add_column(column, justify="right", no_wrap=True)
    for text, answer in zip(plan.texts, spoken, strict=True):
        table.add_row(text, *_row(answer.stats, deepest))
    table.add_section()
    table.add_row("all", *_row(total([answer.stats for answer in spoken]), deepest))
    console.print()
    console.print(table)


def _row(stats: Stats, deepest: int) -> list[str]:
    rates = [f"{rate:.2f}" for rate in stats.rates]
    padding = ["-"] * (deepest - len(rates))
    return [str(stats.output_tokens), str(stats.rounds), f"{stats.accept_length:.2f}", *rates, *padding]


def total(parts: Sequence[Stats]) -> Stats:
    """The sum of several sessions' counts."""
    histogram: dict[int, int] = {}
    for part in parts:
        for accepted, rounds in part.histogram.items():
            histogram[accepted] = histogram.get(accepted, 0) + rounds
    return Stats(
        sum(part.rounds for part in parts),
        sum(part.draft_tokens for part in parts),
        sum(part.accepted_tokens for part in parts),
        sum(part.output_tokens for part in parts),
        histogram,
        _columns([part.accepted_at for part in parts]),
        _columns([part.drafted_at for part in parts]),
    )


def _columns(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    width = max((len(row) for row in rows), default=0)
    return tuple(sum(row[i] for row in rows if i < len(row)) for i in range(width))


def _speeds(tokens: int, fast: float, slow: float, console: Console) -> None:
    console.print(
        f"Generated by the server alone: {tokens / fast:.0f} tokens a second with drafts, {tokens / slow:.0f} without "
        f"({slow / fast:.2f}x)",
        highlight=False,
    )


def _verdict(spoken: Sequence[Spoken], plan: Plan, console: Console) -> int:
    wrong = [(text, answer) for text, answer in zip(plan.texts, spoken, strict=True) if not answer.same]
    for text, answer in wrong:
        console.print(f"{_difference(answer)} in the answer to: {text}", style="red", markup=False, highlight=False)
    if not wrong:
        console.print(f"All {len(spoken)} texts are those of plain decoding, token for token.", highlight=False)
    return 1 if wrong else 0


def _difference(answer: Spoken) -> str:
    mine = answer.output if answer.output != answer.plain else answer.generated
    at = next((i for i, pair in enumerate(zip(mine, answer.plain, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"{len(mine)} tokens where plain decoding gives {len(answer.plain)}"
    return f"token {at} is {mine[at]}, plain decoding gives {answer.plain[at]},"
