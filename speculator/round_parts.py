"""What lies between the passes of a round: judge, keep the accepted path, hand true rows to the head, report.

Owns: those parts, as device work on whole batches that reads nothing back, so that they can be recorded. Must never
know a session or who drafted.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from speculator.lookback import TrueRows, gather_rows
from speculator.readout import target_draws
from speculator.sampling import RowSampling, scores
from speculator.tree import Tree, compaction
from speculator.types import Rule
from speculator.verify import DraftQ, Verdict, verify, verify_coupled
from target.batch import Batch, causal_positions
from target.cache import PagedCache
from target.readout import Asked, Readout

RULES = (Rule.COUPLED, Rule.REJECTION, Rule.BLOCK)  # by their numbers on the device


class Answers(Protocol):
    """What the target says about a batch, see `passes.Verified`."""

    @property
    def logits(self) -> Tensor: ...

    def read(self, asked: Asked) -> Readout | None: ...


class Report(NamedTuple):
    """What a round tells about R rows besides its tokens; D is the longest path."""

    logprobs: Tensor  # [R, D] float32, log p of the committed tokens before temperature and filters
    finite: Tensor  # [R] bool: every valid query of the row gave finite logits


def judge_coupled(
    tree: Tree, verified: Answers, sampling: RowSampling, base: Tensor, seen: Tensor | None = None
) -> tuple[Verdict, Report]:
    """The coupled rule below sequences of committed length `base` [R]; logits are written where nobody answers without.

    `seen` [R, T, V] as in `sampling.scores`.
    """
    draws = target_draws(verified.read, sampling, base[:, None] + tree.depths)
    if draws is None:
        verdict = verify(Rule.COUPLED, tree, scores(verified.logits, sampling, seen), sampling, base)
        return verdict, report(tree, verdict, verified.logits)
    verdict = verify_coupled(tree, draws.tokens)
    return verdict, Report(draws.logprobs.gather(1, verdict.path), (draws.finite | ~tree.valid()).all(-1))


def judge_each(
    tree: Tree,
    logits: Tensor,
    sampling: RowSampling,
    base: Tensor,
    rules: Tensor,
    q: DraftQ | None = None,
    seen: Tensor | None = None,
) -> tuple[Verdict, Report]:
    """As `judge_coupled`, with RULES[rules[r]] for row r, all on the device: each rule judges every row.

    Trees are not judged by the block rule, which takes chains only.
    """
    values = scores(logits, sampling, seen)
    verdict = verify(Rule.COUPLED, tree, values, sampling, base)
    for number in range(1, len(RULES) if tree.chain else RULES.index(Rule.BLOCK)):
        other, own = verify(RULES[number], tree, values, sampling, base, q), rules == number
        kept = torch.where(own, other.kept, verdict.kept)
        tokens, path = (torch.where(own[:, None], other[i], verdict[i]) for i in (0, 2))
        verdict = Verdict(tokens, kept, path)
    return verdict, report(tree, verdict, logits)


def keep_path(cache: PagedCache, batch: Batch, verdict: Verdict, features: Tensor) -> TrueRows:
    """Move the accepted nodes' keys and values next to the committed ones; the rest is forgotten.

    Returns what the head has to run: the committed tokens with the true features [R, T, F] before each.
    """
    tokens = verdict.tokens.clamp(min=0)
    if batch.ancestors is not None:
        move_path(cache, batch, verdict.path, verdict.kept)
        features = gather_rows(features, verdict.path)
    positions = causal_positions(batch.context, tokens.shape[1])
    committed = batch._replace(tokens=tokens, positions=positions, counts=verdict.kept, ancestors=None)
    return TrueRows(committed, features, tokens)


def move_path(cache: PagedCache, batch: Batch, path: Tensor, kept: Tensor) -> None:
    """Put keys and values of the first `kept` [R] nodes of `path` [R, D] in drafted trees next to the context."""
    slots = batch.slots(cache.page_size, cache.pad_slot)
    source, destination = compaction(path, kept, kept.new_zeros(kept.shape))
    cache.move(slots.gather(1, source).flatten(), slots.gather(1, destination).flatten())


def newest(tokens: Tensor, kept: Tensor) -> Tensor:
    """The last of the first `kept` [R] tokens [R, D]: [R]; the first one where nothing was kept."""
    return tokens.gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]


def report(tree: Tree, verdict: Verdict, logits: Tensor) -> Report:
    """About a verdict on raw logits [R, T, V]."""
    tokens = verdict.tokens.clamp(min=0)
    # a sum that is finite has finite terms; on a CPU it takes a tenth of the time of looking at each
    finite = (logits.sum(-1, dtype=torch.float32).isfinite() | ~tree.valid()).all(-1)
    return Report(log_probabilities(gather_rows(logits, verdict.path), tokens), finite)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p [R, D] of tokens [R, D] under raw logits [R, D, V]: before temperature and filters."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
