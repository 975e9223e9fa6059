"""Tokens a second of one greedy session: plain, with drafts, and transformers on the same weights, in one run.

Owns: the clock and the table. All variants write the same prompts to the same end, in turns; a ratio is the median over
repeats of what two variants took in the same one, the prompt's pass included, and again from the first token on. Must
never time anything it did not check: texts that differ are reported.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from speculator.bench.pairs import Pair, add_arguments, load_pair, read_prompts
from speculator.bench.prompts import OPEN_SET
from speculator.bench.provenance import provenance
from speculator.errors import ConfigError
from speculator.local import generate
from speculator.types import DraftShape

Writer = Callable[[list[int]], Iterator[Sequence[int]]]  # pieces of the answer, the first as soon as it is there


@dataclass
class Timed:
    """What one variant took for all prompts in one repeat; `first` are the seconds and tokens up to first pieces."""

    seconds: float = 0.0
    tokens: int = 0
    first_seconds: float = 0.0
    first_tokens: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def decode_rate(self) -> float | None:
        """Without the passes over prompts; None where answers came in one piece."""
        tokens = self.tokens - self.first_tokens
        return tokens / (self.seconds - self.first_seconds) if tokens else None


def main(argv: list[str] | None = None) -> int:
    """Run the bench; exit code 0."""
    args = _parser().parse_args(argv)
    if min(args.tokens, args.repeats, *args.depths) < 1:
        raise ConfigError("--tokens, --repeats and --depths must be at least 1.")
    pair = load_pair(args)
    prompts = [pair.tokenizer.encode_chat(text) for text in read_prompts(args.prompts or OPEN_SET, args.limit)]
    writers = _writers(pair, args)
    texts = {name: [[t for piece in write(p) for t in piece] for p in prompts] for name, write in writers.items()}
    report = {"provenance": provenance(), **figures(texts, _measure(writers, prompts, args.repeats))}
    _show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=128, help="at most so many new tokens")
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 4, 5, 7], help="chains to time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-transformers", action="store_true")
    return parser


def _writers(pair: Pair, args: argparse.Namespace) -> dict[str, Writer]:
    ends = frozenset(pair.engine.info.eos_token_ids)

    def ours(shape: DraftShape | None) -> Writer:
        return lambda prompt: generate(pair.engine, prompt, args.tokens, None, shape, ends)

    writers = {"plain": ours(None)}
    writers |= {f"chain {depth}": ours(DraftShape(depth)) for depth in args.depths if pair.engine.head}
    if not args.no_transformers:
        writers |= _transformers(pair, args.tokens)
    return writers


def _transformers(pair: Pair, tokens: int) -> dict[str, Writer]:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = next(pair.engine.model.parameters()).dtype
    model: Any = AutoModelForCausalLM.from_pretrained(str(pair.target), dtype=dtype)
    model = model.to(pair.engine.device).eval()

    def write(prompt: list[int], **more: Any) -> Iterator[Sequence[int]]:
        ids = torch.tensor([prompt], device=pair.engine.device)
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)
        yield out[0, len(prompt) :].tolist()

    return {
        "transformers": write,
        "transformers, prompt look-up": lambda prompt: write(prompt, prompt_lookup_num_tokens=5),
    }


def _measure(writers: Mapping[str, Writer], prompts: list[list[int]], repeats: int) -> dict[str, list[Timed]]:
    """Per variant and repeat; variants take turns prompt by prompt, in an order that moves on."""
    timed = {name: [Timed() for _ in range(repeats)] for name in writers}
    names = list(writers)
    for repeat in track(range(repeats), "timing", console=Console(stderr=True), transient=True):
        for turn, prompt in enumerate(prompts):
            first = (turn + repeat) % len(names)
            for name in names[first:] + names[:first]:
                _time(writers[name], prompt, timed[name][repeat])
    return timed


def _time(write: Writer, prompt: list[int], timed: Timed) -> None:
    """Add one answer to `timed`."""
    start = time.perf_counter()
    pieces = write(prompt)
    first = len(next(pieces))
    timed.first_seconds += time.perf_counter() - start
    timed.first_tokens += first
    timed.tokens += first + sum(map(len, pieces))
    timed.seconds += time.perf_counter() - start


def figures(texts: Mapping[str, list[list[int]]], timed: Mapping[str, list[Timed]]) -> dict[str, Any]:
    """The report: `texts` are the answers of each variant, `timed` its repeats; "plain" is what others are beside."""
    rows = {
        name: _row(runs, timed["plain"]) | {"same_text": texts[name] == texts["plain"]} for name, runs in timed.items()
    }
    return {"prompts": len(texts["plain"]), "tokens": sum(map(len, texts["plain"])), "variants": rows}


def _row(runs: Sequence[Timed], plain: Sequence[Timed]) -> dict[str, Any]:
    ratios = [run.rate / other.rate for run, other in zip(runs, plain, strict=True)]
    decoding = [
        run.decode_rate / other.decode_rate
        for run, other in zip(runs, plain, strict=True)
        if run.decode_rate and other.decode_rate
    ]
    return {
        "tokens_per_second": round(median(run.rate for run in runs), 1),
        "ratio_to_plain": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "ratio_without_prefill": round(median(decoding), 3) if decoding else None,
    }


def _show(report: dict[str, Any]) -> None:
    console = Console()
    console.print(report["provenance"])
    table = Table(title=f"{report['prompts']} prompts, {report['tokens']} tokens, greedy, one session")
    for column in ("variant", "tokens/s", "of plain", "repeats", "without prefill", "same text"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in report["variants"].items():
        low, high = row["ratios"][0], row["ratios"][-1]
        decoding = row["ratio_without_prefill"]
        table.add_row(
            name,
            f"{row['tokens_per_second']:.1f}",
            f"{row['ratio_to_plain']:.2f}x",
            f"{low:.2f} to {high:.2f}",
            "-" if decoding is None else f"{decoding:.2f}x",
            "yes" if row["same_text"] else "no",
        )
    console.print(table)
