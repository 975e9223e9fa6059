"""`speculator bench recording`: what writing every round down costs, with and without it in turns in one run.

Owns: the pairs of runs. The same prompts are answered by the same rounds in both, one of them with a recording on disk;
a pair gives one ratio, and the figure is the median over pairs. Takes the options of `bench acceptance`. Must never
count acceptance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import track

from speculator.bench import acceptance, subject
from speculator.bench.outputs import check_files
from speculator.bench.player import Player
from speculator.bench.prompts import Prompt
from speculator.bench.provenance import provenance
from speculator.bench.recording import Recording
from speculator.bench.rounds import ChatTokenizer, Plan
from speculator.errors import ConfigError, SpeculatorError

LIMIT = 0.03  # of the time of a round: what recording may cost


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one run, by the wall and by the processor; `rounds` is 0 where nothing was recorded."""

    wall: float
    cpu: float
    rounds: int = 0


@dataclass(frozen=True, slots=True)
class Overhead:
    """Medians over pairs; shares of the time without recording. `cpu` is of this process alone, not of a server's."""

    pairs: int
    rounds: int  # of all recorded runs
    round: float  # seconds of wall time per recorded round, without recording
    wall: float
    cpu: float
    spread: tuple[float, float]  # quartiles of `wall` over pairs


def measure(
    player: Player, tokenizer: ChatTokenizer, groups: Sequence[Sequence[Prompt]], plan: Plan, folder: Path
) -> Iterator[tuple[Spent, Spent]]:
    """A pair (recorded, not recorded) for each group of prompts, the first of each pair in turns."""
    for i, group in enumerate(groups):
        order = (True, False) if i % 2 else (False, True)
        found = {
            record: _run(player, tokenizer, group, replace(plan, record=record), folder / str(i)) for record in order
        }
        yield found[True], found[False]


def _run(player: Player, tokenizer: ChatTokenizer, group: Sequence[Prompt], plan: Plan, path: Path) -> Spent:
    wall, cpu, rounds = time.perf_counter(), time.process_time(), 0
    with Recording(path if plan.record else None, {}) as recording:
        for answer in player.play(tokenizer, group, plan, {}):
            if plan.record:
                recording.add(answer)
                rounds += len(answer.rounds)
    return Spent(time.perf_counter() - wall, time.process_time() - cpu, rounds)


def summary(pairs: Sequence[tuple[Spent, Spent]]) -> Overhead:
    """The figures of some pairs."""
    walls = sorted(_shares(pairs, lambda spent: spent.wall))
    return Overhead(
        pairs=len(pairs),
        rounds=sum(recorded.rounds for recorded, _ in pairs),
        round=median(plain.wall / max(1, recorded.rounds) for recorded, plain in pairs),
        wall=median(walls),
        cpu=median(_shares(pairs, lambda spent: spent.cpu)),
        spread=(walls[len(walls) // 4], walls[(3 * len(walls)) // 4]),
    )


def _shares(pairs: Sequence[tuple[Spent, Spent]], read: Callable[[Spent], float]) -> list[float]:
    return [read(recorded) / read(plain) - 1 for recorded, plain in pairs]


def main(argv: list[str] | None = None) -> int:
    """Run the bench; exit code 0, 2 for settings that cannot be used."""
    args = acceptance.parsed(_parser(), argv)
    try:
        check_files(args.json)
        found = run(args)
    except SpeculatorError as error:
        Console(stderr=True).print(error.message, markup=False, style="red")
        return 2
    show(found, Console())
    if args.json:
        args.json.write_text(json.dumps({**asdict(found), **provenance()}, indent=1) + "\n", encoding="utf-8")
    return 0


def run(args: argparse.Namespace) -> Overhead:
    """The overhead that the arguments ask for."""
    if args.pairs < 1:
        raise ConfigError("--pairs must be at least 1.")
    plan, prompts = acceptance.plans(args)[0], acceptance.all_prompts(args)
    groups = [_group(prompts, i * plan.rows, plan.rows) for i in range(args.pairs)]
    with subject.subject(args, [plan]) as found, TemporaryDirectory() as folder:
        plan = replace(plan, ends=found.ends)
        for _ in found.player.play(found.tokenizer, groups[0], replace(plan, tokens=8), {}):
            pass  # nobody counts the first rounds
        pairs = measure(found.player, found.tokenizer, groups, plan, Path(folder))
        return summary(list(track(pairs, "pairs", len(groups), console=Console(stderr=True), transient=True)))


def _group(prompts: Sequence[Prompt], start: int, count: int) -> list[Prompt]:
    """`count` first turns, from the beginning again after the last."""
    picked = [prompts[(start + i) % len(prompts)] for i in range(min(count, len(prompts)))]
    return [replace(prompt, turns=prompt.turns[:1]) for prompt in picked]


def show(found: Overhead, console: Console) -> None:
    """Two lines."""
    low, high = (f"{100 * share:+.1f}" for share in found.spread)
    console.print(
        f"Recording costs {100 * found.wall:+.2f} % of the time of a round by the wall (quartiles {low} to {high} %), "
        f"{100 * found.cpu:+.2f} % by the processor: {verdict(found)}",
        markup=False,
    )
    console.print(
        f"{found.pairs} pairs in turns, {found.rounds} recorded rounds, {1e3 * found.round:.3f} ms each.", markup=False
    )


def verdict(found: Overhead) -> str:
    """By the wall clock where its quartiles lie on one side of the limit; otherwise it cannot tell."""
    low, high = found.spread
    may = f"the {100 * LIMIT:.0f} % that it may"
    if low < LIMIT < high:
        return f"{may} lie between the quartiles, so the wall clock cannot tell; take more --pairs or a quiet machine."
    return f"{'within' if high <= LIMIT else 'above'} {may}."


def _parser() -> argparse.ArgumentParser:
    parser = acceptance.parser(__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=24, help="of runs, one recorded and one not")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
