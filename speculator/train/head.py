"""Trains a draft head on the target's own answers: training-time test (arXiv 2503.01840).

Whatever its kind, the head is unrolled on its own output over several steps, in the convention it is served in: row t
pairs the feature of token t with token t + 1, step j reads token t + 1 + j at position t + j. Must never know serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speculator.heads.base import DraftHead
from speculator.train.attention import Unrolled, attend_with, hidden_rows, packed_attend
from speculator.train.data import ANSWER, Document, pack
from speculator.train.finite import finite_loss
from speculator.train.optim import Budget, Optimizers
from speculator.train.recipe import Head
from speculator.train.report import Log
from target.decoder import Decoder
from target.model import Hidden


class Rows(NamedTuple):
    """A batch of packed conversations, each [R, L]."""

    tokens: Tensor  # int64
    documents: Tensor  # number within the row, -1 is padding
    positions: Tensor  # int64, from 0 in every document
    answers: Tensor  # bool


def unroll(
    head: DraftHead, features: Tensor, tokens: Tensor, positions: Tensor, hidden: Tensor, steps: int
) -> list[Tensor]:
    """Outputs g [R, N, H] of each step, with true tokens; features [R, N, F], tokens and positions [R, N + steps]."""
    attend, rows = head_attend(head, hidden), features.shape[1]
    outputs: list[Tensor] = []
    state = head.fuse(features)
    for j in range(steps):
        outputs.append(head(state, tokens[:, 1 + j : 1 + j + rows], positions[:, :rows] + j, attend))
        state = head.recycle(outputs[-1])
    return outputs


def head_attend(head: DraftHead, hidden: Tensor) -> Any:
    """What the layers of a head call that is run several times over rows; `hidden` as `Unrolled` takes it."""
    config = head.shared.config
    return attend_with(Unrolled(hidden).run, config.mla if config and head.latent else None)


def target_pass(model: Decoder, rows: Rows, taps: tuple[int, ...]) -> Hidden:
    """The target over packed documents that do not see each other."""
    attend = packed_attend(rows.documents, model.config)
    return model(rows.tokens, rows.positions, attend, taps)  # type: ignore[no-any-return]


def label_logits(model: Decoder, hidden: Hidden) -> Tensor:
    """[R, L, V] in float32: half precision would turn near ties into wrong labels."""
    with torch.autocast(hidden.final.device.type, enabled=False):
        return model.logits(hidden.final.float())


class StepLoss(NamedTuple):
    """Sums over rows [R, N] of one step."""

    loss: Tensor
    agree: Tensor  # [R, N] bool: the head's favourite is the target's


def step_loss(head: DraftHead, output: Tensor, logits: Tensor, recipe: Head, acceptance: Tensor) -> StepLoss:
    """Loss of one step against the target's logits [R, N, V]; nothing is summed yet."""
    log_q = head.logits(output).float().log_softmax(-1)
    p, best = logits.softmax(-1), logits.argmax(-1)
    soft = -(p * log_q).sum(-1)
    hard = -log_q.gather(-1, best[..., None])[..., 0]
    missed = 1 - torch.minimum(p, log_q.exp()).sum(-1)
    mixed = (1 - recipe.hard) * soft + recipe.hard * hard
    return StepLoss(mixed + acceptance * missed, log_q.argmax(-1) == best)


def head_loss(
    head: DraftHead, model: Decoder, rows: Rows, recipe: Head, acceptance: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, agreement [unroll]) of a batch; rows t run to L - unroll, so that every step has its token and label.

    Without `labels` no gradient reaches the target. With it, [] in 0..1, gradients reach the target's features, and
    that share of them its predictions: a target whose predictions give way learns to say what its head can follow.
    """
    steps, n = recipe.unroll, rows.tokens.shape[1] - recipe.unroll
    with torch.autocast(rows.tokens.device.type, torch.bfloat16, enabled=rows.tokens.is_cuda):
        with torch.set_grad_enabled(labels is not None):
            hidden = target_pass(model, rows, head.taps)
            logits = label_logits(model, hidden)
            logits = logits if labels is None else logits.detach().lerp(logits, labels)
            features = head.features(hidden)[:, :n]
        outputs = unroll(head, features, rows.tokens, rows.positions, hidden_rows(rows.documents[:, :n]), steps)
        alive = torch.ones_like(rows.answers[:, :n], dtype=torch.float32)
        total, agreement = torch.zeros((), device=alive.device), []
        for j, output in enumerate(outputs):
            result = step_loss(head, output, logits[:, 1 + j : 1 + j + n], recipe, acceptance)
            weight = _weights(rows, j, n, recipe.outside)
            focus = weight * (1 - recipe.alive * (1 - alive))
            total = total + recipe.decay**j * (result.loss * focus).sum() / focus.sum().clamp(min=1)
            agreement.append((result.agree * weight).sum() / weight.sum().clamp(min=1))
            alive = alive * result.agree
    return total, torch.stack(agreement).detach()


def _weights(rows: Rows, step: int, n: int, outside: float) -> Tensor:
    """[R, n]: the label of a row at a step is about token t + 2 + step, which must be of the same document."""
    label = slice(2 + step, 2 + step + n)
    # one label lies past the end of the row: it counts as another document's
    documents, answers = F.pad(rows.documents, (0, 1), value=-1)[:, label], F.pad(rows.answers, (0, 1))[:, label]
    same = (documents == rows.documents[:, :n]) & (documents >= 0)
    return same.float() * torch.where(answers, 1.0, outside)


class HeadData:
    """Packed answers on the device, in random order without end."""

    def __init__(self, documents: Sequence[Document], length: int, device: torch.device, seed: int) -> None:
        packed = pack(documents, length)
        self.tokens = int((packed.documents >= 0).sum())
        self._arrays = [torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a).to(device) for a in packed]
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = device
        self._order = torch.zeros(0, dtype=torch.int64, device=device)

    def batch(self, rows: int) -> Rows:
        while len(self._order) < rows:
            more = torch.randperm(len(self._arrays[0]), generator=self._generator, device=self._device)
            self._order = torch.cat((self._order, more))
        index, self._order = self._order[:rows], self._order[rows:]
        tokens, marks, documents, positions = (a[index] for a in self._arrays)
        return Rows(tokens.long(), documents, positions.long(), marks == ANSWER)


def train_head(head: DraftHead, model: Decoder, data: HeadData, recipe: Head) -> list[dict[str, float]]:
    """Train in place and return the curve."""

    def eager(rows: Rows, acceptance: Tensor) -> tuple[Tensor, Tensor]:
        return head_loss(head, model, rows, recipe, acceptance)

    early = torch.zeros((), device=model.embed.weight.device)
    loss = finite_loss(eager, (head,), (data.batch(recipe.rows), early), compiled=early.is_cuda)
    optimizers, budget, log = Optimizers(head, recipe.learning), Budget(recipe.steps, recipe.seconds), Log("head")
    step, each = 0, recipe.rows * recipe.length
    while (progress := budget.progress(step)) < 1:
        late = torch.full((), recipe.acceptance if progress > 0.5 else 0.0, device=model.embed.weight.device)
        value, agreement = loss(data.batch(recipe.rows), late)
        value.backward()
        optimizers.step(progress)
        step += 1
        if step % 10 == 0:
            last = float(value.detach())
            if log.due:
                log(step, loss=last, progress=progress, **budget.pace(step, each), **_named(agreement))
    log(step, loss=float(value.detach()), progress=1.0, **budget.pace(step, each), **_named(agreement))
    return log.rows


def _named(agreement: Tensor) -> dict[str, float]:
    return {f"agree_{j}": value for j, value in enumerate(agreement.tolist())}
