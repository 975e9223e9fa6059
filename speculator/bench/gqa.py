"""Paged grouped-query attention on a GPU: our kernels beside FlashAttention-3 and torch's SDPA.

Owns: the table. All run in the same process on the same caches; a figure is the median over replays of a recorded
loop, so launches cost nothing. Must never show a time whose result it did not compare with float32 attention.
"""

from __future__ import annotations

import argparse
import json
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
from target.attention.flash import Flash3Plan, FlashAttention3
from target.attention.sdpa import SdpaAttention
from target.batch import Batch
from target.cache import LayerShape, PagedCache
from target.errors import PlanError

if TYPE_CHECKING:  # it needs triton
    from target.kernels.gqa import Config

FLASH_SPLITS = (0, 1, 4, 16, 32)  # 0 lets FlashAttention-3 choose; the fastest of these stands in the table
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
        report |= {"tune": tune(args)} if args.tune else {"cells": table(args)}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flash3", metavar="DIR", help="library or folder of FlashAttention-3; else it is left out")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--tune", action="store_true", help="time every configuration of our kernels instead")
    parser.add_argument("--no-sdpa", action="store_true", help="leave SDPA out")
    parser.add_argument("--pages", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 32768])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 8, 64])
    return parser


def _fields(args: argparse.Namespace) -> Iterator[tuple[Cell, Field]]:
    """All cells; those of one page size, batch and length share their cache."""
    for page, batch, length in product(args.pages, args.batches, args.lengths):
        cache = _cache(Cell(page, batch, length, 1))
        for queries in args.queries:
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


def tune(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The time of every configuration for every cell, best first."""
    rows: list[dict[str, Any]] = []
    for cell, f in _fields(args):
        found = {str(tuple(config)): _try(config, f) for config in _configs(cell)}
        times = sorted((value, name) for name, value in found.items() if isinstance(value, float))
        failed = {name: value for name, value in found.items() if isinstance(value, str)}
        rows.append({**cell._asdict(), "times": [(name, value) for value, name in times], "failed": failed})
        print(cell, "best", times[:4], "default", times and found[str(tuple(_default(cell)))], flush=True)
    return rows


def _default(cell: Cell) -> Config:
    from target.kernels.gqa import pick

    return pick(cell.queries, cell.heads, cell.kv_heads, cell.dim, torch.bfloat16, torch.device("cuda", 0))


def _configs(cell: Cell) -> Iterator[Config]:
    """The default, and what lies around it in each direction and in some pairs of them."""
    base = _default(cell)
    yield base
    for splits, shortest in product({base.splits, base.splits * 2, max(base.splits // 2, 1)}, (1, 2, 4)):
        yield base._replace(splits=splits, shortest=shortest)
    for stages, tma in product((1, 2, 3, 4), (True, False)):
        yield base._replace(stages=stages, tma=tma)
    for warps, block in product((2, 4, 8), (32, 64, 128)):
        yield base._replace(warps=warps, block=block, stages=2 if block == 128 else 3)
    for rows in {16, 32, 64, 128} - {base.rows}:
        yield base._replace(rows=rows, warps=8 if rows == 128 else 4)


def _try(config: Config, f: Field) -> float | str:
    from target.attention.triton import TritonAttention

    attention = TritonAttention(f.cache, config)
    try:
        plan = attention.plan(f.batch)
        return round(_time(lambda turn: attention.attend(plan, f.layer(turn), f.q, None), f), 1)
    except Exception as failure:  # a configuration that does not fit the device is a result, not the end of the run
        return f"{type(failure).__name__}: {str(failure)[:160]}"


if __name__ == "__main__":
    raise SystemExit(main())
