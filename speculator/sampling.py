"""How the target samples: filters, counter-based noise, and the draw that speculation must reproduce.

Owns the sampling distribution of a row and the noise that decides its draws.
Must never know what a draft is, where logits come from, or which rows share a batch.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from speculator.types import SamplingParams

GREEDY_BELOW = 1e-5  # a temperature under this is 0: dividing logits by it would leave nothing but the argmax anyway


class Stream(enum.IntEnum):
    """Independent families of noise under one seed."""

    TARGET = 0  # the coupled draw of a position; the head that drafts for `coupled` uses it too
    DRAFT = 1  # what a head draws its drafts with under `rejection` and `block`
    ACCEPT = 2  # whether a drafted node is accepted
    RESIDUAL = 3  # the bonus token of `rejection` and `block`


class RowSampling(NamedTuple):
    """Sampling parameters of the R rows of a batch, and what the host knows about them.

    Filters of a greedy row are already switched off. The host-known members only skip work: they never change a result.
    """

    temperature: Tensor  # [R] float32, 0 is greedy
    top_k: Tensor  # [R] int64, 0 is off
    top_p: Tensor  # [R] float32, 1 is off
    min_p: Tensor  # [R] float32, 0 is off
    penalty: Tensor  # [R] float32, 1 is off
    seed: Tensor  # [R] int64, the two's complement of an unsigned seed
    all_greedy: bool
    any_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_penalty: bool
    width: int  # how many of the best scores top-k and top-p have to rank; 0 is all of them

    @classmethod
    def alike(cls, read: Mapping[str, Tensor], greedy: bool, filtered: bool) -> RowSampling:
        """Of recorded passes: `read` are the parameters by name; without the penalty they are passes that know none.

        The host says what holds for every batch that a recording may meet.
        """
        return cls(
            **{"penalty": read["temperature"], **read},
            all_greedy=greedy,
            any_greedy=True,
            any_top_k=filtered,
            any_top_p=filtered,
            any_min_p=filtered,
            any_penalty="penalty" in read,
            width=0,
        )

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams], device: torch.device | str) -> RowSampling:
        """Move the parameters of R rows to `device` in one copy."""
        sampled = [p.temperature >= GREEDY_BELOW for p in params]
        top_k = [p.top_k if on else 0 for p, on in zip(params, sampled, strict=True)]
        top_p = [p.top_p if on else 1.0 for p, on in zip(params, sampled, strict=True)]
        min_p = [p.min_p if on else 0.0 for p, on in zip(params, sampled, strict=True)]
        temperature = [p.temperature if on else 0.0 for p, on in zip(params, sampled, strict=True)]
        penalty = [p.repetition_penalty for p in params]
        floats = torch.tensor([temperature, top_p, min_p, penalty], dtype=torch.float64)
        whole = torch.tensor([top_k, [_signed(p.seed) for p in params]], dtype=torch.int64)
        packed = upload(torch.cat([floats.view(torch.int64), whole]), device)
        reals = packed[:4].view(torch.float64).float()
        unranked = any(p < 1 and k <= 0 for p, k in zip(top_p, top_k, strict=True))
        return cls(
            temperature=reals[0],
            top_k=packed[4],
            top_p=reals[1],
            min_p=reals[2],
            penalty=reals[3],
            seed=packed[5],
            all_greedy=not any(sampled),
            any_greedy=not all(sampled),
            any_top_k=any(k > 0 for k in top_k),
            any_top_p=any(p < 1 for p in top_p),
            any_min_p=any(p > 0 for p in min_p),
            any_penalty=any(p != 1 for p in penalty),
            width=0 if unranked else max(0, *top_k, 0),
        )


def upload(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy a host tensor to `device` without making the host wait for it."""
    return pinned(values, device).to(device, non_blocking=True)


def pinned(values: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor that copies to `device` without making the host wait."""
    return values.pin_memory() if torch.device(device).type == "cuda" else values


def scores(logits: Tensor, rows: RowSampling, seen: Tensor | None) -> Tensor:
    """Unnormalised log-probabilities [R, T, V] float32 of the target's sampling distribution; -inf is excluded.

    Order: repetition penalty on the tokens of `seen` ([R, T, V] bool, None when no row has a penalty), temperature,
    top-k, top-p, min-p; the results are those of transformers' processors, except that tokens which tie with the last
    token kept are all kept, so nothing depends on how a sort breaks ties. Greedy rows get the penalty only.
    A filter always keeps the best token.
    """
    result = logits.float()
    if rows.any_penalty:
        result = _penalised(result, rows.penalty, seen)
    if rows.all_greedy:
        return result
    result = result / _column(torch.where(rows.temperature > 0, rows.temperature, 1.0))
    if not (rows.any_top_k or rows.any_top_p or rows.any_min_p):
        return result
    return torch.where(result < _lowest_kept(result, rows), -math.inf, result)


def probabilities(values: Tensor, rows: RowSampling) -> Tensor:
    """Normalise `scores` [R, T, V] to float64; a greedy row is a point mass on its best token (lowest id on ties)."""
    if not rows.any_greedy:
        return values.softmax(-1, dtype=torch.float64)
    best = torch.zeros_like(values, dtype=torch.float64).scatter_(-1, values.argmax(-1, keepdim=True), 1.0)
    if rows.all_greedy:
        return best
    return torch.where(_column(rows.temperature > 0), values.softmax(-1, dtype=torch.float64), best)


def coupled_sample(
    values: Tensor, rows: RowSampling, counter: Tensor, *, ids: Tensor | None = None, span: int = 0
) -> Tensor:
    """Draw [R, T] int64 from `values` (scores [R, T, V]): argmax(values + noise of (seed, counter, token)).

    `counter` [R, T] is the absolute position of the token to be produced, so the draw depends on nothing else.
    Greedy rows take the argmax; the lowest index wins ties. `ids` [V] names the token of every column when they are not
    0..V-1 (a head with its own vocabulary); the result is a column then. `span` > 0 promises
    counter[:, 0] <= counter < counter[:, 0] + span: trees save work because a position's noise is made once.
    """
    if rows.all_greedy:
        return values.argmax(-1)
    ids = torch.arange(values.shape[-1], device=values.device) if ids is None else ids
    noise = _shared_gumbel(rows.seed, counter, ids, span) if 0 < span < counter.shape[1] else None
    noise = gumbel(rows.seed, counter, Stream.TARGET, ids) if noise is None else noise
    if rows.any_greedy:
        noise = noise * _column(rows.temperature > 0)
    return (values + noise).argmax(-1)


def draft_sample(values: Tensor, rows: RowSampling, base: Tensor, counter: Tensor, ids: Tensor | None = None) -> Tensor:
    """Draw drafts [R, T] int64 from a head's `values` (scores [R, T, V]) for `rejection` and `block`.

    The noise is of this round alone and independent of what verifies it. `base` [R] is the committed length,
    `counter` [R, T] the depth or any number that tells the draws of a round apart. Greedy rows take the argmax.
    """
    if rows.all_greedy:
        return values.argmax(-1)
    ids = torch.arange(values.shape[-1], device=values.device) if ids is None else ids
    noise = gumbel(fold(rows.seed, base), counter, Stream.DRAFT, ids)
    if rows.any_greedy:
        noise = noise * _column(rows.temperature > 0)
    return (values + noise).argmax(-1)


def fold(seed: Tensor, base: Tensor) -> Tensor:
    """Key [R] int64 of one round: rules that look at later tokens to decide need noise that no other round uses.

    `base` [R] int64 is the committed length at the start of the round.
    """
    return _mix(seed + base * _ROUND)


def uniform(seed: Tensor, counter: Tensor, stream: Stream, ids: Tensor) -> Tensor:
    """Noise in (0, 1), never 0 or 1: [R, T, K] float64, the same bits on every device.

    A pure function of (`seed` [R], `counter` [R, T], `stream`, `ids` [K] or [R, T, K]), all int64. Every (seed,
    counter, stream) is one SplitMix64 sequence (Steele, Lea, Flood 2014), which `ids` index.
    """
    return _uniform_of(noise_keys(seed, counter, stream), ids)


def gumbel(seed: Tensor, counter: Tensor, stream: Stream, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [R, T, K] float32, -log(-log(u)) of `uniform` with the same arguments; within (-4, 37)."""
    return gumbel_of(noise_keys(seed, counter, stream), ids)


def noise_keys(seed: Tensor, counter: Tensor, stream: Stream) -> Tensor:
    """Key [R, T] int64 of the sequence that `uniform` and `gumbel` take their noise from; the same arguments."""
    return _mix(seed[:, None] + counter * _COUNTER + _signed((int(stream) + 1) * _STREAM))


def gumbel_of(keys: Tensor, ids: Tensor) -> Tensor:
    """`gumbel` by key: keys [...] and ids [K], or [..., K], -> [..., K] float32."""
    return _uniform_of(keys, ids).log_().neg_().float().log_().neg_()


def _uniform_of(keys: Tensor, ids: Tensor) -> Tensor:
    bits = _mix(keys[..., None] + ids * _GOLDEN)
    # 52 bits and a half: exact in float64 and symmetric about 1/2; 53 bits would round up to 1.
    return (bits >> 12).bitwise_and_(_ones(52)).double().add_(0.5).mul_(2.0**-52)


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    return ((value + 2**63) % 2**64) - 2**63


# Odd constants with well spread bits. The first three are SplitMix64's own; the others keep the arguments apart.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_COUNTER = _signed(0xD1342543DE82EF95)
_STREAM = _signed(0xA0761D6478BD642F)
_ROUND = _signed(0xE7037ED1A0B428DB)


def _ones(bits: int) -> int:
    return (1 << bits) - 1


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (wrapping), in place; the masks turn arithmetic shifts into logical ones."""
    z.bitwise_xor_((z >> 30).bitwise_and_(_ones(34))).mul_(_MIX_1)
    z.bitwise_xor_((z >> 27).bitwise_and_(_ones(37))).mul_(_MIX_2)
    return z.bitwise_xor_((z >> 31).bitwise_and_(_ones(33)))


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]


def _shared_gumbel(seed: Tensor, counter: Tensor, ids: Tensor, span: int) -> Tensor:
    """`gumbel` for counters that repeat within `span` positions of the first."""
    first = counter[:, :1]
    positions = first + torch.arange(span, device=counter.device)
    noise = gumbel(seed, positions, Stream.TARGET, ids)
    index = (counter - first)[..., None].expand(-1, -1, noise.shape[-1])
    return noise.gather(1, index)


def _penalised(values: Tensor, penalty: Tensor, seen: Tensor | None) -> Tensor:
    if seen is None:
        raise ValueError("a row has a repetition penalty: scores() needs the tokens it has seen")
    factor = _column(penalty)
    return torch.where(seen, torch.where(values < 0, values * factor, values / factor), values)


def _lowest_kept(values: Tensor, rows: RowSampling) -> Tensor:
    """The lowest score [R, T, 1] that the filters keep: each of them is a threshold."""
    if not (rows.any_top_k or rows.any_top_p):
        return lowest_kept(values.amax(-1, keepdim=True), rows)
    return lowest_kept(_best(values, rows.width), rows)


def lowest_kept(ranked: Tensor, rows: RowSampling) -> Tensor:
    """The lowest score [R, T, 1] that the filters keep, from the best scores [R, T, K] in descending order.

    K is `width` where that is not 0, all scores where it is; one where only min-p filters.
    """
    if not (rows.any_top_k or rows.any_top_p):
        return _min_p_floor(ranked[..., :1], rows)
    floor = _ranked_floor(ranked, rows)
    return torch.maximum(floor, _min_p_floor(ranked[..., :1], rows)) if rows.any_min_p else floor


def _best(values: Tensor, width: int) -> Tensor:
    """The `width` best scores in descending order, all of them for 0."""
    if 0 < width < values.shape[-1]:
        return values.topk(width, dim=-1).values
    return values.sort(dim=-1, descending=True).values


def _min_p_floor(best: Tensor, rows: RowSampling) -> Tensor:
    """p >= min_p * p(best), without normalising."""
    return best + _column(rows.min_p.log())


def _ranked_floor(ranked: Tensor, rows: RowSampling) -> Tensor:
    """Threshold of top-k and top-p from the best scores `ranked` [R, T, K], descending."""
    limit = torch.where(rows.top_k > 0, rows.top_k, ranked.shape[-1]).clamp(max=ranked.shape[-1])
    last = _column(limit - 1).expand(*ranked.shape[:2], 1)
    if rows.any_top_p:
        last = torch.minimum(last, _nucleus_end(ranked, last, rows.top_p))
    off = _column((rows.top_k <= 0) & (rows.top_p >= 1))
    return torch.where(off, -math.inf, ranked.gather(-1, last))


def _nucleus_end(ranked: Tensor, last: Tensor, top_p: Tensor) -> Tensor:
    """Rank [R, T, 1] of the last token of the smallest set with mass >= top_p among ranks 0..`last`.

    float64, so that the answer does not depend on how many ranks the batch made us look at.
    """
    weight = (ranked.double() - ranked[..., :1].double()).exp()
    mass = weight.cumsum(-1)
    wanted = torch.where(top_p < 1, top_p.double(), math.inf)
    inside = mass - weight < _column(wanted) * mass.gather(-1, last)
    return (inside.sum(-1, keepdim=True) - 1).clamp(min=0)
