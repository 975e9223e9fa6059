"""Explains a model folder: what it holds, what was chosen where a format is ambiguous, and which choice fits.

Owns: the report of `speculator inspect` and the measuring of alternatives. Reports, never switches. Must never know
the service or the engine; how acceptance is measured is a callable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import torch

from speculator.errors import CheckpointError
from speculator.heads.detect import is_whole_model
from speculator.heads.exact import ExactPlan, exact_pair
from speculator.heads.folder import checkpoint_errors
from speculator.heads.formats import read_head
from speculator.heads.load import load_head
from speculator.heads.mtp_exact import MtpPlan, exact_mtp
from speculator.heads.mtp_names import find_modules
from speculator.heads.overrides import Choice, show
from speculator.heads.probe import Acceptance, AcceptanceProbe, DenseProbe
from speculator.heads.reading import HeadFile, TargetFacts, field_value
from target.config import ModelConfig, load_config
from target.config_mla import MlaConfig
from target.config_moe import MoeConfig
from target.decoder import Decoder
from target.names import decoder_slots, mtp_names
from target.weights import WeightFiles

MIN_GAIN = 0.05  # drafts per round below which a difference is of no interest
SIGMAS = 4.0  # neighbouring rounds are not independent, so more than the usual 2


def inspect_folder(path: Path, target: Path | None = None, overrides: Mapping[str, str] | None = None) -> str:
    """The report on a target's or a head's folder, or on both where a target carries MTP modules.

    With the `target` folder a head is checked against it.

    CheckpointError says what is wrong with a folder that cannot be used.
    """
    with checkpoint_errors(path):
        names = WeightFiles(path).names()
        if is_whole_model(names):
            config = load_config(path)
            report = _target_report(path, config, names)
            if find_modules(names, config) is None:
                return report
            return f"{report}\n{_head_report(_read(path, target, overrides), target)}"
    return _head_report(_read(path, target, overrides), target)


def _read(path: Path, target: Path | None, overrides: Mapping[str, str] | None) -> HeadFile:
    return read_head(path, None if target is None else _facts(target), overrides)


def _facts(folder: Path) -> TargetFacts:
    with checkpoint_errors(folder):
        return TargetFacts.of(load_config(folder), folder.name)


def _target_report(path: Path, config: ModelConfig, names: set[str]) -> str:
    expected, modules = set(decoder_slots(config, names)), mtp_names(config, names)
    rows = [(f.name, _value(getattr(config, f.name))) for f in fields(config) if f.name != "windows"]
    rows.append(("sliding windows", _windows(config)))
    rows.append(("parameters", _millions(target_parameters(config))))
    rows.append(("tensors", _tensors_text(names - modules, expected, config.tied)))
    return "\n".join([f"{path}: a target", *_table(rows)])


def _value(value: object) -> str:
    if isinstance(value, MlaConfig | MoeConfig):
        return ", ".join(f"{f.name} {_value(getattr(value, f.name))}" for f in fields(value))
    return show(tuple(sorted(value)) if isinstance(value, frozenset) else value)


def _windows(config: ModelConfig) -> str:
    windowed = [w for w in config.windows if w is not None]
    return f"{len(windowed)} of {config.num_layers} layers, {windowed[0]} tokens" if windowed else "none"


def target_parameters(config: ModelConfig) -> int:
    """Values of all weight matrices of a target."""
    with torch.device("meta"):
        model = Decoder(config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


def _tensors_text(names: set[str], expected: set[str], tied: bool) -> str:
    found = {n for n in names if not n.endswith("rotary_emb.inv_freq")} - ({"lm_head.weight"} if tied else set())
    missing, unknown = sorted(expected - found), sorted(found - expected)
    problems = [
        f"{len(some)} {word}: {', '.join(some[:4])}"
        for word, some in (("missing", missing), ("unknown", unknown))
        if some
    ]
    return f"{len(names)}; " + ("; ".join(problems) or "complete, none unknown")


def _head_report(file: HeadFile, target: Path | None) -> str:
    rows = [(c.field, f"{show(c.value):<14} {c.source}") for c in file.choices]
    rows.append(("parameters", f"{_millions(file.parameters)}, {file.bytes / 2**20:.1f} MiB in the file"))
    unused = f"{', '.join(file.unused)}" if file.unused else "none"
    rows.append(("tensors", f"{len(file.slots)} used; not needed: {unused}"))
    title = f"{file.folder}: a head of kind {file.record.kind}"
    checked = f"checked against {target}" if target else "not checked against a target"
    open_ones = [c for c in file.choices if c.ambiguous]
    return "\n".join([f"{title}, {checked}", *_table(rows), *_notes(file.warnings, open_ones)])


def _notes(warnings: Sequence[str], ambiguous: Sequence[Choice]) -> list[str]:
    lines = [f"warning: {text}" for text in warnings]
    for c in ambiguous:
        others = f"; could be {' or '.join(c.alternatives)}" if c.alternatives else ""
        lines.append(f"ambiguous: {c.field} = {show(c.value)} ({c.source}){others}")
    return [*lines, "a probe measures which of them fits"] if ambiguous else lines


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} million"


class Verdict(Enum):
    """What measuring a field's alternatives showed."""

    FITS = "fits"  # clearly better than every alternative
    BETTER = "clearly better elsewhere"
    UNDECIDED = "undecided, more prompts may tell"
    NO_EFFECT = "no effect"  # every alternative drafts the same


class Finding(NamedTuple):
    """One field: its value now, what each alternative reached, and the verdict."""

    field: str
    value: str
    measured: Mapping[str, Acceptance]
    verdict: Verdict
    best: str  # the value that fits best; `value` unless the verdict is BETTER
    failed: Mapping[str, str]  # alternatives that could not be loaded, with the reason


class ProbeReport(NamedTuple):
    """The head as the file and the given overrides read it, and what else was tried.

    `suggested` are the overrides that were clearly better, found one after the other; `reached` is their acceptance.
    """

    base: Acceptance
    findings: tuple[Finding, ...]
    suggested: Mapping[str, str]
    reached: Acceptance

    def text(self) -> str:
        lines = [f"as read: {_acceptance(self.base)}, {len(self.base.lengths)} rounds"]
        for finding in self.findings:
            lines += _finding_lines(finding)
        if not self.suggested:
            return "\n".join([*lines, "no alternative is clearly better"])
        flags = " ".join(f"{name}={value}" for name, value in self.suggested.items())
        return "\n".join([*lines, f"suggested overrides: {flags}", f"with them: {_acceptance(self.reached)}"])


def _acceptance(measured: Acceptance) -> str:
    rates = " ".join(f"{rate:.3f}" for rate in measured.rates)
    return f"accept length {1 + measured.mean:.3f}, by position {rates}"


def _finding_lines(finding: Finding) -> list[str]:
    verdict = finding.verdict.value if finding.best == finding.value else f"clearly better: {finding.best}"
    lines = [f"{finding.field} = {finding.value}: {verdict}"]
    lines += [f"  {value:<14} {_acceptance(measured)}" for value, measured in finding.measured.items()]
    return lines + [f"  {value:<14} cannot be loaded: {reason}" for value, reason in finding.failed.items()]


def probe(
    target: Decoder,
    head_folder: Path,
    prompts: Sequence[Sequence[int]],
    alternatives: Mapping[str, Sequence[str]] | None = None,
    *,
    overrides: Mapping[str, str] | None = None,
    measure: AcceptanceProbe | None = None,
    new_tokens: int = 64,
    depth: int = 5,
    progress: Callable[[str], None] | None = None,
) -> ProbeReport:
    """Measure a head's greedy acceptance over the values that its file may mean.

    `prompts` are token ids. `alternatives` maps a field to the override texts to try; by default those that the reader
    of the folder knows: tap ids (for MTP: F or B(n)), norm_before_residual, norm_output (recycling), own_embed,
    rope.theta, zero_first. `measure` runs a head; by default a dense oracle that drafts chains of `depth` over
    `new_tokens` of the target's greedy text.
    Fields are tried one at a time; a clearly better value is kept and the others are tried again on top of it.
    """
    given = dict(overrides or {})
    run = measure or DenseProbe(target, prompts, new_tokens, depth)
    attempt = _Attempts(target, head_folder, run, progress or (lambda text: None))
    file = read_head(head_folder, TargetFacts.of(target.config), given)
    if alternatives is None:
        alternatives = {c.field: c.alternatives for c in file.choices if c.alternatives and c.field not in given}
    base = attempt(given)
    findings, suggested = _search(attempt, file, given, alternatives, base)
    reached = attempt({**given, **suggested}) if suggested else base
    return ProbeReport(base, tuple(findings), suggested, reached)


class _Attempts:
    """Loads and measures the head under overrides, each combination once."""

    def __init__(
        self, target: Decoder, folder: Path, measure: AcceptanceProbe, progress: Callable[[str], None]
    ) -> None:
        self.target, self.folder, self.measure, self.progress = target, folder, measure, progress
        self._known: dict[tuple[tuple[str, str], ...], Acceptance] = {}

    def __call__(self, overrides: Mapping[str, str]) -> Acceptance:
        key = tuple(sorted(overrides.items()))
        if key not in self._known:
            self.progress(" ".join(f"{name}={value}" for name, value in key) or "as read")
            weight = self.target.embed.weight
            head = load_head(self.folder, self.target, weight.dtype, weight.device, overrides)
            self._known[key] = self.measure(head)
        return self._known[key]


def _search(
    attempt: _Attempts,
    file: HeadFile,
    given: Mapping[str, str],
    alternatives: Mapping[str, Sequence[str]],
    base: Acceptance,
) -> tuple[list[Finding], dict[str, str]]:
    """Take the largest clear gain, then try the remaining fields again."""
    suggested: dict[str, str] = {}
    settled: list[Finding] = []
    current, remaining = base, dict(alternatives)
    while True:
        findings = [
            _try(attempt, field, show(field_value(file.record, field)), values, {**given, **suggested}, current)
            for field, values in remaining.items()
        ]
        better = [f for f in findings if f.verdict is Verdict.BETTER]
        if not better:
            return [*settled, *findings], suggested
        winner = max(better, key=lambda f: f.measured[f.best].mean)
        suggested[winner.field] = winner.best
        settled.append(winner)
        current = winner.measured[winner.best]
        del remaining[winner.field]


def _try(
    attempt: _Attempts, field: str, value: str, others: Sequence[str], overrides: Mapping[str, str], current: Acceptance
) -> Finding:
    measured, failed = {}, {}
    for other in (text for text in others if text != value):
        try:
            measured[other] = attempt({**overrides, field: other})
        except CheckpointError as error:
            failed[other] = error.message
    best = max(measured, key=lambda name: measured[name].mean, default=value)
    verdict = _verdict(current, [*measured.values()])
    return Finding(
        field, value, {value: current, **measured}, verdict, best if verdict is Verdict.BETTER else value, failed
    )


def _verdict(current: Acceptance, others: Sequence[Acceptance]) -> Verdict:
    if all(other.lengths == current.lengths for other in others):
        return Verdict.NO_EFFECT
    best = max(others, key=lambda other: other.mean)
    if clearly_better(best, current):
        return Verdict.BETTER
    return Verdict.FITS if clearly_better(current, best) else Verdict.UNDECIDED


def clearly_better(one: Acceptance, other: Acceptance) -> bool:
    """More drafts accepted per round than chance or a rounding error explains."""
    noise = math.hypot(one.error, other.error)
    return one.mean - other.mean > max(MIN_GAIN, SIGMAS * noise)


def self_check() -> str:
    """Heads that are exact by construction must reach acceptance 1 in the probe; says so, or raises CheckpointError."""
    lines = []
    pairs = {f"{kind} head": exact_pair(ExactPlan(kind=kind)) for kind in ("eagle", "eagle3")}
    pairs |= {f"chain of {n} MTP modules": exact_mtp(MtpPlan(modules=n)) for n in (1, 3)}
    for name, pair in pairs.items():
        vocab = pair.target.config.vocab_size
        prompts = [[(7 * i + 3 * j) % vocab for j in range(8)] for i in range(3)]
        measured = DenseProbe(pair.target, prompts, new_tokens=32, depth=5)(pair.head)
        lines.append(f"exact {name}: {_acceptance(measured)}")
        if measured.rates != (1.0,) * 5:
            raise CheckpointError(f"{lines[-1]}; every rate must be 1, this installation computes wrongly")
    return "\n".join(lines)
