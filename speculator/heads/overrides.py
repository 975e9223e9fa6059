"""What was chosen for each field of a head's record, where it came from, and how a user overrides it.

Owns: the typed parsing of `field=value` and the word "choice". Must never know files or tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, get_type_hints

from speculator.errors import ConfigError
from speculator.heads.record import HeadRecord
from target.config import ROPE_TYPES, RopeConfig


@dataclass(frozen=True)
class Choice:
    """One field of the record: its value, where that came from, and what else a file like this could mean.

    `alternatives` are override texts worth probing; `ambiguous` says that the file itself does not settle the field.
    """

    field: str
    value: object
    source: str
    alternatives: tuple[str, ...] = ()
    ambiguous: bool = False

    def __str__(self) -> str:
        text = f"{self.field} = {show(self.value)}  [{self.source}]"
        return f"{text}  AMBIGUOUS, could be {' or '.join(self.alternatives)}" if self.ambiguous else text


class Overrides(NamedTuple):
    """Parsed overrides: whole fields, and parts of the rope."""

    fields: Mapping[str, Any]
    rope: Mapping[str, Any]

    def names(self) -> tuple[str, ...]:
        return (*self.fields, *(f"rope.{name}" for name in self.rope))

    def apply(self, record: HeadRecord) -> HeadRecord:
        return replace(record, **self.fields, rope=replace(record.rope, **self.rope))


def show(value: object) -> str:
    """A value in the spelling that an override takes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, RopeConfig):
        scaling = f" {dict(value.scaling)}" if value.kind != "default" else ""
        return f"{value.kind}, theta {value.theta:g}{scaling}"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:g}"
    return str(int(value)) if isinstance(value, float) else str(value)


def parse_overrides(overrides: Mapping[str, object]) -> Overrides:
    """`{"norm_before_residual": "true", "boundaries": "2,4,6", "rope.theta": "10000"}` -> typed values.

    A configuration file may give the values themselves: true, [2, 4, 6], 10000.
    ConfigError names the known fields when one is unknown, and the expected form when a value does not parse.
    """
    whole: dict[str, Any] = {}
    rope: dict[str, Any] = {}
    for name, value in overrides.items():
        place, key = (rope, name.removeprefix("rope.")) if name.startswith("rope.") else (whole, name)
        place[key] = _parse(name, _text(value))
    return Overrides(whole, rope)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    if isinstance(value, float):
        return repr(value)
    return show(tuple(value) if isinstance(value, list) else value).strip()


def override_fields() -> dict[str, type | object]:
    """Every name that can be overridden, with its type."""
    hints = get_type_hints(HeadRecord)
    known = {f.name: hints[f.name] for f in fields(HeadRecord) if f.name not in ("kind", "rope")}
    return known | {"rope.theta": float, "rope.kind": str, "rope.scaling": dict, "rope.max_position": int}


def _parse(name: str, text: str) -> Any:
    known = override_fields()
    if name not in known:
        raise ConfigError(f"a head has no field {name!r}; known fields are {', '.join(sorted(known))}")
    parser, form = _PARSERS[known[name]]
    try:
        value = parser(text)
    except ValueError:
        raise ConfigError(f"{name}={text}: expected {form}") from None
    if name == "rope.kind" and value not in ROPE_TYPES:
        raise ConfigError(f"{name}={text}: expected one of {', '.join(ROPE_TYPES)}")
    return value


def _bool(text: str) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]


def _checked_bool(text: str) -> bool:
    try:
        return _bool(text)
    except KeyError:
        raise ValueError(text) from None


def _ints(text: str) -> tuple[int, ...]:
    return () if text in ("", "none") else tuple(int(part) for part in text.strip("()[]").split(","))


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


_PARSERS: dict[object, tuple[Callable[[str], Any], str]] = {
    bool: (_checked_bool, "true or false"),
    int: (int, "an integer"),
    float: (float, "a number"),
    str: (str, "a word"),
    dict: (_object, "a JSON object"),
    tuple[int, ...]: (_ints, "integers like 2,16,29 or none"),
}
