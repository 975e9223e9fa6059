"""The vocabularies of a head, and whose embedding and lm_head it uses.

Must never know layers or switches.
"""

from __future__ import annotations

from typing import Any

import torch

from speculator.errors import CheckpointError
from speculator.heads.d2t import read_target_ids
from speculator.heads.reading import Reading


def read_vocabulary(reading: Reading) -> dict[str, Any]:
    """Fields vocab_size, draft_vocab_size, own_embed, own_lm_head, lm_head_is_embed, d2t; settles `target_ids`."""
    r = reading
    vocab = _vocab_size(r)
    rows = r.source.shape("lm_head.weight")[0] if r.source.has("lm_head.weight") else None
    declared = r.source.integer("draft_vocab_size")
    if rows is None and declared is not None and not same_vocabulary(declared, vocab):
        raise CheckpointError(f"tensor lm_head.weight is missing, and draft_vocab_size {declared} needs the head's own")
    drafts = r.pick("draft_vocab_size", _draft_ids(r, rows, vocab), "tensor lm_head" if rows else "vocab_size")
    mapped = r.target_ids is not None
    return {
        "vocab_size": vocab,
        "draft_vocab_size": drafts,
        "own_embed": _own_embed(r),
        "d2t": r.pick("d2t", mapped, "tensor d2t" if mapped else "the whole vocabulary"),
        **_lm_head(r, rows),
    }


def same_vocabulary(ours: int, theirs: int) -> bool:
    """Whether two vocabulary sizes differ by padding at most (1 %)."""
    return abs(ours - theirs) <= max(ours, theirs) // 100


def _vocab_size(reading: Reading) -> int:
    """The target's size; the head's own claims must agree up to padding."""
    r = reading
    claims = {
        "t2d": r.source.shapes.get("t2d", (None,))[0],
        "embed_tokens": r.source.shapes.get("embed_tokens.weight", (None,))[0],
        "config vocab_size": r.source.integer("vocab_size"),
    }
    known = {source: size for source, size in claims.items() if size}
    if r.target is not None:
        for source, size in known.items():
            _check_vocab(r, source, size, r.target.vocab_size)
        return r.pick("vocab_size", r.target.vocab_size, "target")
    if not known:
        raise CheckpointError("nothing says how large the target's vocabulary is; give the target")
    source, size = next(iter(known.items()))
    return r.pick("vocab_size", size, source)


def _check_vocab(reading: Reading, source: str, size: int, ours: int) -> None:
    if not same_vocabulary(size, ours):
        raise CheckpointError(
            f"this head was made for a vocabulary of {size} tokens ({source}), the target has {ours}; "
            "it was made for another target"
        )
    if size != ours:
        reading.warnings.append(f"vocab_size: {source} says {size}, the target has {ours}; taken as padding")


def _draft_ids(reading: Reading, rows: int | None, vocab: int) -> int:
    """Draft vocabulary size; settles `target_ids`. Some exports ship a d2t of zeros for a whole vocabulary."""
    tensors = reading.source.tensors
    whole = rows is None or same_vocabulary(rows, vocab)
    if "d2t" not in tensors or (whole and not tensors["d2t"].any()):
        return _undivided(reading, rows, vocab)
    if rows is None:
        raise CheckpointError("tensor lm_head.weight is missing, and d2t needs the head's own")
    ids = read_target_ids(tensors["d2t"], tensors.get("t2d"), rows, vocab)
    identity = len(ids) == vocab and bool((ids.diff() == 1).all())  # unique ids below vocab, so they start at 0
    reading.target_ids = None if identity else ids
    return len(ids)


def _undivided(reading: Reading, rows: int | None, vocab: int) -> int:
    """Draft ids are target ids; rows past the target's vocabulary are padding, and so are missing ones."""
    if rows is None or (rows >= vocab and same_vocabulary(rows, vocab)):
        return vocab
    if rows > vocab:
        raise CheckpointError(f"lm_head has {rows} rows for a vocabulary of {vocab} tokens; is it for another target?")
    if not same_vocabulary(rows, vocab):
        raise CheckpointError(f"tensor d2t is missing: lm_head has {rows} rows for a vocabulary of {vocab} tokens")
    reading.target_ids = torch.arange(rows)
    return rows


def _own_embed(reading: Reading) -> bool:
    """The target's embedding wherever it fits: trainers ship copies, and at times untrained tables."""
    r = reading
    if not r.source.has("embed_tokens.weight"):
        return r.pick("own_embed", False, "no tensor embed_tokens: the target's")
    if r.source.shape("embed_tokens.weight")[1] != r.choices["target_hidden_size"].value:
        return r.pick("own_embed", True, "tensor embed_tokens, of another width than the target's")
    deepspec = any(str(name).endswith("Eagle3Model") for name in r.source.config.get("architectures") or ())
    if r.source.flag("embed_requires_grad") or deepspec:
        return r.pick("own_embed", True, "config says it is the head's own", ("false",))
    source = "the target's: exporters often write an untrained embed_tokens"
    return r.pick("own_embed", False, source, ("true",), ambiguous=True)


def _lm_head(reading: Reading, rows: int | None) -> dict[str, bool]:
    """A tensor wins over tie_word_embeddings, which is wrong in published configs."""
    r = reading
    if rows is not None:
        return {"own_lm_head": r.pick("own_lm_head", True, "tensor lm_head"), "lm_head_is_embed": False}
    tied = r.source.kind == "eagle3" and bool(r.source.flag("tie_word_embeddings"))
    source = "no tensor lm_head: " + ("the embedding (tie_word_embeddings)" if tied else "the target's")
    return {"own_lm_head": r.pick("own_lm_head", False, source), "lm_head_is_embed": tied}
