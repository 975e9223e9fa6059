"""Trains an EAGLE-3 head on the target's own answers: training-time test (arXiv 2503.01840).

The head is unrolled on its own output over several steps, in the convention it is served in: row t pairs the feature
of token t with token t + 1, step j reads token t + 1 + j at position t + j. Must never know serving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speculator.heads.base import TargetWeights
from speculator.heads.eagle3 import Eagle3Head
from speculator.heads.load import load_head
from speculator.heads.record import HeadRecord
from speculator.train.data import ANSWER, Document, pack
from speculator.train.optim import Budget, Optimizers
from speculator.train.recipe import Head
from speculator.train.report import Log
from target.llama import Llama, init_weights
from target.model import Hidden

HIDDEN = -1e30  # a score that softmax turns into 0; with -inf, torch 2.11 compiles a backward pass that gives NaN


class Rows(NamedTuple):
    """A batch of packed conversations, each [R, L]."""

    tokens: Tensor  # int64
    documents: Tensor  # number within the row, -1 is padding
    positions: Tensor  # int64, from 0 in every document
    answers: Tensor  # bool


class UnrolledAttention:
    """The attention of a head that is run several times over the same rows.

    Step 0 sees the step-0 keys of rows <= t of its own document. Step j sees those too, and the keys of steps 1..j of
    its own row: what a served chain that starts at row t has in its cache.
    """

    def __init__(self, hidden: Tensor) -> None:
        """hidden [R or 1, N, N] bool: which step-0 rows a row may not see."""
        self._hidden = hidden[:, None, None]
        self._steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [R, N, heads, dim], k and v [R, N, kv_heads, dim] -> [R, N, heads, dim]."""
        rows, length, heads, dim = q.shape
        steps = self._steps.setdefault(layer, [])
        steps.append((k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]))  # [R, kv_heads, 1, N, dim]
        q = q.view(rows, length, k.shape[2], -1, dim).permute(0, 2, 3, 1, 4) * dim**-0.5
        (first, value), later = steps[0], steps[1:]
        scores = [(q @ first.mT).masked_fill(self._hidden, HIDDEN)]
        scores += [(q * key).sum(-1, keepdim=True) for key, _ in later]
        share = torch.cat([s.float() for s in scores], dim=-1).softmax(-1).to(value.dtype)
        out = share[..., :length] @ value
        for i, (_, own) in enumerate(later):
            out = out + share[..., length + i, None] * own
        return out.permute(0, 3, 1, 2, 4).reshape(rows, length, heads, dim)


def hidden_rows(documents: Tensor) -> Tensor:
    """[R, N] document numbers -> [R, N, N] bool, True where a row may not see another."""
    index = torch.arange(documents.shape[1], device=documents.device)
    return (documents[:, :, None] != documents[:, None]) | (index[None, :] > index[:, None])


def unroll(
    head: Eagle3Head, features: Tensor, tokens: Tensor, positions: Tensor, hidden: Tensor, steps: int
) -> list[Tensor]:
    """Outputs g [R, N, H] of each step, with true tokens; features [R, N, F], tokens and positions [R, N + steps]."""
    attention, rows = UnrolledAttention(hidden), features.shape[1]
    outputs: list[Tensor] = []
    state = head.fuse(features)
    for j in range(steps):
        outputs.append(head(state, tokens[:, 1 + j : 1 + j + rows], positions[:, :rows] + j, attention.attend))
        state = head.recycle(outputs[-1])
    return outputs


def target_pass(model: Llama, rows: Rows, taps: tuple[int, ...]) -> Hidden:
    """The target over packed documents that do not see each other."""
    seen = ~hidden_rows(rows.documents)[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen).transpose(1, 2)

    return model(rows.tokens, rows.positions, attend, taps)  # type: ignore[no-any-return]


def label_logits(model: Llama, hidden: Hidden) -> Tensor:
    """[R, L, V] in float32: half precision would turn near ties into wrong labels."""
    with torch.autocast(hidden.final.device.type, enabled=False):
        return model.logits(hidden.final.float())


class StepLoss(NamedTuple):
    """Sums over rows [R, N] of one step."""

    loss: Tensor
    agree: Tensor  # [R, N] bool: the head's favourite is the target's


def step_loss(head: Eagle3Head, output: Tensor, logits: Tensor, recipe: Head, acceptance: Tensor) -> StepLoss:
    """Loss of one step against the target's logits [R, N, V]; nothing is summed yet."""
    log_q = head.logits(output).float().log_softmax(-1)
    p, best = logits.softmax(-1), logits.argmax(-1)
    soft = -(p * log_q).sum(-1)
    hard = -log_q.gather(-1, best[..., None])[..., 0]
    missed = 1 - torch.minimum(p, log_q.exp()).sum(-1)
    mixed = (1 - recipe.hard) * soft + recipe.hard * hard
    return StepLoss(mixed + acceptance * missed, log_q.argmax(-1) == best)


def head_loss(
    head: Eagle3Head, model: Llama, rows: Rows, recipe: Head, acceptance: Tensor, joint: bool = False
) -> tuple[Tensor, Tensor]:
    """(loss, agreement [unroll]) of a batch; rows t run to L - unroll, so that every step has its token and label.

    `joint` lets gradients into the target, through its features and through the labels.
    """
    steps, n = recipe.unroll, rows.tokens.shape[1] - recipe.unroll
    with torch.autocast(rows.tokens.device.type, torch.bfloat16, enabled=rows.tokens.is_cuda):
        with torch.set_grad_enabled(joint):
            hidden = target_pass(model, rows, head.taps)
            logits = label_logits(model, hidden)
            features = torch.cat(hidden.taps, dim=-1)[:, :n]
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


def new_head(model: Llama, recipe: Head, taps: tuple[int, ...], seed: int) -> Eagle3Head:
    """A head that starts from the target's lm_head and final norm, and from the deepest tap as its state."""
    config = model.config
    record = HeadRecord(
        kind="eagle3",
        hidden_size=config.hidden_size,
        target_hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        draft_vocab_size=config.vocab_size,
        intermediate_size=recipe.intermediate_size,
        num_layers=1,
        num_heads=recipe.heads,
        num_kv_heads=recipe.kv_heads,
        head_dim=config.head_dim,
        norm_eps=config.norm_eps,
        rope=config.rope,
        boundaries=taps,
        fc_norm=recipe.fc_norm,
        norm_output=recipe.norm_output,
    )
    head = Eagle3Head(record, TargetWeights(model.embed.weight.detach(), model.head_weight.detach()), 0)
    init_weights(head, torch.Generator().manual_seed(seed))
    _start_from_target(head, model)
    return head.to(model.embed.weight.device)


@torch.no_grad()
def _start_from_target(head: Eagle3Head, model: Llama) -> None:
    assert head.lm_head is not None and head.fc is not None and head.norm is not None
    head.lm_head.weight.copy_(model.head_weight)
    head.norm.weight.copy_(model.norm.weight)
    width = model.config.hidden_size
    head.fc.weight[:, -width:] += torch.eye(width)


def load_eagle3(folder: Path, model: Llama) -> Eagle3Head:
    """A trained head from its folder, in the target's dtype and on its device."""
    head = load_head(folder, model, model.embed.weight.dtype, model.embed.weight.device)
    assert isinstance(head, Eagle3Head)
    return head


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


HeadLoss = Callable[[Rows, Tensor], tuple[Tensor, Tensor]]


def make_head_loss(head: Eagle3Head, model: Llama, recipe: Head) -> HeadLoss:
    """`head_loss` of a pair, compiled on a GPU."""

    def loss(rows: Rows, acceptance: Tensor) -> tuple[Tensor, Tensor]:
        return head_loss(head, model, rows, recipe, acceptance)

    return torch.compile(loss, dynamic=False) if model.embed.weight.is_cuda else loss


def train_head(head: Eagle3Head, model: Llama, data: HeadData, recipe: Head) -> list[dict[str, float]]:
    """Train in place and return the curve."""
    loss = make_head_loss(head, model, recipe)
    optimizers, budget, log = Optimizers(head, recipe.learning), Budget(recipe.steps, recipe.seconds), Log("eagle3")
    step = 0
    while (progress := budget.progress(step)) < 1:
        late = torch.full((), recipe.acceptance if progress > 0.5 else 0.0, device=model.embed.weight.device)
        value, agreement = loss(data.batch(recipe.rows), late)
        value.backward()
        optimizers.step(progress)
        step += 1
        if step % 10 == 0:
            last = float(value.detach())
            if log.due:
                log(step, loss=last, progress=progress, **_named(agreement))
    log(step, loss=float(value.detach()), progress=1.0, **_named(agreement))
    return log.rows


def _named(agreement: Tensor) -> dict[str, float]:
    return {f"agree_{j}": value for j, value in enumerate(agreement.tolist())}
