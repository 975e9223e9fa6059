"""Pairs of random models on disk, in the layouts of the bundled pairs, made in a second."""

from __future__ import annotations

from pathlib import Path

import torch

from speculator.bundled import Pair
from speculator.heads.save import save_head
from speculator.train.folders import head_folder, save_trained_head, target_folder
from speculator.train.model import new_head, new_target, target_config
from speculator.train.recipe import DeltaRecipe, Head, MlaRecipe, MoeRecipe, TargetRecipe
from speculator.train.tokenizer import ChatTokenizer, train_bpe
from target.load import load_target
from target.save import save_target
from tests.unit.engines import tiny_head, tiny_target

TEXTS = ("Why is the sky blue?", "Tell me a story about a fox.", "def add(a, b):\n    return a + b\n") * 4
LATENT = TargetRecipe(
    hidden_size=32, layers=3, heads=4, intermediate_size=64, max_position=512,
    mla=MlaRecipe(rank=16, nope_dim=8, rope_dim=4, value_dim=8),
    moe=MoeRecipe(experts=4, top_k=2, inner_size=16),
)  # fmt: skip
HYBRID = TargetRecipe(
    hidden_size=32, layers=4, heads=4, kv_heads=2, head_dim=8, intermediate_size=64, max_position=512,
    delta=DeltaRecipe(key_heads=2, value_heads=4, key_dim=8, value_dim=8),
)  # fmt: skip


def make_pair(folder: Path) -> Pair:
    """Writes target and eagle3 below `folder`; the tokenizer has a chat template."""
    tokenizer = _tokenizer(folder)
    sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512}
    target = tiny_target(3, eos_token_id=0, **sizes)
    head = tiny_head(target, "eagle3", vocab_size=tokenizer.vocab_size, draft_vocab_size=tokenizer.vocab_size)
    save_target(target, folder / "target")
    save_head(head, folder / "eagle3")
    return Pair(folder.name, folder / "target", folder / "eagle3")


def make_eagle_pair(folder: Path) -> Pair:
    """Writes target and an EAGLE-1 head, which borrows the target's tables, below `folder`."""
    pair = make_pair(folder)
    target = load_target(pair.target, torch.float32)
    size = target.config.vocab_size
    save_head(tiny_head(target, "eagle", vocab_size=size, draft_vocab_size=size), folder / "eagle", "eagle")
    return Pair(folder.name, pair.target, folder / "eagle")


def make_mtp_pair(folder: Path, sizes: TargetRecipe = LATENT) -> Pair:
    """Writes a target of DeepSeek-V3's family, or one of other sizes, with its MTP module below `folder`."""
    target = new_target(target_config(sizes, _tokenizer(folder).vocab_size), seed=3)
    head = new_head(target, Head(kind="mtp", seconds=1, steps=1, rows=1, length=64), (), seed=4)
    save_trained_head(head, target, folder)
    return Pair(folder.name, target_folder(folder), head_folder(folder, "mtp"))


def _tokenizer(folder: Path) -> ChatTokenizer:
    tokenizer = train_bpe(TEXTS, 280)
    tokenizer.save(target_folder(folder), 512)
    return tokenizer
