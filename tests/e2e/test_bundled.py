"""The bundled pair as a newcomer gets it: it loads elsewhere too, serves many at once, and never changes a text."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from speculator.bundled import Pair, find_pairs
from speculator.client import AsyncClient, Sampling, Stopping
from speculator.config import ServerConfig, load
from speculator.core import DrafterCore
from speculator.engine import Engine
from speculator.errors import CheckpointError
from speculator.load import load_engine
from speculator.local import LocalSequence, generate
from speculator.server import Server
from speculator.tokenizer import load_tokenizer
from speculator.types import DraftShape, SamplingParams, Step, StepResult
from target.attention.dense import attend_causal
from target.load import load_target

MODELS = Path(__file__).resolve().parents[2] / "deploy" / "models"
QUESTIONS = ("What is a noun?", "Tom has 3 apples and buys 4.", "Write a function that adds.", "Tell me about the sea.")
SESSIONS, TOKENS = 64, 24


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.set_num_threads(1)
    found = find_pairs(MODELS)
    assert found, "deploy/models holds no pair"
    return found[0]


def engine_of(pair: Pair, sessions: int, *more: str) -> Engine:
    sets = {"model.target": pair.target, "model.head": pair.head, "model.device": "cpu"}
    return load_engine(load(None, [*(f"{k}={v}" for k, v in sets.items()), f"engine.max_sessions={sessions}", *more]))


def prompts(pair: Pair, count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(pair.target)
    return [tokenizer.encode_chat(f"{QUESTIONS[i % len(QUESTIONS)]} ({i})") for i in range(count)]


def test_the_pair_is_small(pair: Pair) -> None:
    files = [f for f in pair.target.parent.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12 * 2**20


def test_transformers_reads_the_target_and_agrees(pair: Pair) -> None:
    from transformers import AutoModelForCausalLM

    theirs, info = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = load_target(pair.target, torch.float32)
    ids = torch.tensor([prompts(pair, 1)[0]])
    with torch.inference_mode():
        hidden = ours(ids, torch.arange(ids.shape[1])[None], attend_causal)
        torch.testing.assert_close(ours.logits(hidden.final), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=7)])
@pytest.mark.parametrize("shape", [DraftShape(5), DraftShape(8, 59, 10), DraftShape(0)])
def test_drafts_change_nothing(pair: Pair, shape: DraftShape, params: SamplingParams) -> None:
    engine = engine_of(pair, 1)
    for prompt in prompts(pair, 3):
        texts = [list(generate(engine, prompt, 48, params, given)) for given in (None, shape)]
        plain, drafted = ([t for step in text for t in step] for text in texts)
        assert drafted == plain
        assert shape.depth == 0 or len(texts[1]) < len(texts[0])  # and some drafts are accepted


async def test_64_sessions_at_once_lose_nothing(pair: Pair) -> None:
    """Client-driven sessions and server-side loops together; each text is that of its own single run."""
    engine, asked = engine_of(pair, SESSIONS), prompts(pair, SESSIONS)
    single = engine_of(pair, 1)
    sampling = [Sampling(0.0 if i % 2 else 0.9, seed=i) for i in range(SESSIONS)]
    expected = [
        [t for step in generate(single, p, TOKENS, SamplingParams(s.temperature, seed=s.seed)) for t in step]
        for p, s in zip(asked, sampling, strict=True)
    ]
    core = DrafterCore(engine)
    server = Server(core, ServerConfig(port=0, metrics_port=0))
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            texts = await asyncio.gather(*(one(client, asked[i], sampling[i], i) for i in range(SESSIONS)))
            assert texts == expected
            stats = await client.stats()
            assert stats.running_sessions == 0 and stats.used_kv_blocks == 0
    finally:
        await server.stop()


async def one(client: AsyncClient, prompt: list[int], sampling: Sampling, number: int) -> list[int]:
    stopping = Stopping(max_new_tokens=TOKENS, ignore_eos=True)
    if number % 3 == 0:
        return [
            t async for chunk in client.generate(prompt, sampling=sampling, stopping=stopping) for t in chunk.tokens
        ]
    async with client.session(prompt, sampling=sampling, stopping=stopping) as session:
        async for _ in session:
            pass
        return list(session.output)


RECORDED = ("graphs.rows=4", "graphs.prompt_tokens=128", "engine.max_context=192", "engine.prefill_chunk=64")


@pytest.mark.parametrize("mode", ["split", "piecewise"])
def test_recorded_passes_change_no_token_and_no_acceptance(pair: Pair, mode: str) -> None:
    """Sessions that start together and end one by one, over hundreds of rounds, graphs off and on."""
    plain, recorded = (engine_of(pair, 4, f"graphs.mode={m}", *RECORDED) for m in ("off", mode))
    assert sessions_in_waves(recorded, pair) == sessions_in_waves(plain, pair)
    counts = recorded.passes.counts  # type: ignore[attr-defined]
    rounds = {name: c.share for name, c in counts.items() if not name.startswith("prompt")}
    assert set(rounds.values()) == {1.0}
    assert counts["prompt"].share == (1.0 if mode == "piecewise" else 0.0)


def test_recorded_rounds_change_no_token_and_no_acceptance(pair: Pair) -> None:
    few = ("draft.depth=2", "graphs.depths=", "engine.max_context=128")
    plain, recorded = (engine_of(pair, 4, f"graphs.mode={m}", *RECORDED, *few) for m in ("off", "round"))
    assert sessions_in_waves(recorded, pair) == sessions_in_waves(plain, pair)
    assert recorded.rounds is not None and recorded.rounds.counts.replayed > 50
    assert recorded.rounds.counts.share == 1.0, recorded.rounds.counts.eager


def sessions_in_waves(engine: Engine, pair: Pair) -> list[tuple[list[int], list[int]]]:
    """Tokens and accepted drafts a round, of every session."""
    found, shape = [], engine.info.default_shape
    for wave in range(3):
        rows = [LocalSequence(engine, r, SamplingParams(0.8 * (r % 2), seed=wave), shape) for r in range(4)]
        for row, prompt in zip(rows, prompts(pair, 4 * (wave + 1))[-4:], strict=True):
            row.tokens = list(prompt)
        accepted: list[list[int]] = [[] for _ in rows]
        while any(row.cached < len(row.tokens) - 1 for row in rows):
            live = [row for row in rows if row.cached < len(row.tokens) - 1]
            for row, step, result in _stepped(engine, live, [row.feed() for row in live]):
                row.take(step, result)
        for number in range(20):
            live = rows[: 4 - number // 6]
            for row, step, result in _stepped(engine, live, [row.round() for row in live]):
                row.take(step, result)
                accepted[row.row].append(len(result.accepted))
        found += [(row.tokens, counts) for row, counts in zip(rows, accepted, strict=True)]
    return found


def _stepped(
    engine: Engine, rows: list[LocalSequence], steps: list[Step]
) -> Iterator[tuple[LocalSequence, Step, StepResult]]:
    yield from zip(rows, steps, engine.step(steps), strict=True)


def test_a_head_of_another_target_is_refused(pair: Pair, tmp_path: Path) -> None:
    from tests.e2e.tiny_pair import make_pair

    other = make_pair(tmp_path / "other")
    with pytest.raises(CheckpointError, match="another"):
        engine_of(Pair("mixed", pair.target, other.head), 1)
