"""Frozen dataclasses from JSON values and back, and the JSON schema that they stand for.

Owns: checking types field by field, with the path of the field that is wrong. Must never know what a record means.
Field types may be bool, int, float, str, Any, `X | None`, tuple[X, ...], tuple[X, Y], Mapping[str, X] and dataclasses.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from speculator.errors import InvalidArgumentError

Record = TypeVar("Record")
WORDS = {bool: "boolean", int: "integer", float: "number", str: "string"}


class RecordError(InvalidArgumentError):
    """A JSON value that is not the record it should be; `field` is the path of the culprit."""

    reason = "BAD_RECORD"


def to_json(value: Any) -> Any:
    """The JSON value of a record: dicts, lists, numbers, strings, None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    return [to_json(inner) for inner in value] if isinstance(value, tuple | list) else value


def from_json(kind: type[Record], value: Any, where: str = "") -> Record:
    """A record of the dataclass `kind`; RecordError names the first field that is missing, unknown or of a wrong type.

    Fields with a default may be missing.
    """
    found: Record = _read(kind, value, where)
    return found


def schema_of(kind: type[Any], title: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a dataclass."""
    found: dict[str, Any] = {}
    root = _schema(kind, found)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **root, "$defs": found}


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(next(arg for arg in inner if arg is not type(None)), value, where)
    if origin is tuple:
        return _tuple(inner, value, where)
    if origin is not None:
        _expect(isinstance(value, dict), "an object", value, where)
        return {key: _read(inner[1], one, _below(where, key)) for key, one in value.items()}
    fits = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    _expect(fits, f"of type {WORDS[kind]}", value, where)
    return value


def _record(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise RecordError(f"the field {_below(where, name)} is unknown", field=_below(where, name))
    for name, field in fields.items():
        if name not in value and _required(field):
            raise RecordError(f"the field {_below(where, name)} is missing", field=_below(where, name))
    hints = _hints(kind)
    return kind(**{name: _read(hints[name], one, _below(where, name)) for name, one in value.items()})


def _tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), "a list", value, where)
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    _expect(len(kinds) == len(value), f"a list of {len(kinds)}", value, where)
    return tuple(_read(kind, one, f"{where}[{i}]") for i, (kind, one) in enumerate(zip(kinds, value, strict=True)))


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _below(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _expect(fits: bool, what: str, value: Any, where: str) -> None:
    if not fits:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        raise RecordError(f"{where or 'the record'} must be {what}, not {shown}", field=where)


def _schema(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    if kind is Any:
        return {}
    if dataclasses.is_dataclass(kind):
        return _object_schema(kind, found)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if arg is type(None) else _schema(arg, found) for arg in inner]}
    if origin is tuple and inner[-1] is Ellipsis:
        return {"type": "array", "items": _schema(inner[0], found)}
    if origin is tuple:
        parts = [_schema(arg, found) for arg in inner]
        return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
    if origin is not None:
        return {"type": "object", "additionalProperties": _schema(inner[1], found)}
    return {"type": WORDS[kind]}


def _object_schema(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in found:
        found[name] = {}  # keeps its place while its fields are described
        hints = _hints(kind)
        fields = dataclasses.fields(kind)
        found[name] = {
            "type": "object",
            "description": " ".join((kind.__doc__ or "").split()),
            "properties": {field.name: _schema(hints[field.name], found) for field in fields},
            "required": [field.name for field in fields if _required(field)],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}
