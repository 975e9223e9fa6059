"""The bench of ranks runs whole gangs on a CPU, and refuses what cannot be divided before it starts any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculator.bench.ranks import main
from speculator.errors import ConfigError

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


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 ranks do not divide 4 attention heads"):
        main([*TINY, "--ranks", "3"])
