"""Every stage of a run on a made-up corpus, and what it leaves: a pair that our engine and transformers run."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speculator.bundled import Pair, find_pairs
from speculator.config import load
from speculator.engine import Engine
from speculator.heads.mtp import MtpHead
from speculator.load import load_engine
from speculator.local import generate
from speculator.train import stages
from speculator.train.evaluate import greedy_drafts, greedy_texts, replay
from speculator.train.folders import load_trained_head
from speculator.train.model import new_head, new_target, target_config
from speculator.train.optim import split_parameters
from speculator.train.recipe import Recipe, RecipeError, bundled_recipe, load_recipe
from speculator.train.report import read_results
from speculator.train.stages import STAGES, Run, run_stages
from speculator.train.tokenizer import load_tokenizer
from speculator.types import DraftShape, SamplingParams
from target.attention.dense import dense_attend
from target.load import load_target
from target.moe import Gate

WORDS = "the a red old small fox cat sea sun ran saw ate and then home far away one two".split()
DEPTH = 3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(4, 20)))


def write_corpora(folder: Path) -> Path:
    """Two sources of conversations, one of texts, 120 records each."""
    folder.mkdir()
    draw = random.Random(0)
    for name in ("gsm8k_train", "small_instruct", "storybook_text"):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as out:
            for i in range(120):
                turns = [{"role": r, "content": sentence(draw)} for r in ("user", "assistant")]
                body = {"text": " ".join(sentence(draw) for _ in range(12))} if "text" in name else {"messages": turns}
                out.write(json.dumps({"id": f"{name}/{i}", **body}) + "\n")
    return folder


def write_prompts(folder: Path) -> Path:
    folder.mkdir()
    for name in ("mt_bench", "gsm8k", "humaneval"):
        lines = [json.dumps({"turns": [f"{name} {word}?"]}) for word in WORDS[:4]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def short(recipe: Recipe) -> Recipe:
    """The same stages in a few steps each."""
    assert recipe.refine and recipe.companion
    return replace(
        recipe,
        tokenizer=replace(recipe.tokenizer, vocab_size=300),
        target=replace(recipe.target, hidden_size=32, intermediate_size=48),
        phases=tuple(replace(phase, steps=4, rows=4, length=48) for phase in recipe.phases),
        refine=replace(recipe.refine, rounds=2, steps=2, prompts=8, new_tokens=8, rows=4, length=48),
        companion=replace(recipe.companion, rows=2, length=40, documents=20),
        answers=replace(recipe.answers, prompts=24, new_tokens=12, max_prompt=48),
        head=replace(recipe.head, steps=12, rows=4, length=48),
        heldout_percent=10.0,
    )


@pytest.fixture(scope="module", params=["toy", "toy-moe", "toy-hybrid"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run."""
    root = tmp_path_factory.mktemp("run")
    recipe = short(load_recipe(bundled_recipe(request.param)))
    data, prompts = write_corpora(root / "data"), write_prompts(root / "prompts")
    made = Run(recipe, data, root / "models" / recipe.name, root / "cache", prompts, torch.device("cpu"))
    run_stages(made, list(STAGES))
    return made


def result(run: Run, stage: str) -> dict[str, Any]:
    return read_results(run.result(stage))


def the_pair(run: Run) -> Pair:
    (pair,) = find_pairs(run.out.parent)
    return pair


def the_engine(run: Run) -> Engine:
    pair = the_pair(run)
    sets = {"model.target": pair.target, "model.head": pair.head, "model.device": "cpu", "engine.max_sessions": 1}
    return load_engine(load(None, [f"{key}={value}" for key, value in sets.items()]))


def test_a_run_leaves_a_pair(run: Run) -> None:
    pair, inside = the_pair(run), run.recipe.head.kind == "mtp"
    assert pair.name == run.recipe.name
    assert pair.head == (pair.target if inside else run.out / "eagle3")
    assert (run.out / "eagle3").exists() is not inside
    taus = result(run, "evaluate")["average"]["tau"]
    assert set(taus) == {"2", "3"} and all(tau >= 1 for tau in taus.values())


def test_a_finished_stage_is_not_run_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run_stages(run, ["target", "head"])
    assert capsys.readouterr().out.count("is there already") == 2
    with pytest.raises(RecipeError, match=r"unknown stage wings; stages are .*head.*eagle3, mtp"):
        run_stages(run, ["wings"])


def test_the_head_goes_by_the_name_of_its_kind(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    kind, other = ("mtp", "eagle3") if run.recipe.head.kind == "mtp" else ("eagle3", "mtp")
    run_stages(run, [kind])
    assert capsys.readouterr().out == "[head] is there already\n"
    with pytest.raises(RecipeError, match=f"recipe {run.recipe.name} has a head of kind {kind}, so {other} cannot"):
        run_stages(run, [other])


def test_a_head_can_be_trained_again(run: Run) -> None:
    before = (the_pair(run).target / "config.json").read_text("utf-8")
    again = replace(run, force=True, recipe=replace(run.recipe, head=replace(run.recipe.head, steps=2)))
    run_stages(again, ["head"])
    assert (the_pair(run).target / "config.json").read_text("utf-8") == before
    the_engine(run)


def test_transformers_reads_the_target_and_agrees(run: Run) -> None:
    transformers = pytest.importorskip("transformers")
    folder = the_pair(run).target
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, ids = load_target(folder, torch.float32), torch.randint(0, 300, (2, 30))
    with torch.no_grad():
        hidden = ours(ids, torch.arange(30).expand_as(ids), dense_attend(ours.config))
        torch.testing.assert_close(ours.logits(hidden.final), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_rounds_of_the_engine_are_those_measured_in_training(run: Run) -> None:
    engine, tokenizer = the_engine(run), load_tokenizer(the_pair(run).target)
    target = load_target(the_pair(run).target, torch.float32)
    head = load_trained_head(run.recipe.head.kind, target, run.out)
    assert type(engine.head) is type(head) and isinstance(head, MtpHead) is (run.recipe.head.kind == "mtp")
    for word in WORDS[:3]:
        prompt, limit = tokenizer.prompt([{"role": "user", "content": word}]), 24
        (text,) = greedy_texts(target, [prompt], limit + DEPTH + 1, rows=1)
        expected = replay(text, greedy_drafts(head, target, [text], DEPTH)[0], DEPTH, limit)
        steps = list(generate(engine, prompt, limit + DEPTH, SamplingParams(), DraftShape(DEPTH), frozenset({0})))
        assert [t for step in steps for t in step][:limit] == text.answer[:limit]
        assert [len(s) for s in steps[1:]][: len(expected) - 1] == [r.committed for r in expected][:-1]


def test_a_head_that_lies_there_is_trained_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target(the_pair(run).target, torch.float32)
    before, seen = load_trained_head(run.recipe.head.kind, target, run.out).state_dict(), []
    monkeypatch.setattr(stages, "train_head", lambda head, *rest: seen.append(clone_of(head)) or [])
    monkeypatch.setattr(stages, "save_trained_head", lambda *rest: None)
    stages.train_draft_head(run)
    assert all(torch.equal(seen[0][name], values) for name, values in before.items())


def clone_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in module.state_dict().items()}


def test_the_experts_were_balanced_in_target_and_module(run: Run) -> None:
    target = load_target(the_pair(run).target, torch.float32)
    head = load_trained_head(run.recipe.head.kind, target, run.out)
    gates = [m for model in (target, head) for m in model.modules() if isinstance(m, Gate)]
    assert len(gates) == (3 if run.recipe.target.moe else 0)
    assert all(gate.correction is not None and gate.correction.abs().max() > 0 for gate in gates)


def test_the_card_says_what_the_pair_is(run: Run) -> None:
    card = (run.out / "README.md").read_text("utf-8")
    if run.recipe.head.kind == "mtp":
        layout = "Qwen3.5 layout" if run.recipe.target.delta else "DeepSeek-V3 layout"
        part = "gated DeltaNet (4 states of 16 x 16)" if run.recipe.target.delta else "experts"
        assert layout in card and part in card and "MTP module" in card and "eagle3" not in card
        assert f"{result(run, 'head')['parameters'] / 1e6:.2f} M" in card
    else:
        assert "Llama layout" in card and "| eagle3 |" in card
    assert f"python -m speculator.train {run.recipe.name} " in card


@pytest.mark.parametrize(("name", "dims"), [("nano-moe", {2, 3}), ("nano-hybrid", {2})])
def test_recipes_of_bundled_pairs_fit_into_twelve_mebibytes(name: str, dims: set[int]) -> None:
    recipe = load_recipe(bundled_recipe(name))
    model = new_target(target_config(recipe.target, recipe.tokenizer.vocab_size), seed=0)
    head = new_head(model, recipe.head, recipe.taps, seed=0)
    size = 2 * sum(p.numel() for m in (model, head) for p in m.parameters())
    assert 11.5 * 2**20 < size < 11.75 * 2**20  # the rest is for the tokenizer, the card and the results
    matrices, rest = split_parameters(model)
    assert {p.dim() for p in matrices} == dims and max(p.dim() for p in rest) == (3 if recipe.target.delta else 2)
