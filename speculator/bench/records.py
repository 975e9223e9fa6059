"""The report of the acceptance benchmark as plain records; the JSON file is these, field by field.

Owns: names and units of every figure. Must never compute one, and must never import torch. The published schema
beside it (schema/acceptance-1.json) is made from these classes; a test keeps them equal. Times are seconds, shares
lie in 0..1, intervals are (low, high), `null` stands for a figure that no round could give.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speculator.bench.outputs import unreadable
from speculator.bench.plain import RecordError, from_json, schema_of, to_json

SCHEMA = "speculator/acceptance-1"
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a draft: a chain of `depth` (branching 1), EAGLE-2's dynamic tree, or a static tree (`parents`)."""

    depth: int
    nodes: int = 0
    branching: int = 1
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run was asked to do."""

    target: str
    head: str
    method: str  # "eagle", "eagle3", "mtp", "ngram", "none", or another engine's word
    shape: Shape
    temperature: float
    rule: str  # "coupled", "rejection", "block", or another engine's word
    seed: int
    max_tokens: int
    batch: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    files: tuple[str, ...] = ()
    chat: bool = True  # prompts went through the tokenizer's chat template
    confidence: float = 0.95  # of every interval
    resamples: int = 0  # bootstrap resamples over prompts; 0: no intervals


@dataclass(frozen=True, slots=True)
class Intervals:
    """Bootstrap intervals over prompts for the figures of the same names; null where there are too few prompts."""

    tau: Interval | None = None
    tau_without_bonus: Interval | None = None
    acceptance_rate: Interval | None = None
    survival: tuple[Interval | None, ...] = ()
    conditional: tuple[Interval | None, ...] = ()
    acceptance: tuple[Interval | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Figures:
    """Acceptance over some rounds; index i of a list is draft position i + 1 (of the histogram: i accepted)."""

    prompts: int
    rounds: int
    tokens: int  # committed by these rounds, bonus included
    drafted: int  # drafted positions that lay inside the answer (levels, not nodes, of a tree)
    accepted: int
    tau: float | None
    tau_without_bonus: float | None
    acceptance_rate: float | None  # accepted / drafted
    survival: tuple[float | None, ...]  # accepted at i / all rounds
    conditional: tuple[float | None, ...]  # accepted at i / rounds that drafted i and accepted i - 1
    acceptance: tuple[float | None, ...]  # accepted at i / rounds that drafted i
    histogram: tuple[int, ...]  # rounds by accepted drafts, 0..depth
    drafted_at: tuple[int, ...]
    accepted_at: tuple[int, ...]
    intervals: Intervals = field(default_factory=Intervals)
    repeated_4grams: float | None = None  # share of 4-grams that their answer had before


@dataclass(frozen=True, slots=True)
class TokenClass:
    """Judged draft positions at which the answer has a token of this class, and how many were accepted."""

    name: str
    judged: int
    accepted: int
    rate: float
    interval: Interval | None = None


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """What drafts of another shape would have had accepted on the same answers."""

    shape: Shape
    source: str  # "recorded" (cut out of recorded drafts and drafts made at the other positions) or "drafted" afresh
    figures: Figures


@dataclass(frozen=True, slots=True)
class Baseline:
    """A drafter without a model on the same answers."""

    name: str
    shape: Shape
    figures: Figures


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Judged drafted tokens with a confidence in low..high."""

    low: float
    high: float
    count: int
    confidence: float | None  # mean
    acceptance: float | None
    interval: Interval | None = None  # of `acceptance`


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence exp(log q) of judged drafted tokens against whether they were accepted."""

    count: int
    ece: float | None  # expected calibration error: mean over tokens of |acceptance - confidence| of their bin
    ece_at: tuple[float | None, ...]  # per draft position
    bins: tuple[CalibrationBin, ...]
    interval: Interval | None = None  # of ece


@dataclass(frozen=True, slots=True)
class Theory:
    """Theoretical acceptance 1 - TV(p, q) per draft position, over rounds whose earlier drafts were accepted."""

    rule: str
    rounds: int
    acceptance: tuple[float | None, ...]
    measured: tuple[float | None, ...]  # conditional acceptance of the same rounds
    count: tuple[int, ...]
    intervals: tuple[Interval | None, ...] = ()  # of `acceptance`


@dataclass(frozen=True, slots=True)
class Repetition:
    """Signs of a collapsed target: the same words again inside an answer, and the same answer to everybody."""

    repeated_4grams: float | None
    shared: Mapping[str, float]  # n -> share of an answer's distinct n-grams that answers to other prompts have too
    identical_answers: float | None  # share of answers that equal another prompt's answer
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # of these, and of shared_{n}grams


@dataclass(frozen=True, slots=True)
class Split:
    """Two runs that should agree: halves of the prompts, or two seeds."""

    kind: str  # "halves" or "seeds"
    tau_a: float
    tau_b: float
    difference: float  # |tau_a - tau_b|; for halves the median over random splits
    floor: float  # a difference that 95 % of such splits stay below


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where the mean round goes. The parts follow each other; `wall` is the same round by a clock of its own."""

    rounds: int
    draft: float
    verify: float
    host: float
    round: float  # the sum of the parts
    commit: float = 0.0
    rpc: float = 0.0  # 0 in process
    wall: float = 0.0

    @property
    def parts(self) -> Mapping[str, float]:
        """The parts that took time, in the order in which they are shown."""
        names = ("draft", "verify", "commit", "host", "rpc")
        return {name: spent for name in names if (spent := float(getattr(self, name)))}


@dataclass(frozen=True, slots=True)
class Cost:
    """Chains of one depth: what a round costs and what it should gain."""

    depth: int
    round: float
    tau: float | None
    speedup: float | None  # tau * plain_token / round


@dataclass(frozen=True, slots=True)
class Time:
    """Speed with drafts beside plain decoding, measured in turns in one run; decoding only, prompts excluded."""

    sessions: int  # that decode together
    ledger: Ledger
    plain_token: float  # of one session: a plain step commits one token of each
    tau: float  # of the timed rounds
    predicted: float  # speed-up, tau * plain_token / round
    measured: float  # speed-up, tokens per second of wall time over plain decoding's
    costs: tuple[Cost, ...] = ()
    recommended_depth: int | None = None
    gap: float | None = None  # predicted / measured - 1
    interval: Interval | None = None  # of `measured`


@dataclass(frozen=True, slots=True)
class PromptRow:
    """Counts of one prompt and turn, for paired comparisons."""

    id: str
    set: str
    category: str
    turn: int  # from 1
    context: int  # tokens before the answer
    rounds: int
    tokens: int
    drafted_at: tuple[int, ...]
    accepted_at: tuple[int, ...]
    asked: str = ""  # fingerprint of the texts that were asked, where it is known


@dataclass(frozen=True, slots=True)
class Against:
    """A run of a sweep beside an earlier one that differs from it in one choice, paired over prompts."""

    point: int  # of the earlier run, counted from 0
    difference: float  # in tau, this run minus that one
    interval: Interval | None
    p: float  # Holm's, over all pairs of the sweep
    significant: bool
    positions: tuple[int, ...] = ()  # from 1, where survival differs by more than chance


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """Another run on the same prompts."""

    shape: Shape
    temperature: float
    rule: str
    seed: int
    figures: Figures
    head: str = ""
    method: str = ""  # as in the settings
    noise: tuple[Split, ...] = ()
    against: tuple[Against, ...] = ()
    prompts: tuple[PromptRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Name:
    """What other engines call a quantity; "" where they have none."""

    here: str
    vllm: str
    sglang: str
    tensorrt_llm: str


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the acceptance benchmark."""

    schema: str
    engine: str  # "speculator", or the engine that the records were imported from
    synthetic: bool  # weights are random: times mean something, acceptance does not
    provenance: Mapping[str, Any]
    settings: Settings
    temperature: float  # of the settings, where readers of model cards look for it
    mean_tau: float | None  # unweighted mean over sets
    overall: Figures
    sets: Mapping[str, Figures]
    groups: Mapping[str, Mapping[str, Figures]] = field(default_factory=dict)  # "category", "turn", "context"
    token_classes: tuple[TokenClass, ...] = ()
    counterfactual: tuple[Counterfactual, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    calibration: Calibration | None = None
    theory: Theory | None = None
    repetition: Repetition | None = None
    noise: tuple[Split, ...] = ()
    time: Time | None = None
    sweep: tuple[SweepPoint, ...] = ()
    prompts: tuple[PromptRow, ...] = ()
    definitions: Mapping[str, str] = field(default_factory=dict)  # of the figures, by their name
    names: tuple[Name, ...] = ()
    notes: tuple[str, ...] = ()  # what a reader must know: figures left out and why
    mean_tau_interval: Interval | None = None


def report_to_json(report: Report) -> dict[str, Any]:
    """The JSON object of a report."""
    found: dict[str, Any] = to_json(report)
    return found


def report_from_json(value: Any) -> Report:
    """A report from its JSON object; RecordError names the field, or the schema that it has instead."""
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise RecordError(f"the field schema must be {SCHEMA!r}, not {schema!r}: not a report of this version")
    return from_json(Report, value)


def read_report(path: Path) -> Report:
    """A report from its file; RecordError says what is wrong in one sentence that names the file."""
    try:
        return report_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(unreadable(path, error)) from None
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is no whole JSON file: {error.msg} in line {error.lineno}") from None
    except RecordError as error:
        raise RecordError(f"{path}: {error.message}", field=error.field) from None


def write_report(report: Report, path: Path) -> None:
    """One JSON file, indented."""
    path.write_text(json.dumps(report_to_json(report), indent=1) + "\n", encoding="utf-8")


def schema() -> dict[str, Any]:
    """The published JSON schema."""
    return {"$id": f"urn:{SCHEMA.replace('/', ':')}", **schema_of(Report, SCHEMA)}
