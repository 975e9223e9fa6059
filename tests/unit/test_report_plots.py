"""PNG plots: one a figure when matplotlib is there, one sentence when it is not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import full_report, report

from speculator.bench.report.plots import write_plots
from speculator.errors import ConfigError

PNG = b"\x89PNG\r\n"


def test_a_plot_for_each_figure_that_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = [path.stem for path in write_plots(full_report(), tmp_path / "all")]
    assert names == ["survival", "conditional", "histogram", "calibration", "ledger", "sweep"]
    assert [path.stem for path in write_plots(report(), tmp_path / "few")] == names[:3]
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.glob("*/*.png"))


def test_a_synthetic_run_is_marked_in_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (real, *_) = write_plots(report(), tmp_path / "real")
    (marked, *_) = write_plots(replace(report(), synthetic=True), tmp_path / "synthetic")
    assert real.read_bytes() != marked.read_bytes()


def test_without_matplotlib_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"speculator\[bench\]"):
        write_plots(report(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
