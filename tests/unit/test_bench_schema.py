"""The published schema is a schema: reports validate against it, damaged ones do not; definitions are published too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from report_samples import full_report, report
from rich.console import Console

from speculator.bench import records
from speculator.bench.definitions import DEFINITIONS, markdown
from speculator.bench.records import report_to_json
from speculator.bench.report.terminal import show

SCHEMA: dict[str, Any] = json.loads((Path(records.__file__).parent / "schema" / "acceptance-1.json").read_text())
KNOWN = {
    "$schema", "$id", "title", "$defs", "$ref", "description", "type", "properties", "required",
    "additionalProperties", "anyOf", "items", "prefixItems", "minItems", "maxItems",
}  # fmt: skip
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "null": lambda v: v is None,
}


def errors(value: Any, schema: dict[str, Any], where: str = "report") -> Iterator[str]:
    """What JSON Schema (draft 2020-12) has against a value, for the keywords that the schema uses."""
    if "$ref" in schema:
        yield from errors(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], where)
    if "anyOf" in schema and all(list(errors(value, part, where)) for part in schema["anyOf"]):
        yield f"{where}: fits none"
    if "type" in schema and not TYPES[schema["type"]](value):
        yield f"{where}: no {schema['type']}"
    elif isinstance(value, dict):
        yield from _object_errors(value, schema, where)
    elif isinstance(value, list):
        yield from _list_errors(value, schema, where)


def _object_errors(value: dict[str, Any], schema: dict[str, Any], where: str) -> Iterator[str]:
    yield from (f"{where}.{name}: missing" for name in schema.get("required", ()) if name not in value)
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, inner in value.items():
        if name in known:
            yield from errors(inner, known[name], f"{where}.{name}")
        elif rest is False:
            yield f"{where}.{name}: unknown"
        elif isinstance(rest, dict):
            yield from errors(inner, rest, f"{where}.{name}")


def _list_errors(value: list[Any], schema: dict[str, Any], where: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{where}: {len(value)} items"
    for i, inner in enumerate(value):
        parts = schema.get("prefixItems", ())
        yield from errors(inner, parts[i] if i < len(parts) else schema.get("items", {}), f"{where}[{i}]")


def keywords(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for name, inner in schema.items():
            yield name
            inside = inner.values() if name in ("properties", "$defs") else [inner]
            for one in inside:
                yield from keywords(one)
    elif isinstance(schema, list):
        for one in schema:
            yield from keywords(one)


def through_a_file(made: records.Report) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(report_to_json(made)))
    return found


def test_only_keywords_that_are_checked_here_are_used() -> None:
    assert set(keywords(SCHEMA)) <= KNOWN


@pytest.mark.parametrize("made", [report(), full_report()], ids=["small", "full"])
def test_reports_validate(made: records.Report) -> None:
    assert list(errors(through_a_file(made), SCHEMA)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("overall", "tau"), "2"),
        (("overall", "rounds"), 1.5),
        (("overall", "intervals", "tau"), [1.0]),
        (("time", "ledger", "commit"), None),
        (("time", "ledger", "colour"), 1.0),
        (("settings", "shape"), []),
        (("sets",), []),
        (("synthetic",), 0),
        (("notes",), [1]),
    ],
)
def test_damaged_reports_do_not(path: tuple[str, ...], value: Any) -> None:
    found = through_a_file(full_report())
    place = found
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert len(list(errors(found, SCHEMA))) >= 1
    del place[path[-1]]
    missing = list(errors(found, SCHEMA))
    assert missing == [] or all(text.endswith("missing") for text in missing)


def test_the_docs_have_the_definitions_as_they_are_printed() -> None:
    docs = (Path(__file__).resolve().parents[2] / "docs" / "acceptance.md").read_text(encoding="utf-8")
    for table in markdown().split("\n\n"):
        assert table in docs


def test_definitions_and_names_are_printed_with_the_figures() -> None:
    out = StringIO()
    show(replace(full_report(), definitions=DEFINITIONS), Console(file=out, width=250))
    assert all(text[:60] in out.getvalue() for text in DEFINITIONS.values())
    assert "mean acceptance length" in out.getvalue()
