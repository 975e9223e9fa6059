"""Paged grouped-query attention on a GPU: our kernels beside FlashAttention-3 and torch's SDPA.

Owns: the table. All run in the same process on the same caches; a figure is the median over replays of a recorded
loop, so launches cost nothing. Must never show a time whose result it did not compare with float32 attention.

Without options it runs the shapes that a figure is wanted for, verification and prompt chunks, each with the figure
and whether it is met; with `--pages`, `--batches`, `--lengths` or `--queries`, the product of these.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from speculator.bench.mla import microseconds
from speculator.bench.provenance import provenance
from target.attention.base import Turn
from target.attention.flash import FlashAttention3, Lengths, flash3_forward
from target.attention.prompts import ROUND
from target.attention.sdpa import SdpaAttention
from target.batch import Batch
from target.cache import LayerShape, PagedCache
from target.errors import PlanError

if TYPE_CHECKING:  # it needs triton
    from target.kernels.gqa import Config

FLASH_SPLITS = (0, 1, 4, 16, 32)  # 0 lets FlashAttention-3 choose; the fastest of these stands in the table
PROMPT_SPLITS = (0, 1)  # more would need memory for partial results of every query, and gain nothing
SHOWN = ((64, 16), (1, 32), (512, 4096, 32768), (1, 8, 64))  # page sizes, batches, lengths and queries of a table
TUNED = ((64,), (1, 8, 32), (512, 4096, 32768), (1, 8, 33, 64))
DEFAULT = "as it is"
WANTED_US = {512: 8.0, 4096: 13.0}  # of verifying 8 tokens of one row at a length
WANTED_TIMES = 1.25  # FlashAttention-3's time, at other lengths
WRONG = 0.05  # from float32 attention over keys and values of unit variance


class Cell(NamedTuple):
    """One shape of the table."""

    page: int
    batch: int
    length: int
    queries: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128


WANTED = (
    *(Cell(64, 1, length, 8) for length in (512, 4096, 32768, 131072)),
    *(Cell(64, 1, context + queries, queries) for context, queries in product((0, 4096), (512, 2048, 8192))),
)


class Field(NamedTuple):
    """What a cell runs on: a batch over several layers, so that none stays in the L2 cache between calls."""

    batch: Batch
    cache: PagedCache
    q: Tensor
    k: Tensor
    v: Tensor

    def layer(self, turn: int) -> int:
        return turn % len(self.cache.layers)


def main(argv: list[str] | None = None) -> int:
    """Run the bench; 0, or 2 where it cannot run."""
    args = _parser().parse_args(argv)
    if not torch.cuda.is_available() or find_spec("triton") is None:
        print("bench gqa needs a CUDA device and the package triton", file=sys.stderr)
        return 2
    if args.flash3:
        os.environ["SPECULATOR_FLASH3"] = args.flash3
    report: dict[str, Any] = {"provenance": provenance()}
    print(json.dumps(report["provenance"]), flush=True)
    with torch.inference_mode():
        report |= tune(args) if args.tune else {"cells": table(args)}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flash3", metavar="DIR", help="library or folder of FlashAttention-3; else it is left out")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument(
        "--tune", nargs="?", const="cuts", choices=("cuts", "kernels"),
        help="time configurations of our kernels instead: lengths of splits and programs a row, or compiled forms",
    )  # fmt: skip
    parser.add_argument("--no-sdpa", action="store_true", help="leave SDPA out; prompt chunks always do")
    for name in ("--pages", "--batches", "--lengths", "--queries"):
        parser.add_argument(name, type=int, nargs="+")
    return parser


def cells(args: argparse.Namespace) -> list[Cell]:
    """Those that a figure is wanted for, unless others are asked for."""
    asked = (args.pages, args.batches, args.lengths, args.queries)
    if not args.tune and not any(asked):
        return list(WANTED)
    of = (given or usual for given, usual in zip(asked, TUNED if args.tune else SHOWN, strict=True))
    return [Cell(*sizes) for sizes in product(*of) if sizes[3] <= sizes[2]]


def _fields(args: argparse.Namespace) -> Iterator[tuple[Cell, Field]]:
    """All cells that fit the memory; those of one page size, batch and length share their cache."""
    for _, alike in groupby(cells(args), key=lambda cell: cell[:3]):
        group = list(alike)
        if 2 * _layer_bytes(group[0]) > torch.cuda.mem_get_info()[0] // 2:
            print(f"left out, too large for this device: {group}", flush=True)
            continue
        cache = _cache(group[0])
        for cell in group:
            yield cell, field(cell, cache)
        del cache


def _layer_bytes(cell: Cell) -> int:
    return (cell.batch * -(-cell.length // cell.page) + 1) * cell.page * 2 * cell.kv_heads * cell.dim * 2


def _cache(cell: Cell) -> PagedCache:
    pages = cell.batch * -(-cell.length // cell.page) + 1
    layers = max(2, min(16, 300_000_000 // _layer_bytes(cell) + 1))
    shape = LayerShape(cell.kv_heads, cell.dim)
    cache = PagedCache([[shape] * layers], pages, cell.page, torch.bfloat16, "cuda")
    for layer in cache.layers:
        layer[1:].normal_()
    return cache


def field(cell: Cell, cache: PagedCache) -> Field:
    """Rows of `length` tokens, the pass's own included, in scattered pages."""
    columns = -(-cell.length // cell.page)
    pages = (torch.randperm(cell.batch * columns, device="cuda") + 1).view(cell.batch, columns)
    ids = torch.zeros(cell.batch, cell.queries, dtype=torch.int64, device="cuda")
    context = torch.full((cell.batch,), cell.length - cell.queries, device="cuda")
    positions = context[:, None] + torch.arange(cell.queries, device="cuda")
    counts = torch.full_like(context, cell.queries)
    batch = Batch(ids, positions, context, counts, pages, longest=cell.length, static=True)

    def noise(heads: int) -> Tensor:
        return torch.randn(cell.batch, cell.queries, heads, cell.dim, dtype=torch.bfloat16, device="cuda")

    return Field(batch, cache, noise(cell.heads), noise(cell.kv_heads), noise(cell.kv_heads))


# ---- the table ----


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per cell, printed as it comes."""
    rows = []
    for cell, ground in _fields(args):
        try:
            row = {**cell._asdict(), **_measure(cell, ground, args)}
            print(_line(row), flush=True)
        except (RuntimeError, PlanError) as failure:  # the other cells still tell something
            row = {**cell._asdict(), "error": str(failure)}
            print(cell, "failed:", failure, flush=True)
        rows.append(row)
    for line in verdict(rows):
        print(line, flush=True)
    return rows


def _measure(cell: Cell, f: Field, args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of attention over stored tokens; of the pass, which also stores its own; errors; ratios."""
    from target.attention.triton import TritonAttention

    ours = TritonAttention(f.cache)
    plan = ours.plan(f.batch)
    ours.run(plan, 0, f.q, f.k, f.v, None)
    row: dict[str, Any] = {"ours": _time(lambda turn: ours.attend(plan, f.layer(turn), f.q, None), f)}
    row["ours_pass"] = microseconds(lambda turn: ours.run(plan, f.layer(turn), f.q, f.k, f.v, None))
    if not args.no_sdpa and cell.queries <= ROUND:
        row |= _sdpa(f)
    if args.flash3:
        row |= _flash3(f)
        row["flash3_speed"] = row["flash3"] / row["ours"]
    row["bandwidth"] = cell.batch * cell.length * cell.kv_heads * cell.dim * 4 / row["ours"] / 1e6
    row["tflops"] = flops(cell) / row["ours"] / 1e6
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
    return rounded | wanted(cell, rounded)


def flops(cell: Cell) -> int:
    """Of scores and values, as far as queries see keys."""
    seen = cell.queries * (cell.length - cell.queries) + cell.queries * (cell.queries + 1) // 2
    return 4 * cell.batch * cell.heads * cell.dim * seen


def wanted(cell: Cell, row: dict[str, Any]) -> dict[str, Any]:
    """The figure asked of a cell and whether it is met; nothing where none is, or its peer was not timed.

    Of prompt chunks it is the choice of `target.attention.choose` that is held to it: that FlashAttention-3 is faster.
    """
    if cell.queries > ROUND and "flash3" in row:
        return {"wanted": "FlashAttention-3, which takes prompts, no slower than ours", "met": row["flash3_speed"] <= 1}
    if cell.queries != 8 or cell.batch != 1:
        return {}
    if cell.length in WANTED_US:
        most = WANTED_US[cell.length]
        return {"wanted": f"{most:.0f} us", "met": row["ours"] <= most}
    if "flash3" not in row:
        return {}
    return {"wanted": f"{WANTED_TIMES} x FlashAttention-3", "met": row["ours"] <= WANTED_TIMES * row["flash3"]}


def _time(call: Callable[[int], Tensor], f: Field) -> float:
    """Its median. Raises RuntimeError when the result on layer 0 is wrong."""
    off = error(f, call(0))
    if not off < WRONG:
        raise RuntimeError(f"wrong by {off}")
    return microseconds(call)


def _sdpa(f: Field) -> dict[str, float]:
    """A whole pass with its plan reused: gathering pages is part of it, building masks is not."""
    attention = SdpaAttention(f.cache)
    plan = attention.plan(f.batch)
    return {"sdpa_pass": _time(lambda turn: attention.run(plan, f.layer(turn), f.q, f.k, f.v, None), f)}


def _flash3(f: Field) -> dict[str, Any]:
    """The kernel alone at the best number of splits: of rounds with its plan reused, of prompt chunks without one."""
    times, out, size = {}, torch.empty_like(f.q), f.cache.page_size
    for splits in PROMPT_SPLITS if f.q.shape[1] > ROUND else FLASH_SPLITS:
        lengths, metadata = _flash3_plan(f, splits)
        out.fill_(torch.nan)  # what an earlier number of splits wrote is no answer of this one

        def call(turn: int, splits: int = splits, lengths: Lengths = lengths, plan: Tensor | None = metadata) -> Tensor:
            return flash3_forward(f.q, f.cache.layers[f.layer(turn)], size, lengths, out, None, splits, plan)

        times[splits] = _time(call, f)
    best = min(times, key=lambda splits: times[splits])
    return {"flash3": times[best], "flash3_splits": best}


def _flash3_plan(f: Field, splits: int) -> tuple[Lengths, Tensor | None]:
    attention = FlashAttention3(f.cache, splits)
    if f.q.shape[1] > ROUND:
        return attention.prepare(f.batch), None
    plan = attention.plan(f.batch)
    attention.refresh(plan, f.q.shape[2], f.k.shape[2], f.q.shape[3])
    return plan.lengths, plan.metadata.plan


def error(f: Field, out: Tensor) -> float:
    """Largest distance from float32 attention over layer 0 in the first and the last row."""
    worst, page = 0.0, f.cache.page_size
    for row in {0, f.q.shape[0] - 1}:
        index = torch.arange(f.batch.longest, device=f.q.device)
        stored = f.cache.layers[0][f.batch.pages[row][index // page] * page + index % page].float()
        stored = stored.repeat_interleave(f.q.shape[2] // stored.shape[2], 2)
        for t in {0, f.q.shape[1] // 2, f.q.shape[1] - 1}:
            keys, values = stored[: int(f.batch.context[row]) + t + 1].unbind(1)
            scores = torch.einsum("hd,lhd->hl", f.q[row, t].float(), keys) * f.q.shape[3] ** -0.5
            exact = torch.einsum("hl,lhd->hd", scores.softmax(-1), values)
            worst = max(worst, float((out[row, t].float() - exact).abs().max()))
    return worst


def _line(row: dict[str, Any]) -> str:
    text = "page {page:2} batch {batch:2} length {length:6} queries {queries:4}: ".format(**row)
    text += "ours {ours:8.1f} us, {bandwidth:.2f} TB/s, {tflops:.0f} TFLOP/s, pass {ours_pass:8.1f}".format(**row)
    if "flash3" in row:
        text += "; FlashAttention-3 {flash3:8.1f} ({flash3_splits} splits), its speed {flash3_speed:.2f}".format(**row)
    if "sdpa_pass" in row:
        text += "; SDPA pass {sdpa_pass:9.1f}, {:.1f} times ours".format(row["sdpa_pass"] / row["ours_pass"], **row)
    if "wanted" in row:
        text += "; {}: wanted {wanted}".format("PASS" if row["met"] else "MISS", **row)
    return text


def verdict(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Against FlashAttention-3 by number of queries, and how many of the wanted figures are met."""
    compared = [row for row in rows if "flash3_speed" in row]
    for queries in sorted({row["queries"] for row in compared}):
        least = min((row for row in compared if row["queries"] == queries), key=lambda row: row["flash3_speed"])
        where = "page {page}, batch {batch}, length {length}".format(**least)
        yield f"queries {queries}: at least {least['flash3_speed']:.2f} of FlashAttention-3's speed ({where})"
    held = [row["met"] for row in rows if "met" in row]
    failed = sum("error" in row for row in rows)
    yield f"{sum(held)} of {len(held)} wanted figures met" + (f", {failed} cells failed" if failed else "")


# ---- tuning ----


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """The time of every configuration for every cell, best first; the best single one for each number of queries.

    What is timed is what a round runs: from a qkv product, its heads turned and its own tokens stored on the way.
    """
    rows = []
    for cell, f in _fields(args):
        rows.append(_tuned(cell, f, args.tune))
        print(_told(rows[-1]), flush=True)
    queries = sorted({row["queries"] for row in rows})
    single = {count: single_best([row for row in rows if row["queries"] == count]) for count in queries}
    for count, choices in single.items():
        shown = choices[:3] + [choice for choice in choices[3:] if choice[0] == DEFAULT]
        for name, mean, worst in shown:
            print(f"queries {count:2}: {mean:.2f} of each cell's best on average, {worst:.2f} at most: {name}")
    return {"tune": rows, "single": single}


def _tuned(cell: Cell, f: Field, what: str) -> dict[str, Any]:
    base = _default(cell)
    found = {_name(config, base): _try(config, f) for config in (_cuts if what == "cuts" else _kernels)(cell)}
    times = [(name, value) for name, value in found.items() if isinstance(value, float)]
    failed = {name: value for name, value in found.items() if isinstance(value, str)}
    ordered = sorted(times, key=lambda pair: pair[1])
    return {**cell._asdict(), "default": base._asdict(), "times": ordered, "failed": failed}


def _told(row: dict[str, Any]) -> str:
    best = "; ".join(f"{value} us {name}" for name, value in row["times"][:3])
    default = dict(row["times"]).get(DEFAULT)
    text = "batch {batch:2} length {length:5} queries {queries:2}: ".format(**row)
    return text + f"default {default} us; best {best}; {len(row['failed'])} failed"


def single_best(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Configurations that ran in all cells by their time over the cell's best: geometric mean and largest."""
    times = [dict(row["times"]) for row in rows]
    everywhere = set.intersection(*(set(found) for found in times)) if times else set()
    scored = []
    for name in everywhere:
        ratios = [found[name] / min(found.values()) for found in times]
        scored.append((name, math.exp(sum(map(math.log, ratios)) / len(ratios)), max(ratios)))
    return sorted(scored, key=lambda choice: choice[1:])


def _name(config: Config, base: Config) -> str:
    """What differs from the default."""
    changes = {key: value for key, value in config._asdict().items() if value != getattr(base, key)}
    return " ".join(f"{key}={value}" for key, value in changes.items()) or DEFAULT


def _default(cell: Cell) -> Config:
    from target.kernels.gqa import pick

    return pick(cell.queries, cell.heads, cell.kv_heads, cell.dim, torch.bfloat16, torch.device("cuda", 0))


def _cuts(cell: Cell) -> Iterator[Config]:
    """Tiles, lengths of splits and programs a row; of each tile a handful of compiled kernels serve all of these."""
    base = _default(cell)
    tiles = [base]
    if cell.queries > 16:
        large = [(64, 4, 3, 1), (64, 4, 2, 2), (128, 8, 3, 1)]
        tiles = [base._replace(rows=m, warps=w, stages=stages, resident=r) for m, w, stages, r in large]
    parts: list[dict[str, Any]] = [dict(resident=n) for n in (1, 2, 4)] + [dict(parts=n) for n in (1, 2, 4, 64)]
    yield from dict.fromkeys((
        base, *(base._replace(run=run) for run in (1024, 4096, 1 << 20)), base._replace(splits=2 * base.splits),
        *(tile._replace(shortest=n, **change) for tile, n, change in product(tiles, (1, 2, 4, 8), parts)),
    ))  # fmt: skip


def _kernels(cell: Cell) -> Iterator[Config]:
    """The default, and what lies around it in each direction and in some pairs of them."""
    base = _default(cell)
    found = [base, base._replace(joined=0)]
    found += [base._replace(stages=stages, tma=tma) for stages, tma in product((1, 2, 3, 4), (True, False))]
    for warps, block in product((2, 4, 8), (32, 64, 128)):
        found.append(base._replace(warps=warps, block=block, stages=2 if block == 128 else 3))
    found += [base._replace(rows=rows, warps=8 if rows == 128 else 4) for rows in (16, 32, 64, 128)]
    yield from dict.fromkeys(found)


def _try(config: Config, f: Field) -> float | str:
    from target.attention.triton import TritonAttention

    attention = TritonAttention(f.cache, config)
    qkv, turn = torch.cat((f.q, f.k, f.v), dim=2), _no_turn(f)
    try:
        plan = attention.plan(f.batch)
        return round(_time(lambda at: attention.run_fused(plan, f.layer(at), qkv, turn, None), f), 1)
    except Exception as failure:  # a configuration that does not fit the device is a result, not the end of the run
        return f"{type(failure).__name__}: {str(failure)[:160]}"


def _no_turn(f: Field) -> Turn:
    """A rotation by nothing, so that results can be compared with attention over what is given."""
    cos = torch.ones_like(f.q[:, :, :1])
    return Turn(cos, torch.zeros_like(cos))


if __name__ == "__main__":
    raise SystemExit(main())
