"""Recorded passes on the tape recorder: everything an engine says is the same, and most of it was replayed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphs.errors import CaptureError
from graphs.recorder import CudaRecorder, Recorder
from graphs.shape import GraphShape
from graphs.tape import TapeRecorder
from speculator import load
from speculator.drafting import Drafted, Start
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.heads.base import DraftHead
from speculator.passes import EagerPasses
from speculator.recorded import Progress, RecordedPasses, Sizes
from speculator.types import Draft, DraftShape, EngineInfo, Rule, SamplingParams
from target.cache import PagedCache
from target.decoder import Decoder
from tests.unit.engines import Driver, tiny_engine, tiny_head, tiny_target
from tests.unit.mla_engines import latent_pair

CHAIN, TREE = DraftShape(4, 0, 1), DraftShape(3, 9, 3)
PROMPTS = [[3, 7, 1, 12, 5], [2, 2, 9], [8] * 21]
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=20, seed=5),
]


def record(
    engine: Engine,
    shape: DraftShape,
    rows: int = 4,
    prompt_tokens: int = 64,
    pages: int = 0,
    progress: Progress | None = None,
) -> RecordedPasses:
    """Put recorded passes, captured on a tape that spoils everything between replays, in place of the eager ones."""
    info = engine.info
    pages = pages or -(-(info.max_context + info.scratch_tokens) // info.page_size)
    assert isinstance(engine.passes, EagerPasses)
    sizes = Sizes(rows, pages, info.page_size, shape, prompt_tokens)
    cuda = engine.device.type == "cuda"
    recorder: Recorder = CudaRecorder() if cuda else TapeRecorder(poison_between_replays=True)
    passes = RecordedPasses(engine.passes, recorder, sizes, engine.device)
    passes.capture(progress)
    engine.passes = passes
    return passes


def pair(kind: str, device: str = "cpu") -> tuple[Decoder, DraftHead]:
    if kind in ("mtp", "mtp2"):
        return latent_pair(modules=2 if kind == "mtp2" else 1, device=device)
    target = tiny_target().to(device)
    return target, tiny_head(target, kind)


def run(
    engine: Engine, shape: DraftShape, params: list[SamplingParams] = PARAMS, count: int = 30
) -> list[tuple[list[int], list[int]]]:
    driver = Driver(engine, scatter=1)
    sessions = driver.start(PROMPTS[: len(params)], params, shape)
    driver.rounds(sessions, count, [shape] * len(sessions))
    return [(s.tokens, s.accepted) for s in sessions]


def replayed_share(passes: RecordedPasses) -> float:
    counts = passes.counts.values()
    replayed = sum(c.replayed for c in counts)
    return replayed / (replayed + sum(c.eager.total() for c in counts))


@pytest.mark.parametrize(
    "kind, shape",
    [("eagle", CHAIN), ("eagle3", CHAIN), ("eagle3", TREE), ("mtp", CHAIN), ("mtp", TREE), ("mtp2", CHAIN)],
)
def test_tokens_and_acceptance_are_those_of_eager_passes(kind: str, shape: DraftShape) -> None:
    target, head = pair(kind)
    expected = run(tiny_engine(target, head), shape)
    engine = tiny_engine(target, head)
    passes = record(engine, shape)
    assert run(engine, shape) == expected
    eager = {name: dict(c.eager) for name, c in passes.counts.items() if c.eager}
    # the modules of a longer chain of modules read each other's rows, so their prompts are not cut into segments
    assert eager == {} if kind != "mtp2" else set(eager) <= {"prompt, head"}
    assert passes.counts["target verify"].replayed > 5


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
def test_drawn_drafts_are_replayed_with_their_distributions(rule: Rule) -> None:
    target = tiny_target()
    head = tiny_head(target, "eagle3")
    params = [
        SamplingParams(temperature=0.9, top_k=30, seed=1, rule=rule),
        SamplingParams(temperature=1.1, seed=2, rule=rule),
    ]
    expected = run(tiny_engine(target, head), CHAIN, params)
    engine = tiny_engine(target, head)
    passes = record(engine, CHAIN)
    assert run(engine, CHAIN, params) == expected
    assert replayed_share(passes) == 1.0


def test_sessions_come_and_go_and_depths_change() -> None:
    """Batches of 1 to 4 rows, shorter chains out of the recorded one, depth 0, and sessions that stop and start."""
    target = tiny_target()
    head = tiny_head(target, "eagle3")
    outcomes = []
    for recorded in (False, True):
        engine = tiny_engine(target, head)
        passes = record(engine, CHAIN) if recorded else None
        driver = Driver(engine)
        early = driver.start(PROMPTS, PARAMS, CHAIN)
        shapes = [CHAIN, DraftShape(2, 0, 1), DraftShape(0, 0, 1)] + [CHAIN] * 5
        driver.rounds(early, 12, shapes)
        driver.rounds(early[:1], 25, [DraftShape(0, 0, 1)] * 8)
        driver.rounds(early[:2], 40, [CHAIN] * 8)
        driver.rounds(early, 60, [CHAIN] * 8)
        outcomes.append([(s.tokens, s.accepted) for s in early])
        if passes:
            assert replayed_share(passes) > 0.99, passes.counts
    assert outcomes[0] == outcomes[1]


def test_what_was_not_recorded_runs_eager_and_is_counted() -> None:
    target = tiny_target()
    head = tiny_head(target, "eagle3")
    engine = tiny_engine(target, head)
    passes = record(engine, CHAIN, rows=2)
    longer, given = DraftShape(6, 0, 1), DraftShape(2, 0, 1, parents=(-1, -1, 0))
    for shape in (longer, TREE, given):
        assert run(engine, shape, count=8) == run(tiny_engine(target, head), shape, count=8)
    reasons = " ".join(passes.counts["draft decode"].eager)
    assert "no shape is chain/greedy/6" in reasons and "tree/9/3/" in reasons and "given tree" in reasons
    assert "no shape holds 3 rows of 7" in passes.counts["target verify"].eager


def test_page_tables_may_be_wider_than_a_session_can_grow() -> None:
    target = tiny_target()
    head = tiny_head(target, "eagle3")
    engine = tiny_engine(target, head)
    passes = record(engine, CHAIN, rows=3, pages=40)  # the driver hands out more
    assert run(engine, CHAIN) == run(tiny_engine(target, head), CHAIN)
    assert replayed_share(passes) == 1.0


def test_prompts_above_the_largest_bucket_run_eager() -> None:
    target = tiny_target()
    head = tiny_head(target, "eagle3")
    engine = tiny_engine(target, head)
    passes = record(engine, CHAIN, prompt_tokens=8)
    assert run(engine, CHAIN) == run(tiny_engine(target, head), CHAIN)
    assert passes.counts["prompt"].eager and passes.counts["prompt, head"].eager


def test_without_capture_everything_runs_eager_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    target = tiny_target()
    head = tiny_head(target, "eagle")
    engine = tiny_engine(target, head)
    assert isinstance(engine.passes, EagerPasses)
    engine.passes = passes = RecordedPasses(
        engine.passes, TapeRecorder(), Sizes(2, 168, engine.info.page_size, CHAIN), engine.device
    )
    assert run(engine, CHAIN) == run(tiny_engine(target, head), CHAIN)
    assert set(passes.counts["target verify"].eager) == {"not captured yet"}
    assert caplog.text.count("target verify runs eager: not captured yet") == 1


def test_all_passes_are_warmed_up_before_the_first_is_recorded() -> None:
    engine, told = tiny_engine(*pair("eagle3")), list[str]()
    passes = record(engine, CHAIN, rows=2, progress=lambda what, done, total: told.append(f"{what}: {done} of {total}"))
    first = next(place for place, line in enumerate(told) if line.startswith("graphs, "))
    assert all(line.startswith("warm-up, ") for line in told[:first])
    assert all(line.startswith("graphs, ") for line in told[first:]) and len(told) == 2 * first
    assert first == sum(len(manager.ladder) for manager in passes.managers)
    assert told[0] == f"warm-up, prompt: 0 of {len(passes.feeding.ladder)}"


@pytest.mark.parametrize(("kind", "taken"), [("eagle3", True), ("mtp", True), ("mtp2", False)])
def test_a_head_that_runs_over_verified_rows_takes_the_targets_states(kind: str, taken: bool) -> None:
    """One refresh then holds for both; modules that look back run over more rows, and have states of their own."""
    passes = record(tiny_engine(*pair(kind)), CHAIN, rows=2)
    theirs = {id(b) for pair_ in passes.verifying.pairs.values() for b in pair_.captured.buffers.values()}
    mine = [graph.state for graph in passes.catching_up.graphs.values()]
    assert mine and all((id(b) in theirs) == taken for state in mine for b in state.buffers.values())
    plans = {id(graph.state.plan) for graph in passes.verifying.graphs.values()}
    assert plans.isdisjoint(id(state.plan) for state in mine)


def test_a_draft_is_not_written_over_by_the_next() -> None:
    engine = tiny_engine(*pair("eagle3"))
    passes, drafts = record(engine, CHAIN), list[tuple[Tensor, Tensor]]()
    draft = passes.draft

    def noted(start: Start, shape: DraftShape) -> Drafted:
        drafted = draft(start, shape)
        drafts.append((drafted.tokens, drafted.tokens.clone()))
        return drafted

    passes.draft = noted  # type: ignore[method-assign]
    run(engine, CHAIN)
    assert len({tuple(kept.flatten().tolist()) for _, kept in drafts}) > 1
    assert all(torch.equal(given, kept) for given, kept in drafts)


@pytest.mark.parametrize(("rows", "prompt_tokens"), [(1, 1024), (32, 64), (300, 8192), (3, 0)])
@pytest.mark.parametrize("shape", [CHAIN, TREE])
def test_the_rungs_of_a_trial_are_all_recorded_shapes(rows: int, prompt_tokens: int, shape: DraftShape) -> None:
    """Or the memory of those that are left out would be given to the KV cache."""
    engine = tiny_engine(*pair("eagle3"))
    assert isinstance(engine.passes, EagerPasses)
    sizes, recorder = Sizes(rows, 40, engine.info.page_size, shape, prompt_tokens), TapeRecorder()

    def shapes(rung: int | None) -> set[tuple[str, GraphShape]]:
        passes = RecordedPasses(engine.passes, recorder, sizes, engine.device, rung)  # type: ignore[arg-type]
        return {(manager.name, shape) for manager in passes.managers for shape in manager.ladder}

    rungs = [shapes(rung) for rung in range(sizes.rungs)]
    assert all(rungs) and set.union(*rungs) == shapes(None)


def test_no_capture_while_serving() -> None:
    target = tiny_target()
    engine = tiny_engine(target, None)
    passes = record(engine, CHAIN, rows=1, prompt_tokens=0)
    with pytest.raises(CaptureError, match="while serving"):
        passes.capture()


def test_client_drafts_of_any_tree_are_verified_by_replay() -> None:
    """A draft that a client made: a tree that fits the recorded tree, with fewer nodes."""
    target = tiny_target()
    head = tiny_head(target, "eagle3")
    tree = Draft((5, 9, 9, 30), (-1, -1, 0, 1))
    outcomes = []
    for recorded in (False, True):
        engine = tiny_engine(target, head)
        passes = record(engine, TREE) if recorded else None
        driver = Driver(engine)
        sessions = driver.start(PROMPTS[:2], PARAMS[:2], TREE)
        driver.rounds(sessions, 20, [TREE] * 2, drafter=lambda s: tree)
        outcomes.append([(s.tokens, s.accepted) for s in sessions])
        if passes:
            assert not passes.counts["target verify"].eager
    assert outcomes[0] == outcomes[1]


def test_no_room_for_a_cache_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphs.memory import CacheSizeError

    def full(*_: object) -> None:
        raise CacheSizeError("no room for a KV cache: use a smaller model")

    monkeypatch.setattr(load, "measure", full)
    with pytest.raises(ConfigError, match="no room for a KV cache"):
        load._measured(None, None, None, None)  # type: ignore[arg-type]


def test_an_unknown_attention_backend_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATOR_ATTENTION", "fast")
    target = tiny_target()
    cache = PagedCache([target.cache_layers], 4, 4, torch.float32)
    with pytest.raises(ConfigError, match="unknown attention backend 'fast': auto, torch or triton"):
        load._engine(EngineInfo("t", "", "none", 61, (), 8, 1, 4, 4, 0, 8), target, None, cache)
