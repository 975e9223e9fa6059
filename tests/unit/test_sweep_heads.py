"""The heads of a sweep: read from their folders onto one target, by name, MTP heads also with fewer modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Driver, tiny_engine
from mtp_models import family_target, mtp_head, save_pair

from speculator.bench import acceptance
from speculator.bench.compare import main as compare
from speculator.bench.recording import Answer, read_recording
from speculator.bench.records import Report, read_report
from speculator.bench.report.heat import heat_grid
from speculator.bench.report.html import page
from speculator.bench.sweep_heads import first_modules, names_of
from speculator.config import Config
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.heads.mtp_exact import MtpPlan, exact_mtp
from speculator.heads.save import save_head
from speculator.load import build_engine
from speculator.train.tokenizer import train_bpe
from speculator.types import DraftShape, SamplingParams
from target.load import load_target
from tests.e2e.tiny_pair import TEXTS, make_pair
from tests.unit.engines import tiny_head

QUICK = ["--threads", "1", "--tokens", "12", "--limit", "4", "--batch", "4", "--resamples", "0", "--timed", "0",
         "--no-counterfactual", "--device", "cpu"]  # fmt: skip


def test_the_shortest_names_that_tell_heads_apart() -> None:
    assert names_of(["models/a/eagle3/", "models/b/mtp"]) == ["eagle3", "mtp"]
    assert names_of(["models/a/eagle3", "models/b/eagle3", "mtp"]) == ["a/eagle3", "b/eagle3", "mtp"]
    with pytest.raises(ConfigError, match="twice"):
        names_of(["a/eagle3", "a/eagle3/"])


def accepted(modules: int, shape: DraftShape) -> list[float]:
    """Survival by position of an exact head of two modules, of which `modules` play."""
    pair = exact_mtp(MtpPlan(modules=2, lag=1))
    head = first_modules(pair.head, pair.target, modules) if modules < 2 else pair.head
    engine = tiny_engine(pair.target, head)
    driver = Driver(engine)
    prompts = [[3, 8, 5, 9, 2, 11, 6, 0], [14, 2, 17, 5, 6, 3, 0, 9]]
    sessions = driver.start(prompts, [SamplingParams()] * 2, shape)
    driver.rounds(sessions, 40, [shape] * 2)
    counts = [count for session in sessions for count in session.accepted]
    return [sum(count > i for count in counts) / len(counts) for i in range(shape.depth)]


def test_one_module_feeds_itself_and_several_follow_each_other() -> None:
    """The second module of the toy cannot be stood in for, so recursing the first is wrong from position 2 on."""
    both, recursed = accepted(2, DraftShape(2)), accepted(1, DraftShape(2))
    assert both == [1.0, 1.0]
    assert recursed[0] == 1.0 and recursed[1] < 0.5


def test_fewer_modules_are_the_same_weights() -> None:
    pair = exact_mtp(MtpPlan(modules=3))
    few = first_modules(pair.head, pair.target, 2)
    assert few.record.modules == 2 and few.lookback == 1
    whole = pair.head.state_dict()
    for name, weight in few.state_dict().items():
        assert weight.data_ptr() == whole[name].data_ptr() and not weight.is_meta


def swept(asked: Sequence[str], tmp_path: Path, name: str = "a.json") -> Report:
    assert acceptance.main([*asked, *QUICK, "--json", str(tmp_path / name)]) == 0
    return read_report(tmp_path / name)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str, str]:
    """A target and two heads that draft differently."""
    made = make_pair(tmp_path / "pair")
    target = load_target(made.target, torch.float32, torch.device("cpu"))
    vocab = target.config.vocab_size
    save_head(tiny_head(target, "eagle3", seed=9, vocab_size=vocab, draft_vocab_size=vocab), tmp_path / "other")
    return str(made.target), str(made.head), str(tmp_path / "other")


def test_several_heads_on_one_target(
    pair: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, one, other = pair
    loads: list[object] = []
    monkeypatch.setattr("speculator.load.read_target", lambda *a: loads.append(a) or load_target(*a))
    asked = ["--target", target, "--head", one, "--head", other, "--depth", "1", "2", "--seed", "3"]
    report = swept([*asked, "--record", str(tmp_path / "run.jsonl")], tmp_path)
    assert len(loads) == 1
    heads = [(p.head, p.method, p.shape.depth) for p in report.sweep]
    lookup = "prompt look-up, 3-grams"
    assert heads == [
        *((lookup, "ngram", d) for d in (1, 2)),
        *(("eagle3", "eagle3", d) for d in (1, 2)),
        *(("other", "eagle3", d) for d in (1, 2)),
    ]
    assert report.sweep[2].figures == replace(report.overall, repeated_4grams=None)
    alone = swept(["--target", target, "--head", other, "--depth", "2", "--seed", "3"], tmp_path, "b.json")
    assert alone.overall.accepted_at == report.sweep[5].figures.accepted_at
    assert alone.sweep == () and len(report.provenance["model_hashes"]) == 4
    assert {report.sweep[a.point].head for a in report.sweep[5].against} == {lookup, "eagle3", "other"}
    assert len(list((tmp_path / "run.sweep").iterdir())) == 3
    assert heat_grid(report).rows == [f"{name}, greedy" for name in (lookup, "eagle3", "other")]
    assert "Sweep, in pairs" in page(report)
    capsys.readouterr()
    assert compare([str(tmp_path / "a.json")]) == 0
    assert "Sweep, in pairs" in capsys.readouterr().out


def test_all_heads_run_as_the_first_one_does(
    pair: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []

    def building(config: Config, *given: Any) -> Engine:
        made.append((config.graphs.mode, config.draft.depth))
        return build_engine(config, *given)

    monkeypatch.setattr("speculator.bench.sweep_heads.build_engine", building)
    asked = ["--target", pair[0], "--head", pair[1], pair[2], "--depth", "2", "--graphs", "piecewise"]
    report = swept([*asked, "--no-baseline"], tmp_path)
    assert made == [("piecewise", 2)] and len(report.sweep) == 2


def test_modules_are_a_sweep_too(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 280)
    target = family_target("deepseek", vocab_size=tokenizer.vocab_size)
    save_pair(target, mtp_head(target, modules=2), tmp_path / "target")
    tokenizer.save(tmp_path / "target", 512)
    asked = ["--target", str(tmp_path / "target"), "--head", "mtp", "--depth", "2", "--no-baseline"]
    report = swept([*asked, "--modules", "1", "2", "--record", str(tmp_path / "run.jsonl")], tmp_path)
    assert [p.head for p in report.sweep] == ["mtp, 1 of 2 modules", "mtp, 2 modules"]
    assert report.sweep[1].figures == replace(report.overall, repeated_4grams=None)
    assert [a.point for a in report.sweep[1].against] == [0]
    (few,) = (tmp_path / "run.sweep").iterdir()
    both, recursed = (answers_of(path) for path in (tmp_path / "run.jsonl", few))
    assert [answer.tokens for answer in both] == [answer.tokens for answer in recursed]
    first, second = ([[a.rounds[0].tokens[i] for a in side] for side in (both, recursed)] for i in (0, 1))
    assert first[0] == first[1] and second[0] != second[1]  # the first module drafts in both


def answers_of(path: Path) -> list[Answer]:
    return sorted(read_recording(path)[1], key=lambda answer: answer.key)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--head", "/nowhere"], "/nowhere"),
        (["--modules", "2"], "between 1 and 1"),
        (["--modules", "0"], "between 1 and 1"),
    ],
)
def test_wrong_heads_are_named_before_anything_runs(
    pair: tuple[str, str, str], more: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "run.jsonl"
    asked = ["--target", pair[0], "--head", pair[1], *more, *QUICK, "--record", str(record)]
    assert acceptance.main(asked) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert told in error and "Traceback" not in error
    assert not record.exists()


def test_a_synthetic_run_has_one_head(capsys: pytest.CaptureFixture[str]) -> None:
    assert acceptance.main(["--synthetic", "llama-tiny", "--modules", "1", *QUICK]) == 2
    assert "loaded here" in " ".join(capsys.readouterr().err.split())


def test_a_report_without_a_sweep_has_no_pairs(
    pair: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept(["--target", pair[0], "--head", pair[1]], tmp_path)
    assert compare([str(tmp_path / "a.json")]) == 2
    assert "name a second report" in " ".join(capsys.readouterr().err.split())
