"""The bench of ranks runs whole gangs on a CPU, and refuses what cannot be divided before it starts any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from speculator.bench import ranks, ranks_shapes
from speculator.bench.ranks import main
from speculator.bench.ranks_pair import write_pair
from speculator.bench.ranks_shapes import check_fits, shape_of, shard_bytes
from speculator.bench.ranks_starts import plan, report
from speculator.bench.ranks_trials import Ending, Fault
from speculator.bench.round_forced import Depths
from speculator.config import load
from speculator.errors import ConfigError, EngineFailedError
from speculator.heads.shard import shard_record
from speculator.load import load_engine
from speculator.ranks.faults import NOW, VARIABLE, fault_of
from target.parallel import check_divides

TINY = ["--shape", "llama-tiny", "--device", "cpu", "--context", "16", "--depth", "3", "--accept", "2", "--rounds", "2"]


def test_gangs_of_one_and_two_are_measured_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "ranks.json"
    assert main([*TINY, "--batches", "1", "--ranks", "1", "2", "--head-parallel", "shard", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert [gang["ranks"] for gang in found["gangs"]] == [1, 2]
    for gang in found["gangs"]:
        assert [row["what"] for row in gang["rows"]] == ["pass of 1", "pass of 8", "round of depth 3"]
        assert gang["rows"][-1]["replayed"] and gang["rows"][-1]["committed"] >= 1
    assert all(row["ratio"] == 1.0 for row in found["gangs"][0]["rows"])
    assert "synthetic" in capsys.readouterr().out and found["provenance"]["commit"]


def test_every_rank_forces_the_same_depths() -> None:
    """Those of any bench, from the first draw on."""
    ours, theirs = (kind(2.0, 3, torch.device("cpu")) for kind in (ranks.Unturned, Depths))
    for _ in range(3):
        assert torch.equal(ours.next(64), theirs.next(64))


def test_stages_are_measured_alone_and_with_two_batches_under_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "stages.json"
    assert main([*TINY, "--batches", "1", "--graphs", "split", "--pipeline", "2", "--json", str(report)]) == 0
    one, two = json.loads(report.read_text())["gangs"]
    assert [row["what"] for row in one["rows"]] == ["part of stage 0", "step, 1 under way"]
    parts = ["part of stage 0", "part of stage 1"]
    assert [row["what"] for row in two["rows"]] == [*parts, "step, 1 under way", "step, 2 under way"]
    assert all(row["ms"] > 0 for gang in (one, two) for row in gang["rows"])
    assert "acceptance not forced" in capsys.readouterr().out


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 stages need a layer each, and LlamaForCausalLM has 4"):
        main([*TINY, "--pipeline", "5"])


def test_a_70b_in_small_runs_over_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--shape", "llama-3.1-70b", "--small", "--batches", "2", "--ranks", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("llama-3.1-70b, small on cpu") and said.count("2 ranks, ") == 3


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 ranks do not divide 4 attention heads"):
        main([*TINY, "--ranks", "3"])


def test_a_shard_is_the_part_of_a_published_model() -> None:
    shape = shape_of("llama-3.1-70b", small=False)
    embedding = 2 * 128256 * 8192
    assert shard_bytes(shape, 1, "replicate") == pytest.approx(2 * (70.55e9 + 1.3e9), rel=0.01)
    assert shard_bytes(shape, 4, "shard") == pytest.approx(2 * 70.55e9 / 4 + embedding + 1.4e9, rel=0.01)
    assert shard_bytes(shape, 4, "shard") < shard_bytes(shape, 4, "replicate")


def test_what_does_not_fit_is_refused_where_it_was_named_and_else_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_shapes, "_memory", lambda device: 139 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks, "resolve_device", lambda name: torch.device("cuda"))
    large, tiny = shape_of("llama-3.1-70b", small=False), shape_of("llama-3.1-70b", small=True)
    with pytest.raises(ConfigError, match=r"llama-3.1-70b over 1 ranks takes 134 GiB on each device and there are 139"):
        check_fits(large, 1, "replicate", torch.device("cuda"))
    with pytest.raises(ConfigError, match="4 ranks need 4 CUDA devices, and this machine has 2"):
        check_fits(tiny, 4, "replicate", torch.device("cuda"))
    flags = ["--shape", "llama-3.1-70b"]
    assert ranks._sizes(ranks._parser().parse_args(flags), large) == [2]
    with pytest.raises(ConfigError, match="takes 134 GiB"):
        ranks._sizes(ranks._parser().parse_args([*flags, "--ranks", "1", "2"]), large)


def test_a_rank_that_fails_ends_the_bench_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere")
    with pytest.raises(EngineFailedError, match=r"2 ranks measured nothing: rank [01] ended with exit code"):
        main([*TINY, "--batches", "1", "--ranks", "2"])


# ---- starts


def test_starts_are_of_every_size_phase_and_kind_and_some_are_left_alone() -> None:
    starts = list(plan(50, [2, 4], seed=1))
    assert starts == list(plan(50, [2, 4], seed=1)) != list(plan(50, [2, 4], seed=2))
    broken = [(start.ranks, start.fault) for start in starts if start.fault]
    assert len({(ranks, fault.when, fault.kind) for ranks, fault in broken}) == 2 * 5 * 4
    assert len(starts) - len(broken) == 5
    assert {fault.rank for size, fault in broken if size == 4} == {0, 1, 2, 3}
    assert {start.graphs for start in starts} == {"piecewise", "round"}


def test_the_pair_of_starts_loads_and_divides_over_four_ranks(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    sets = {"model.target": pair.target, "model.head": pair.head, "model.device": "cpu", "engine.max_sessions": 1}
    engine = load_engine(load(None, [f"{key}={value}" for key, value in sets.items()]))
    assert engine.head is not None and engine.info.draft_method == "eagle3"
    check_divides(engine.model.config, 4)
    shard_record(engine.head.record, 4)


@pytest.mark.parametrize(("count", "sizes"), [(0, [2]), (5, [])])
def test_nothing_to_start_is_a_sentence(count: int, sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match="--starts"):
        list(plan(count, sizes, 0))


def test_a_report_counts_ends_by_phase_and_kind() -> None:
    starts = list(plan(12, [2], seed=0))
    endings = [Ending(start.fault, float(i), 2.0 * i, 1, "", "", "it took 11 s" if i == 11 else "")
               for i, start in enumerate(starts)]  # fmt: skip
    found = report(starts, endings, "cpu")
    assert found["wrong"] == 1 and found["slowest_s"] == 11.0 and found["provenance"]["commit"]
    cells = {(cell["when"], cell["kind"]): cell for cell in found["table"]}
    assert cells["meeting", "kill"] == dict(when="meeting", kind="kill", starts=1, slowest=0.0, wrong=0)
    assert cells["all", "left alone"]["starts"] == 1
    assert sum(cell["starts"] for cell in cells.values()) == 12
    json.dumps(found)


def test_a_fault_comes_at_its_time_in_any_of_its_phases_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    came = list[str]()
    monkeypatch.setattr("speculator.ranks.faults.FAULTS", {"kill": lambda: came.append("now")})
    environ = {VARIABLE: Fault(1, "load", 3, "kill").text}
    other, struck = fault_of(0, environ), fault_of(1, environ)
    for phase in ("meeting", "target", "head", "graphs, head", "target", "target"):
        other(phase)
        struck(phase)
    assert came == ["now"]
    assert capfd.readouterr().err == f"{NOW}rank 1, kill in target\n"
