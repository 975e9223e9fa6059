"""Results on their way from all ranks to rank 0: tensors whose size follows from the order, the same on every rank.

Owns: that layout, and how a step that a rank refused is told. Must never know engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from speculator.errors import DraftNotFoundError, InvalidTreeError, NumericalError, SpeculatorError
from speculator.ranks.codec import float_word, word_float
from speculator.ranks.pulse import Pulse
from speculator.ranks.shares import Share
from speculator.types import Draft, Step, StepResult

# what a step may come to for which its own caller is to blame, or its own numbers; anything else ends the gang
REFUSALS: tuple[type[SpeculatorError], ...] = (NumericalError, DraftNotFoundError, InvalidTreeError)
TEXT = 240  # bytes of a refusal's text that travel
HEAD = 2 + TEXT // 8  # which refusal, bytes of its text, the text
Outcome = list[StepResult] | SpeculatorError  # of one rank's steps


class Returns:
    """Gathers what all ranks made of an order; call `gather` on each, once an order."""

    def __init__(self, group: dist.ProcessGroup | None, share: Share, pulse: Pulse) -> None:
        self._group, self._share, self._pulse = group, share, pulse

    def gather(self, steps: Sequence[Step], own: Outcome) -> list[StepResult]:
        """On rank 0 the results of `steps` of all ranks in order, elsewhere none.

        A rank's refusal is raised on rank 0; RuntimeError when a rank is gone.
        """
        counts = [sum(self._share.owner(step.row) == rank for step in steps) for rank in range(self._share.size)]
        width = _width(steps)
        mine = torch.tensor(outcome_words(own, width, max(counts)), dtype=torch.int64)
        boxes = [torch.empty_like(mine) for _ in counts] if self._share.rank == 0 else None
        with self._pulse.waiting():
            dist.gather(mine, boxes, group=self._group, group_dst=0)
        if boxes is None:
            return []
        found = [outcome_of(box.tolist(), width, count) for box, count in zip(boxes, counts, strict=True)]
        return self._in_order(steps, found)

    def _in_order(self, steps: Sequence[Step], found: Sequence[Outcome]) -> list[StepResult]:
        queues: list[Iterator[StepResult]] = []
        for outcome in found:
            if isinstance(outcome, SpeculatorError):
                raise outcome
            queues.append(iter(outcome))
        return [next(queues[self._share.owner(step.row)]) for step in steps]


def _width(steps: Sequence[Step]) -> tuple[int, int]:
    """Tokens that a step of an order can commit, and nodes that it can draft, at most."""
    committed = max((1 + len(step.draft.tokens) if step.draft else 1 for step in steps), default=1)
    shapes = [step.propose for step in steps if step.propose is not None]
    return committed, max((len(s.parents) or (s.depth if s.is_chain else s.nodes) for s in shapes), default=0)


def outcome_words(own: Outcome, width: tuple[int, int], rows: int) -> list[int]:
    """What travels of one rank's outcome: as many words for every outcome of up to `rows` results of such `width`."""
    size = HEAD + rows * _row_size(width)
    if isinstance(own, SpeculatorError):
        words = _refusal_words(own)
    else:
        words = [0] * HEAD + [word for result in own for word in _result_words(result, width)]
    return words + [0] * (size - len(words))


def outcome_of(words: Sequence[int], width: tuple[int, int], rows: int) -> Outcome:
    """The outcome of `rows` steps that such words tell."""
    if words[0]:
        text = b"".join(word.to_bytes(8, "little", signed=True) for word in words[2:HEAD])
        return REFUSALS[words[0] - 1](text[: words[1]].decode(errors="replace"))
    size = _row_size(width)
    return [_result(words[HEAD + row * size : HEAD + (row + 1) * size], width) for row in range(rows)]


def _refusal_words(error: SpeculatorError) -> list[int]:
    text = error.message.encode()[:TEXT]
    packed = text.ljust(TEXT, b"\0")
    words = [int.from_bytes(packed[i : i + 8], "little", signed=True) for i in range(0, TEXT, 8)]
    return [REFUSALS.index(type(error)) + 1, len(text), *words]


def _row_size(width: tuple[int, int]) -> int:
    committed, drafted = width
    return 4 + 3 * committed + 3 * drafted


def _result_words(result: StepResult, width: tuple[int, int]) -> list[int]:
    """Counts, then columns of the widest result: tokens, their log-probabilities, accepted nodes; the draft's."""
    committed, drafted = width
    draft = result.draft or Draft()
    words = [len(result.tokens), len(result.accepted), len(draft.tokens), draft.draft_id]
    for column in (result.tokens, [float_word(p) for p in result.logprobs], result.accepted):
        words += _filled(column, committed)
    for column in (draft.tokens, draft.parents, [float_word(p) for p in draft.logprobs]):
        words += _filled(column, drafted)
    return words


def _filled(column: Sequence[int], size: int) -> list[int]:
    return [*column, *[0] * (size - len(column))]


def _result(words: Sequence[int], width: tuple[int, int]) -> StepResult:
    committed, drafted = width
    tokens, accepted, nodes, number = words[:4]
    ends = [4, *(4 + committed * (i + 1) for i in range(3))]
    first, second, third = (words[start : start + committed] for start in ends[:3])
    rest = ends[3]
    made, above, logq = (words[rest + i * drafted : rest + (i + 1) * drafted][:nodes] for i in range(3))
    draft = Draft(tuple(made), tuple(above), tuple(map(word_float, logq)), draft_id=number) if nodes else None
    return StepResult(tuple(first[:tokens]), tuple(map(word_float, second[:tokens])), tuple(third[:accepted]), draft)
