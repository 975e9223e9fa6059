"""`speculator bench report`: a report file as a page, a terminal table, plots; or another engine's records as one.

Owns: the flags. Must never compute or draw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from speculator.bench.outputs import check_files
from speculator.bench.records import Report, read_report, write_report
from speculator.bench.report.html import page
from speculator.bench.report.plots import write_plots
from speculator.bench.report.terminal import show
from speculator.bench.vllm_import import Asked, read_vllm
from speculator.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Print the table and write what was asked for; exit code 0.

    Raises RecordError, naming the field, for a file that is not a report of this version, ConfigError for outputs that
    cannot be written.
    """
    args = _parser().parse_args(argv)
    check_files(args.json, args.output)
    report = _read(args)
    if args.json:
        write_report(report, args.json)
    if args.output:
        args.output.write_text(page(report), encoding="utf-8")
    written = [str(path) for path in (args.json, args.output) if path]
    if args.plots:
        written += [str(path) for path in write_plots(report, args.plots)]
    if not args.quiet:
        show(report, Console())
    for path in written:
        print(path)
    return 0


def _read(args: argparse.Namespace) -> Report:
    if not args.vllm:
        return read_report(args.file)
    if args.temperature is None:
        raise ConfigError("vLLM's records do not say how tokens were sampled: give --temperature (0 is greedy).")
    return read_vllm(args.file, Asked(args.temperature, args.target, args.head, args.synthetic))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="report of `speculator bench acceptance --json`")
    parser.add_argument("-o", "--output", type=Path, help="write one self-contained HTML page")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write PNG plots (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="write the report as JSON, for an import")
    parser.add_argument("--quiet", action="store_true", help="print no table")
    parser.add_argument("--vllm", action="store_true", help="FILE holds vLLM responses with per-request acceptance")
    imported = parser.add_argument_group("what an import is told")
    imported.add_argument("--temperature", type=float, help="the requests' own")
    imported.add_argument("--target", default="", help="name of the target; default: the model that FILE names")
    imported.add_argument("--head", default="", help="name of the draft head")
    imported.add_argument("--synthetic", action="store_true", help="the server ran with synthetic acceptance")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
