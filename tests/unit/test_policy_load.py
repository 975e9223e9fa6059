"""From a configuration to a depth policy, on real tiny engines.

Owns: when there is one, where its costs come from, and what a reader is told when they cannot be had.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import engines
import pytest
from hybrid_models import hybrid_engine, hybrid_head, hybrid_target

from graphs.tape import TapeRecorder
from speculator.cli import main
from speculator.cli.models import Flags
from speculator.config import load
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.policy import NOTHING
from speculator.policy_load import depth_policy
from speculator.recorded import Sizes
from speculator.round import Rounds
from speculator.types import DraftShape

MEASURED = ("policy.measure=on", "policy.measure_seconds=0", "draft.depth=2")


def tiny(head: bool = True) -> Engine:
    target = engines.tiny_target()
    return engines.tiny_engine(target, engines.tiny_head(target, "eagle3") if head else None, rows=2)


def test_measured_costs_make_a_policy_and_leave_the_engine_empty() -> None:
    engine = tiny()
    policy = depth_policy(load(None, MEASURED), engine)
    assert policy is not None and policy.shapes == (NOTHING, DraftShape(1), DraftShape(2))
    assert all(cost.seconds > 0 for cost in policy.costs.costs)
    assert not any(engine.rows.speculate), "its rows are closed again"


@pytest.mark.parametrize("more", [(), ("policy.mode=off",), ("draft.depth=0",)])
def test_there_is_none_without_costs_or_drafts(more: tuple[str, ...]) -> None:
    given = (*MEASURED, *more) if more else ()
    assert depth_policy(load(None, given), tiny()) is None


def test_there_is_none_without_a_head() -> None:
    assert depth_policy(load(None, MEASURED), tiny(head=False)) is None


def test_costs_are_measured_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(None, [*MEASURED, f"policy.costs={tmp_path / 'costs.json'}"])
    first = depth_policy(config, tiny())
    monkeypatch.setattr("speculator.policy_load.measure_costs", None)
    second = depth_policy(config, tiny())
    assert first is not None and second is not None and second.costs == first.costs


def test_costs_of_another_pair_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    config = load(None, [*MEASURED, f"policy.costs={path}"])
    depth_policy(config, tiny())
    found = json.loads(path.read_text())
    found["subject"]["target"] = "another"
    path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="was measured with target 'another', not 'tiny'"):
        depth_policy(config, tiny())


def test_costs_that_are_not_there_and_may_not_be_measured_are_a_sentence(tmp_path: Path) -> None:
    config = load(None, ["policy.measure=off", f"policy.costs={tmp_path / 'none.json'}"])
    with pytest.raises(ConfigError, match=r"none\.json is not there, and policy\.measure is off"):
        depth_policy(config, tiny())


def test_where_rounds_are_recorded_only_their_depths_are_chosen_from() -> None:
    engine = tiny()
    recorder = TapeRecorder()
    sizes = Sizes(1, 130, 4, DraftShape(4))
    engine.rounds = Rounds(engine.passes, recorder, sizes, engine.cache, engine.rows, engine.lookback, (0, 2))
    config = load(None, [*MEASURED, "draft.depth=4", "graphs.mode=round", "graphs.depths=0,2"])
    policy = depth_policy(config, engine)
    assert policy is not None and policy.shapes == (NOTHING, DraftShape(2), DraftShape(4))


def test_a_target_with_recurrent_layers_is_measured_too() -> None:
    target = hybrid_target("dense")
    engine = hybrid_engine(target, hybrid_head(target, "eagle3"))
    policy = depth_policy(load(None, MEASURED), engine)
    assert policy is not None and len(policy.costs.costs) >= 3


def test_costs_that_cannot_be_had_end_the_policy_and_not_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("No round could be timed.")

    monkeypatch.setattr("speculator.policy_load.measure_costs", refuse)
    engine = tiny()
    with pytest.raises(ConfigError, match="No round"):
        depth_policy(load(None, MEASURED), engine)
    monkeypatch.setattr("speculator.policy_load._measures", lambda config, device: True)
    with caplog.at_level(logging.WARNING):
        assert depth_policy(load(None, ["draft.depth=2"]), engine) is None
    assert "always as deep as configured: No round could be timed." in caplog.text


@pytest.mark.parametrize(
    ("words", "mode"), [([], "auto"), (["--policy", "off"], "off"), (["--policy", "auto"], "auto")]
)
def test_serve_has_a_flag_for_it(words: list[str], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Flags] = []
    monkeypatch.setattr("speculator.cli.run.run_server", seen.append)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", "0", "--set", "draft.depth=2", *words])
    assert not ended.value.code
    config = load(None, seen[0].overrides)
    assert config.policy.mode == mode and config.server.port == 0 and config.draft.depth == 2


@pytest.mark.parametrize("bad", ["policy.mode=deep", "policy.measure_seconds=-1", "policy.measure=perhaps"])
def test_wrong_keys_are_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="policy"):
        load(None, [bad])
