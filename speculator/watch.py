"""The drift alarm: says once, with a stated false-alarm rate, that acceptance at a position has left its band.

Owns: bands (from an acceptance report, or learnt from the first rounds) and the sequential test against them.
Must never import torch, grpc or prometheus_client, nor be on the path of a step: it reads counts a few times a second.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from speculator.answers import Acceptance
from speculator.errors import ConfigError

log = logging.getLogger(__name__)

SCHEMA = "speculator/acceptance-1"  # of the reports that bands come from
POSITIONS = 16  # deepest draft; the false-alarm rate is shared by this many positions, two directions each
SHIFTS = (0.05, 0.15, 0.4)  # sizes of drift that the test looks for, as shares of what could be lost
BLOCK = 512  # rounds counted together to see what is alike: texts of several sessions that run together
HALF_LIFE = 512  # rounds after which an observation counts half in the recent rate
BELOW, INSIDE, ABOVE = -1, 0, 1


class Band(NamedTuple):
    """Where acceptance at one position belongs.

    `dispersion` is the variance of the accepted count over that of independent rounds: rounds of one text are alike.
    """

    low: float
    high: float
    dispersion: float = 1.0


class Drift(NamedTuple):
    """Acceptance at `position` (1 is the first drafted token) left its band; `side` is BELOW or ABOVE."""

    position: int
    side: int
    recent: float
    band: Band


class PositionState(NamedTuple):
    """What a scrape may show of one position; `band` is None while it is being learnt."""

    position: int
    side: int
    recent: float
    band: Band | None


# ---- bands ----


def bands_of_report(path: str | Path, tolerance: float = 0.02) -> tuple[Band, ...]:
    """Bands by position from a report of `speculator bench acceptance`.

    The interval has three standard errors over prompts, and the dispersion is the variance between prompts over that
    of independent rounds. Raises ConfigError naming the field for a file that is no such report, or a synthetic one.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the baseline {path}: {error.strerror}") from error
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ConfigError(f"the baseline {path} is no whole JSON file: {error}") from error
    found = report if isinstance(report, dict) else {}
    _expect(found.get("schema") == SCHEMA, path, "schema", f'"{SCHEMA}"')
    _expect(found.get("synthetic") is False, path, "synthetic", "false, or acceptance means nothing")
    rows = found.get("prompts")
    _expect(isinstance(rows, list) and len(rows) > 0, path, "prompts", "a list of at least one prompt")
    bands = _bands([_counts(row, path, f"prompts[{i}]") for i, row in enumerate(rows or ())], tolerance)
    _expect(bool(bands), path, "prompts", "prompts with drafts")
    return bands


def _counts(row: Any, path: str | Path, where: str) -> tuple[list[int], list[int]]:
    accepted, drafted = ((row.get(key) if isinstance(row, dict) else None) for key in ("accepted_at", "drafted_at"))
    for key, counts in (("accepted_at", accepted), ("drafted_at", drafted)):
        fits = isinstance(counts, list) and all(isinstance(count, int) for count in counts)
        _expect(fits, path, f"{where}.{key}", "a list of counts")
    assert isinstance(accepted, list) and isinstance(drafted, list)
    _expect(len(accepted) == len(drafted), path, f"{where}.accepted_at", "as long as drafted_at")
    return accepted, drafted


def _expect(fits: bool, path: str | Path, field: str, what: str) -> None:
    if not fits:
        raise ConfigError(f"the baseline {path} cannot be used: the field {field} must be {what}")


def _bands(prompts: Sequence[tuple[list[int], list[int]]], tolerance: float) -> tuple[Band, ...]:
    depth = min(POSITIONS, max((len(drafted) for _, drafted in prompts), default=0))
    pairs = ([(a[i], d[i]) for a, d in prompts if i < len(d) and d[i]] for i in range(depth))
    return tuple(_band(counts, tolerance) for counts in pairs if counts)


def _band(counts: Sequence[tuple[int, int]], tolerance: float) -> Band:
    """The band of a rate seen as (accepted, judged) in groups of rounds that may be alike.

    Its interval has three standard errors; the dispersion is Pearson's chi-square per degree of freedom.
    """
    accepted, judged = (sum(column) for column in zip(*counts, strict=True))
    rate = accepted / judged
    spread = max(rate * (1 - rate), 1 / judged)  # a rate of 0 or 1 is known no better than one round in all
    chi_square = sum((a - n * rate) ** 2 / (n * spread) for a, n in counts)
    dispersion = max(1.0, chi_square / max(1, len(counts) - 1))
    reach = 3 * math.sqrt(dispersion * spread / judged) + tolerance
    return Band(max(0.0, rate - reach), min(1.0, rate + reach), dispersion)


class Learner:
    """Turns the first `wanted` judged rounds of a position into a band; blocks of BLOCK rounds show what is alike."""

    def __init__(self, wanted: int, tolerance: float) -> None:
        self._wanted, self._tolerance = wanted, tolerance
        self._blocks: list[tuple[int, int]] = []
        self._open = (0, 0)

    def add(self, accepted: int, judged: int) -> Band | None:
        """The band, once enough rounds were seen."""
        self._open = (self._open[0] + accepted, self._open[1] + judged)
        if self._open[1] >= BLOCK:
            self._blocks.append(self._open)
            self._open = (0, 0)
        done = sum(judged for _, judged in self._blocks) >= self._wanted
        return _band(self._blocks, self._tolerance) if done else None


# ---- the test ----


class Detector:
    """Shiryaev-Roberts e-detector for one side of one band (Shin, Ramdas, Rinaldo, arXiv 2203.03532).

    `evidence` grows by one a round and is multiplied by the likelihood ratio of a drifted rate against the edge of the
    band, averaged over SHIFTS. While the rate is inside, its mean is at most the number of rounds, so it reaches a
    threshold T no sooner than after T rounds on average. The ratio is tempered by the dispersion, which keeps that
    bound (Jensen) and makes up for rounds that are alike.
    """

    def __init__(self, edge: float, dispersion: float) -> None:
        self._ratios = [_log_ratios(edge, edge * (1 - shift), dispersion) for shift in SHIFTS]
        self._parts = [0.0] * len(SHIFTS)

    def observe(self, hits: int, rounds: int) -> float:
        """The evidence after `rounds` more rounds, `hits` of which did what drift makes rarer."""
        self._parts = [
            _grown(part + rounds, hits * on_hit + (rounds - hits) * on_miss)
            for part, (on_hit, on_miss) in zip(self._parts, self._ratios, strict=True)
        ]
        return sum(self._parts) / len(self._parts)

    def reset(self) -> None:
        self._parts = [0.0] * len(SHIFTS)


def _log_ratios(edge: float, drifted: float, dispersion: float) -> tuple[float, float]:
    return math.log(drifted / edge) / dispersion, math.log((1 - drifted) / (1 - edge)) / dispersion


def _grown(value: float, log_factor: float) -> float:
    return math.exp(min(700.0, math.log(value) + log_factor)) if value > 0 else 0.0


class PositionWatch:
    """One position: its band, one detector a side, and the recent rate."""

    def __init__(self, position: int, band: Band | None, learner: Learner) -> None:
        self.position, self.side, self.band = position, INSIDE, band
        self._learner = learner
        self._detectors: dict[int, Detector] = _detectors(band) if band else {}
        self._seen = (0, 0)
        self._recent, self._weight = 0.0, 0.0
        self._since = 0  # rounds since the alarm

    @property
    def recent(self) -> float:
        """Acceptance over about the last HALF_LIFE rounds; 0 before the first one."""
        return self._recent / self._weight if self._weight else 0.0

    @property
    def judged(self) -> int:
        return self._seen[1]

    def observe(self, accepted: int, judged: int, threshold: float) -> int:
        """Counts since the start; BELOW or ABOVE in the moment of an alarm, else INSIDE.

        The two counts may be read between two updates, so a hit without its round waits for the next call.
        """
        rounds = judged - self._seen[1]
        hits = min(accepted - self._seen[0], rounds)
        if rounds <= 0:
            return INSIDE
        self._seen = (self._seen[0] + hits, judged)
        self._remember(hits, rounds)
        if self.band is None:
            self._learn(hits, rounds)
            return INSIDE
        return self._test(hits, rounds, threshold) if self.side == INSIDE else self._recover(rounds)

    def _remember(self, hits: int, rounds: int) -> None:
        keep = 0.5 ** (rounds / HALF_LIFE)
        self._recent, self._weight = self._recent * keep + hits, self._weight * keep + rounds

    def _learn(self, hits: int, rounds: int) -> None:
        self.band = self._learner.add(hits, rounds)
        if self.band is not None:
            self._detectors = _detectors(self.band)
            log.info("acceptance at position %d: band %.3f to %.3f", self.position, self.band.low, self.band.high)

    def _test(self, hits: int, rounds: int, threshold: float) -> int:
        for side, detector in self._detectors.items():
            if detector.observe(hits if side == BELOW else rounds - hits, rounds) >= threshold:
                self.side, self._since = side, 0
                return side
        return INSIDE

    def _recover(self, rounds: int) -> int:
        self._since += rounds
        assert self.band is not None
        if self._since >= 2 * HALF_LIFE and self.band.low <= self.recent <= self.band.high:
            self.side = INSIDE
            for detector in self._detectors.values():
                detector.reset()
            log.info("acceptance at position %d is back in its band: %.3f", self.position, self.recent)
        return INSIDE


def _detectors(band: Band) -> dict[int, Detector]:
    edges = {BELOW: band.low, ABOVE: 1 - band.high}
    return {side: Detector(edge, band.dispersion) for side, edge in edges.items() if 0 < edge < 1}


class AcceptanceWatch:
    """Watches acceptance by position of one server.

    `bands[i]` is the band of position i + 1; positions beyond them are learnt from their first `learn` judged rounds.
    While every rate stays in its band and rounds are independent, alarms are at least `rounds_between_false_alarms`
    rounds apart on average, all positions and both directions together.
    """

    def __init__(
        self,
        bands: tuple[Band, ...] = (),
        *,
        learn: int = 16_384,
        tolerance: float = 0.02,
        rounds_between_false_alarms: float = 1e9,
    ) -> None:
        self.rounds_between_false_alarms = rounds_between_false_alarms
        self._threshold = rounds_between_false_alarms * 2 * POSITIONS
        self._positions = [
            PositionWatch(i + 1, bands[i] if i < len(bands) else None, Learner(learn, tolerance))
            for i in range(POSITIONS)
        ]

    def observe(self, counts: Acceptance) -> list[Drift]:
        """Takes the counts since the start; returns the alarms that they raise, each logged once."""
        found = []
        columns = zip(self._positions, counts.accepted_at + [0] * POSITIONS, counts.drafted_at, strict=False)
        for watch, accepted, judged in columns:
            side = watch.observe(accepted, judged, self._threshold)
            if side != INSIDE and watch.band is not None:
                found.append(Drift(watch.position, side, watch.recent, watch.band))
        for drift in found:
            self._warn(drift)
        return found

    def _warn(self, drift: Drift) -> None:
        log.warning(
            "acceptance at position %d left its band: lately %.3f, expected %.3f to %.3f (false alarms: at most one "
            "in %.0e rounds on average)",
            drift.position,
            drift.recent,
            drift.band.low,
            drift.band.high,
            self.rounds_between_false_alarms,
        )

    def states(self) -> list[PositionState]:
        """The positions that were judged or have a band."""
        seen = [watch for watch in self._positions if watch.band is not None or watch.judged]
        return [PositionState(w.position, w.side, w.recent, w.band) for w in seen]


def watch_of(baseline: str, rounds_between_false_alarms: float) -> AcceptanceWatch | None:
    """The watch that a configuration asks for: None for 0 rounds, learnt bands for no baseline. Raises ConfigError."""
    if not rounds_between_false_alarms:
        return None
    bands = bands_of_report(baseline) if baseline else ()
    return AcceptanceWatch(bands, rounds_between_false_alarms=rounds_between_false_alarms)
