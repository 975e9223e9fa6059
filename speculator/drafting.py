"""The draft loop: from the head's last output to a chain, a static tree, or the dynamic tree of EAGLE-2/3.

Owns: which tokens are drafted and from which distribution. Must never know sessions or verification. No value comes
back to the host inside the loop; the head's keys and values of drafted tokens are scratch that the next catch-up
overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from speculator.heads.base import DraftHead
from speculator.sampling import RowSampling, Stream, coupled_sample, draft_sample, gumbel, scores
from speculator.tree import StaticLevel, TreeGrowth, static_levels
from speculator.types import DraftShape
from target.attention.base import bind
from target.attention.sdpa import SdpaAttention
from target.batch import Batch


class Start(NamedTuple):
    """Where R rows draft from. `context` [R] tokens are cached; the committed length is one more."""

    output: Tensor  # [R, H] the head's output at the last committed token
    context: Tensor  # [R] int64
    pages: Tensor  # [R, P] int64
    longest: int  # host-known bound on `context`
    sampling: RowSampling
    coupled: bool  # draw with the target's own noise, else with noise of the round


class Drafted(NamedTuple):
    """Trees of N nodes in topological order; parent -1 is the last committed token."""

    tokens: Tensor  # [R, N] int64
    parents: Tensor  # [R, N] int64
    logprobs: Tensor  # [R, N] float32, log q(token | path)
    q: Tensor | None = None  # [R, N, V] float64 when the tokens were drawn from it (else they are point masses)
    steps: Sequence[int] = ()
    ids: Sequence[int] = ()


def draft(head: DraftHead, attention: SdpaAttention, start: Start, shape: DraftShape) -> Drafted:
    """Draft `shape` for every row."""
    expand = Expansion(head, attention, start)
    if shape.parents:
        return _static(expand, shape.parents)
    if shape.is_chain:
        return _chain(expand, shape.depth)
    return _dynamic(expand, shape)


class Expansion:
    """Runs the head on drafted tokens and ranks what follows."""

    def __init__(self, head: DraftHead, attention: SdpaAttention, start: Start) -> None:
        self.head, self.attention, self.start = head, attention, start
        # filters shape q as they shape p; the repetition penalty stays with the target (q need not follow it)
        self.sampling = start.sampling._replace(any_penalty=False)
        count = head.record.draft_vocab_size
        self.ids = torch.arange(count, device=start.output.device) if head.target_ids is None else head.target_ids

    def root(self) -> Tensor:
        """[R, 1, H]"""
        return self.start.output[:, None]

    def run(self, parents: Tensor, tokens: Tensor, level: int, offset: int, ancestors: Tensor | None) -> Tensor:
        """Outputs [R, k, H] of drafted `tokens` [R, k] of depth `level`, given their parents' outputs [R, k, H].

        `offset` is the first scratch node of this pass and `ancestors` [R, k] its masks over earlier scratch nodes.
        """
        rows, count = tokens.shape
        start = self.start
        positions = (start.context + level - 1)[:, None].expand(rows, count)
        counts = torch.full_like(start.context, count)
        longest = start.longest + offset + count
        batch = Batch(tokens, positions, start.context, counts, start.pages, ancestors, offset, longest)
        return self.head(self.head.recycle(parents), tokens, positions, bind(self.attention, batch))  # type: ignore[no-any-return]

    def values(self, outputs: Tensor) -> Tensor:
        """Outputs [R, k, H] -> unnormalised log q [R, k, Vd] under the rows' temperature and filters."""
        return scores(self.head.logits(outputs), self.sampling, None)

    def counter(self, values: Tensor, level: int) -> Tensor:
        """[R, k] absolute positions of tokens of depth `level`, one for each of values [R, k, Vd]."""
        return (self.start.context + level)[:, None].expand(values.shape[:2])

    def draw(self, values: Tensor, level: int) -> Tensor:
        """One draft id [R, 1] from values [R, 1, Vd]."""
        counter = self.counter(values, level)
        if self.start.coupled:
            return coupled_sample(values, self.sampling, counter, ids=self.ids)
        return draft_sample(values, self.sampling, self.start.context + 1, counter, self.ids)

    def ranked(self, outputs: Tensor, level: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k best continuations of each node: target ids, ranking log-scores and log q, each [R, nodes, k].

        Under the coupled rule the target's noise is known, so the tokens that noise favours rank first: the score is
        the log-probability of being the target's draw if the target agreed with the head, softened by their gap.
        """
        values = self.values(outputs)
        logq = values.log_softmax(-1)
        score = logq
        if self.start.coupled and not self.sampling.all_greedy:
            noise = gumbel(self.sampling.seed, self.counter(values, level), Stream.TARGET, self.ids)
            score = (logq + noise * (self.sampling.temperature > 0)[:, None, None]).log_softmax(-1)
        best, ids = score.topk(k, dim=-1)
        return self.ids[ids], best, logq.gather(-1, ids)


def _chain(expand: Expansion, depth: int) -> Drafted:
    output = expand.root()
    tokens, logprobs, distributions = list[Tensor](), list[Tensor](), list[Tensor]()
    sampled = not (expand.start.coupled or expand.sampling.all_greedy)
    for level in range(1, depth + 1):
        if level > 1:
            output = expand.run(output, tokens[-1], level - 1, level - 2, None)
        values = expand.values(output)
        drawn = expand.draw(values, level)
        logq = values.log_softmax(-1)
        tokens.append(expand.ids[drawn])
        logprobs.append(logq.gather(-1, drawn[..., None])[..., 0])
        if sampled:
            distributions.append(_in_target_vocabulary(expand, logq))
    parents = torch.arange(-1, depth - 1, device=output.device).expand(output.shape[0], depth)
    q = torch.cat(distributions, dim=1) if sampled else None
    return Drafted(torch.cat(tokens, dim=1), parents, torch.cat(logprobs, dim=1), q)


def _in_target_vocabulary(expand: Expansion, logq: Tensor) -> Tensor:
    """log q [R, 1, Vd] -> q [R, 1, V] float64, zero outside the draft vocabulary."""
    q = logq.softmax(-1, dtype=torch.float64)
    if expand.head.target_ids is None:
        return q
    wide = q.new_zeros(*q.shape[:2], expand.head.record.vocab_size)
    return wide.scatter_(-1, expand.ids.expand_as(q), q)


def _static(expand: Expansion, parents: Sequence[int]) -> Drafted:
    """Fill a given tree: the r-th child of a node is the r-th best token after it."""
    device, rows = expand.ids.device, expand.start.output.shape[0]
    tokens = torch.zeros(rows, len(parents), dtype=torch.int64, device=device)
    logprobs = torch.zeros(rows, len(parents), device=device)
    outputs, offset = expand.root(), 0
    for depth, level in enumerate(static_levels(parents), 1):
        index = _index(level, device)
        ids, _, logq = expand.ranked(outputs, depth, max(level.ranks) + 1)
        tokens[:, index.nodes] = ids[:, index.parents, index.ranks]
        logprobs[:, index.nodes] = logq[:, index.parents, index.ranks]
        if level.expanded:
            drafted = tokens[:, index.nodes[index.expanded]]
            above = outputs[:, index.parents[index.expanded]]
            masks = index.masks.expand(rows, -1)
            outputs = expand.run(above, drafted, depth, offset, masks)
            offset += len(level.expanded)
    return Drafted(tokens, torch.tensor(parents, device=device).expand(rows, -1), logprobs)


class _Index(NamedTuple):
    """A StaticLevel as index tensors."""

    nodes: Tensor
    parents: Tensor
    ranks: Tensor
    expanded: Tensor
    masks: Tensor


def _index(level: StaticLevel, device: torch.device) -> _Index:
    return _Index(*(torch.tensor(part, dtype=torch.int64, device=device) for part in level))


def _dynamic(expand: Expansion, shape: DraftShape) -> Drafted:
    """EAGLE-2's tree: expand the best k nodes of every level, keep the best `nodes` candidates of all."""
    k = min(shape.branching, expand.ids.shape[0])
    tokens, scores_, logq = expand.ranked(expand.root(), 1, k)
    growth = TreeGrowth(scores_[:, 0], tokens[:, 0], logq[:, 0])
    outputs = expand.root()
    for level in range(1, shape.depth):
        frontier = growth.frontier()
        above = outputs.gather(1, frontier.parents[..., None].expand(-1, -1, outputs.shape[-1]))
        outputs = expand.run(above, frontier.tokens, level, (level - 1) * k, frontier.masks)
        tokens, scores_, logq = expand.ranked(outputs, level + 1, k)
        growth.grow(scores_, tokens, logq)
    grown = growth.select(tokens.new_zeros(tokens.shape[0]), shape.nodes)
    return Drafted(grown.tree.tokens[:, 1:], grown.tree.parents[:, 1:] - 1, grown.logprobs[:, 1:])
