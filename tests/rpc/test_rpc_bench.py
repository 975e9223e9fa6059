"""The benchmark of the wire measures what it says: every step commits, every echo comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculator.bench.rpc import main
from speculator.errors import ConfigError


def test_it_measures_steps_beside_echoes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "rpc.json"
    monkeypatch.setattr("sys.argv", f"rpc --exchanges 100 --repeats 1 --json {report}".split())
    main()
    found = json.loads(report.read_text())
    assert json.loads(capsys.readouterr().out) == found
    for which in ("step", "relay", "echo"):
        assert 0 < found[f"{which}_p50_us"] <= found[f"{which}_p99_us"]
        assert found[f"{which}_p50_us"] < found[f"{which}_whole_p50_us"]
    assert found["ratio_p50"] == round(found["step_p50_us"] / found["echo_p50_us"], 3)
    assert found["provenance"]["commit"]
    assert "CPUs" in found["provenance"]["device"]
    assert found["provenance"]["versions"].keys() >= {"grpcio", "protobuf"}
    assert found["provenance"]["argv"][:2] == ["--exchanges", "100"]


def test_a_report_that_cannot_be_written_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["rpc", "--json", str(tmp_path / "none" / "rpc.json")])
    with pytest.raises(ConfigError, match="cannot be written: there is no folder"):
        main()
