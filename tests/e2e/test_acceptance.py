"""`speculator bench acceptance` on the bundled pair: one command, one report, counterfactual depths that are real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speculator.bench import acceptance
from speculator.bench.compare import main as compare
from speculator.bench.counterfactual import cut_all, walk
from speculator.bench.figures import as_recorded, figures
from speculator.bench.forced import draft_everywhere
from speculator.bench.outcomes import outcomes
from speculator.bench.prompts import read_prompts
from speculator.bench.recording import Answer
from speculator.bench.records import read_report
from speculator.bench.rounds import Plan, play
from speculator.bundled import Pair, find_pairs
from speculator.config import load
from speculator.engine import Engine
from speculator.load import load_engine
from speculator.tokenizer import load_tokenizer
from speculator.train.recipe import TargetRecipe
from speculator.types import DraftShape, SamplingParams
from tests.e2e.tiny_pair import HYBRID, LATENT, make_mtp_pair

MODELS = Path(__file__).resolve().parents[2] / "deploy" / "models"
CHAIN, TREE = DraftShape(4), DraftShape(4, 24, 4)
PROMPTS = read_prompts()
QUICK = ["--threads", "1", "--tokens", "24", "--limit", "5", "--resamples", "200", "--timed", "1"]


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.set_num_threads(1)
    found = find_pairs(MODELS)
    assert found, "deploy/models holds no pair"
    return found[0]


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Engine:
    sets = {"model.target": pair.target, "model.head": pair.head, "model.device": "cpu", "engine.threads": 1}
    return load_engine(load(None, [*(f"{k}={v}" for k, v in sets.items()), "engine.max_sessions=8"]))


def run(pair: Pair, engine: Engine, params: SamplingParams, shape: DraftShape, tokens: int = 48) -> list[Answer]:
    plan = Plan(params, shape, tokens, 8, frozenset(engine.info.eos_token_ids))
    return sorted(play(engine, load_tokenizer(pair.target), PROMPTS, plan, {}), key=lambda a: a.key)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=3)])
def test_every_depth_equals_a_real_run(pair: Pair, engine: Engine, params: SamplingParams) -> None:
    everywhere = draft_everywhere(engine, run(pair, engine, params, CHAIN), [CHAIN], params, 8)
    found = {answer.key: drafts[CHAIN] for answer, drafts in everywhere}
    rounds = 0
    for depth in (1, 2, 3, 4):
        for real in run(pair, engine, params, DraftShape(depth)):
            drafts = cut_all(found[real.key], CHAIN, DraftShape(depth))
            assert drafts is not None
            assert walk(real, drafts.__getitem__) == outcomes(real)
            rounds += len(real.rounds)
    assert rounds > 700


def test_sub_trees_equal_real_runs(pair: Pair, engine: Engine) -> None:
    greedy = SamplingParams()
    everywhere = draft_everywhere(engine, run(pair, engine, greedy, TREE), [TREE], greedy, 8)
    found = {answer.key: drafts[TREE] for answer, drafts in everywhere}
    rounds = 0
    for part in (DraftShape(4, 12, 4), DraftShape(4, 6, 4), DraftShape(4, 3, 4), DraftShape(1, 1, 4)):
        for real in run(pair, engine, greedy, part):
            drafts = cut_all(found[real.key], TREE, part)
            assert drafts is not None
            assert walk(real, drafts.__getitem__) == outcomes(real)
            rounds += len(real.rounds)
    assert rounds > 700


def test_one_command_gives_a_report(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, kept = tmp_path / "a.json", tmp_path / "run.jsonl"
    models = ["--target", str(pair.target), "--head", str(pair.head)]
    asked = [*models, *QUICK, "--depth", "3", "--temperature", "0.7", "--seeds", "2", "--theory"]
    assert acceptance.main([*asked, "--record", str(kept), "--json", str(path)]) == 0
    report = read_report(path)
    assert report.overall.rounds == sum(row.rounds for row in report.prompts) > 20
    assert report.mean_tau == report.sets["open"].tau
    assert [c.shape.depth for c in report.counterfactual] == [1, 2, 3]
    deepest = report.counterfactual[-1].figures
    assert deepest == replace(report.overall, repeated_4grams=None)
    assert report.theory and report.calibration and report.repetition and report.time
    assert [split.kind for split in report.noise] == ["halves", "seeds"]
    assert set(report.groups) == {"category", "turn", "context"}
    capsys.readouterr()

    assert acceptance.main([*asked, "--record", str(kept), "--json", str(tmp_path / "b.json")]) == 0  # nothing to play
    again = read_report(tmp_path / "b.json")
    assert again.overall == report.overall and again.counterfactual == report.counterfactual
    assert compare([str(path), str(tmp_path / "b.json"), "--json", str(tmp_path / "c.json")]) == 0
    assert "+0.000" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [LATENT, HYBRID], ids=["latent-experts", "hybrid"])
def test_a_target_with_its_own_module(sizes: TargetRecipe, tmp_path: Path) -> None:
    """MLA and experts, and recurrent states: the same report, with depths that are those of real runs."""
    made = make_mtp_pair(tmp_path / "pair", sizes)
    asked = ["--target", str(made.target), "--head", "mtp", *QUICK[:-2], "--timed", "0", "--temperature", "1"]
    assert acceptance.main([*asked, "--depth", "3", "--json", str(tmp_path / "deep.json")]) == 0
    report = read_report(tmp_path / "deep.json")
    assert 0 < report.overall.accepted < report.overall.drafted
    for depth, shape in enumerate(report.counterfactual, 1):
        path = tmp_path / f"{depth}.json"
        assert acceptance.main([*asked, "--depth", str(depth), "--no-counterfactual", "--json", str(path)]) == 0
        assert shape.figures == replace(read_report(path).overall, repeated_4grams=None)
    assert depth == 3


def test_a_sweep_has_a_point_for_each_combination(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    asked = ["--target", str(pair.target), "--head", str(pair.head), *QUICK, "--no-counterfactual", "--timed", "0"]
    swept = ["--depth", "1", "3", "--temperature", "0", "1", "--rule", "rejection"]
    assert acceptance.main([*asked, *swept, "--json", str(path)]) == 0
    points = read_report(path).sweep
    heads = [p for p in points if p.method != "ngram"]
    assert [(p.temperature, p.shape.depth) for p in heads] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert all(p.figures.tau and p.figures.tau > 1 for p in points)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--prompts", "/nowhere.jsonl"], "cannot be read"),
        (["--depth", "40"], "out of bounds"),
        (["--also", "3:4"], "--also takes"),
        (["--batch", "0"], "at least 1"),
        (["--confidence", "95"], "between 0 and 1"),
        (["--nodes", "8"], "a tree has --branching 2"),
        (["--branching", "4", "--rule", "block"], "verifies chains only"),
        (["--top-p", "2"], "top_p must be"),
        (["--temperature", "nan"], "temperature must be finite"),
        (["--resamples", "-1"], "must be at least 0"),
        (["--synthetic", "llama-tiny", "--head", "x"], "leave out --target and --head"),
        (["--server", "127.0.0.1:1", "--graphs", "off"], "are the server's"),
        (["--also", "4:200:4"], "out of bounds"),
        (["--json", "."], "it is a folder"),
        (["--html", "/nowhere/a.html"], "there is no folder /nowhere"),
        (["--sets", "mt-bench"], "named by their path"),
    ],
)
def test_wrong_input_is_one_sentence(asked: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert acceptance.main([*QUICK, *asked]) == 2
    error = capsys.readouterr().err
    assert told in " ".join(error.split()) and "Traceback" not in error


def test_a_report_says_that_it_is_synthetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--synthetic", "llama-tiny", "--device", "cpu", *QUICK, "--no-counterfactual", "--batch", "2"]
    assert acceptance.main([*asked, "--json", str(tmp_path / "a.json")]) == 0
    assert read_report(tmp_path / "a.json").synthetic
    assert "synthetic" in capsys.readouterr().out.lower()


def test_figures_are_those_of_the_rounds(pair: Pair, engine: Engine) -> None:
    answers = run(pair, engine, SamplingParams(), CHAIN, 24)
    found = figures(as_recorded(answers), 4, resamples=0)
    assert found.tokens == sum(len(answer.tokens) - 1 for answer in answers)
    assert found.tau == pytest.approx(found.tokens / sum(len(answer.rounds) for answer in answers), abs=1e-6)
