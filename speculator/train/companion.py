"""A head that grows up with its target: its loss reaches into the target's features and predictions.

The target learns states that say more of what comes next, and predictions that a head can follow, as models with
trained-in multi-token prediction do (DeepSeek-V3, arXiv 2412.19437, section 2.2). Owns: the joint term. Must never know
phases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from speculator.heads.base import DraftHead
from speculator.train.data import Document, Stream
from speculator.train.finite import finite_loss
from speculator.train.head import HeadData, Rows, head_loss
from speculator.train.optim import Optimizers
from speculator.train.recipe import Companion, Head
from target.decoder import Decoder

LESS, MORE = 0.3, 1.3  # what a round of refinement does to the share of the labels' gradient
GAIN = 0.08  # an agreement that is 0.1 short doubles the weight in 90 steps


class CompanionTrainer:
    """Adds `weight` times the head's loss to the gradients of target and head, on its own batches."""

    def __init__(
        self, head: DraftHead, model: Decoder, recipe: Companion, shape: Head, streams: Mapping[str, Stream], seed: int
    ) -> None:
        self.head, self.model, self.recipe = head, model, recipe
        self._shape, self._seed = shape, seed
        self.goal = recipe.goal
        device = model.embed.weight.device
        documents = sample_documents(streams, recipe.weights, recipe.documents, recipe.length, seed)
        self._data = HeadData(documents, recipe.length, device, seed)
        self._optimizers = Optimizers(head, recipe.learning)
        self._none = torch.zeros((), device=device)
        self.weight = torch.full((), recipe.weight, device=device)
        self.labels = torch.full((), recipe.labels, device=device)
        first = self._data.batch(recipe.rows)
        self._loss = finite_loss(self._eager, (head, model), (first,), compiled=self._none.is_cuda)
        self.last = self._none
        self._refining = False

    def _eager(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        total, agreement = head_loss(self.head, self.model, rows, self._shape, self._none, self.labels)
        return total / self._shape.unroll, agreement

    def backward(self) -> None:
        """Accumulate the gradients of one batch."""
        value, agreement = self._loss(self._data.batch(self.recipe.rows))
        (value * self.weight).backward()
        self.last = agreement[0]
        if self.goal > 0:  # on the device: the host never waits for it
            self.weight.mul_(torch.exp(GAIN * (self.goal - self.last))).clamp_(0.01, self.recipe.most)

    def read(self, documents: Sequence[Document], shared: float) -> None:
        """From now on learn from the target's own answers, as the recipe has it for refinement.

        `shared` is the share of their n-grams that other answers have too. Above the recipe's limit the target is
        buying agreement with stock phrases, so less of the gradient reaches its predictions.
        """
        self._data = HeadData(documents, self.recipe.length, self._none.device, self._seed)
        self.goal = self.recipe.refine_goal
        if not self._refining:
            self.labels.fill_(self.recipe.refine_labels)
            self._refining = True
        self.labels.mul_(LESS if shared > self.recipe.shared_limit else MORE).clamp_(max=self.recipe.refine_labels)

    def state(self) -> dict[str, float]:
        """For a log line."""
        unrest = {f"head_{name}": value for name, value in self._optimizers.state().items()}
        return {"agree": float(self.last), "joint": float(self.weight), "labels": float(self.labels), **unrest}

    def step(self, progress: float) -> None:
        self._optimizers.step(progress)


def sample_documents(
    streams: Mapping[str, Stream], weights: Mapping[str, float], count: int, length: int, seed: int
) -> list[Document]:
    """Pieces of at most `length` tokens: whole conversations, and parts of texts that start anywhere."""
    rng = np.random.default_rng(seed)
    used = {n: s for n, s in streams.items() if weights.get(n, 0) > 0 and len(s.tokens) > length}
    share = np.array([len(s.tokens) * weights[n] for n, s in used.items()], np.float64)
    drawn = rng.choice(len(used), size=count, p=share / share.sum())
    pools = list(used.values())
    return [_piece(pools[i], length, rng) for i in drawn]


def _piece(stream: Stream, length: int, rng: np.random.Generator) -> Document:
    if stream.chat:
        number = int(rng.integers(len(stream.starts)))
        start = int(stream.starts[number])
        after = int(stream.starts[number + 1]) if number + 1 < len(stream.starts) else len(stream.tokens)
    else:
        start = int(rng.integers(len(stream.tokens) - length))
        after = start + length
    piece = slice(start, min(after, start + length))
    return Document(stream.tokens[piece], stream.marks[piece])
