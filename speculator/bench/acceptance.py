"""Accept length and acceptance by position of a pair over prompts, on the real engine in this process.

Owns: counting. tau is tokens committed per target pass, bonus included; acceptance at position i is accepted drafts of
depth i over rounds that drafted at least i deep. Tokens are counted once, up to and including the end mark.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from speculator.bench.pairs import Pair, add_arguments, load_pair, read_prompts
from speculator.bench.provenance import provenance
from speculator.engine import Engine
from speculator.local import LocalSequence
from speculator.types import DraftShape, Rule, SamplingParams, Step, StepResult


class Tally:
    """Counts over rounds."""

    def __init__(self, levels: int) -> None:
        self.rounds, self.tokens = 0, 0
        self.drafted, self.accepted = [0] * levels, [0] * levels
        self.grams: list[float] = []

    def add(self, levels: int, accepted: int, committed: int) -> None:
        """One round that judged `levels` of its draft; `committed` tokens of it count."""
        self.rounds += 1
        self.tokens += committed
        for i in range(levels):
            self.drafted[i] += 1
            self.accepted[i] += i < accepted

    @property
    def figures(self) -> dict[str, Any]:
        rates = [round(a / d, 4) if d else None for a, d in zip(self.accepted, self.drafted, strict=True)]
        return {
            "tau": round(self.tokens / max(1, self.rounds), 4),
            "rounds": self.rounds,
            "tokens": self.tokens,
            "acceptance": rates,
            "repeated_4grams": round(sum(self.grams) / max(1, len(self.grams)), 4),
        }


def main(argv: list[str] | None = None) -> int:
    """Run the bench; exit code 0."""
    args = _parser().parse_args(argv)
    pair = load_pair(args, rows=args.batch)
    shape = _shape(args)
    files = args.sets or [args.prompts]
    report: dict[str, Any] = {"provenance": provenance(), "shape": str(shape), "temperature": args.temperature}
    report["sets"] = {_name(file): measure(pair, file, shape, args).figures for file in files}
    taus = [row["tau"] for row in report["sets"].values()]
    report["mean_tau"] = round(sum(taus) / len(taus), 4)
    _show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--sets", type=Path, nargs="+", help="several prompt files, reported one by one and as a mean")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--depth", type=int, default=5, help="levels of drafted tokens")
    parser.add_argument("--nodes", type=int, default=0, help="drafted nodes of a dynamic tree (EAGLE's total minus 1)")
    parser.add_argument("--branching", type=int, default=1, help="top-k of a dynamic tree; 1 is a chain")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rule", choices=[rule.value for rule in Rule], default=Rule.COUPLED.value)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="sessions at a time")
    return parser


def _shape(args: argparse.Namespace) -> DraftShape:
    return DraftShape(args.depth, args.nodes or (0 if args.branching <= 1 else 59), args.branching)


def _name(file: Path | None) -> str:
    return file.stem if file else "built-in"


def measure(pair: Pair, file: Path | None, shape: DraftShape, args: argparse.Namespace) -> Tally:
    """Run all prompts of a file, `args.batch` at a time."""
    prompts = [pair.tokenizer.encode_chat(text) for text in read_prompts(file, args.limit)]
    tally, ends = Tally(shape.depth), frozenset(pair.engine.info.eos_token_ids)
    params = SamplingParams(args.temperature, seed=args.seed, rule=Rule(args.rule))
    starts = range(0, len(prompts), args.batch)
    for start in track(starts, _name(file), console=Console(stderr=True), transient=True):
        run_batch(pair.engine, prompts[start : start + args.batch], params, shape, args.tokens, ends, tally)
    return tally


def run_batch(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    shape: DraftShape,
    limit: int,
    ends: frozenset[int],
    tally: Tally,
) -> None:
    """Decode prompts together; each stops at its end mark or after `limit` tokens."""
    live = []
    for row, prompt in enumerate(prompts):
        sequence = LocalSequence(engine, row, params, shape)
        sequence.tokens = list(prompt)
        live.append((sequence, len(prompt)))
    while live:
        steps = [s.feed() if s.cached < len(s.tokens) - 1 or len(s.tokens) == n else s.round() for s, n in live]
        results = engine.step(steps)
        live = [
            (sequence, length)
            for (sequence, length), step, result in zip(live, steps, results, strict=True)
            if _goes_on(sequence, length, step, result, limit, ends, tally)
        ]


def _goes_on(
    sequence: LocalSequence,
    length: int,
    step: Step,
    result: StepResult,
    limit: int,
    ends: frozenset[int],
    tally: Tally,
) -> bool:
    tokens = sequence.take(step, result)
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
    committed = stop or len(tokens)
    if step.draft is not None:
        judged = min(_levels(step), committed) if stop else _levels(step)  # nothing past the end is judged
        tally.add(judged, min(len(result.accepted), judged), committed)
    written = sequence.tokens[length : len(sequence.tokens) - len(tokens) + committed]
    done = stop is not None or len(written) >= limit
    if done:
        tally.grams.append(repeated_share(written))
    return not done


def _levels(step: Step) -> int:
    depths: list[int] = []
    for parent in step.draft.parents if step.draft else ():
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the same text."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _show(report: dict[str, Any]) -> None:
    console = Console()
    console.print(report["provenance"])
    table = Table(title=f"{report['shape']}, temperature {report['temperature']}")
    for column in ("prompts", "tau", "tokens", "rounds", "repeated 4-grams", "acceptance by position"):
        table.add_column(column)
    for name, row in report["sets"].items():
        rates = " ".join("-" if rate is None else f"{rate:.2f}" for rate in row["acceptance"])
        grams = f"{row['repeated_4grams']:.3f}"
        table.add_row(name, f"{row['tau']:.2f}", str(row["tokens"]), str(row["rounds"]), grams, rates)
    console.print(table)
    console.print(f"mean tau {report['mean_tau']:.3f}")
