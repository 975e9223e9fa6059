"""What sampling asks about logits, and what the answers mean: tokens drawn, drafts ranked.

Owns: which draws need no written logits. Must never know models, kernels or who verifies: it is handed a way to ask,
and says nothing (None) where the logits themselves are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from speculator.sampling import RowSampling, Stream, noise_keys
from target.readout import Asked, Readout, values_of

Read = Callable[[Asked], Readout | None]  # about N rows; None where logits have to be written first


class Draws(NamedTuple):
    """The token that the target draws at each of R x T places under the coupled rule."""

    tokens: Tensor  # [R, T] int64
    logprobs: Tensor  # [R, T] float32, their log-probabilities before temperature
    finite: Tensor  # [R, T] bool: every logit is


class Ranking(NamedTuple):
    """The k best draft tokens at each of R x T places."""

    columns: Tensor  # [R, T, k] int64
    scores: Tensor  # [R, T, k] float32, normalised over the vocabulary
    logprobs: Tensor  # [R, T, k] float32, log q


def unread(asked: Asked) -> Readout | None:
    """Where logits are always written."""
    return None


def target_draws(read: Read, rows: RowSampling, counter: Tensor) -> Draws | None:
    """Draws at absolute positions `counter` [R, T], as `coupled_sample` of `scores` makes them."""
    if not _plain(rows) or rows.any_penalty:
        return None
    found = read(_question(rows, counter, coupled=True))
    if found is None:
        return None
    shape = counter.shape
    logprobs = found.logits[:, 0] - found.total
    return Draws(found.columns[:, 0].view(shape), logprobs.view(shape), found.finite.view(shape))


def draft_ranking(
    read: Read, rows: RowSampling, counter: Tensor, best: int, ids: Tensor | None, coupled: bool
) -> Ranking | None:
    """The `best` columns by values of the rows' temperature, plus the target's own noise where `coupled`.

    `counter` [R, T] are absolute positions, `ids` [V] the target's ids of the columns, None where they are equal.
    """
    if not _plain(rows):
        return None
    asked = _question(rows, counter, coupled)._replace(best=best, ids=ids, ranked=True)
    found = read(asked)
    if found is None or found.score_total is None:
        return None
    shape = (*counter.shape, best)
    scores, logprobs = found.scores - found.score_total[:, None], values_of(found, asked) - found.total[:, None]
    return Ranking(found.columns.view(shape), scores.view(shape), logprobs.view(shape))


def _plain(rows: RowSampling) -> bool:
    """Whether every token keeps its score."""
    return not (rows.any_top_k or rows.any_top_p or rows.any_min_p)


def _question(rows: RowSampling, counter: Tensor, coupled: bool) -> Asked:
    """About every place of `counter` [R, T] as a row of its own."""
    if rows.all_greedy:
        return Asked()
    temperature = rows.temperature[:, None].expand(counter.shape).flatten()
    return Asked(temperature=temperature, keys=_keys(rows, counter) if coupled else None)


def _keys(rows: RowSampling, counter: Tensor) -> Tensor:
    return noise_keys(rows.seed, counter, Stream.TARGET).flatten()
