"""`speculator bench acceptance`: acceptance of a pair over prompts, on the real engine here or on a running server.

Owns: the arguments, and which runs they ask for. Must never compute a figure: definitions are in `definitions.py`,
figures in `measure.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from speculator.bench import subject
from speculator.bench.measure import Bench, Wishes
from speculator.bench.outputs import check_files
from speculator.bench.pairs import add_arguments
from speculator.bench.plain import to_json
from speculator.bench.prompts import FORMATS, OPEN_SET, TEXT, Prompt, PromptError, read_prompts, set_name
from speculator.bench.provenance import provenance
from speculator.bench.recording import Answer, Recording
from speculator.bench.records import Report, write_report
from speculator.bench.report.html import page
from speculator.bench.report.plots import check_plots, write_plots
from speculator.bench.report.terminal import show
from speculator.bench.rounds import Plan
from speculator.bench.subject import Subject
from speculator.bench.sweep import Book, Sweep, sweep_folder
from speculator.bench.sweep_heads import contenders
from speculator.drafts import ShapeRequest, check_sampling
from speculator.errors import CheckpointError, ConfigError, InvalidArgumentError, SpeculatorError
from speculator.types import DraftShape, Rule, SamplingParams

EAGLE_NODES = 59  # EAGLE-2's 60 tokens, the root among them
INTERRUPTED = 130  # as a shell would say it
BEFORE = (InvalidArgumentError, ConfigError, CheckpointError)  # wrong input: the run does not begin

HELP = """Several values of --head, --modules, --temperature, --rule, --depth, --nodes or --branching are a sweep over
all their combinations, with prompt look-up beside them; the first one gets the whole report. An interrupted run with
--record goes on when the same command is given again."""


def main(argv: list[str] | None = None) -> int:
    """Run the bench; exit code 0, 2 for prompts, recordings, servers or settings that cannot be used."""
    args = parsed(parser(f"{__doc__.splitlines()[0]} {HELP}"), argv)
    try:
        check_files(args.json, args.html)
        if args.plots:
            check_plots(args.plots)
        report = run(args)
        show(report, Console())
        _write(report, args)
    except SpeculatorError as error:
        said = [error.message] if isinstance(error, BEFORE) else [f"{error.message.rstrip('.')}.", _kept(args)]
        Console(stderr=True).print(" ".join(said), markup=False, style="red")
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Interrupted. {_kept(args)}", markup=False)
        return INTERRUPTED
    return 0


def run(args: argparse.Namespace) -> Report:
    """The report that the arguments ask for."""
    prompts = all_prompts(args)
    asked, wishes = plans(args), _wishes(args)
    with subject.subject(args, asked, wishes.also) as found:
        played = [replace(plan, ends=found.ends) for plan in asked]
        bench = Bench(found.player, found.tokenizer, prompts, wishes, _progress)
        heads = contenders(args, found, bench, played[0])
        with Recording(args.record, _recording_settings(found)) as recording:
            where = _provenance(found, {} if heads.alone else heads.hashes)
            report = bench.report(played[0], found.settings, where, recording, bool(args.synthetic))
        if len(played) == 1 and heads.alone:
            return report
        book = Book(sweep_folder(args.record), _recording_settings(found), heads.hashes)
        book.note(heads.main, played[0], recording.answers)
        return replace(report, sweep=Sweep(heads, played, book, wishes.baseline, args.confidence).run())


def _write(report: Report, args: argparse.Namespace) -> None:
    if args.json:
        write_report(report, args.json)
    if args.html:
        args.html.write_text(page(report), encoding="utf-8")
    if args.plots:
        write_plots(report, args.plots)


def _kept(args: argparse.Namespace) -> str:
    """What is left of a run that ended early."""
    if args.record and args.record.exists() and args.record.stat().st_size:
        return f"Whole answers are kept in {args.record}: the same command goes on with them."
    return "Nothing was recorded yet." if args.record else "With --record FILE an interrupted run can be gone on with."


def all_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Prompts of all files, at most --limit of each; PromptError when two sets have one name."""
    files = args.sets or [args.prompts or OPEN_SET]
    names = [set_name(file) for file in files]
    if len(set(names)) < len(names):
        raise PromptError(f"Two prompt files have the same name: {', '.join(names)}.")
    return [prompt for file in files for prompt in read_prompts(file, args.format, args.limit)]


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments as `plans` and `subject` want them: `head` is the first of `heads`."""
    args = parser.parse_args(argv)
    args.head = args.heads[0] if args.heads else ""
    return args


def parser(text: str | None) -> argparse.ArgumentParser:
    """The arguments, under the description `text`."""
    parser = argparse.ArgumentParser(description=text)
    add_arguments(parser, several_heads=True)
    parser.add_argument("--modules", type=int, nargs="+", default=[], help="of an MTP head play the first N, recursed")
    subject.add_arguments(parser)
    parser.add_argument("--sets", type=Path, nargs="+", help="several prompt files, reported one by one and as a mean")
    parser.add_argument("--format", choices=["", *FORMATS, TEXT], default="", help="of the files (default: by fields)")
    parser.add_argument("--tokens", type=int, default=128, help="at most so many in an answer")
    parser.add_argument("--depth", type=int, nargs="+", default=[5], help="levels of drafted tokens")
    parser.add_argument("--nodes", type=int, nargs="+", default=[0], help="nodes of a dynamic tree (EAGLE's total - 1)")
    parser.add_argument("--branching", type=int, nargs="+", default=[1], help="top-k of a dynamic tree; 1 is a chain")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0], help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="of sampling; 0 for all tokens")
    parser.add_argument("--rule", choices=[r.value for r in Rule], nargs="+", default=[Rule.COUPLED.value])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds", type=int, choices=(1, 2), default=1, help="2: run another seed too, for the noise floor"
    )
    parser.add_argument("--batch", type=int, default=8, help="sessions at a time")
    parser.add_argument("--record", type=Path, help="keep every round in this file, and go on with it if it is there")
    parser.add_argument("--also", nargs="+", default=[], metavar="D[:N:K]", help="further counterfactual shapes")
    parser.add_argument("--theory", action="store_true", help="also 1 - TV(p, q), by a run under the rejection rule")
    parser.add_argument("--no-counterfactual", action="store_true")
    parser.add_argument("--no-baseline", action="store_true", help="no prompt look-up")
    parser.add_argument("--timed", type=int, default=4, help="prompts whose rounds are timed, 0 for none")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap; 0 for no intervals")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--html", type=Path, help="write one self-contained page")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write PNG plots (needs matplotlib)")
    return parser


def plans(args: argparse.Namespace) -> list[Plan]:
    """What is to be played: every combination of the shapes and ways of sampling."""
    if args.tokens < 1 or args.batch < 1:
        raise ConfigError("--tokens and --batch must be at least 1.")
    if any(args.nodes) and max(args.branching) == 1:
        raise ConfigError("--nodes is of a tree, and a tree has --branching 2 or more; of a chain give --depth.")
    shapes = [_shape(*given) for given in product(args.depth, args.nodes, args.branching)]
    combined = list(product(_samplings(args), dict.fromkeys(shapes)))
    if any(sampling.rule is Rule.BLOCK and not shape.is_chain for sampling, shape in combined):
        raise ConfigError("--rule block verifies chains only: leave out --branching, or run it by itself.")
    return [Plan(sampling, shape, args.tokens, args.batch) for sampling, shape in combined]


def _samplings(args: argparse.Namespace) -> list[SamplingParams]:
    """Every way of sampling; InvalidArgumentError for one that the service would not take."""
    asked = product(args.temperature, args.rule)
    found = [SamplingParams(t, args.top_k, args.top_p, seed=args.seed, rule=Rule(rule)) for t, rule in asked]
    for params in found:
        check_sampling(params)
    return found


def _shape(depth: int, nodes: int, branching: int) -> DraftShape:
    if not (1 <= depth <= 16 and 0 <= nodes <= 63 and 1 <= branching <= 16):
        raise ConfigError(f"A draft of depth {depth}, {nodes} nodes and branching {branching} is out of bounds.")
    if branching == 1:
        return DraftShape(depth)
    return ShapeRequest(depth, nodes or EAGLE_NODES, branching).over(DraftShape(depth))  # no more than its levels hold


def _also(text: str) -> DraftShape:
    """D for a chain, D:N:K for a tree."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdigit() for part in parts):
        raise ConfigError(f"--also takes DEPTH or DEPTH:NODES:BRANCHING, not {text!r}.")
    return _shape(int(parts[0]), *(int(part) for part in parts[1:])) if len(parts) == 3 else _shape(int(parts[0]), 0, 1)


def _wishes(args: argparse.Namespace) -> Wishes:
    if not 0 < args.confidence < 1:
        raise ConfigError(f"--confidence must lie between 0 and 1, not be {args.confidence}.")
    if min(args.limit, args.timed, args.resamples) < 0:
        raise ConfigError("--limit, --timed and --resamples must be at least 0.")
    return Wishes(
        counterfactual=not args.no_counterfactual,
        also=tuple(_also(text) for text in args.also),
        seeds=args.seeds,
        theory=args.theory,
        timed=args.timed,
        baseline=not args.no_baseline,
        resamples=args.resamples,
        confidence=args.confidence,
    )


def _recording_settings(found: Subject) -> dict[str, Any]:
    """What a recording must have been made with to be gone on with."""
    whole: dict[str, Any] = to_json(found.settings)
    kept = {name: whole[name] for name in whole if name not in ("confidence", "resamples", "batch", "target", "head")}
    return kept | {"models": [found.hashes["target"], found.hashes["head"]]}


def _provenance(found: Subject, heads: Mapping[str, str]) -> dict[str, Any]:
    told: dict[str, Any] = {**provenance(), "target_revision": found.revision}
    if found.server:
        told["client_device"] = told.pop("device")  # what the server runs on, it does not tell
        return told | {"server": found.server}
    return told | {"model_hashes": {**found.hashes, **heads}}


def _progress(answers: Iterable[Answer], total: int, label: str) -> Iterator[Answer]:
    yield from track(answers, label, total, console=Console(stderr=True), transient=True)
