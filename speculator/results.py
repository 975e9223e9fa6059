"""What a step leaves on the device, and the one transfer that turns it into plain values.

Must never know how it was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speculator.drafting import Drafted
from speculator.errors import NumericalError
from speculator.round_result import Flight
from speculator.types import Draft, Step, StepResult

NOT_FINITE = "the target produced NaN or infinite values; nothing was committed"


class Committed(NamedTuple):
    """What one part of a step decided, still on the device."""

    steps: Sequence[int]  # indices into the step list
    tokens: Tensor  # [R, D] int64
    kept: Tensor  # [R] int64 valid tokens
    path: Tensor  # [R, D] int64 nodes: the root, then the accepted ones
    logprobs: Tensor  # [R, D] float32
    finite: Tensor  # [R] bool


def collect(
    steps: Sequence[Step], committed: Sequence[Committed], drafted: Sequence[Drafted], flight: Flight | None = None
) -> list[StepResult]:
    """The one transfer: read every result back and hand out plain values. A recorded round brings its own."""
    device = [t for c in committed for t in (c.tokens, c.kept, c.path, c.logprobs, c.finite)]
    device += [t for d in drafted for t in (d.tokens, d.parents, d.logprobs)]
    host = iter(_download(device))
    results = [StepResult() for _ in steps]
    for part in committed:
        _commit(results, part.steps, *(next(host) for _ in range(5)))
    for draft in drafted:
        _offer(results, draft.steps, draft.ids, None, *(next(host) for _ in range(3)))
    if flight is not None:
        _land(results, flight)
    return results


def _land(results: list[StepResult], flight: Flight) -> None:
    columns, outcome = flight.land(), flight.outcome
    _commit(results, outcome.steps, *columns[:5])
    if len(columns) > 5:
        _offer(results, outcome.steps, outcome.ids, outcome.wants, *columns[5:])


def _commit(
    results: list[StepResult], steps: Sequence[int], tokens: Any, kept: Any, path: Any, logprobs: Any, finite: Any
) -> None:
    if not all(finite):
        raise NumericalError(NOT_FINITE)
    for row, i in enumerate(steps):
        n = kept[row]
        nodes = tuple(node - 1 for node in path[row][1:n])
        results[i] = StepResult(tuple(tokens[row][:n]), tuple(logprobs[row][:n]), nodes)


def _offer(
    results: list[StepResult],
    steps: Sequence[int],
    ids: Sequence[int],
    wants: Sequence[int] | None,
    tokens: Any,
    parents: Any,
    logprobs: Any,
) -> None:
    """Add drafts to results; of each row the first of `wants` nodes, all of them for None."""
    for row, i in enumerate(steps):
        n = len(tokens[row]) if wants is None else wants[row]
        if n and (wants is None or results[i].tokens):  # a round does nothing for a sequence that has ended
            made, above, logq = (tuple(values[row][:n]) for values in (tokens, parents, logprobs))
            results[i] = results[i]._replace(draft=Draft(made, above, logq, draft_id=ids[row]))


def _download(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Nested lists of the tensors; from a GPU in one copy."""
    if not tensors or tensors[0].device.type == "cpu":
        return [t.tolist() for t in tensors]
    flat = [(t.double().view(torch.int64) if t.is_floating_point() else t.long()).flatten() for t in tensors]
    pieces = torch.cat(flat).cpu().split([t.numel() for t in tensors])
    return [
        (p.view(torch.float64) if t.is_floating_point() else p).view(t.shape).tolist()
        for p, t in zip(pieces, tensors, strict=True)
    ]
