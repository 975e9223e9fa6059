"""`speculator bench acceptance` on the bundled pair: in process, over gRPC, with graphs on and off, one report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speculator import __version__
from speculator.bench import acceptance
from speculator.bench.records import Report, read_report
from speculator.bundled import Pair, find_pairs
from speculator.config import load
from speculator.load import load_engine
from speculator.tokenizer import fingerprint
from speculator.translate import About
from tests.unit.bench_server import Loopback
from tests.unit.test_bench_schema import SCHEMA, errors

MODELS = Path(__file__).resolve().parents[2] / "deploy" / "models"
PLAYED = ["--tokens", "24", "--limit", "4", "--depth", "3", "--batch", "4", "--resamples", "100"]
QUICK = [*PLAYED, "--timed", "0"]


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.set_num_threads(1)
    found = find_pairs(MODELS)
    assert found, "deploy/models holds no pair"
    return found[0]


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[Loopback]:
    sets = {"model.target": pair.target, "model.head": pair.head, "model.device": "cpu", "engine.threads": 1}
    engine = load_engine(load(None, [*(f"{k}={v}" for k, v in sets.items()), "engine.max_sessions=4"]))
    about = About(__version__, engine.info.target_model, "here", "rev", fingerprint(pair.target))
    made = Loopback(engine, about)
    yield made
    made.close()


def models(pair: Pair) -> list[str]:
    return ["--target", str(pair.target), "--head", str(pair.head), "--threads", "1"]


def measured(path: Path, *asked: str) -> Report:
    assert acceptance.main([*asked, "--json", str(path)]) == 0
    return read_report(path)


def figures_of(report: Report) -> Report:
    """What must not depend on how the rounds were run."""
    settings = replace(report.settings, target="", head="")
    return replace(report, provenance={}, settings=settings, time=None, calibration=None, notes=())


def test_one_greedy_run_is_the_same_in_process_over_grpc_and_with_graphs(
    pair: Pair, server: Loopback, tmp_path: Path
) -> None:
    here = measured(tmp_path / "here.json", *models(pair), *QUICK)
    there = measured(tmp_path / "there.json", "--server", server.address, *QUICK)
    replayed = measured(tmp_path / "graphs.json", *models(pair), *QUICK, "--graphs", "split")
    assert figures_of(there) == figures_of(here) and figures_of(replayed) == figures_of(here)
    assert here.overall.rounds > 15 and len(here.counterfactual) == 3
    for other in (there, replayed):
        assert other.calibration and here.calibration and other.calibration.count == here.calibration.count
        assert other.calibration.ece == pytest.approx(here.calibration.ece, abs=1e-4)
    assert list(errors(json.loads((tmp_path / "there.json").read_text()), SCHEMA)) == []
    assert there.provenance["server"]["address"] == server.address
    assert "device" not in there.provenance and "device" in here.provenance


def test_a_run_over_grpc_is_timed_and_gone_on_with(server: Loopback, tmp_path: Path) -> None:
    kept, asked = tmp_path / "run.jsonl", ["--server", server.address, *PLAYED, "--timed", "1", "--no-counterfactual"]
    first = measured(tmp_path / "a.json", *asked, "--record", str(kept))
    assert first.time and set(first.time.ledger.parts) == {"draft", "verify", "commit", "host", "rpc"}
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:3]) + lines[3][:50])
    again = measured(tmp_path / "b.json", *asked, "--record", str(kept))
    assert again.overall == first.overall
    assert any("last line was cut" in note for note in again.notes)
    assert len(kept.read_text().splitlines()) == len(lines)


def test_the_page_and_the_plots_come_with_the_same_command(server: Loopback, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    asked = ["--server", server.address, *PLAYED, "--timed", "1", "--depth", "1", "2"]
    assert acceptance.main([*asked, "--html", str(tmp_path / "a.html"), "--plots", str(tmp_path / "plots")]) == 0
    html = (tmp_path / "a.html").read_text()
    for part in ("Calibration", "Where a round goes", "Sweep", "rpc", "Noise floor", server.address):
        assert part in html
    assert not any(word in html for word in ("<script", "<link", "src="))
    drawn = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert drawn == {"survival", "conditional", "histogram", "calibration", "ledger", "sweep"}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--head", "x"], "The head is the server's"),
        (["--theory"], "compares whole distributions"),
        (["--synthetic", "llama-tiny"], "give one of them"),
        (["--batch", "5"], "5 sessions at a time (--batch) are asked for, the server takes 4"),
        (["--target", "/nowhere"], "/nowhere has no tokenizer"),
    ],
)
def test_what_a_server_cannot_do_is_one_sentence(
    server: Loopback, asked: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert acceptance.main(["--server", server.address, *QUICK, *asked]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert told in error and "Traceback" not in error


def test_a_recording_of_another_server_is_not_gone_on_with(
    server: Loopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "run.jsonl"
    asked = ["--server", server.address, *QUICK, "--no-counterfactual", "--record", str(kept)]
    assert acceptance.main(asked) == 0
    header, *rest = kept.read_text().splitlines()
    found = json.loads(header)
    found["settings"]["models"][0] = "other weights"
    kept.write_text("\n".join([json.dumps(found), *rest]) + "\n")
    capsys.readouterr()
    assert acceptance.main(asked) == 2
    assert "was recorded with models" in " ".join(capsys.readouterr().err.split())
