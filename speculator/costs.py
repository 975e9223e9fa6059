"""What a round costs, by how many sessions share it, what they draft and how much they hold: measured, kept, asked.

Owns: the table, its file and the measurement, which only calls an engine's steps. Must never import torch, know
acceptance, or choose anything.
"""

from __future__ import annotations

import json
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from speculator.errors import ConfigError, SpeculatorError
from speculator.types import Draft, DraftShape, EngineInfo, SamplingParams, Step, StepResult

FORMAT = "speculator-costs-1"
ROWS, CONTEXTS = (1, 2, 4, 8, 16, 32, 64), (512, 4096)
WARM, REPEATS = 2, 5
ALONE = DraftShape(0)


class Steps(Protocol):
    """The part of an engine that rounds are timed on."""

    info: EngineInfo

    def open(self, row: int, sampling: SamplingParams, speculate: bool) -> None: ...

    def close(self, row: int) -> None: ...

    def step(self, steps: Sequence[Step]) -> list[StepResult]: ...


class Cost(NamedTuple):
    """One round of `rows` sessions that hold `context` tokens each: verify `shape`, then draft `shape`."""

    shape: DraftShape
    rows: int
    context: int
    seconds: float


@dataclass(frozen=True)
class CostTable:
    """Measured rounds, and what lies between them by straight lines. Raises ConfigError when it is empty or negative.

    `subject` says what was measured on what; a table speaks of nothing else.
    """

    costs: tuple[Cost, ...]
    subject: Mapping[str, str]

    def __post_init__(self) -> None:
        sizes = all(c.rows > 0 and c.context >= 0 and 0 < c.seconds < float("inf") for c in self.costs)
        if not self.costs or not sizes:
            raise ConfigError("A cost table needs rounds of one row or more, each with a time above 0.")

    @cached_property
    def shapes(self) -> tuple[DraftShape, ...]:
        """Measured shapes, the smallest drafts first."""
        return tuple(sorted({cost.shape for cost in self.costs}, key=size))

    @cached_property
    def _curves(self) -> Mapping[DraftShape, Sequence[tuple[int, Curve]]]:
        """Of each shape, by context: seconds by rows, where more rows never cost less (what is less is noise)."""
        return {shape: _curves_of([c for c in self.costs if c.shape == shape]) for shape in self.shapes}

    def seconds(self, rows: int, shape: DraftShape, context: float) -> float:
        """Seconds of a round. A shape that was not measured costs what the next larger one does, or the largest."""
        curves = self._curves[self._measured(shape)]
        return _between(context, [at for at, _ in curves], [curve.at(rows) for _, curve in curves])

    def _measured(self, shape: DraftShape) -> DraftShape:
        if shape in self._curves:
            return shape
        return next((s for s in self.shapes if size(s) >= size(shape)), self.shapes[-1])


class Curve(NamedTuple):
    """Seconds by rows; beyond the last point the last slope goes on."""

    rows: Sequence[int]
    values: Sequence[float]

    def at(self, rows: int) -> float:
        if rows <= self.rows[-1] or len(self.rows) == 1:
            return _between(rows, self.rows, self.values)
        slope = (self.values[-1] - self.values[-2]) / (self.rows[-1] - self.rows[-2])
        return self.values[-1] + slope * (rows - self.rows[-1])


def size(shape: DraftShape) -> tuple[int, int]:
    """Shapes in the order of what they make the target read: drafted nodes, then levels."""
    return (len(shape.parents) or shape.nodes if not shape.is_chain else shape.depth, shape.depth)


def _curves_of(costs: Sequence[Cost]) -> list[tuple[int, Curve]]:
    return [(at, _curve([c for c in costs if c.context == at])) for at in sorted({c.context for c in costs})]


def _curve(costs: Sequence[Cost]) -> Curve:
    ordered = sorted((c.rows, c.seconds) for c in costs)
    values, most = list[float](), 0.0
    for _, seconds in ordered:
        most = max(most, seconds)
        values.append(most)
    return Curve([rows for rows, _ in ordered], values)


def _between(x: float, xs: Sequence[int], ys: Sequence[float]) -> float:
    """By a straight line between the points around x, by the nearest point outside them."""
    right = bisect_left(xs, x)
    if right == 0 or right == len(xs):
        return ys[min(right, len(xs) - 1)]
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])


# ---- the file


def save_costs(table: CostTable, path: Path) -> None:
    """Write a table as JSON; ConfigError says why it cannot be."""
    costs = [{**cost._asdict(), "shape": _brief(cost.shape)} for cost in table.costs]
    text = json.dumps({"format": FORMAT, "subject": dict(table.subject), "costs": costs}, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot write the cost table {path}: {error.strerror}.") from None


def _brief(shape: DraftShape) -> dict[str, Any]:
    return {name: value for name, value in asdict(shape).items() if value != getattr(ALONE, name) or name == "depth"}


def read_costs(path: Path, subject: Mapping[str, str]) -> CostTable:
    """The table of a file that `save_costs` wrote for `subject`; ConfigError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        costs = tuple(_cost(one) for one in found["costs"])
        known, about = found["format"] == FORMAT, dict(found["subject"])
    except OSError as error:
        raise ConfigError(f"Cannot read the cost table {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a cost table: {type(error).__name__}: {error}.") from None
    if not known:
        raise ConfigError(f"{path} is not a cost table of the format {FORMAT}.")
    for name, value in subject.items():
        if about.get(name) != value:
            raise ConfigError(
                f"The cost table {path} was measured with {name} {about.get(name)!r}, not {value!r}: delete it to "
                "measure again."
            )
    return CostTable(costs, about)


def _cost(one: Mapping[str, Any]) -> Cost:
    shape = dict(one["shape"])
    parents = tuple(int(parent) for parent in shape.pop("parents", ()))
    whole = {name: int(value) for name, value in shape.items()}
    return Cost(DraftShape(**whole, parents=parents), int(one["rows"]), int(one["context"]), float(one["seconds"]))


# ---- the measurement


def measure_costs(
    engine: Steps,
    shapes: Iterable[DraftShape],
    subject: Mapping[str, str],
    *,
    seconds: float,
    rows: Sequence[int] = ROWS,
    contexts: Sequence[int] = CONTEXTS,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:
    """Time rounds on an engine that serves nobody yet, for about `seconds` at most.

    The ends of the ladders come first, so that a table that ran out of time still spans them. A batch that the device
    has no room for is left out; ConfigError when that is every one. The caches hold nothing but zeros: what is timed
    does not depend on it.
    """
    end = clock() + seconds
    costs = list[Cost]()
    wanted = list(shapes)
    for context, count in _ends_first(_fitting(engine.info, contexts), _rows(engine.info, rows)):
        if costs and clock() >= end:
            break
        costs += _together(engine, wanted, count, context, clock)
    if not costs:
        raise ConfigError("No round could be timed for the policy: set policy.mode to off.")
    return CostTable(tuple(costs), subject)


def _rows(info: EngineInfo, rows: Sequence[int]) -> list[int]:
    return sorted({min(count, info.max_rows) for count in rows})


def _fitting(info: EngineInfo, contexts: Sequence[int]) -> list[int]:
    """Contexts that a session may have, the largest as large as it can be."""
    most = max(1, info.max_context - info.scratch_tokens)
    return sorted({min(context, most) for context in contexts})


def _ends_first(contexts: Sequence[int], rows: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (context, rows): the corners, then the shortest context, then the rest."""
    pairs = [(context, count) for context in contexts for count in rows]
    corners = [p for p in pairs if p[0] in (contexts[0], contexts[-1]) and p[1] in (rows[0], rows[-1])]
    return corners + [p for p in pairs if p not in corners]


def _together(
    engine: Steps, shapes: Sequence[DraftShape], rows: int, context: int, clock: Callable[[], float]
) -> Iterator[Cost]:
    """Every shape in turns, so that a machine that grows slower or faster does so for all of them alike."""
    pages = _pages(engine.info, rows, context)
    if pages is None:
        return
    opened = list[int]()
    try:
        for row in range(rows):
            engine.open(row, SamplingParams(), True)
            opened.append(row)
        times: dict[DraftShape, list[float]] = {shape: [] for shape in shapes}
        for turn in range(WARM + REPEATS):
            for shape in shapes:
                taken = _round_seconds(engine, shape, pages, context, clock)
                if turn >= WARM:
                    times[shape].append(taken)
    except SpeculatorError:  # no memory for such a batch, or it is not finite on zeros: then there is no such cost
        return
    finally:
        for row in opened:
            engine.close(row)
    for shape, taken_times in times.items():
        yield Cost(shape, rows, context, statistics.median(taken_times))


def _pages(info: EngineInfo, rows: int, context: int) -> list[list[int]] | None:
    """Page tables of `rows` sessions; None when the cache does not hold them."""
    each = -(-(context + info.scratch_tokens) // info.page_size)
    if rows * each > info.total_pages - 1:
        return None
    return [list(range(1 + row * each, 1 + (row + 1) * each)) for row in range(rows)]


def _round_seconds(
    engine: Steps, shape: DraftShape, pages: Sequence[Sequence[int]], context: int, clock: Callable[[], float]
) -> float:
    """One round that verifies a draft of its own shape; the round before it made that draft."""
    drafts = [result.draft or Draft() for result in engine.step(_steps(pages, context, [Draft()] * len(pages), shape))]
    begin = clock()
    engine.step(_steps(pages, context, drafts, shape))
    return clock() - begin


def _steps(pages: Sequence[Sequence[int]], context: int, drafts: Sequence[Draft], shape: DraftShape) -> list[Step]:
    return [
        Step(row, context, table, None, 0, draft, shape)
        for row, (table, draft) in enumerate(zip(pages, drafts, strict=True))
    ]
