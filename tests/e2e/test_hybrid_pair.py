"""A hybrid target with its MTP module over gRPC: served from its folder, drafted, verified, checked against itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculator import cli
from speculator.bundled import find_pairs
from tests.e2e.tiny_pair import HYBRID, make_mtp_pair


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """deploy/models of a working directory that holds one pair, hybrid."""
    folder = tmp_path / "deploy" / "models" / "tiny-hybrid"
    make_mtp_pair(folder, HYBRID)
    monkeypatch.chdir(tmp_path)
    return folder.parent


def test_the_demo_runs_on_a_hybrid_pair(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pair,) = find_pairs(models)
    assert pair.head == pair.target
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--pair", "tiny-hybrid", "--device", "cpu", "-n", "8"])
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    assert "All 5 texts are those of plain decoding" in told.out


def test_a_tree_by_configuration_ends_the_start_with_one_sentence(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(models / "tiny-hybrid" / "target")
    asked = ["--target", folder, "--head", "mtp", "--device", "cpu", "--set", "draft.branching=4"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", *asked])
    assert ended.value.code not in (0, None)
    told = capsys.readouterr()
    assert "it takes chains only" in told.err + str(ended.value.code) and "Traceback" not in told.err
