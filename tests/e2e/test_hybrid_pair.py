"""A hybrid target with its MTP module over gRPC: served from its folder, drafted, verified, checked against itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculator import cli
from speculator.bundled import find_pairs
from speculator.train.folders import save_trained_head, target_folder
from speculator.train.model import new_head, new_target, target_config
from speculator.train.recipe import DeltaRecipe, Head, TargetRecipe
from speculator.train.tokenizer import train_bpe

TEXTS = ("Why is the sky blue?", "Tell me a story about a fox.", "def add(a, b):\n    return a + b\n") * 4
SIZES = TargetRecipe(
    hidden_size=32, layers=4, heads=4, kv_heads=2, head_dim=8, intermediate_size=64, max_position=512,
    delta=DeltaRecipe(key_heads=2, value_heads=4, key_dim=8, value_dim=8),
)  # fmt: skip


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """deploy/models of a working directory that holds one pair, hybrid."""
    folder = tmp_path / "deploy" / "models" / "tiny-hybrid"
    tokenizer = train_bpe(TEXTS, 280)
    tokenizer.save(target_folder(folder), 512)
    target = new_target(target_config(SIZES, tokenizer.vocab_size), seed=3)
    head = new_head(target, Head(kind="mtp", seconds=1, steps=1, rows=1, length=64), (), seed=4)
    save_trained_head(head, target, folder)
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
