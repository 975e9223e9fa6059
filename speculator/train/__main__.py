"""`python -m speculator.train RECIPE --data DIR --out DIR`: all stages of a recipe, or some."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from speculator.train.recipe import RecipeError, bundled_recipe, load_recipe, recipe_names, scale_time
from speculator.train.report import DivergedError
from speculator.train.stages import HEADS, STAGES, Run, run_stages


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m speculator.train", description="Train a target and its draft head.")
    p.add_argument("recipe", help=f"a TOML file, or the name of a recipe of this package ({', '.join(recipe_names())})")
    p.add_argument("--data", type=Path, required=True, help="folder of *.jsonl.gz corpora")
    p.add_argument("--out", type=Path, required=True, help="folder for models and results")
    p.add_argument("--cache", type=Path, help="folder for tokens, checkpoints and answers (default: OUT.cache)")
    p.add_argument("--prompts", type=Path, help="folder with mt_bench.jsonl, gsm8k.jsonl, humaneval.jsonl")
    p.add_argument("--start", type=Path, help="a target folder to go on from, instead of random weights")
    p.add_argument("--stage", nargs="+", default=["all"], help=f"all, or some of: {', '.join((*STAGES, *HEADS))}")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    p.add_argument("--pace", type=float, default=1.0, help="multiplies all time budgets of the recipe")
    p.add_argument("--force", action="store_true", help="run stages again whose results are there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with a sentence when the recipe or a path is wrong or training diverges."""
    args = parser().parse_args(argv)
    names = list(STAGES) if args.stage == ["all"] else args.stage
    try:
        run = Run(
            recipe=scale_time(load_recipe(bundled_recipe(args.recipe)), args.pace),
            data=args.data,
            out=args.out,
            cache=args.cache or args.out.with_name(args.out.name + ".cache"),
            prompts=args.prompts,
            device=torch.device(args.device),
            workers=args.workers,
            force=args.force,
            start=args.start,
        )
        run_stages(run, names)
    except (RecipeError, DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
