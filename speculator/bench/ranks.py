"""`speculator bench ranks`: passes and rounds of a published shape over 1, 2 and 4 ranks, side by side in one run.

Owns: the gangs of one run, one after the other, and the ratios to one rank. Weights are random, made on each device
for its shard, and acceptance is forced, so every output says that it is synthetic. With `--pipeline` it measures stages
(ranks_stages.py), with `--starts` nothing: it breaks gangs instead (ranks_trials.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from speculator.bench.provenance import provenance
from speculator.bench.ranks_trials import run_trials, serve_command
from speculator.bench.round_forced import Depths
from speculator.bench.round_play import MODES, WRAP, play, recorded, time_pass
from speculator.bench.synthetic import SHAPES, eagle3_record, random_weights
from speculator.bundled import find_pair
from speculator.config import Config, load
from speculator.engine import Engine
from speculator.errors import ConfigError, EngineFailedError
from speculator.heads.base import DraftHead
from speculator.heads.load import HEADS, lend
from speculator.heads.shard import shard_record
from speculator.load import SCRATCH_TOKENS, build_engine, resolve_device
from speculator.ranks.engine import Follower, LeadEngine
from speculator.ranks.launch import variables
from speculator.ranks.team import Team
from speculator.recorded import Sizes
from speculator.types import DraftShape
from target.config import parse_config
from target.decoder import Decoder
from target.errors import PlanError
from target.parallel import ALONE, ParallelDecoder, add_up, check_divides

QUERIES = (1, 8)
RESULT = "RANKS "  # before what rank 0 of a gang prints for the process that started it
SECONDS = 600  # that a gang may take
STALL = 120.0


class Unturned(Depths):
    """Forced depths that never begin again: only rank 0 would."""

    def restart(self) -> None:
        return None


def main(argv: list[str] | None = None) -> int:
    """Run the bench, or one rank of it; exit code 1 when a start did not end cleanly."""
    args = _parser().parse_args(argv)
    if args.starts:
        pair = find_pair(None)
        command = serve_command(Path(pair.target), Path(pair.head), 2)
        return int(any(ending.wrong for ending in run_trials(command, args.starts, 2, args.seed)))
    if args.pipeline:
        from speculator.bench.ranks_stages import check_stages_fit

        args.ranks = [1, args.pipeline]
        check_stages_fit(args)
    if args.worker:
        return _worker(args)
    _check(args)
    report = run(args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _show(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    p.add_argument("--pipeline", type=int, default=0, help="measure a pipeline of so many stages, beside one rank")
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="sizes of gangs; ratios are to the first")
    p.add_argument("--device", default="auto", help="cuda takes one device a rank")
    p.add_argument("--graphs", choices=MODES, default="round")
    p.add_argument("--head-parallel", choices=("replicate", "shard"), default="replicate")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--depth", type=int, default=7)
    p.add_argument("--accept", type=float, default=4.0, help="tokens that a round is forced to commit, on average")
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--json", type=Path)
    p.add_argument("--starts", type=int, default=0, help="break so many gangs of the bundled pair on the CPU instead")
    p.add_argument("--seed", type=int, default=0, help="of the faults")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p


def _check(args: argparse.Namespace) -> None:
    device, config = resolve_device(args.device), parse_config(SHAPES[args.shape][0])
    most = max(args.ranks)
    if device.type == "cuda" and most > torch.cuda.device_count():
        raise ConfigError(f"{most} ranks need {most} CUDA devices, and this machine has {torch.cuda.device_count()}")
    try:
        for size in args.ranks if not args.pipeline else ():
            check_divides(config, size)
    except PlanError as error:
        raise ConfigError(str(error)) from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report, gang by gang."""
    gangs = [_gang(args, size) for size in args.ranks]
    if args.pipeline:
        return _report(args, gangs)
    for gang in gangs:
        for row, first in zip(gang["rows"], gangs[0]["rows"], strict=True):
            row["ratio"] = round(row["ms"] / first["ms"], 3)
    return _report(args, gangs)


def _report(args: argparse.Namespace, gangs: list[dict[str, Any]]) -> dict[str, Any]:
    forced = "not forced" if args.pipeline else f"forced to {args.accept:g} tokens a round"
    says = f"synthetic: random weights, acceptance {forced}"
    return {"bench": "ranks", "says": says, "shape": args.shape, "provenance": provenance(), "gangs": gangs}


def _gang(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Start `size` ranks of this bench and wait for what rank 0 measured."""
    command = [sys.executable, "-m", "speculator", "bench", "ranks", "--worker", *_own(args)]
    shared = variables(size, "", "")
    ranks = [_start(command, shared, rank) for rank in range(size)]
    try:
        said, _ = ranks[0].communicate(timeout=SECONDS)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    found = [line for line in said.splitlines() if line.startswith(RESULT)]
    if not found:
        raise EngineFailedError(f"{size} ranks measured nothing; rank 0 ended with exit code {ranks[0].returncode}")
    return {"ranks": size, **json.loads(found[0].removeprefix(RESULT))}


def _own(args: argparse.Namespace) -> list[str]:
    same = ("shape", "device", "graphs", "head_parallel", "context", "depth", "accept", "rounds", "pipeline")
    flags = [word for name in same for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return [*flags, "--batches", *map(str, args.batches)]


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
    return build_engine(_config(args), team.device, lambda: _shard(args.shape, team, args.head_parallel), None, team)


def _shard(name: str, team: Team, divided: str) -> tuple[Decoder, DraftHead]:
    """A rank's shard of a random target, and of a random head or a whole one that is the same on all ranks."""
    raw, draft_vocab = SHAPES[name]
    dtype: torch.dtype = getattr(torch, raw["torch_dtype"])
    with torch.device("meta"):
        target = ParallelDecoder(parse_config(raw), team.mesh.tensor)
    torch.manual_seed(team.rank)
    target = random_weights(target, dtype, team.device)
    record = eagle3_record(target.whole, draft_vocab)
    shared, axis = lend(record, target), team.mesh.tensor if divided == "shard" else ALONE
    with torch.device("meta"):
        head = HEADS["eagle3"](shard_record(record, axis.size), shared, target.config.num_layers)
    add_up(head, axis)
    torch.manual_seed(0)  # what every rank holds whole must be the same; that pieces are too does not show in times
    head = random_weights(head, dtype, team.device)
    head.target_ids = torch.arange(draft_vocab, device=team.device)
    return target, head


def _config(args: argparse.Namespace, more: Mapping[str, Any] | None = None) -> Config:
    longest, rows = args.context + WRAP + max(QUERIES), max(args.batches) * max(1, args.pipeline)
    room = rows * (longest + SCRATCH_TOKENS + 64)
    sets = {"model.target": args.shape, "model.head": args.shape, "graphs.mode": "off", "engine.kv_tokens": room,
            "engine.max_context": longest, "engine.max_sessions": rows, "draft.depth": args.depth}  # fmt: skip
    return load(None, [f"{key}={value}" for key, value in {**sets, **(more or {})}.items()])


def _passes(engine: Engine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The target alone, all ranks at once."""
    torch.manual_seed(0)
    timed = [(queries, time_pass(engine, queries, args.context, args.rounds)) for queries in QUERIES]
    return [{"what": f"pass of {queries}", "rows": 1, "ms": round(1e3 * seconds, 4)} for queries, seconds in timed]


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
