"""What ranks run in the tests of gangs. Apart from the tests, because each rank imports it anew."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from graphs.agreement import DisagreementError
from graphs.errors import CaptureMemoryError
from speculator.config import Config, load
from speculator.errors import SpeculatorError
from speculator.load import load_engine
from speculator.ranks.data import follower
from speculator.ranks.engine import Follower, LeadEngine
from speculator.ranks.gang import Hub, Limits, Member, Watch
from speculator.ranks.pulse import Pulse
from speculator.ranks.team import Team
from speculator.types import DraftShape, Rule, SamplingParams
from target.experts import EXPERTS
from target.parallel import PARTS, TENSOR
from tests.unit.engines import Driver

PROMPTS = ((5, 9, 2, 40, 3, 8, 52, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21), (7, 1), (30, 31, 32, 33))
PARAMS = (SamplingParams(), SamplingParams(temperature=0.9, seed=2**64 - 3), SamplingParams(temperature=0.7, top_k=9))
CHAIN, TREE = DraftShape(3), DraftShape(3, 6, 2)
COUNT = 24


def config_of(folder: str, **sets: object) -> Config:
    """`sets` without a dot in their names are of the model."""
    given = {"target": f"{folder}/target", "head": f"{folder}/eagle3", **sets}
    named = {key if "." in key else f"model.{key}": value for key, value in given.items()}
    fixed = {"engine.max_sessions": 4, "engine.prefill_chunk": 8, "engine.max_context": 256, "draft.depth": 3}
    return load(None, [f"{key}={value}" for key, value in {**fixed, **named}.items()])


def rounds(engine: Any, shapes: list[DraftShape | None]) -> list[Any]:
    """Committed tokens and accepted counts of three sessions; two of them end and open again."""
    found: list[Any] = []
    for again in range(2):
        driver = Driver(engine, scatter=again)
        sessions = driver.start(PROMPTS, PARAMS, shapes[0])
        driver.rounds(sessions, COUNT, shapes)
        found += [[s.produced, s.accepted] for s in sessions]
        for s in sessions:
            engine.close(s.row)
    return found


def in_gang(rank: int, size: int, config: Config) -> tuple[Any, Team]:
    torch.set_num_threads(1)
    team = Team.build(size, torch.device("cpu"), 20.0, lambda why: why)
    return load_engine(config, None, team), team


def gang(rank: int, folder: str, size: int, trees: bool = False, sets: dict[str, object] | None = None) -> Any:
    """Rank 0 serves sessions; what it committed, and how many passes ran as graphs."""
    engine, team = in_gang(rank, size, config_of(folder, **(sets or {})))
    if rank:
        Follower(engine, team.channel).run()
        return "followed"
    assert isinstance(engine, LeadEngine)
    shapes: list[DraftShape | None] = [TREE] * 3 if trees else [CHAIN, DraftShape(2), CHAIN]
    found = rounds(engine, shapes)
    engine.end()
    return [found, {name: list(counts) for name, counts in engine.passes_run().items()}]


def wrong_way(rank: int, folder: str) -> Any:
    """Rank 1 has other weights from the second step on."""
    engine, team = in_gang(rank, 2, config_of(folder))
    if rank == 0:
        try:
            return rounds(engine, [CHAIN] * 3)
        except SpeculatorError as error:
            return [error.reason, error.message]
    step = engine.step

    def astray(steps: Any) -> Any:
        found = step(steps)
        return [result._replace(tokens=(1,)) for result in found]

    engine.step = astray
    Follower(engine, team.channel).run()
    return "followed"


def rejected(rank: int, folder: str) -> Any:
    """A step that every rank refuses leaves all of them able to go on."""
    engine, team = in_gang(rank, 2, config_of(folder))
    if rank:
        Follower(engine, team.channel).run()
        return "followed"
    driver = Driver(engine)
    sampled = SamplingParams(temperature=1.0, rule=Rule.REJECTION)
    [session] = driver.start([PROMPTS[0]], [sampled], CHAIN)
    held, failed = session.draft, ""
    session.draft = replace(held, draft_id=10**6)
    try:
        driver.rounds([session], COUNT, [CHAIN])
    except SpeculatorError as error:
        failed = error.reason
    session.draft = held
    driver.rounds([session], COUNT, [CHAIN])
    engine.end()
    return [failed, len(session.produced) >= COUNT]


def votes(rank: int) -> Any:
    """The least of all ranks' pages, and captures that fail on no rank, on all, on one."""
    team = Team.build(2, torch.device("cpu"), 20.0, lambda why: why)

    def record(failing: tuple[int, ...]) -> Callable[[Callable[[str, int, int], None]], None]:
        def capture(vote: Callable[[str, int, int], None]) -> None:
            vote("first", 0, 2)
            if rank in failing:
                raise CaptureMemoryError("no room for the first shape")
            vote("second", 1, 2)

        return capture

    said: list[Any] = [team.smallest(100 - rank, "pages"), team.capture(record(())), team.capture(record((0, 1)))]
    try:
        team.capture(record((1,)))
    except DisagreementError as error:
        said.append(str(error))
    return said


WATCHED = Limits(silent=10.0, stalled=1.5)
NAP = 0.4  # seconds, before every part of a layer; a pass takes many


def watched(rank: int, folder: str, kind: str, sets: dict[str, object], hangs_at: int) -> Any:
    """Rank 1 sleeps before each part of a layer, at one of them for ever; why the gang was lost is written down."""
    torch.set_num_threads(1)
    pulse, stages = Pulse(), 2 if kind == "stages" else 1
    watch = watch_over(rank, folder, pulse)
    axis = EXPERTS if kind == "experts" else TENSOR
    team = Team.build(2 // stages, torch.device("cpu"), 60.0, told(watch), pulse, stages, axis)
    engine = load_engine(config_of(folder, **sets), None, team)
    if rank:
        sleep_in(engine, hangs_at)
        follower(engine, team).run()
        return "followed"
    assert isinstance(engine, LeadEngine)
    watch.serving()
    driver = Driver(engine)
    sessions = driver.start(PROMPTS[2:], PARAMS[:1], CHAIN)
    driver.rounds(sessions, 2, [CHAIN])
    engine.end()
    watch.end()
    return [list(s.produced) for s in sessions]


def watch_over(rank: int, folder: str, pulse: Pulse) -> Watch:
    def lost(why: str) -> None:
        Path(folder, f"why-{rank}").write_text(why)
        os._exit(0)

    hub = Hub(2, pulse, lost, "token", limits=WATCHED) if rank == 0 else None
    addresses = [hub.address if hub else ""]
    dist.broadcast_object_list(addresses)
    watch: Watch = hub or Member(1, addresses[0], "token", pulse, lost, WATCHED)
    watch.start()
    return watch


def told(watch: Watch) -> Callable[[str], str]:
    """What rank 0 does about a failure: the watch may know whose fault it is."""
    return watch.fail if isinstance(watch, Hub) else lambda why: why


def sleep_in(engine: Any, hangs_at: int) -> None:
    calls = iter(range(10**6))

    def sleep(*inputs: Any) -> None:
        time.sleep(NAP)
        if next(calls) == hangs_at:
            threading.Event().wait()

    for model in (engine.model, engine.head):
        for part in model.modules() if model else ():
            if isinstance(part, PARTS):
                part.register_forward_pre_hook(sleep)
