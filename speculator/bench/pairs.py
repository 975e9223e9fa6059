"""What the benches run on: a pair by path (the bundled one by default), prompts, an engine of one session.

Must never measure anything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from speculator.bench.outputs import unreadable
from speculator.bundled import find_pairs
from speculator.config import Config, load
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.load import load_engine
from speculator.tokenizer import FolderTokenizer, load_tokenizer

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Tom has 12 apples. He gives 5 of them to Mary and then buys 8 more. How many apples does Tom have now?",
    "Write a Python function that returns the sum of the even numbers in a list.",
    "Tell me a short story about a fox who wanted to learn to swim.",
    "Explain the difference between a virus and a bacterium.",
    "A train travels 60 miles in 1.5 hours. What is its speed in miles per hour?",
    "Write a Python function that checks whether a string is a palindrome.",
    "What does the word 'generous' mean?",
)


class Pair(NamedTuple):
    """An engine, its tokenizer, and where they came from."""

    engine: Engine
    tokenizer: FolderTokenizer
    target: Path
    head: str


def add_arguments(parser: argparse.ArgumentParser, several_heads: bool = False) -> None:
    """The arguments every in-process bench takes; several heads become `heads`, a list."""
    parser.add_argument("--target", help="target folder (default: the bundled pair)")
    if several_heads:
        text = "head folders, `mtp` for modules in the target's; the first gets the whole report, all are a sweep"
        parser.add_argument("--head", dest="heads", metavar="HEAD", nargs="+", action="extend", default=[], help=text)
    else:
        parser.add_argument("--head", help="head folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 is torch's choice")
    parser.add_argument("--prompts", type=Path, help="JSONL with `turns` or `prompt`, or a text file of one a line")
    parser.add_argument("--limit", type=int, default=0, help="at most so many prompts")
    parser.add_argument("--json", type=Path, help="write the figures here too")


def load_pair(args: argparse.Namespace, rows: int = 1, more: Mapping[str, object] | None = None) -> Pair:
    """The pair that the arguments name; `more` are further keys of the configuration."""
    config = pair_config(args, rows, more)
    target = config.model.target
    return Pair(load_engine(config), load_tokenizer(Path(target)), Path(target), config.model.head)


def pair_config(args: argparse.Namespace, rows: int = 1, more: Mapping[str, object] | None = None) -> Config:
    """The configuration of `load_pair`."""
    target, head = args.target, args.head or ""
    if not target:
        pairs = find_pairs()
        if not pairs:
            raise ConfigError("No target is named and no bundled pair is here: give --target PATH and --head PATH.")
        target, head = str(pairs[0].target), head or str(pairs[0].head)
    sets = {"model.target": target, "model.head": head, "model.device": args.device, "engine.threads": args.threads}
    sets |= more or {}
    return load(None, [f"{key}={value}" for key, value in sets.items()] + [f"engine.max_sessions={rows}"])


def read_prompts(path: Path | None, limit: int) -> list[str]:
    """First turns of a file, or the small set of this module; `limit` 0 takes all."""
    prompts = list(PROMPTS) if path is None else _from_file(path)
    return prompts[: limit or None]


def _from_file(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(unreadable(path, error)) from None
    return [_first_turn(line) for line in lines] if path.suffix == ".jsonl" else lines


def _first_turn(line: str) -> str:
    record = json.loads(line)
    return str(record["turns"][0] if "turns" in record else record.get("prompt") or record["question"])
