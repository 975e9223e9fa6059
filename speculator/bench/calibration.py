"""Does the head know when it is right: confidence of drafted tokens against their acceptance.

Owns: bins, the expected calibration error, and acceptance by the class of the token that the target said. Must never
run a model. Counted are drafted tokens whose predecessors were all accepted: the others nobody judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from speculator.bench.bootstrap import Array, interval, ratio, weights
from speculator.bench.figures import Counted, rounded
from speculator.bench.outcomes import Judged, judged
from speculator.bench.recording import Answer
from speculator.bench.records import Calibration, CalibrationBin, TokenClass

BINS = 10


def calibration(answers: Sequence[Answer], levels: int, resamples: int = 2000, confidence: float = 0.95) -> Calibration:
    """Reliability in ten bins of equal width, pooled and by position."""
    prompts: dict[tuple[str, str], list[Judged]] = {}
    for answer in answers:
        tokens = [token for round_ in answer.rounds for token in judged(answer, round_)]
        prompts.setdefault((answer.set, answer.id), []).extend(tokens)
    tables = np.array([_bins(tokens) for tokens in prompts.values()]).reshape(len(prompts), 3, BINS)
    count, sure, right = tables.sum(0)
    everything = [token for tokens in prompts.values() for token in tokens]
    found = Calibration(
        count=len(everything),
        ece=_ece(everything),
        ece_at=tuple(_ece([t for t in everything if t.depth == i + 1]) for i in range(levels)),
        bins=tuple(_bin(i, int(count[i]), float(sure[i]), float(right[i])) for i in range(BINS)),
    )
    if not resamples or not everything:
        return found
    drawn = np.einsum("rp,pkb->rkb", weights(len(prompts), resamples), tables)
    seen = (tables[:, 0] > 0).sum(0)  # prompts with a token in the bin
    rates = ratio(drawn[:, 2], drawn[:, 0])
    bands = [rounded(interval(rates[:, i], int(seen[i]), confidence)) for i in range(BINS)]
    bins = tuple(replace(one, interval=band) for one, band in zip(found.bins, bands, strict=True))
    return replace(found, bins=bins, interval=rounded(interval(_errors(drawn), len(prompts), confidence)))


def _bins(tokens: Iterable[Judged]) -> Array:
    """Count, sum of confidences, sum of acceptances of each bin, [3, BINS]."""
    table = np.zeros((3, BINS))
    for token in tokens:
        sure = math.exp(token.logq)
        table[:, min(BINS - 1, int(sure * BINS))] += (1, sure, token.accepted)
    return table


def _errors(tables: Array) -> Array:
    """Expected calibration error of tables [..., 3, BINS]."""
    count, sure, right = np.moveaxis(tables, -2, 0)
    return ratio(np.abs(right - sure).sum(-1), count.sum(-1))


def _ece(tokens: Sequence[Judged]) -> float | None:
    return round(float(_errors(_bins(tokens))), 6) if tokens else None


def _bin(i: int, count: int, sure: float, right: float) -> CalibrationBin:
    means = (round(sure / count, 6), round(right / count, 6)) if count else (None, None)
    return CalibrationBin(i / BINS, (i + 1) / BINS, count, *means)


# token classes


def token_class(piece: str) -> str:
    """What kind of token a decoded piece is."""
    bare = piece.strip()
    if not bare:
        return "space" if piece and "\n" not in piece else "line end" if piece else "special"
    if any(c.isdigit() for c in bare):
        return "number"
    if any(c.isalpha() for c in bare):
        return "word start" if piece[0].isspace() or bare[0].isupper() else "word inside"
    return "sign"


def token_classes(
    counted: Sequence[Counted], piece: Callable[[int], str], resamples: int = 2000, confidence: float = 0.95
) -> tuple[TokenClass, ...]:
    """Acceptance by the class of the token that the answer has at each judged position, most frequent class first.

    `piece` decodes one token id.
    """
    known: dict[int, str] = {}
    prompts: dict[tuple[str, str], dict[str, list[int]]] = {}
    for answer, rounds in counted:
        text, table = answer.whole, prompts.setdefault((answer.set, answer.id), {})
        for base, drafted, accepted, _ in rounds:
            for i in range(min(drafted, accepted + 1)):
                token = text[base + i]
                name = known.setdefault(token, token_class(piece(token)))
                pair = table.setdefault(name, [0, 0])
                pair[0] += 1
                pair[1] += i < accepted
    names = {name for table in prompts.values() for name in table}
    found = [_class(name, list(prompts.values()), resamples, confidence) for name in names]
    return tuple(sorted(found, key=lambda c: (-c.judged, c.name)))


def _class(name: str, prompts: Sequence[dict[str, list[int]]], resamples: int, confidence: float) -> TokenClass:
    table = np.array([prompt.get(name, [0, 0]) for prompt in prompts], dtype=np.float64)
    count, right = table.sum(0)
    band = None
    if resamples:
        drawn = weights(len(table), resamples) @ table
        band = rounded(interval(ratio(drawn[:, 1], drawn[:, 0]), int((table[:, 0] > 0).sum()), confidence))
    return TokenClass(name, int(count), int(right), round(float(right / count), 6), band)
