"""A pair of random models on disk, in the layout of the bundled pairs, made in a second."""

from __future__ import annotations

from pathlib import Path

from speculator.bundled import Pair
from speculator.heads.save import save_head
from speculator.train.tokenizer import train_bpe
from target.save import save_target
from tests.unit.engines import tiny_head, tiny_target

TEXTS = ("Why is the sky blue?", "Tell me a story about a fox.", "def add(a, b):\n    return a + b\n") * 4


def make_pair(folder: Path) -> Pair:
    """Writes target and eagle3 below `folder`; the tokenizer has a chat template."""
    tokenizer = train_bpe(TEXTS, 280)
    sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512}
    target = tiny_target(3, eos_token_id=0, **sizes)
    head = tiny_head(target, "eagle3", vocab_size=tokenizer.vocab_size, draft_vocab_size=tokenizer.vocab_size)
    save_target(target, folder / "target")
    tokenizer.save(folder / "target", 512)
    save_head(head, folder / "eagle3")
    return Pair(folder.name, folder / "target", folder / "eagle3")
