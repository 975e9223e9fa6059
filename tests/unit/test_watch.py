"""The drift alarm: a band that is left is noticed, noise and clustered prompts are not, and bad baselines are named."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric
from report_samples import full_report

from speculator.answers import Acceptance
from speculator.bench.fake import EchoEngine
from speculator.bench.records import SCHEMA, write_report
from speculator.core import DrafterCore
from speculator.errors import ConfigError
from speculator.metrics import ServiceMetrics
from speculator.session import SessionSpec
from speculator.totals import Confidence
from speculator.types import Draft, StoppingParams
from speculator.watch import ABOVE, BELOW, INSIDE, AcceptanceWatch, Band, Detector, Drift, bands_of_report, watch_of

DEPLOY = Path(__file__).parents[2] / "deploy"

RATES = (0.7, 0.6, 0.5)  # conditional acceptance of three positions
SURVIVAL = (0.7, 0.42, 0.21)
BANDS = tuple(Band(rate - 0.02, rate + 0.02) for rate in SURVIVAL)


def one_round(dice: random.Random, rates: Iterable[float]) -> int:
    accepted = 0
    for rate in rates:
        if dice.random() >= rate:
            break
        accepted += 1
    return accepted


def rounds(dice: random.Random, count: int, rates: tuple[float, ...]) -> Iterator[tuple[int, int]]:
    return ((len(rates), one_round(dice, rates)) for _ in range(count))


def run(watch: AcceptanceWatch, counts: Acceptance, played: Iterable[tuple[int, int]], every: int = 40) -> list[Drift]:
    """Plays rounds (judged, accepted) into the counts; the watch looks at them every `every` rounds."""
    found = []
    for index, (judged, accepted) in enumerate(played):
        counts.record(judged, judged, accepted)
        if index % every == every - 1:
            found += watch.observe(counts)
    return found


def side(watch: AcceptanceWatch, position: int) -> int:
    return next(state.side for state in watch.states() if state.position == position)


@pytest.mark.parametrize("bands", [BANDS, ()], ids=["given", "learnt"])
def test_noise_raises_no_alarm(bands: tuple[Band, ...]) -> None:
    dice = random.Random(1)
    watch = AcceptanceWatch(bands, learn=4_096, rounds_between_false_alarms=1e7)
    assert run(watch, Acceptance(), rounds(dice, 60_000, RATES)) == []
    for state, rate in zip(watch.states(), SURVIVAL, strict=True):
        assert state.band is not None and state.band.low <= rate <= state.band.high
        assert state.recent == pytest.approx(rate, abs=0.1)


@pytest.mark.parametrize("bands", [BANDS, ()], ids=["given", "learnt"])
def test_a_drop_at_one_position_is_noticed_there_and_once(
    bands: tuple[Band, ...], caplog: pytest.LogCaptureFixture
) -> None:
    dice, counts, watch = random.Random(2), Acceptance(), AcceptanceWatch(bands, learn=4_096)
    assert run(watch, counts, rounds(dice, 8_000, RATES)) == []
    with caplog.at_level(logging.WARNING):
        drifts = run(watch, counts, rounds(dice, 4_000, (0.7, 0.6, 0.2)))
    assert [(drift.position, drift.side) for drift in drifts] == [(3, BELOW)]
    assert len(caplog.records) == 1 and "position 3 left its band" in caplog.text
    assert [side(watch, position) for position in (1, 2, 3)] == [INSIDE, INSIDE, BELOW]


def test_a_rise_is_noticed_too() -> None:
    watch = AcceptanceWatch(BANDS)
    drifts = run(watch, Acceptance(), rounds(random.Random(3), 4_000, (0.95, 0.6, 0.5)))
    assert (drifts[0].position, drifts[0].side) == (1, ABOVE)


def test_the_alarm_ends_when_acceptance_comes_back() -> None:
    dice, counts, watch = random.Random(4), Acceptance(), AcceptanceWatch(BANDS[:1])
    assert run(watch, counts, rounds(dice, 3_000, (0.4,)))
    assert side(watch, 1) == BELOW
    assert run(watch, counts, rounds(dice, 8_000, (0.7,))) == []
    assert side(watch, 1) == INSIDE
    assert [drift.position for drift in run(watch, counts, rounds(dice, 3_000, (0.4,)))] == [1]


def test_false_alarms_are_no_more_frequent_than_stated() -> None:
    """At the very edge of the band, where the bound is tight: the mean run to an alarm of a low threshold."""
    dice, threshold, lengths = random.Random(5), 200.0, []
    for _ in range(60):
        detector, length = Detector(0.5, 1.0), 0
        while detector.observe(sum(dice.random() < 0.5 for _ in range(10)), 10) < threshold:
            length += 10
        lengths.append(length + 10)
    assert sum(lengths) / len(lengths) >= threshold


def clustered(dice: random.Random, texts: int) -> Iterator[tuple[int, int]]:
    """Texts of 50 rounds, each with its own rate around 0.6."""
    for _ in range(texts):
        rate = dice.betavariate(6, 4)
        yield from ((1, int(dice.random() < rate)) for _ in range(50))


def test_rounds_of_a_text_being_alike_is_not_drift() -> None:
    counts, watch = Acceptance(), AcceptanceWatch(learn=16_384)
    assert run(watch, counts, clustered(random.Random(6), 2_000), every=25) == []
    band = watch.states()[0].band
    assert band is not None and band.dispersion > 1.5
    assert run(watch, counts, rounds(random.Random(7), 20_000, (0.4,)), every=25)


def test_a_band_is_learnt_only_from_enough_rounds() -> None:
    watch, counts = AcceptanceWatch(learn=1_000), Acceptance()
    run(watch, counts, rounds(random.Random(8), 400, RATES))
    assert [state.band for state in watch.states()] == [None] * 3
    run(watch, counts, rounds(random.Random(8), 1_000, RATES))
    assert all(state.band for state in watch.states())


def test_counts_read_between_two_updates_lose_nothing() -> None:
    watch = AcceptanceWatch(BANDS[:1])
    watch.observe(Acceptance(rounds=[0, 10], judged=[0, 9]))  # the tenth hit has no round yet
    watch.observe(Acceptance(rounds=[0, 10], judged=[0, 10]))
    assert watch.states()[0].recent == 1.0


@pytest.mark.parametrize("band", [Band(0.0, 1.0), Band(0.0, 0.02), Band(0.98, 1.0)])
def test_rates_of_nought_and_one_have_bands(band: Band) -> None:
    watch = AcceptanceWatch((band,))
    rate = 0.0 if band.high < 1 else 1.0
    assert run(watch, Acceptance(), rounds(random.Random(9), 5_000, (rate,))) == []


# ---- baselines ----


def saved(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({"schema": SCHEMA, "synthetic": False, "prompts": ROWS, **changes}), encoding="utf-8")
    return path


ROWS = [{"accepted_at": [35 + side, 21, 10], "drafted_at": [50, 50, 50]} for side in (4, -4) * 20]


def test_bands_come_from_a_report(tmp_path: Path) -> None:
    bands = bands_of_report(saved(tmp_path / "r.json"))
    assert [round((band.low + band.high) / 2, 3) for band in bands] == [0.7, 0.42, 0.2]
    assert bands[0].dispersion > 1.3 and bands[1].dispersion == 1.0
    assert bands[0].high - bands[0].low > bands[1].high - bands[1].low
    assert bands == bands_of_report(saved(tmp_path / "r.json", prompts=[*ROWS, {"accepted_at": [], "drafted_at": []}]))


def test_a_report_of_the_benchmark_is_such_a_report(tmp_path: Path) -> None:
    write_report(full_report(), tmp_path / "r.json")
    assert len(bands_of_report(tmp_path / "r.json")) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"synthetic": True}, "synthetic"),
        ({"prompts": []}, "prompts"),
        ({"prompts": [{"accepted_at": [1]}]}, "drafted_at"),
        ({"prompts": [{"accepted_at": [1], "drafted_at": [4, 4]}]}, r"prompts\[0\]\.accepted_at"),
        ({"prompts": [*ROWS, 3]}, r"prompts\[40\]"),
        ({"prompts": [{"accepted_at": [], "drafted_at": []}]}, "drafts"),
        ({"prompts": "many"}, "prompts"),
        ({"schema": "speculator/acceptance-0"}, "schema"),
    ],
)
def test_wrong_baselines_are_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        bands_of_report(saved(tmp_path / "r.json", **changes))
    assert "r.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_baseline_that_is_no_file_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        bands_of_report(tmp_path / "missing.json")
    (tmp_path / "cut.json").write_text('{"synthetic": fal')
    with pytest.raises(ConfigError, match=r"cut\.json is no whole JSON"):
        bands_of_report(tmp_path / "cut.json")


def test_a_configuration_asks_for_a_watch(tmp_path: Path) -> None:
    baseline = str(saved(tmp_path / "r.json"))
    assert watch_of(baseline, 0) is None
    given, learnt = watch_of(baseline, 1e6), watch_of("", 1e6)
    assert given is not None and [state.position for state in given.states()] == [1, 2, 3]
    assert learnt is not None and learnt.states() == []
    assert given.rounds_between_false_alarms == 1e6


# ---- what Prometheus and Grafana are told ----


def scraped(watch: AcceptanceWatch | None) -> dict[str, Metric]:
    core = DrafterCore(EchoEngine())
    core.totals.acceptance.record(3, 3, 2)
    core.totals.reject("SERVER_FULL")
    return {family.name: family for family in ServiceMetrics(core, {"version": "1"}, watch).collect()}


def test_a_scrape_shows_the_head_and_the_drift() -> None:
    watch = AcceptanceWatch(BANDS[:2])
    run(watch, Acceptance(), rounds(random.Random(2), 4_000, (0.4, 1.0)))
    found = scraped(watch)
    assert found["speculator_build_info"].samples[0].labels == {"version": "1", "head": "echo"}
    drift = {sample.labels["position"]: sample.value for sample in found["speculator_acceptance_drift"].samples}
    assert drift == {"1": BELOW, "2": INSIDE}
    assert found["speculator_acceptance_recent"].samples[0].value == pytest.approx(0.4, abs=0.1)
    low = found["speculator_acceptance_band"].samples[0]
    assert (low.labels, low.value) == ({"position": "1", "bound": "low"}, BANDS[0].low)


async def test_a_running_core_feeds_its_watch() -> None:
    """The engine accepts everything, which is far above the band."""
    core = DrafterCore(EchoEngine(), watch=AcceptanceWatch((Band(0.1, 0.2),)))
    await core.start()
    try:
        spec = SessionSpec("s", "", (5, 6, 7), stopping=StoppingParams(2_000))
        _ = [step async for step in core.generate(spec)]
        while not (core.watch and core.watch.states() and core.watch.states()[0].side):
            await asyncio.sleep(0.01)
        assert core.watch.states()[0].side == ABOVE
    finally:
        await core.stop()


def test_confidence_is_counted_up_to_the_first_rejection() -> None:
    counts = Confidence()
    chain = Draft((1, 2, 3), (-1, 0, 1), tuple(math.log(q) for q in (1.0, 0.55, 0.31)))
    counts.record(chain, 3, 1)  # the third token was never judged
    counts.record(chain, 1, 1)  # the text ended after the first
    counts.record(Draft((1, 2), (-1, -1), (-0.1, -0.2)), 1, 1)  # a tree
    counts.record(Draft((1,), (-1,)), 1, 1)  # from a client
    counts.record(Draft((1,), (-1,), (math.nan,)), 1, 0)  # from a head whose logits overflowed
    assert sum(counts.judged) == 3
    counts.record(Draft((1,), (-1,), (1e-6,)), 1, 1)  # a log q that rounding put above 0
    assert counts.judged == [0, 0, 0, 0, 0, 1, 0, 0, 0, 3]
    assert counts.accepted == [0, 0, 0, 0, 0, 0, 0, 0, 0, 3]


def test_a_scrape_shows_calibration() -> None:
    core = DrafterCore(EchoEngine())
    core.totals.confidence.record(Draft((1,), (-1,), (math.log(0.55),)), 1, 1)
    found = {family.name: family for family in ServiceMetrics(core, {}).collect()}
    for name in ("judged", "accepted"):
        samples = found[f"speculator_confidence_{name}_tokens"].samples
        assert {s.labels["bin"]: s.value for s in samples if s.value} == {"0.5": 1}


def test_without_a_watch_a_scrape_shows_no_drift() -> None:
    assert not any(name.startswith("speculator_acceptance_") for name in scraped(None))


def exported() -> set[str]:
    names = {sample.name for family in scraped(AcceptanceWatch()).values() for sample in family.samples}
    families = {name + end for name, family in scraped(AcceptanceWatch()).items() for end in ENDS[family.type]}
    return names | families | {"grpc_server_handled_total"}


ENDS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@pytest.mark.parametrize("file", ["prometheus/rules.yml", "grafana/dashboards/speculator.json"])
def test_rules_and_dashboard_ask_for_metrics_that_exist(file: str) -> None:
    text = (DEPLOY / file).read_text(encoding="utf-8")
    asked = set(re.findall(r"\b(?:speculator|grpc_server)_\w+", text))
    assert len(asked) >= 8 and asked <= exported(), asked - exported()


def test_every_panel_asks_the_chosen_source_and_ids_differ() -> None:
    board = json.loads((DEPLOY / "grafana/dashboards/speculator.json").read_text(encoding="utf-8"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    targets = [target for panel in panels for target in panel.get("targets", ())]
    assert {target["datasource"]["uid"] for target in targets} == {"${datasource}"}
    assert all(target["expr"].count("(") == target["expr"].count(")") for target in targets)
