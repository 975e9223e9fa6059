"""A head's draft vocabulary: which target token each draft token stands for.

Owns: the meaning of d2t and t2d. Must never know configs or folders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculator.errors import CheckpointError


def read_target_ids(d2t: Tensor, t2d: Tensor | None, rows: int, vocab: int) -> Tensor:
    """d2t offsets [Vd] -> target ids [Vd] int64, checked against the vocabulary and t2d [V].

    `rows` is the number of rows of lm_head. CheckpointError when ids repeat, leave the vocabulary, disagree with t2d,
    or when the file holds absolute ids.
    """
    if d2t.dim() != 1 or d2t.is_floating_point():
        raise CheckpointError(f"d2t must be a list of integers, got shape {list(d2t.shape)} of {d2t.dtype}")
    if d2t.numel() != rows:
        raise CheckpointError(f"d2t has {d2t.numel()} entries but lm_head has {rows} rows")
    offsets = d2t.long()
    ids = torch.arange(rows) + offsets
    if not _are_ids(ids, vocab):
        _refuse_absolute(offsets, vocab)
        raise CheckpointError(f"d2t is not a list of offsets: draft id + d2t must be unique ids below {vocab}")
    if t2d is not None:
        _check_t2d(offsets, ids, t2d, vocab)
    return ids


def _are_ids(ids: Tensor, vocab: int) -> bool:
    within = bool(((ids >= 0) & (ids < vocab)).all())
    return within and bool((ids.sort().values.diff() > 0).all())


def _refuse_absolute(offsets: Tensor, vocab: int) -> None:
    if _are_ids(offsets, vocab):
        raise CheckpointError(
            "d2t holds absolute target ids; it must hold offsets (target id = draft id + d2t[draft id]). "
            "Subtract arange(len(d2t)) from it and save the file again"
        )


def _check_t2d(offsets: Tensor, ids: Tensor, t2d: Tensor, vocab: int) -> None:
    if t2d.dim() != 1:
        raise CheckpointError(f"t2d must be a list of booleans, got shape {list(t2d.shape)}")
    marked = t2d.bool().nonzero().flatten()
    if torch.equal(marked, ids.sort().values):
        return
    if torch.equal(marked, offsets.sort().values):
        _refuse_absolute(offsets, vocab)
    raise CheckpointError(
        f"d2t and t2d disagree: d2t maps to {ids.numel()} target tokens, t2d marks {marked.numel()}, "
        f"{_overlap(ids, marked)} are the same"
    )


def _overlap(ids: Tensor, marked: Tensor) -> int:
    return int(torch.isin(ids, marked).sum())


def offsets(target_ids: Tensor) -> Tensor:
    """Target ids [Vd] -> d2t [Vd] int64."""
    return target_ids.long().cpu() - torch.arange(target_ids.numel())


def mask(target_ids: Tensor, vocab: int) -> Tensor:
    """Target ids [Vd] -> t2d [V] bool."""
    marked = torch.zeros(vocab, dtype=torch.bool)
    marked[target_ids.cpu()] = True
    return marked
