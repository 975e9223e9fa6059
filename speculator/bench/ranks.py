"""`speculator bench ranks`: passes and rounds of a published shape over 1, 2 and 4 ranks, side by side in one run.

Owns: the gangs of one run, one after the other, and the ratios to the first. Weights are random, made on each device
for its shard, and acceptance is forced, so every output says that it is synthetic. With `--pipeline` it measures stages
(ranks_stages.py), with `--starts` nothing: it breaks gangs instead (ranks_starts.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speculator.bench.outputs import check_files
from speculator.bench.provenance import provenance
from speculator.bench.ranks_shapes import WHOLE, Shape, build_shard, check_fits, shape_of
from speculator.bench.ranks_starts import run_starts
from speculator.bench.ranks_starts import show as show_starts
from speculator.bench.round_forced import Depths
from speculator.bench.round_play import MODES, WRAP, play, recorded, time_pass
from speculator.config import Config, load
from speculator.engine import Engine
from speculator.errors import ConfigError, EngineFailedError
from speculator.load import SCRATCH_TOKENS, build_engine, resolve_device
from speculator.passes import Verified
from speculator.ranks.engine import Follower, LeadEngine
from speculator.ranks.launch import variables
from speculator.ranks.team import Team
from speculator.recorded import Sizes
from speculator.types import DraftShape
from target.readout import Asked

QUERIES = (1, 8)
SIZES = (1, 2, 4)
RESULT = "RANKS "  # before what rank 0 of a gang prints for the process that started it
STALL = 120.0


class Unturned(Depths):
    """Forced depths that never begin again: only rank 0 would."""

    def restart(self) -> None:
        return None


def main(argv: list[str] | None = None) -> int:
    """Run the bench, or one rank of it; exit code 1 when a start did not end cleanly."""
    args = _parser().parse_args(argv)
    if args.pipeline:
        from speculator.bench.ranks_stages import check_stages_fit

        args.ranks = [1, args.pipeline]
        check_stages_fit(args)
    if args.worker:
        return _worker(args)
    check_files(args.json)
    broken = args.starts is not None
    found = _starts(args) if broken else run(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (show_starts if broken else _show)(found)
    return int(bool(found.get("wrong")))


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", choices=list(WHOLE), default="llama-3.1-8b")
    p.add_argument("--small", action="store_true", help="as many heads and everything else tiny: shows that it runs")
    p.add_argument("--pipeline", type=int, default=0, help="measure a pipeline of so many stages, beside one rank")
    p.add_argument(
        "--ranks", type=int, nargs="+", help="sizes of gangs, of 1, 2 and 4 those that fit; ratios to the first"
    )
    p.add_argument("--device", default="auto", help="cuda takes one device a rank; auto is cpu with --starts")
    p.add_argument("--graphs", choices=MODES, default="round")
    p.add_argument("--head-parallel", choices=("replicate", "shard"), default="replicate")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--depth", type=int, default=7)
    p.add_argument("--accept", type=float, default=4.0, help="tokens that a round is forced to commit, on average")
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--limit", type=int, default=300, help="seconds that a gang may take")
    p.add_argument("--json", type=Path)
    p.add_argument("--starts", type=int, help="instead start so many gangs of a tiny pair and break most of them")
    p.add_argument("--seed", type=int, default=0, help="of the faults")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p


def _starts(args: argparse.Namespace) -> dict[str, Any]:
    device = "cpu" if args.device == "auto" else args.device
    return run_starts(args.starts, [size for size in args.ranks or SIZES if size > 1], args.seed, device)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report, gang by gang."""
    shape = shape_of(args.shape, args.small)
    if args.pipeline:
        return _report(args, shape.name, [_gang(args, size) for size in args.ranks])
    gangs = [_gang(args, size) for size in _sizes(args, shape)]
    for gang in gangs:
        for row, first in zip(gang["rows"], gangs[0]["rows"], strict=True):
            row["ratio"] = round(row["ms"] / first["ms"], 3)
    return _report(args, shape.name, gangs)


def _report(args: argparse.Namespace, shape: str, gangs: list[dict[str, Any]]) -> dict[str, Any]:
    forced = "not forced" if args.pipeline else f"forced to {args.accept:g} tokens a round"
    says = f"synthetic: random weights, acceptance {forced}"
    return {"bench": "ranks", "says": says, "shape": shape, "provenance": provenance(), "gangs": gangs}


def _sizes(args: argparse.Namespace, shape: Shape) -> Sequence[int]:
    """The sizes that were named, each of which must fit; else those of the usual ones that do."""
    device, fitting, why = resolve_device(args.device), list[int](), list[ConfigError]()
    for size in args.ranks or SIZES:
        try:
            check_fits(shape, size, args.head_parallel, device)
            fitting.append(size)
        except ConfigError as error:
            why.append(error)
    if why and (args.ranks or not fitting):
        raise why[0]
    return fitting


def _gang(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Start `size` ranks of this bench and wait for what rank 0 measured."""
    command = [sys.executable, "-m", "speculator", "bench", "ranks", "--worker", *_own(args)]
    shared = variables(size, "", "")
    ranks = [_start(command, shared, rank) for rank in range(size)]
    try:
        failed = _wait(ranks, args.limit)
    finally:
        for process in ranks:
            process.kill()
    said = [process.communicate()[0] for process in ranks][0]
    found = [line for line in said.splitlines() if line.startswith(RESULT)]
    if failed or not found:
        raise EngineFailedError(f"{size} ranks measured nothing: {failed or 'rank 0 said nothing'}")
    return {"ranks": size, **json.loads(found[0].removeprefix(RESULT))}


def _wait(ranks: Sequence[subprocess.Popen[str]], limit: float) -> str:
    """Until rank 0 has ended; which rank failed before, "" for none. What rank 0 prints fits into its pipe."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if ranks[0].poll() == 0:
            return ""
        failed = [(rank, process.returncode) for rank, process in enumerate(ranks) if process.poll()]
        if failed:
            return "rank {} ended with exit code {}".format(*failed[0])
        time.sleep(0.05)
    return f"it was not done after {limit} s"


def _own(args: argparse.Namespace) -> list[str]:
    same = ("shape", "device", "graphs", "head_parallel", "context", "depth", "accept", "rounds", "pipeline")
    flags = [word for name in same for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return [*flags, "--batches", *map(str, args.batches), *(["--small"] if args.small else [])]


def _start(command: list[str], shared: Mapping[str, str], rank: int) -> subprocess.Popen[str]:
    environ = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
    return subprocess.Popen(command, env=environ, stdout=out, text=True)


# ---- one rank


def _worker(args: argparse.Namespace) -> int:
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    device = resolve_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    rows = _stages(args, size, device) if args.pipeline else _tensor(args, size, device)
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        print(RESULT + json.dumps({"device": name, "rows": rows}), flush=True)
    os._exit(0)  # without the farewell of process groups, which waits for ranks that have gone


def _tensor(args: argparse.Namespace, size: int, device: torch.device) -> list[dict[str, Any]]:
    team = Team.build(size, device, STALL, lambda why: why)
    engine = _engine(args, team)
    return _passes(engine, args) + [row for batch in args.batches for row in _rounds(engine, args, team, batch)]


def _stages(args: argparse.Namespace, size: int, device: torch.device) -> list[dict[str, Any]]:
    from speculator.bench.ranks_stages import measure_stages

    sets = {"graphs.mode": "off" if args.graphs == "off" else "split", "graphs.rows": max(args.batches),
            "parallel.pipeline": size, "engine.max_sessions": args.pipeline * max(args.batches)}  # fmt: skip
    return measure_stages(args, Team.build(1, device, STALL, lambda why: why, pipeline=size), _config(args, sets))


def _engine(args: argparse.Namespace, team: Team) -> Engine:
    shape = shape_of(args.shape, args.small)
    return build_engine(_config(args), team.device, lambda: build_shard(shape, team, args.head_parallel), None, team)


def _config(args: argparse.Namespace, more: Mapping[str, Any] | None = None) -> Config:
    longest, rows = args.context + WRAP + max(QUERIES), max(args.batches) * max(1, args.pipeline)
    room = rows * (longest + SCRATCH_TOKENS + 64)
    sets = {"model.target": args.shape, "model.head": args.shape, "graphs.mode": "off", "engine.kv_tokens": room,
            "engine.max_context": longest, "engine.max_sessions": rows, "draft.depth": args.depth}  # fmt: skip
    return load(None, [f"{key}={value}" for key, value in {**sets, **(more or {})}.items()])


def _passes(engine: Engine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The target alone, all ranks at once."""
    torch.manual_seed(0)
    timed = [(queries, time_pass(engine, queries, args.context, args.rounds, _greedy)) for queries in QUERIES]
    return [{"what": f"pass of {queries}", "rows": 1, "ms": round(1e3 * seconds, 4)} for queries, seconds in timed]


def _greedy(verified: Verified) -> Tensor:
    """The best tokens, as a server asks for them: without the logits where ranks can say."""
    found = verified.read(Asked())
    return verified.logits.argmax(-1) if found is None else found.columns


def _rounds(engine: Engine, args: argparse.Namespace, team: Team, batch: int) -> list[dict[str, Any]]:
    """Rounds as rank 0 orders them; only rank 0 has a figure."""
    depths, page = Unturned(args.accept, args.depth, engine.device), engine.info.page_size
    pages = -(-(engine.info.max_context + SCRATCH_TOKENS) // page)
    sizes = Sizes(batch, pages, page, DraftShape(args.depth))
    with recorded(engine, args.graphs, sizes, depths):
        if not isinstance(engine, LeadEngine):
            Follower(engine, team.channel).run()
            return []
        played = play(engine, batch, args.context, DraftShape(args.depth), args.rounds, depths)
        engine.end()
        ms = round(1e3 * statistics.median(played.seconds), 4)
        return [{"what": f"round of depth {args.depth}", "rows": batch, "ms": ms, "committed": played.committed,
                 "replayed": played.replayed}]  # fmt: skip


def _show(report: Mapping[str, Any]) -> None:
    made = report["provenance"]
    print(f"{report['shape']} on {report['gangs'][0]['device']}, commit {made['commit']}: {report['says']}")
    for gang in report["gangs"]:
        for row in gang["rows"]:
            what = f"{gang['ranks']} ranks, {row['what']:18} rows {row['rows']:2}"
            print(f"  {what} {row['ms']:9.3f} ms" + (f" {row['ratio']:6.3f}" if "ratio" in row else ""))


if __name__ == "__main__":
    sys.exit(main())
