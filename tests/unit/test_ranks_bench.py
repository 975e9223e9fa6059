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


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 ranks do not divide 4 attention heads"):
        main([*TINY, "--ranks", "3"])
