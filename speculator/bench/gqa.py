"""Paged grouped-query attention on a GPU: our kernels beside FlashAttention-3 and torch's SDPA.

Owns: the table. All run in the same process on the same caches; a figure is the median over replays of a recorded
loop, so launches cost nothing. Must never show a time whose result it did not compare with float32 attention.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from speculator.bench.mla import microseconds
from speculator.bench.provenance import provenance
from target.attention.base import Turn
from target.attention.flash import Flash3Plan, FlashAttention3
from target.attention.sdpa import SdpaAttention
from target.batch import Batch
from target.cache import LayerShape, PagedCache
from target.errors import PlanError

if TYPE_CHECKING:  # it needs triton
    from target.kernels.gqa import Config

FLASH_SPLITS = (0, 1, 4, 16, 32)  # 0 lets FlashAttention-3 choose; the fastest of these stands in the table
SHOWN = ((64, 16), (1, 32), (1, 8, 64))  # page sizes, batches and queries of the table
TUNED = ((64,), (1, 8, 32), (1, 8, 33, 64))
DEFAULT = "as it is"
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
    parser.add_argument("--no-sdpa", action="store_true", help="leave SDPA out")
    parser.add_argument("--pages", type=int, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 32768])
    parser.add_argument("--queries", type=int, nargs="+")
    return parser


def _fields(args: argparse.Namespace) -> Iterator[tuple[Cell, Field]]:
    """All cells; those of one page size, batch and length share their cache."""
    pages, batches, queries_of = TUNED if args.tune else SHOWN
    for page, batch, length in product(args.pages or pages, args.batches or batches, args.lengths):
        cache = _cache(Cell(page, batch, length, 1))
        for queries in args.queries or queries_of:
            cell = Cell(page, batch, length, queries)
            yield cell, field(cell, cache)
        del cache


def _cache(cell: Cell) -> PagedCache:
    pages = cell.batch * -(-cell.length // cell.page) + 1
    layer_bytes = pages * cell.page * 2 * cell.kv_heads * cell.dim * 2
    layers = max(2, min(16, 300_000_000 // layer_bytes + 1))
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
    for line in _verdict([row for row in rows if "flash3_speed" in row]):
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
    if not args.no_sdpa:
        row |= _sdpa(f)
    if args.flash3:
        row |= _flash3(f)
        row["flash3_speed"] = row["flash3"] / row["ours"]
    row["bandwidth"] = cell.batch * cell.length * cell.kv_heads * cell.dim * 4 / row["ours"] / 1e6
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


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
    """The kernel alone with its plan reused, at the best number of splits."""
    times = {}
    for splits in FLASH_SPLITS:
        attention = FlashAttention3(f.cache, splits)
        plan = attention.plan(f.batch)
        attention.refresh(plan, f.q.shape[2], f.k.shape[2], f.q.shape[3])
        times[splits] = _time(partial(_call_flash3, f, attention, plan), f)
    best = min(times, key=lambda splits: times[splits])
    return {"flash3": times[best], "flash3_splits": best}


def _call_flash3(f: Field, attention: FlashAttention3, plan: Flash3Plan, turn: int) -> Tensor:
    store = f.cache.layers[f.layer(turn)]
    keys, values = (part.unflatten(0, (-1, f.cache.page_size)) for part in store.unbind(1))
    out = torch.empty_like(f.q)
    torch.ops._vllm_fa3_C.fwd(
        f.q, keys, values, None, None, None, out, None, None, None, plan.counts, plan.stored, f.q.shape[1],
        f.batch.longest, plan.table, None, None, None, None, None, None, None, None, f.q.shape[3] ** -0.5, True,
        -1, -1, 0.0, True, plan.metadata.plan, attention.splits, None, 0, None, 1, 0, None,
    )  # fmt: skip
    return out


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
    text = "page {page:2} batch {batch:2} length {length:5} queries {queries:2}: ".format(**row)
    text += "ours {ours:8.1f} us, {bandwidth:.2f} TB/s, pass {ours_pass:8.1f}".format(**row)
    if "flash3" in row:
        text += "; FlashAttention-3 {flash3:8.1f} ({flash3_splits} splits), its speed {flash3_speed:.2f}".format(**row)
    if "sdpa_pass" in row:
        text += "; SDPA pass {sdpa_pass:9.1f}, {:.1f} times ours".format(row["sdpa_pass"] / row["ours_pass"], **row)
    return text


def _verdict(rows: list[dict[str, Any]]) -> Iterator[str]:
    for queries in sorted({row["queries"] for row in rows}):
        least = min(rows, key=lambda row: row["flash3_speed"] if row["queries"] == queries else float("inf"))
        where = "page {page}, batch {batch}, length {length}".format(**least)
        yield f"queries {queries}: at least {least['flash3_speed']:.2f} of FlashAttention-3's speed ({where})"


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
