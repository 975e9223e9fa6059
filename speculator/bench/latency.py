"""Tokens a second of one greedy session: plain, with drafts, and transformers on the same weights, in one run.

Owns: the clock and the table. All variants write the same prompts to the same end, prefill included, in turns; the
median over repeats counts. Must never time anything it did not check: texts that differ are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from speculator.bench.pairs import Pair, add_arguments, load_pair, read_prompts
from speculator.bench.provenance import provenance
from speculator.local import generate
from speculator.types import DraftShape

Writer = Callable[[list[int]], list[int]]


def main(argv: list[str] | None = None) -> int:
    """Run the bench; exit code 0."""
    args = _parser().parse_args(argv)
    pair = load_pair(args)
    prompts = [pair.tokenizer.encode_chat(text) for text in read_prompts(args.prompts, args.limit)]
    writers = _writers(pair, args)
    texts = {name: [write(p) for p in prompts] for name, write in writers.items()}  # warms up too
    seconds = _measure(writers, prompts, args.repeats)
    report = {"provenance": provenance(), **_figures(texts, seconds)}
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
        return lambda p: [t for step in generate(pair.engine, p, args.tokens, None, shape, ends) for t in step]

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

    def write(prompt: list[int], **more: Any) -> list[int]:
        ids = torch.tensor([prompt], device=pair.engine.device)
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return {
        "transformers": write,
        "transformers, prompt look-up": lambda prompt: write(prompt, prompt_lookup_num_tokens=5),
    }


def _measure(writers: dict[str, Writer], prompts: list[list[int]], repeats: int) -> dict[str, list[float]]:
    """Seconds for all prompts, per variant and repeat; variants take turns prompt by prompt."""
    seconds = {name: [0.0] * repeats for name in writers}
    for repeat in track(range(repeats), "timing", console=Console(stderr=True), transient=True):
        for prompt in prompts:
            for name, write in writers.items():
                start = time.perf_counter()
                write(prompt)
                seconds[name][repeat] += time.perf_counter() - start
    return seconds


def _figures(texts: dict[str, list[list[int]]], seconds: dict[str, list[float]]) -> dict[str, Any]:
    rates = {name: sum(map(len, texts[name])) / statistics.median(times) for name, times in seconds.items()}
    rows = {
        name: {
            "tokens_per_second": round(rate, 1),
            "ratio_to_plain": round(rate / rates["plain"], 3),
            "spread": round((max(seconds[name]) - min(seconds[name])) / statistics.median(seconds[name]), 3),
            "same_text": texts[name] == texts["plain"],
        }
        for name, rate in rates.items()
    }
    return {"prompts": len(texts["plain"]), "tokens": sum(map(len, texts["plain"])), "variants": rows}


def _show(report: dict[str, Any]) -> None:
    console = Console()
    console.print(report["provenance"])
    table = Table(title=f"{report['prompts']} prompts, {report['tokens']} tokens, greedy, one session")
    for column in ("variant", "tokens/s", "of plain", "spread", "same text"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in report["variants"].items():
        rate, ratio, spread = row["tokens_per_second"], row["ratio_to_plain"], row["spread"]
        table.add_row(name, f"{rate:.1f}", f"{ratio:.2f}x", f"{spread:.0%}", "yes" if row["same_text"] else "no")
    console.print(table)
