"""What a step came to, as one tensor of a fixed size: a row of words for each session, and one for what went wrong.

Owns: the layout. Must never know engines or how the tensor travels. The last stage of a pipeline packs it on its
device; the others move keys and values by it there, and rank 0 reads the results from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speculator.drafting import Drafted
from speculator.errors import DraftNotFoundError, NumericalError, SpeculatorError
from speculator.results import NOT_FINITE, Committed
from speculator.types import Draft, StepResult

ERRORS = (DraftNotFoundError, NumericalError)  # what a step may deserve, by number from 1
LETTERS = 256  # bytes of a sentence
KEPT, FINITE, NODES, NUMBER = range(4)  # the first words of a row; then the parts of `Layout`
FIRST = 4


class Layout(NamedTuple):
    """Words of int64: a row is [kept, finite, drafted nodes, id of the draft], then tokens, path and log p of at most
    `path` tokens, then tokens, parents and log q of at most `nodes` drafted ones. Numbers are float64 by their bits.
    """

    path: int
    nodes: int

    def shape(self, sessions: int) -> tuple[int, int]:
        """Of the outcome of so many steps; row 0 is for an error: its number, then its sentence."""
        return 1 + sessions, max(FIRST + 3 * (self.path + self.nodes), 1 + LETTERS // 8)

    def empty(self, sessions: int, device: torch.device) -> Tensor:
        out = torch.zeros(self.shape(sessions), dtype=torch.int64, device=device)
        out[1:, FINITE] = 1
        return out

    def commit(self, out: Tensor, index: Tensor, part: Committed) -> None:
        """Write what was decided for the steps `index` [R]."""
        rows = index + 1
        out[rows, KEPT], out[rows, FINITE] = part.kept, part.finite.long()
        for at, values in enumerate((part.tokens, part.path, _bits(part.logprobs))):
            start = FIRST + at * self.path
            out[rows, start : start + values.shape[1]] = values

    def offer(self, out: Tensor, index: Tensor, part: Drafted, numbers: Tensor) -> None:
        """Write what was drafted for the steps `index` [R], under draft ids `numbers` [R]."""
        rows = index + 1
        out[rows, NODES], out[rows, NUMBER] = part.tokens.shape[1], numbers
        for at, values in enumerate((part.tokens, part.parents, _bits(part.logprobs))):
            start = FIRST + 3 * self.path + at * self.nodes
            out[rows, start : start + values.shape[1]] = values

    def verdict(self, out: Tensor, index: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Of the steps `index` [R], the accepted path [R, depth] and how many of its nodes were kept [R]."""
        rows = index + 1
        return out[rows, FIRST + self.path : FIRST + self.path + depth], out[rows, KEPT]

    def results(self, out: Tensor) -> list[StepResult]:
        """Plain values, in one transfer; raises what the step deserved."""
        out = out.cpu()
        first, *rows = out.tolist()
        if first[0]:
            raise _error(first)
        if not all(row[FINITE] for row in rows):
            raise NumericalError(NOT_FINITE)
        reals = out.view(torch.float64)[1:].tolist()
        return [self._result(words, values) for words, values in zip(rows, reals, strict=True)]

    def _result(self, words: list[int], reals: list[float]) -> StepResult:
        kept, count, path = words[KEPT], words[NODES], self.path
        tokens, nodes = words[FIRST : FIRST + kept], words[FIRST + path + 1 : FIRST + path + kept]
        logprobs = reals[FIRST + 2 * path : FIRST + 2 * path + kept]
        draft = self._draft(words, reals, count) if count else None
        return StepResult(tuple(tokens), tuple(logprobs), tuple(node - 1 for node in nodes), draft)

    def _draft(self, words: list[int], reals: list[float], count: int) -> Draft:
        tokens, parents, logq = (FIRST + 3 * self.path + at * self.nodes for at in range(3))
        made, above = tuple(words[tokens : tokens + count]), tuple(words[parents : parents + count])
        return Draft(made, above, tuple(reals[logq : logq + count]), draft_id=words[NUMBER])


def _bits(values: Tensor) -> Tensor:
    return values.double().view(torch.int64)


def failed(out: Tensor, error: SpeculatorError) -> Tensor:
    """The outcome of a step that deserves an error; errors that are the device's own have none and are raised."""
    if type(error) not in ERRORS:
        raise error
    said = error.message.encode()[:LETTERS].ljust(LETTERS, b"\0")
    words = [int.from_bytes(said[i : i + 8], "little", signed=True) for i in range(0, LETTERS, 8)]
    out.zero_()
    out[0, : 1 + len(words)] = torch.tensor([1 + ERRORS.index(type(error)), *words], device=out.device)
    return out


def _error(words: Sequence[Any]) -> SpeculatorError:
    said = b"".join(int(word).to_bytes(8, "little", signed=True) for word in words[1 : 1 + LETTERS // 8])
    return ERRORS[words[0] - 1](said.rstrip(b"\0").decode(errors="replace"))
