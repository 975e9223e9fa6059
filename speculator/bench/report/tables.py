"""The tables of an acceptance report as rows of text, for any medium.

Owns: which table shows what. Must never know HTML or the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from speculator.bench.records import Figures, Report, SweepPoint
from speculator.bench.report.words import (
    NONE,
    at,
    bracketed,
    number,
    number_range,
    sampling_text,
    seconds,
    shape_text,
    share,
    share_range,
)

GROUPS = {"category": "By category", "turn": "By turn", "context": "By context length", "set": "By prompt set"}


class Table(NamedTuple):
    """Columns after the first hold figures. `note` says how to read it."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(report: Report) -> list[Table]:
    """Every table that has rows, the general ones first."""
    made = [
        by_position(report),
        _sets(report),
        *(_group(name, groups) for name, groups in report.groups.items()),
        _token_classes(report),
        _counterfactual(report),
        _ledger(report),
        _speed(report),
        _costs(report),
        _baselines(report),
        _sweep(report),
        beside(report),
        _theory(report),
        _noise(report),
        _repetition(report),
    ]
    return [table for table in made if table.rows]


def reference_tables(report: Report) -> list[Table]:
    """What other engines call the figures, and where the run came from."""
    made = [names(report), settings(report), provenance(report)]
    return [table for table in made if table.rows]


def by_position(report: Report) -> Table:
    figures, found = report.overall, report.overall.intervals
    rows = [
        [
            str(i + 1),
            bracketed(share(survival), share_range(at(found.survival, i))),
            bracketed(share(_at(figures.conditional, i)), share_range(at(found.conditional, i))),
            bracketed(share(_at(figures.acceptance, i)), share_range(at(found.acceptance, i))),
            _count(figures.accepted_at, i),
            _count(figures.drafted_at, i),
        ]
        for i, survival in enumerate(figures.survival)
    ]
    note = (
        "Out of: survival, all rounds; conditional, those that accepted all before; acceptance, those that drafted it."
    )
    return Table(
        "By position", note, ["position", "survival", "conditional", "acceptance", "accepted", "drafted"], rows
    )


def _at(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


def _count(values: Sequence[int], index: int) -> str:
    return str(values[index]) if index < len(values) else NONE


# ---- acceptance by something ----

FIGURES = ["prompts", "rounds", "tau", "acceptance rate", "position 1"]


def _figures(figures: Figures) -> list[str]:
    found = figures.intervals
    return [
        str(figures.prompts),
        str(figures.rounds),
        bracketed(number(figures.tau), number_range(found.tau)),
        bracketed(share(figures.acceptance_rate), share_range(found.acceptance_rate)),
        share(_at(figures.survival, 0)),
    ]


def _by(title: str, column: str, note: str, rows: Iterable[tuple[str, Figures]]) -> Table:
    return Table(title, note, [column, *FIGURES], [[name, *_figures(figures)] for name, figures in rows])


def _sets(report: Report) -> Table:
    return _by("By prompt set", "set", "", report.sets.items())


def _group(name: str, groups: Mapping[str, Figures]) -> Table:
    return _by(GROUPS.get(name, f"By {name}"), name, "", groups.items())


def _counterfactual(report: Report) -> Table:
    rows = ((f"{shape_text(one.shape)} ({one.source})", one.figures) for one in report.counterfactual)
    note = "What drafts of these shapes would have had accepted on the same answers; equal to real runs."
    return _by("Other shapes, from the same recording", "shape", note, rows)


def _baselines(report: Report) -> Table:
    rows = [(f"{one.name}, {shape_text(one.shape)}", one.figures) for one in report.baselines]
    own = [(f"this head, {shape_text(report.settings.shape)}", report.overall)] if rows else []
    return _by("Baselines", "drafter", "A head should beat drafters without a model.", [*own, *rows])


def _sweep(report: Report) -> Table:
    named = ((f"{_run_name(one)}, seed {one.seed}", one.figures) for one in report.sweep)
    return _by("Sweep", "run", "Each row is another run on the same prompts.", named)


def _run_name(one: SweepPoint) -> str:
    return ", ".join(filter(None, (one.head, shape_text(one.shape), sampling_text(one.temperature, one.rule))))


def beside(report: Report) -> Table:
    """The runs of a sweep in pairs that differ in one choice."""
    rows = [
        [
            _run_name(one),
            _run_name(report.sweep[pair.point]),
            f"{pair.difference:+.3f}",
            "" if pair.interval is None else f"{pair.interval[0]:+.3f} to {pair.interval[1]:+.3f}",
            f"{pair.p:.4f}",
            ("yes" if pair.significant else "no"),
            ", ".join(map(str, pair.positions)) or NONE,
        ]
        for one in report.sweep
        for pair in one.against
    ]
    note = "Paired over prompts; the p values are Holm's over all pairs. Positions: where survival differs."
    return Table("Sweep, in pairs", note, ["run", "against", "tau", "interval", "p", "differs", "positions"], rows)


def _token_classes(report: Report) -> Table:
    rows = [
        [one.name, str(one.judged), str(one.accepted), bracketed(share(one.rate), share_range(one.interval))]
        for one in report.token_classes
    ]
    note = "Drafted tokens whose predecessors were all accepted."
    return Table("By class of token", note, ["class", "judged", "accepted", "rate"], rows)


# ---- time and trust ----


def _ledger(report: Report) -> Table:
    ledger = report.time.ledger if report.time else None
    if ledger is None:
        return Table("Where a round goes", "", [], [])
    whole = ledger.wall or ledger.round
    rows = [[name, seconds(spent), _share_of(spent, whole)] for name, spent in ledger.parts.items()]
    if ledger.wall:
        rest = ledger.wall - ledger.round
        rows += [["between the parts", seconds(rest), _share_of(rest, whole)], ["by the clock", seconds(whole), ""]]
    note = f"Mean of {ledger.rounds} rounds of one session. What each part is stands in the definitions, as ledger."
    return Table("Where a round goes", note, ["part", "time", "share"], rows)


def _share_of(part: float, whole: float) -> str:
    return share(part / whole if whole else None)


def _speed(report: Report) -> Table:
    time = report.time
    rows = []
    if time is not None:
        rows = [
            ["predicted", f"{number(time.predicted)} x"],
            ["measured", f"{bracketed(number(time.measured), number_range(time.interval))} x"],
        ]
        rows += [["predicted / measured - 1", f"{100 * time.gap:+.1f} %"]] if time.gap is not None else []
        rows += [["time of a plain token", seconds(time.plain_token)], ["tau of the timed rounds", number(time.tau)]]
    note = "Predicted: tau x time of a plain token / time of a round (medians). Measured: tokens a second by the clock."
    return Table("Speed-up over plain decoding", note, ["what", "value"], rows)


def _costs(report: Report) -> Table:
    costs = report.time.costs if report.time else ()
    best = report.time.recommended_depth if report.time else None
    rows = [
        [f"{c.depth}{' (best)' if c.depth == best else ''}", seconds(c.round), number(c.tau), number(c.speedup)]
        for c in costs
    ]
    note = "Predicted speed-up of a chain of this depth: tau x time of a plain token / time of a round."
    return Table("Which depth pays", note, ["depth", "round", "tau", "speed-up"], rows)


def _theory(report: Report) -> Table:
    theory = report.theory
    columns = zip(theory.acceptance, theory.measured, theory.count, strict=True) if theory else ()
    bands = theory.intervals if theory else ()
    rows = [
        [str(i + 1), bracketed(share(a), share_range(at(bands, i))), share(m), str(n)]
        for i, (a, m, n) in enumerate(columns)
    ]
    note = "What rejection sampling accepts with this head, from a run of its own: chains under the rejection rule."
    return Table("Theoretical acceptance", note, ["position", "1 - TV(p, q)", "measured", "rounds"], rows)


def _noise(report: Report) -> Table:
    rows = [
        [split.kind, *(number(x, 3) for x in (split.tau_a, split.tau_b, split.difference, split.floor))]
        for split in report.noise
    ]
    note = "Runs that should agree. A difference in tau below the floor is noise."
    return Table("Noise floor (A/A)", note, ["split by", "tau A", "tau B", "difference", "floor (95 %)"], rows)


def _repetition(report: Report) -> Table:
    found = report.repetition
    if found is None:
        return Table("Repetition", "", [], [])
    bands = found.intervals

    def row(text: str, value: float | None, name: str) -> list[str]:
        return [text, bracketed(share(value), share_range(bands.get(name)))]

    shared = [
        row(f"{n}-grams shared with answers to other prompts", value, f"shared_{n}grams")
        for n, value in found.shared.items()
    ]
    own = [row("4-grams repeated inside an answer", found.repeated_4grams, "repeated_4grams")]
    same = [row("answers equal to that of another prompt", found.identical_answers, "identical_answers")]
    note = "A target that repeats itself is easy to draft for: high values make acceptance look better than it is."
    return Table("Repetition", note, ["sign", "share"], [*own, *shared, *same])


# ---- reference ----


def definitions(report: Report) -> Table:
    return Table("Definitions", "", ["figure", "meaning"], [[key, text] for key, text in report.definitions.items()])


def names(report: Report) -> Table:
    rows = [[name.here, name.vllm, name.sglang, name.tensorrt_llm] for name in report.names]
    return Table("What others call it", "", ["here", "vLLM", "SGLang", "TensorRT-LLM"], rows)


def settings(report: Report) -> Table:
    chosen = report.settings
    rows = [[name, _plain(getattr(chosen, name))] for name in chosen.__dataclass_fields__ if name != "shape"]
    return Table("Settings", "", ["setting", "value"], [["shape", shape_text(chosen.shape)], *rows])


def provenance(report: Report) -> Table:
    rows = [["engine", report.engine], ["synthetic", _plain(report.synthetic)]]
    rows += [[key, _plain(value)] for key, value in report.provenance.items()]
    return Table("Provenance", "", ["what", "value"], rows)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return " ".join(str(inner) for inner in value)
    return value if isinstance(value, str) else json.dumps(value)
