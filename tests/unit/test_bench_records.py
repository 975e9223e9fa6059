"""The report's records: JSON there and back, the published schema, and errors that name the field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speculator.bench import records
from speculator.bench.plain import RecordError
from speculator.bench.records import Figures, Intervals, Report, Settings, Shape

SCHEMA = Path(records.__file__).parent / "schema" / "acceptance-1.json"
FIGURES = Figures(
    2, 4, 9, 8, 5, 2.25, 1.25, 0.625, (0.75, None), (0.75, 0.5), (0.75, 0.5), (1, 2, 1), (4, 4), (3, 2),
    Intervals((2.0, 2.5), survival=((0.5, 1.0), None)),
)  # fmt: skip


def sample() -> Report:
    settings = Settings("t", "h", "eagle3", Shape(2), 0.0, "coupled", 0, 64, 8)
    return Report(records.SCHEMA, "speculator", False, {"commit": "x"}, settings, 0.0, 2.25, FIGURES, {"toy": FIGURES})


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = replace(sample(), groups={"turn": {"1": FIGURES}}, notes=("a",))
    records.write_report(report, tmp_path / "a.json")
    assert records.read_report(tmp_path / "a.json") == report


def test_the_published_schema_is_that_of_the_records() -> None:
    assert json.loads(SCHEMA.read_text()) == records.schema()


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("overall", "tau"), "high", "overall.tau must be of type number"),
        (("overall", "rounds"), 1.5, "overall.rounds must be of type integer"),
        (("settings", "shape"), [], "settings.shape must be an object"),
        (("sets", "toy", "histogram"), 3, "sets.toy.histogram must be a list"),
        (("synthetic",), 1, "synthetic must be of type boolean"),
        (("settings", "colour"), 1, "settings.colour is unknown"),
        (("schema",), "speculator/acceptance-0", "not a report of this version"),
    ],
)
def test_a_wrong_field_is_named(path: tuple[str, ...], value: Any, told: str) -> None:
    found = records.report_to_json(sample())
    place = found
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(RecordError, match=told.replace(".", r"\.")):
        records.report_from_json(found)


def test_a_missing_field_is_named() -> None:
    found = json.loads(json.dumps(records.report_to_json(sample())))
    del found["overall"]["tau"]
    with pytest.raises(RecordError, match=r"overall\.tau is missing"):
        records.report_from_json(found)


def test_a_cut_file_is_no_report(tmp_path: Path) -> None:
    records.write_report(sample(), tmp_path / "a.json")
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text()[:200])
    with pytest.raises(RecordError, match=r"a\.json is no whole JSON file"):
        records.read_report(tmp_path / "a.json")
