"""Recipes, schedules, repetition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from speculator.train.finite import finite_loss
from speculator.train.head import Rows
from speculator.train.optim import Budget, Muon, curve, orthogonalise
from speculator.train.recipe import Learning, RecipeError, bundled_recipe, load_recipe, recipe_names, scale_time
from speculator.train.repetition import common, repeated, repeated_share, shared_share
from speculator.train.report import DivergedError, Log


@pytest.mark.parametrize("name", recipe_names())
def test_bundled_recipes_load(name: str) -> None:
    recipe = load_recipe(bundled_recipe(name))
    assert recipe.name == name and recipe.phases and bool(recipe.taps) is (recipe.head.kind == "eagle3")
    assert scale_time(recipe, 0.5).phases[0].seconds == recipe.phases[0].seconds / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("vocab_size = 512", "vocab_size = 'x'"), "vocab_size must be int"),
        (("vocab_size = 512", "vocab = 512"), "unknown keys vocab"),
        (("vocab_size = 512", ""), "missing keys vocab_size"),
        (("seed = 1", "seed = "), "not valid TOML"),
    ],
)
def test_a_wrong_recipe_names_the_key(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    text = bundled_recipe("toy").read_text("utf-8").replace(*change)
    (tmp_path / "r.toml").write_text(text, "utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("toy", ("head_dim = 16", ""), "target: missing keys head_dim, kv_heads"),
        ("toy", ("[head]", '[head]\nkind = "medusa"'), "head: kind must be eagle3 or mtp, got 'medusa'"),
        ("toy", ("[head]", '[head]\nkind = "mtp"'), "kind mtp needs a target with mla and moe"),
        ("toy", ("[head]\nintermediate_size = 96", "[head]"), "head: missing keys heads, intermediate_size, kv_heads"),
        ("toy-moe", ("moe = {", "# moe = {"), "mla and moe come together"),
        ("toy-moe", ("top_k = 2", "top_k = 9"), "top_k 9"),
        ("toy-moe", ("rope_dim = 8", "rope_dim = 7"), "rope_dim must be even, got 7"),
        ("toy-moe", ("rank = 24, ", ""), "mla: missing keys rank"),
    ],
)
def test_parts_that_do_not_go_together_are_named(
    name: str, change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    text = bundled_recipe(name).read_text("utf-8")
    assert change[0] in text
    (tmp_path / "r.toml").write_text(text.replace(*change), "utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.toml")


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match="wings does not exist; recipes of this package are nano-en, nano-hybrid, nano-moe, "
    ):
        load_recipe(bundled_recipe("wings"))


def test_a_budget_ends_by_steps_or_by_time() -> None:
    now = [0.0]
    budget = Budget(100, 10.0, settle=2, clock=lambda: now[0])
    now[0] = 6.0  # compilation
    assert budget.progress(1) == 0.01
    assert budget.progress(2) == 0.02
    now[0] = 8.0
    assert budget.progress(3) == 0.5
    assert budget.progress(90) == 0.9
    assert budget.pace(90, tokens=50) == {"settled": 6.0, "tokens_per_second": 88 * 50 / 2}
    now[0] = 10.5
    assert budget.progress(4) == 1.0


@pytest.mark.parametrize("cosine", [False, True])
def test_the_curve_rises_then_falls_to_its_end(cosine: bool) -> None:
    learning = Learning(warmup=0.1, final=0.2, cosine=cosine)
    values = [curve(p / 100, learning) for p in range(101)]
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)
    assert values[10] == pytest.approx(1.0) and values[-1] == pytest.approx(0.2)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    x = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    for matrices in (x, x.mT):
        values = torch.linalg.svdvals(orthogonalise(matrices, steps=7))
        assert values.min() > 0.5 and values.max() < 1.4


def test_muon_descends() -> None:
    goal = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(6, 6, requires_grad=True)
    optimizer = Muon([weight], lr=0.1)
    losses = []
    for _ in range(60):
        loss = (weight - goal).square().sum()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 5


def test_muon_moves_each_matrix_of_a_stack_as_if_it_were_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    stack, gradient = torch.randn(3, 6, 4, generator=draw), torch.randn(3, 6, 4, generator=draw)
    together, alone = stack.clone().requires_grad_(), [m.clone().requires_grad_() for m in stack]
    together.grad = gradient
    Muon([together], lr=0.1).step()
    for parameter, one in zip(alone, gradient, strict=True):
        parameter.grad = one.clone()
        Muon([parameter], lr=0.1).step()
    torch.testing.assert_close(together.detach(), torch.stack([p.detach() for p in alone]))
    assert not torch.allclose(together.detach(), stack)


def test_repetition() -> None:
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4, 5]) == [False] * 7 + [True, False]
    assert repeated_share([[7] * 10]) == pytest.approx(6 / 7)
    assert repeated_share([list(range(20)), list(range(20))]) == 0.0  # texts are compared with themselves only
    assert repeated_share([[1, 2]]) == 0.0


def test_a_phrase_counts_as_common_when_enough_texts_have_it() -> None:
    texts = [[1, 2, 3], [1, 2, 3, 1, 2, 3], [2, 3], [4]]
    assert common(texts, 2, n=3) == [
        [False, False, True],
        [False, False, True, False, False, True],
        [False] * 2,
        [False],
    ]
    assert not any(any(marks) for marks in common(texts, 3, n=3)), "one text counts once, however often it says it"
    assert common([[], [7]], 2, n=2) == [[], [False]], "an n-gram never spans two texts"
    assert common([[5, 6], [5, 6], [5, 7]], 2) == [[True] * 2, [True] * 2, [False] * 2], "short texts count as a whole"


def test_short_texts_are_shared_as_a_whole() -> None:
    assert shared_share([[1, 2], [1, 2], [1, 3, 4]]) == pytest.approx(2 / 3)
    assert shared_share([[], [1] * 9, [2] + [1] * 8]) == pytest.approx(2 / 3)


def test_a_loss_whose_compiled_gradients_are_not_finite_runs_eager_and_one_that_never_has_any_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = nn.Linear(2, 1)
    rows = Rows(*torch.ones(4, 1, 2).unbind())

    def loss(rows: Rows) -> tuple[Tensor, Tensor]:
        return module(rows.tokens).sum(), rows.tokens

    def broken(rows: Rows) -> tuple[Tensor, Tensor]:
        return module(rows.tokens).sum() * float("nan"), rows.tokens

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: broken)
    assert finite_loss(loss, (module,), (rows,), compiled=True) is loss
    assert module.weight.grad is None, "a trial leaves no gradient behind"
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    assert finite_loss(loss, (module,), (rows,), compiled=True) is loss
    with pytest.raises(DivergedError, match="weight"):
        finite_loss(broken, (module,), (rows,), compiled=False)


def test_training_ends_at_a_loss_that_is_not_finite() -> None:
    log = Log("pretrain")
    log(10, loss=2.0)
    with pytest.raises(DivergedError, match="pretrain: the loss is nan at step 20"):
        log(20, loss=float("nan"))
