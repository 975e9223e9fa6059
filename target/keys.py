"""Reads single keys of a published config, with errors that name the file and the key.

Must never know what a key means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from target.errors import CheckpointError

Raw = Mapping[str, Any]
MOST = 1 << 27  # no published size is near it; beyond it only an error of another kind would come


def read_int(raw: Raw, key: str, where: str, default: int | None = None, least: int = 1) -> int:
    """An integer from `least` to MOST; a key that is absent or null takes the default, where there is one."""
    value = default if raw.get(key) is None else raw[key]
    if type(value) is not int or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of {least} or more"
        raise CheckpointError(f"{where}: {key} must be {kind}, got {value!r}")
    if value > MOST:
        raise CheckpointError(f"{where}: {key} must be at most {MOST}, got {str(value)[:20]}")
    return value


def read_number(raw: Raw, key: str, where: str, default: float | None = None) -> float:
    """A finite number above zero."""
    value: Any = default if raw.get(key) is None else raw[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {key} must be a positive number, got {value!r}")
    return float(value)


def read_ids(raw: Raw, key: str, where: str) -> tuple[int, ...]:
    """None, one id or a list of ids."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        raise CheckpointError(f"{where}: {key} must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def require(raw: Raw, key: str, where: str, *allowed: object) -> None:
    """CheckpointError unless the key is absent, null, or one of the values that are supported."""
    value = raw.get(key)
    if value is not None and value not in allowed:
        known = " or ".join(map(repr, allowed))
        raise CheckpointError(f"{where}: {key} {value!r} is not supported, only {known}")
