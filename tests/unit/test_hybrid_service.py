"""Hybrid targets behind the scheduler and its thread: sessions in any mix, refusals, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from hybrid_models import SIZES, VOCAB, hybrid_engine, hybrid_head, hybrid_target
from mtp_models import save_pair

from speculator.config import load as load_settings
from speculator.core import DrafterCore
from speculator.drafts import ShapeRequest
from speculator.engine import Engine
from speculator.errors import ConfigError, InvalidArgumentError, InvalidTreeError, ServerFullError, SpeculatorError
from speculator.load import load_engine
from speculator.policy_load import depth_policy
from speculator.recurrent import RecurrentRows, state_bytes
from speculator.session import SessionSpec
from speculator.types import Draft, FinishReason, SamplingParams, Step, StoppingParams
from target.decoder import Decoder
from target.save import save_target

SAMPLED = SamplingParams(temperature=0.9, seed=7)
PROMPT = tuple(range(3, 40))  # three chunks


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def target() -> Decoder:
    return hybrid_target()


def spec(
    name: str = "", tokens: tuple[int, ...] = PROMPT, count: int | None = 64, sampling: SamplingParams = SAMPLED,
    **more: object,
) -> SessionSpec:  # fmt: skip
    return SessionSpec(name, "", tokens, sampling, StoppingParams(count), **more)  # type: ignore[arg-type]


@asynccontextmanager
async def running(engine: Engine, **options: float) -> AsyncIterator[DrafterCore]:
    """At the end no row, page or state is held."""
    core = DrafterCore(engine, **options)  # type: ignore[arg-type]
    await core.start()
    try:
        yield core
        for view in await core.page(count=100):
            await core.delete(view.session_id)
        usage = core.usage()
        assert (usage.active, usage.finished, usage.used_pages, usage.reserved_pages) == (0, 0, 0, 0)
    finally:
        await core.stop()
        core._worker.scheduler.check()
    assert isinstance(engine.recurrent, RecurrentRows)
    states = engine.recurrent.cache
    assert not states.matrices.any() and not states.windows.any() and not any(engine.recurrent.lengths)


async def text_of(core: DrafterCore, wanted: SessionSpec) -> list[int]:
    return [token async for part in core.generate(wanted) for token in part.tokens]


async def plain(target: Decoder, wanted: SessionSpec) -> list[int]:
    async with running(hybrid_engine(target, None)) as core:
        return await text_of(core, wanted)


@pytest.mark.asyncio
@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "coupled"])
async def test_every_way_to_a_text_is_the_same_text(target: Decoder, sampling: SamplingParams) -> None:
    """Generate, rounds of the caller, a prompt without its last token, the rest by Extend, and from half the text."""
    expected = await plain(target, spec(sampling=sampling))
    engine = hybrid_engine(target, hybrid_head(target, "mtp"))
    async with running(engine) as core:
        assert await text_of(core, spec(sampling=sampling)) == expected
        await core.create(spec("a", sampling=sampling, prefill_only=True))
        await core.create(spec("b", PROMPT[:5], 64 + len(PROMPT) - 5, sampling, prefill_only=True))
        await core.extend("b", 5, PROMPT[5:])
        await core.create(spec("c", PROMPT + tuple(expected[:30]), 34, sampling, prefill_only=True))
        for name in "abc":
            view = await core.get(name, with_tokens=True)
            while view.finish is FinishReason.RUNNING:
                offered = await core.propose(name, view.length, ShapeRequest(depth=3))
                await core.verify(name, view.length, offered.draft_id)
                view = await core.get(name, with_tokens=True)
            assert view.tokens is not None and list(view.tokens[len(PROMPT) :]) == expected, name


@pytest.mark.asyncio
async def test_a_client_that_comes_and_goes_in_any_way_leaves_nothing(target: Decoder) -> None:
    engine = hybrid_engine(target, hybrid_head(target, "mtp"), rows=5)
    expected = await plain(target, spec())
    rng = random.Random(3)
    async with running(engine, idle_timeout=0.2) as core:
        await asyncio.gather(*(_visitor(core, i, random.Random(rng.random()), expected) for i in range(40)))
        await asyncio.sleep(0.6)  # idle sessions expire
        assert core.usage().active == 0


async def _visitor(core: DrafterCore, number: int, rng: random.Random, expected: list[int]) -> None:
    await asyncio.sleep(rng.random() * 0.8)
    name, kind = f"s{number}", rng.randrange(5)
    try:
        if kind == 0:
            assert await text_of(core, spec(name)) == expected
        elif kind == 1:
            await asyncio.wait_for(text_of(core, spec(name)), rng.random() * 0.1)
        elif kind == 2:
            await asyncio.wait_for(core.create(spec(name)), rng.random() * 0.03)
        else:
            await _rounds(core, name, rng, expected)
            if kind == 3:
                await core.delete(name)
    except (TimeoutError, ServerFullError):
        return


async def _rounds(core: DrafterCore, name: str, rng: random.Random, expected: list[int]) -> None:
    """Right, wrong and cancelled drafts, and tokens of the caller's own; the text goes on as if nothing had been."""
    created = await core.create(spec(name, prefill_only=True))
    length = created.session.length
    for _ in range(8):
        done = length - len(PROMPT)
        right = expected[done : done + 4]
        draft = [t if rng.random() < 0.7 else (t + 1) % VOCAB for t in right]
        tree = Draft(tuple(draft), tuple(range(-1, len(draft) - 1)))
        try:
            if rng.random() < 0.3:
                await asyncio.wait_for(core.extend(name, length, tuple(right[:2])), 0.001)
            else:
                verified = await asyncio.wait_for(core.verify(name, length, tree), rng.choice([10, 0.002]))
                assert list(verified.tokens) == expected[done : done + len(verified.tokens)]
        except TimeoutError:
            await asyncio.sleep(0.02)
        view = await core.get(name, with_tokens=True)
        length = view.length
        assert view.tokens is not None and list(view.tokens[len(PROMPT) :]) == expected[: length - len(PROMPT)]


@pytest.mark.asyncio
async def test_trees_are_refused_before_they_reach_the_device(target: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = hybrid_engine(target, hybrid_head(target, "mtp")), list[Step]()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda steps: (seen.extend(steps), step(steps))[1])
    why = "whose state holds one past: it takes chains only, every branch of a tree would need a state of its own"
    async with running(engine) as core:
        await core.create(spec("a", prefill_only=True))
        length = len(PROMPT)
        for shape in (ShapeRequest(depth=2, branching=2), ShapeRequest(parents=(-1, -1))):
            with pytest.raises(InvalidArgumentError, match=why) as refused:
                await core.propose("a", length, shape)
            assert refused.value.status == "INVALID_ARGUMENT"
            with pytest.raises(InvalidArgumentError, match=why):
                await core.create(spec("b", shape=shape))
        with pytest.raises(InvalidTreeError, match=why):
            await core.verify("a", length, Draft((1, 2), (-1, -1)))
        assert all(s.draft is None and s.propose is None for s in seen)
        assert (await core.propose("a", length, ShapeRequest(parents=(-1, 0)))).draft.is_chain


# from a folder


@pytest.fixture
def folder(tmp_path: Path, target: Decoder) -> Path:
    return save_pair(target, hybrid_head(target, "mtp"), tmp_path)  # type: ignore[arg-type]


def settings(folder: Path, *more: str) -> list[str]:
    return [f"model.target={folder}", "model.head=mtp", "model.device=cpu", "model.dtype=float32", *more]


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["off", "split", "piecewise"])
async def test_a_folder_is_served_in_every_mode(folder: Path, target: Decoder, mode: str) -> None:
    asked = settings(folder, f"graphs.mode={mode}", "engine.max_sessions=3", "engine.max_context=256", "draft.depth=3")
    engine = load_engine(load_settings(None, asked))
    expected = await plain(target, spec())
    async with running(engine) as core:
        texts = await asyncio.gather(*(text_of(core, spec()) for _ in range(3)))
        assert texts == [expected] * 3
        tally = core.passes_run()
    assert engine.info.draft_method == "mtp" and engine.info.max_branching == 1
    if mode != "off":
        assert tally["target verify"][0] > 10 and tally["prompt"][0] == 0 and tally["prompt"][1] > 0
        reasons = engine.passes.counts["prompt"].eager  # type: ignore[attr-defined]
        assert set(reasons) == {"prompts of a target with recurrent layers are not cut into segments"}


def test_states_are_part_of_the_memory_budget(folder: Path, target: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = 50
    states = state_bytes(target, sessions)
    layers = len(target.state_layers)
    assert states == (sessions + 1) * layers * (3 * 64 * 4 + 4 * 8 * 8 * 4)
    asked = settings(folder, f"engine.max_sessions={sessions}", "engine.page_size=16")
    a_page = 16 * 2 * (2 * 2 * 8 * 4)  # target and head, keys and values, 2 heads of 8, in float32
    monkeypatch.setattr("speculator.load.CPU_CACHE_BYTES", states + 10 * a_page)
    engine = load_engine(load_settings(None, asked))
    assert engine.info.total_pages == 11
    assert isinstance(engine.recurrent, RecurrentRows)
    assert engine.recurrent.cache.bytes == states and len(engine.recurrent.lengths) == sessions


def test_states_that_cannot_be_had_are_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("out of memory\nmore about it")

    monkeypatch.setattr("speculator.load.state_cache", full)
    with pytest.raises(ConfigError, match=r"states of 64 sessions take 0.00 GiB, .*: lower engine.max_sessions \(out"):
        load_engine(load_settings(None, settings(folder)))


def test_a_tree_by_configuration_is_refused_at_start_up(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"draft.branching 3: this target has recurrent layers.*set draft.branching"):
        load_engine(load_settings(None, settings(folder, "draft.branching=3", "draft.nodes=8")))


def test_a_hybrid_without_a_head_is_served(tmp_path: Path, target: Decoder) -> None:
    save_target(target, tmp_path, torch.float32)
    engine = load_engine(load_settings(None, [f"model.target={tmp_path}", "model.device=cpu"]))
    assert engine.head is None and isinstance(engine.recurrent, RecurrentRows)
    assert SIZES["num_hidden_layers"] == len(target.cache_layers) + len(target.state_layers)
    with pytest.raises(SpeculatorError, match="no MTP modules"):
        load_engine(load_settings(None, settings(tmp_path)))


def test_rounds_are_timed_on_made_up_sequences(folder: Path) -> None:
    """A policy needs costs at lengths that no session has; afterwards a step must go on where its state ends again."""
    asked = settings(folder, "policy.measure=on", "policy.measure_seconds=0.5", "engine.max_sessions=2")
    given = load_settings(None, [*asked, "engine.max_context=300", "draft.depth=2"])
    engine = load_engine(given)
    policy = depth_policy(given, engine)
    assert policy is not None
    assert isinstance(engine.recurrent, RecurrentRows)
    assert not engine.recurrent.cache.matrices.any() and not any(engine.recurrent.lengths)
    with pytest.raises(SpeculatorError, match="cannot go back"):
        engine.step([Step(0, 9, [1], root=1, draft=Draft())])
