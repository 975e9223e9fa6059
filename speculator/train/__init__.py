"""Trains tokenizers, targets and draft heads from text, by recipe.

Owns: everything that makes a pair of model folders. Must never know sessions, servers or clients.
"""

from speculator.train.recipe import Recipe, RecipeError, bundled_recipe, load_recipe
from speculator.train.stages import (
    STAGES,
    Run,
    measure,
    run_stages,
    tokenize,
    train_draft_head,
    train_target,
    train_tokenizer,
    write_answers,
    write_card,
)

__all__ = [
    "STAGES",
    "Recipe",
    "RecipeError",
    "Run",
    "bundled_recipe",
    "load_recipe",
    "measure",
    "run_stages",
    "tokenize",
    "train_draft_head",
    "train_target",
    "train_tokenizer",
    "write_answers",
    "write_card",
]
