"""Trains the target: language modelling over a mix of texts and conversations, in phases.

Owns: the loss and the loop. Must never know heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from speculator.train.companion import CompanionTrainer
from speculator.train.data import ANSWER, QUESTION, REPEATED, Mixture, Stream
from speculator.train.optim import Budget, Optimizers
from speculator.train.recipe import Phase
from speculator.train.report import Log
from target.attention.dense import dense_attend
from target.decoder import Decoder

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def language_loss(model: Decoder, tokens: Tensor, weights: Tensor, unlike: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, unlikelihood) means over tokens [R, L + 1] with weights [R, L] for each.

    Unlikelihood is -log(1 - p(token)) (Welleck et al. 2019, arXiv 1908.04319).
    """
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model.logits(model(tokens[:, :-1], positions, dense_attend(model.config)).final)
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(weights.shape)
    unlikely = -torch.log1p(-(-loss).exp().clamp(max=1 - 1e-4))
    return (loss * weights).sum() / weights.sum().clamp(min=1), (unlikely * unlike).sum() / unlike.sum().clamp(min=1)


def make_loss(model: Decoder, device: torch.device) -> Loss:
    """`language_loss` of a model, compiled on a GPU; one shape is compiled once."""

    def loss(tokens: Tensor, weights: Tensor, unlike: Tensor) -> tuple[Tensor, Tensor]:
        return language_loss(model, tokens, weights, unlike)

    return torch.compile(loss, dynamic=False) if device.type == "cuda" else loss


def loss_weights(marks: Tensor, prompt_weight: float) -> tuple[Tensor, Tensor]:
    """marks [R, L] -> weights of cross-entropy and of unlikelihood."""
    weights = (marks == ANSWER).float() + prompt_weight * (marks == QUESTION).float()
    return weights, (marks == REPEATED).float()


def train_phase(
    model: Decoder,
    loss: Loss,
    phase: Phase,
    streams: Mapping[str, Stream],
    device: torch.device,
    seed: int,
    companion: CompanionTrainer | None = None,
) -> list[dict[str, float]]:
    """Run one phase in place and return its curve."""
    mixture = Mixture(streams, phase.weights, phase.length, device, seed)
    optimizers, budget, log = Optimizers(model, phase.learning), Budget(phase.steps, phase.seconds), Log(phase.name)
    step, each = 0, phase.rows * phase.length
    while (progress := budget.progress(step)) < 1:
        tokens, marks = mixture.batch(phase.rows)
        value, _ = loss(tokens, *loss_weights(marks, phase.prompt_weight))
        value.backward()
        if companion is not None:
            companion.backward()
            companion.step(progress)
        optimizers.step(progress)
        step += 1
        if step % 10 == 0:  # reading the loss also keeps the host from running ahead of the clock
            last = float(value.detach())
            if log.due:
                more = optimizers.state() | (companion.state() if companion is not None else {})
                log(step, loss=last, progress=progress, tokens=step * each, **budget.pace(step, each), **more)
    log(step, loss=float(value.detach()), progress=1.0, tokens=step * each, **budget.pace(step, each))
    return log.rows


@torch.no_grad()
def heldout_losses(
    model: Decoder, streams: Mapping[str, Stream], length: int, device: torch.device, rows: int = 32
) -> dict[str, float]:
    """Cross-entropy per token of each source's held-out documents."""
    losses = {}
    for name, stream in streams.items():
        if len(stream.tokens):
            tokens, marks = Mixture({name: stream}, {name: 1.0}, length, device, seed=0).batch(rows)
            losses[name] = round(float(language_loss(model, tokens, *loss_weights(marks, 1.0))[0]), 4)
    return losses
