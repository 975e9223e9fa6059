"""What layers attend to while a pair is trained and measured: packed documents, and heads run over themselves.

Owns: the masks, once for grouped queries and for latents (MLA): a latent is the key and the value of one head that all
query heads share. Must never know models, losses or serving.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from target.attention.base import Attend
from target.config import ModelConfig
from target.config_mla import MlaConfig
from target.deepseek import AttendLatent
from target.deltanet_chunks import packed_sequences

HIDDEN = -1e30  # a score that softmax turns into 0; with -inf, torch 2.11 compiles a backward pass that gives NaN

# run(layer, q [R, T, heads, dim], k and v [R, T, kv_heads, dim], scale) -> [R, T, heads, dim]
Run = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def attend_with(run: Run, mla: MlaConfig | None) -> Any:
    """The `attend` that layers call: of latents where there is `mla`, else of grouped queries; windows are not kept."""
    return _grouped(run) if mla is None else _latent(run, mla.rank)


def _grouped(run: Run) -> Attend:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return run(layer, q, k, v, q.shape[-1] ** -0.5)

    return attend


def _latent(run: Run, rank: int) -> AttendLatent:
    def attend(layer: int, q: Tensor, latent: Tensor, scale: float) -> Tensor:
        shared = latent[:, :, None]
        return run(layer, q, shared, shared, scale)[..., :rank]

    return attend


def packed_attend(documents: Tensor, config: ModelConfig) -> Any:
    """What the layers of a target call over whole rows of documents [R, T] that do not see each other."""
    attend = attend_with(Unrolled(hidden_rows(documents)).run, config.mla)
    return attend if config.delta is None else packed_sequences(attend, documents)


def hidden_rows(documents: Tensor) -> Tensor:
    """[R, N] document numbers -> [R, N, N] bool, True where a row may not see another."""
    index = torch.arange(documents.shape[1], device=documents.device)
    return (documents[:, :, None] != documents[:, None]) | (index[None, :] > index[:, None])


class Unrolled:
    """The attention of a head that is run several times over the same rows, or of a target that is run once.

    Step 0 sees the step-0 keys of rows <= t of its own document. Step j sees those too, and the keys of steps 1..j of
    its own row: what a served chain that starts at row t has in its cache. Scores are float32 also under autocast:
    half precision would turn near ties of the target into wrong labels.
    """

    def __init__(self, hidden: Tensor) -> None:
        """hidden [R or 1, N, N] bool: which step-0 rows a row may not see."""
        self._hidden = hidden[:, None, None]
        self._steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows, length, heads, dim = q.shape
        steps = self._steps.setdefault(layer, [])
        steps.append((k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]))  # [R, kv_heads, 1, N, dim]
        q = q.view(rows, length, k.shape[2], -1, dim).permute(0, 2, 3, 1, 4).float() * scale
        (first, value), later = steps[0], steps[1:]
        with torch.autocast(q.device.type, enabled=False):
            scores = [(q @ first.float().mT).masked_fill(self._hidden, HIDDEN)]
        scores += [(q * key).sum(-1, keepdim=True) for key, _ in later]
        share = torch.cat(scores, dim=-1).softmax(-1).to(value.dtype)
        out = share[..., :length] @ value
        for i, (_, own) in enumerate(later):
            out = out + share[..., length + i, None] * own
        return out.permute(0, 3, 1, 2, 4).reshape(rows, length, heads, dim)
