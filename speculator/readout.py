"""What sampling asks about logits, and what the answers mean: tokens drawn, drafts ranked.

Owns: which draws need no written logits, and what filters keep. Must never know models or who verifies: it is handed a
way to ask, and says nothing (None) where the logits themselves are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from speculator.sampling import RowSampling, Stream, lowest_kept, noise_keys
from target.pdl import pdl_on
from target.readout import Asked, Keep, Readout, values_of

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


class Reading(NamedTuple):
    """A ranking as it was read: nothing is normalised yet."""

    found: Readout  # about R * T rows
    asked: Asked
    places: Sequence[int]  # R, T

    def ranking(self) -> Ranking:
        found, shape = self.found, (*self.places, self.asked.best)
        assert found.score_total is not None
        scores = found.scores - found.score_total[:, None]
        logprobs = values_of(found, self.asked) - found.total[:, None]
        return Ranking(found.columns.view(shape), scores.view(shape), logprobs.view(shape))


def unread(asked: Asked) -> Readout | None:
    """Where logits are always written."""
    return None


def target_draws(read: Read, rows: RowSampling, counter: Tensor) -> Draws | None:
    """Draws at absolute positions `counter` [R, T], as `coupled_sample` of `scores` makes them."""
    if rows.any_penalty:
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
    reading = draft_reading(read, rows, counter, best, ids, coupled)
    return None if reading is None else reading.ranking()


def draft_reading(
    read: Read,
    rows: RowSampling,
    counter: Tensor,
    best: int,
    ids: Tensor | None,
    coupled: bool,
    keys: Tensor | None = None,
) -> Reading | None:
    """`draft_ranking` for those who normalise on their way; `keys` [R] are of the noise, where somebody made them."""
    asked = _question(rows, counter, coupled, keys)._replace(best=best, ids=ids, ranked=True)
    found = read(asked)
    return None if found is None or found.score_total is None else Reading(found, asked, counter.shape)


def kept(rows: RowSampling, places: Sequence[int]) -> Keep | None:
    """The filters of rows at R x T `places`; None where there are none."""
    ranked = rows.any_top_k or rows.any_top_p
    if not (ranked or rows.any_min_p):
        return None

    def floor(best: Tensor) -> Tensor:
        return lowest_kept(best.view(*places, -1), rows).flatten(0, 1)

    def find(logits: Tensor, temperature: Tensor | None) -> Tensor:
        from speculator.kernels.floor import launch_floor

        ratio, pdl = rows.min_p.log(), pdl_on(logits.device)
        return launch_floor(logits, temperature, rows.top_k, rows.top_p, ratio, places[1], pdl)

    return Keep(rows.width if ranked else 1, floor, find)


def _question(rows: RowSampling, counter: Tensor, coupled: bool, keys: Tensor | None = None) -> Asked:
    """About every place of `counter` [R, T] as a row of its own."""
    if rows.all_greedy:
        return Asked()
    if coupled:
        keys = _keys(rows, counter) if keys is None else _everywhere(keys, counter)
    return Asked(temperature=_everywhere(rows.temperature, counter), keys=keys, keep=kept(rows, counter.shape))


def _everywhere(values: Tensor, counter: Tensor) -> Tensor:
    """values [R] at each of R x T places: [R * T], contiguous, which a flattened expansion of one row is not."""
    return values[:, None].expand(counter.shape).contiguous().flatten()


def _keys(rows: RowSampling, counter: Tensor) -> Tensor:
    return noise_keys(rows.seed, counter, Stream.TARGET).flatten()
