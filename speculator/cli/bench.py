"""`speculator bench`: hands over to the benchmarks.

Owns: their names. Must never know what they measure; each reads its own arguments.
"""

from __future__ import annotations

import sys
from importlib import import_module

import typer

BENCHES = {
    "latency": ("speculator.bench.latency", "Tokens a second with and without drafts, beside transformers."),
    "acceptance": ("speculator.bench.acceptance", "Accept length and acceptance by position over prompt sets."),
    "recording": ("speculator.bench.overhead", "What writing every round down costs, with and without it in turns."),
    "report": ("speculator.bench.report.command", "A report file as a page, a table, plots; vLLM's records as one."),
    "compare": ("speculator.bench.compare", "Two acceptance reports on the same prompts, paired."),
    "graphs": ("speculator.bench.graphs", "Recorded passes beside eager ones: speed, equality, what capture takes."),
    "gqa": ("speculator.bench.gqa", "Grouped-query attention on a GPU, beside FlashAttention-3 and SDPA."),
    "skinny": ("speculator.bench.skinny", "Products of few rows on a GPU beside cuBLAS; rebuilds their table."),
    "mla": ("speculator.bench.mla", "Lazily planned MLA attention on a GPU, beside the real FlashMLA."),
    "round": ("speculator.bench.round", "The time of a round, its ledger and floor, beside vLLM and torch.compile."),
    "hybrid": ("speculator.bench.hybrid", "A hybrid target: passes of 1 to 8 tokens, commits, MTP rounds, state bits."),
    "ranks": ("speculator.bench.ranks", "Passes and rounds over several ranks; or how broken gangs end (--starts)."),
    "rpc": ("speculator.bench.rpc", "One step over gRPC beside a raw echo of the same bytes."),
}

bench = typer.Typer(
    help="Measure latency, acceptance, or the cost of gRPC. `speculator bench NAME --help` lists the options of one.",
    no_args_is_help=True,
)


def run(name: str, arguments: list[str]) -> None:
    """Run a benchmark's `main` as its own program would."""
    module = import_module(BENCHES[name][0])
    before = sys.argv
    sys.argv = [f"speculator bench {name}", *arguments]
    try:
        raise typer.Exit(module.main() or 0)
    finally:
        sys.argv = before


def _command(name: str, text: str) -> None:
    def command(context: typer.Context) -> None:
        run(name, context.args)

    command.__doc__ = text
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    bench.command(name, add_help_option=False, context_settings=settings)(command)


for _name, (_, _text) in BENCHES.items():
    _command(_name, _text)
