"""A pair whose head lies in its target's folder, by name from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculator import cli
from speculator.bundled import find_pairs
from tests.e2e.tiny_pair import make_mtp_pair, make_pair


def test_demo_runs_the_pair_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "deploy" / "models"
    latent, first = make_mtp_pair(models / "a-latent"), make_pair(models / "b-first")
    monkeypatch.chdir(tmp_path)
    assert [(p.name, p.head.name) for p in find_pairs()] == [("b-first", "eagle3"), ("a-latent", "target")]
    assert find_pairs(models) == [first, latent]
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--pair", "a-latent", "--device", "cpu", "-n", "8"])
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    assert "All 5 texts are those of plain decoding" in told.out
