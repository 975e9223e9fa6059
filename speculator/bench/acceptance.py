"""`speculator bench acceptance`: acceptance of a pair over prompts, on the real engine in this process.

Owns: the arguments, and which runs they ask for. Definitions are in `definitions.py`, figures in `measure.py`. Several
values of --temperature, --rule, --depth, --nodes or --branching are a sweep over all their combinations; the first one
gets the whole report.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from speculator.bench.hashes import model_hash
from speculator.bench.measure import Bench, Wishes, shape_of
from speculator.bench.pairs import Pair, add_arguments, load_pair
from speculator.bench.plain import to_json
from speculator.bench.prompts import FORMATS, OPEN_SET, TEXT, Prompt, PromptError, read_prompts, set_name
from speculator.bench.provenance import provenance
from speculator.bench.recording import Answer, Recording
from speculator.bench.records import Report, Settings, write_report
from speculator.bench.report.terminal import show
from speculator.bench.rounds import ChatTokenizer, Plan
from speculator.bench.synthetic import SHAPES, synthetic_engine
from speculator.engine import Engine
from speculator.errors import ConfigError, SpeculatorError
from speculator.types import DraftShape, Rule, SamplingParams


def main(argv: list[str] | None = None) -> int:
    """Run the bench; exit code 0, 2 for prompts, recordings or settings that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        report = run(args)
        if args.json:
            write_report(report, args.json)
    except SpeculatorError as error:
        Console(stderr=True).print(error.message, markup=False, style="red")
        return 2
    show(report, Console())
    return 0


def run(args: argparse.Namespace) -> Report:
    """The report that the arguments ask for."""
    prompts = all_prompts(args)
    plans = _plans(args)
    engine, tokenizer, settings = _subject(args, plans[0])
    ends = frozenset(engine.info.eos_token_ids)
    first, *others = [replace(plan, ends=ends) for plan in plans]
    bench = Bench(engine, tokenizer, prompts, _wishes(args), _progress)
    with Recording(args.record, _recording_settings(settings, prompts)) as recording:
        report = bench.report(first, settings, _provenance(args, settings), recording, bool(args.synthetic))
    swept = [first, *others] if others else []
    return replace(report, sweep=tuple(bench.point(plan, settings.head) for plan in swept))


def all_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Prompts of all files, at most --limit of each; PromptError when two sets have one name."""
    files = args.sets or [args.prompts or OPEN_SET]
    names = [set_name(file) for file in files]
    if len(set(names)) < len(names):
        raise PromptError(f"Two prompt files have the same name: {', '.join(names)}.")
    return [prompt for file in files for prompt in read_prompts(file, args.format, args.limit)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--sets", type=Path, nargs="+", help="several prompt files, reported one by one and as a mean")
    parser.add_argument("--format", choices=["", *FORMATS, TEXT], default="", help="of the files (default: by fields)")
    parser.add_argument("--tokens", type=int, default=128, help="at most so many in an answer")
    parser.add_argument("--depth", type=int, nargs="+", default=[5], help="levels of drafted tokens")
    parser.add_argument("--nodes", type=int, nargs="+", default=[0], help="nodes of a dynamic tree (EAGLE's total - 1)")
    parser.add_argument("--branching", type=int, nargs="+", default=[1], help="top-k of a dynamic tree; 1 is a chain")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0])
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--rule", choices=[r.value for r in Rule], nargs="+", default=[Rule.COUPLED.value])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="2: run another seed too, for the noise floor")
    parser.add_argument("--batch", type=int, default=8, help="sessions at a time")
    parser.add_argument("--record", type=Path, help="keep every round in this file, and go on with it if it is there")
    parser.add_argument("--also", nargs="+", default=[], metavar="D[:N:K]", help="further counterfactual shapes")
    parser.add_argument("--theory", action="store_true", help="also 1 - TV(p, q), by a run under the rejection rule")
    parser.add_argument("--no-counterfactual", action="store_true")
    parser.add_argument("--no-baseline", action="store_true", help="no prompt look-up")
    parser.add_argument("--timed", type=int, default=4, help="prompts whose rounds are timed, 0 for none")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap; 0 for no intervals")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--synthetic", choices=list(SHAPES), help="random weights of this shape, for times alone")
    return parser


def _plans(args: argparse.Namespace) -> list[Plan]:
    if args.tokens < 1 or args.batch < 1 or min(args.temperature) < 0:
        raise ConfigError("--tokens and --batch must be at least 1, --temperature at least 0.")
    shapes = [_shape(*given) for given in product(args.depth, args.nodes, args.branching)]
    combined = product(args.temperature, args.rule, dict.fromkeys(shapes))
    return [
        Plan(SamplingParams(t, args.top_k, args.top_p, seed=args.seed, rule=Rule(rule)), shape, args.tokens, args.batch)
        for t, rule, shape in combined
    ]


def _shape(depth: int, nodes: int, branching: int) -> DraftShape:
    if not (1 <= depth <= 16 and 0 <= nodes <= 63 and 1 <= branching <= 16):
        raise ConfigError(f"A draft of depth {depth}, {nodes} nodes and branching {branching} is out of bounds.")
    return DraftShape(depth) if branching == 1 else DraftShape(depth, nodes or 59, branching)


def _also(text: str) -> DraftShape:
    """D for a chain, D:N:K for a tree."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdigit() for part in parts):
        raise ConfigError(f"--also takes DEPTH or DEPTH:NODES:BRANCHING, not {text!r}.")
    return _shape(int(parts[0]), *(int(part) for part in parts[1:])) if len(parts) == 3 else _shape(int(parts[0]), 0, 1)


def _wishes(args: argparse.Namespace) -> Wishes:
    if not 0 < args.confidence < 1:
        raise ConfigError(f"--confidence must lie between 0 and 1, not be {args.confidence}.")
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


class Bytes:
    """The tokenizer of models without one: a token a byte."""

    has_chat = False

    def encode_chat(self, messages: str | Sequence[dict[str, str]]) -> list[int]:
        text = messages if isinstance(messages, str) else "\n".join(m["content"] for m in messages)
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i % 256 for i in ids).decode("latin-1")


def _subject(args: argparse.Namespace, plan: Plan) -> tuple[Engine, ChatTokenizer, Settings]:
    """What is measured, and the settings of the report."""
    if args.synthetic:
        engine = synthetic_engine(args.synthetic, args.device, plan.rows, {"engine.threads": args.threads})
        return engine, Bytes(), _settings(args, plan, engine, args.synthetic, "random", False)
    pair: Pair = load_pair(args, rows=plan.rows)
    if pair.engine.head is None:
        raise ConfigError("There is no draft head to measure: give --head PATH.")
    settings = _settings(args, plan, pair.engine, str(pair.target), pair.head, pair.tokenizer.has_chat)
    return pair.engine, pair.tokenizer, settings


def _settings(args: argparse.Namespace, plan: Plan, engine: Engine, target: str, head: str, chat: bool) -> Settings:
    assert plan.shape is not None
    return Settings(
        target=target,
        head=head,
        method=engine.info.draft_method,
        shape=shape_of(plan.shape),
        temperature=plan.sampling.temperature,
        rule=plan.sampling.rule.value,
        seed=plan.sampling.seed,
        max_tokens=plan.tokens,
        batch=plan.rows,
        top_k=plan.sampling.top_k,
        top_p=plan.sampling.top_p,
        files=tuple(set_name(file) for file in args.sets or [args.prompts or OPEN_SET]),
        chat=chat,
        confidence=args.confidence,
        resamples=args.resamples,
    )


def _recording_settings(settings: Settings, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a recording must have been made with to be gone on with."""
    found: dict[str, Any] = to_json(settings)
    kept = {name: found[name] for name in found if name not in ("confidence", "resamples", "batch", "target", "head")}
    return kept | {"models": [model_hash(Path(folder)) for folder in (settings.target, settings.head)]}


def _provenance(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    models = {name: model_hash(Path(folder)) for name, folder in (("target", settings.target), ("head", settings.head))}
    return {**provenance(), "model_hashes": models}


def _progress(answers: Iterable[Answer], total: int, label: str) -> Iterator[Answer]:
    yield from track(answers, label, total, console=Console(stderr=True), transient=True)
