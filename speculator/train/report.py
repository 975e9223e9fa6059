"""Says how far a training run is, and keeps the curve.

Must never know what is trained.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class DivergedError(ArithmeticError):
    """Training met a value that is not finite; nothing after it would be worth its time."""


class Log:
    """Prints at most every `every` seconds and remembers what it printed; DivergedError where a loss is not finite."""

    def __init__(self, title: str, every: float = 5.0) -> None:
        self.title, self.every = title, every
        self.rows: list[dict[str, float]] = []
        self._begin = time.monotonic()
        self._next = 0.0

    @property
    def due(self) -> bool:
        return time.monotonic() - self._begin >= self._next

    def __call__(self, step: int, **values: float) -> None:
        seconds = time.monotonic() - self._begin
        self._next = seconds + self.every
        self.rows.append({"step": step, "seconds": round(seconds, 2)} | {k: round(v, 5) for k, v in values.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"[{self.title}] {seconds:6.1f} s  step {step}  {shown}", flush=True)
        if not math.isfinite(values.get("loss", 0.0)):
            raise DivergedError(f"{self.title}: the loss is {values['loss']} at step {step}")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value
