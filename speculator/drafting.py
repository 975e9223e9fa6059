"""The draft loop: from the head's last output to a chain, a static tree, or the dynamic tree of EAGLE-2/3.

Owns: which tokens are drafted and from which distribution. Must never know sessions or verification. No value comes
back to the host inside the loop; the head's keys and values of drafted tokens are scratch that the next catch-up
overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from speculator.heads.base import DraftHead
from speculator.lookback import gather_rows, module_step
from speculator.readout import Ranking, Reading, draft_reading
from speculator.sampling import RowSampling, Stream, coupled_sample, draft_sample, gumbel, scores
from speculator.tree import Frontier, Grown, StaticLevel, TreeGrowth, in_kernels, static_levels
from speculator.types import DraftShape
from target.attention.base import Attention, bind
from target.batch import Batch


class Start(NamedTuple):
    """Where R rows draft from. `context` [R] tokens are cached; the committed length is one more."""

    output: Tensor  # [R, modules, H] the newest true output of each of the head's modules
    context: Tensor  # [R] int64
    pages: Tensor  # [R, P] int64
    longest: int  # host-known bound on `context`
    sampling: RowSampling
    coupled: bool  # draw with the target's own noise, else with noise of the round
    static: bool = False  # the tensors are refilled between runs of a recorded pass, `longest` bounds what is stored
    keys: Tensor | None = None  # [depth, R] int64, of the target's noise at each level, where somebody made them
    drawn: Tensor | None = None  # [R] bool: rows that are not `coupled` all the same, where the device alone knows

    @property
    def live(self) -> Tensor:
        """[R] bool: not padding, whose page table begins with the null page."""
        return self.pages[:, 0] > 0


class Drafted(NamedTuple):
    """Trees of N nodes in topological order; parent -1 is the last committed token."""

    tokens: Tensor  # [R, N] int64
    parents: Tensor  # [R, N] int64
    logprobs: Tensor  # [R, N] float32, log q(token | path)
    q: Tensor | None = None  # [R, N, V] float64 when the tokens were drawn from it (else they are point masses)
    steps: Sequence[int] = ()
    ids: Sequence[int] = ()


class Growing(Protocol):
    """A draft under way: `step` adds level 1, then 2, up to `depth`; `done` is the draft."""

    depth: int

    def step(self, level: int) -> None: ...

    def done(self) -> Drafted: ...


def draft(head: DraftHead, attention: Attention[Any], start: Start, shape: DraftShape) -> Drafted:
    """Draft `shape` for every row."""
    growing = begin(head, attention, start, shape)
    for level in range(1, growing.depth + 1):
        growing.step(level)
    return growing.done()


def begin(head: DraftHead, attention: Attention[Any], start: Start, shape: DraftShape) -> Growing:
    """A draft of `shape` that is taken level by level, as recorded passes need it."""
    expand = Expansion(head, attention, start)
    if shape.parents:
        return _Static(expand, shape.parents)
    return _Chain(expand, shape.depth) if shape.is_chain else _Dynamic(expand, shape)


class Expansion:
    """Runs the head on drafted tokens and ranks what follows."""

    def __init__(self, head: DraftHead, attention: Attention[Any], start: Start) -> None:
        self.head, self.attention, self.start, self.live = head, attention, start, start.live
        # filters shape q as they shape p; the repetition penalty stays with the target (q need not follow it)
        self.sampling = start.sampling._replace(any_penalty=False)
        self._counts = dict[int, Tensor]()

    @cached_property
    def ids(self) -> Tensor:
        """[Vd] int64, the target's ids of the draft vocabulary."""
        count, given = self.head.record.draft_vocab_size, self.head.target_ids
        return torch.arange(count, device=self.start.output.device) if given is None else given

    def root(self) -> Tensor:
        """[R, 1, H]"""
        return self.start.output[:, :1]

    def follow(self, above: Tensor, tokens: Sequence[Tensor], level: int) -> Tensor:
        """Outputs [R, n, H] after a chain of `level` drafted tokens (each [R, 1]), the newest last."""
        if self.head.lookback:
            return module_step(self.head, self.attention, self.start, above, tokens, level)
        return self.run(above, tokens[-1], level, level - 1, None)

    def run(
        self,
        parents: Tensor,
        tokens: Tensor,
        level: int,
        offset: int,
        ancestors: Tensor | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Outputs [R, k, H] of drafted `tokens` [R, k] of depth `level`, given their parents' outputs [R, k, H].

        `offset` is the first scratch node of this pass and `ancestors` [R, k] its masks over earlier scratch nodes.
        """
        rows, count = tokens.shape
        start = self.start
        if positions is None:
            positions = (start.context + (level - 1) if level > 1 else start.context)[:, None].expand(rows, count)
        if count not in self._counts:
            self._counts[count] = self.live * count
        counts = self._counts[count]
        longest = start.longest + (0 if start.static else offset + count)
        batch = Batch(tokens, positions, start.context, counts, start.pages, ancestors, offset, longest, start.static)
        return self.head(self.head.recycle(parents), tokens, positions, bind(self.attention, batch))  # type: ignore[no-any-return]

    def values(self, outputs: Tensor, step: int = 0) -> Tensor:
        """Outputs [R, k, H] -> unnormalised log q [R, k, Vd] under the rows' temperature and filters."""
        return scores(self.head.stage(step).logits(outputs), self.sampling, None)

    def counter(self, outputs: Tensor, level: int) -> Tensor:
        """[R, k] absolute positions of tokens of depth `level`, one for each of outputs or values [R, k, ...]."""
        context = self.start.context
        return (context + level if level else context)[:, None].expand(outputs.shape[:2])

    def read(self, outputs: Tensor, level: int, k: int, step: int = 0) -> Ranking | None:
        """The k best draft ids after each of outputs [R, n, H]; None where logits have to be written for that."""
        reading = self.reading(outputs, level, k, step)
        return None if reading is None else reading.ranking()

    def reading(self, outputs: Tensor, level: int, k: int, step: int = 0) -> Reading | None:
        """`read` without its arithmetic."""
        stage = self.head.stage(step)
        if stage.reader is None or self.start.drawn is not None:  # a question cannot leave out some rows' noise
            return None
        ask = partial(stage.read, outputs)
        ids, keys = self.head.target_ids, self.start.keys
        made = None if keys is None else keys[level - 1]
        silent = made is not None or self.sampling.all_greedy  # then only the shape of positions is read
        counter = self.counter(outputs, 0 if silent else level)
        return draft_reading(ask, self.sampling, counter, k, ids, self.start.coupled, made)

    def draw(self, values: Tensor, level: int) -> Tensor:
        """One draft id [R, 1] from values [R, 1, Vd]."""
        counter, start = self.counter(values, level), self.start
        if start.coupled:
            coupled = coupled_sample(values, self.sampling, counter, ids=self.ids)
            if start.drawn is None:
                return coupled
        drawn = draft_sample(values, self.sampling, start.context + 1, counter, self.ids)
        return drawn if start.drawn is None else torch.where(start.drawn[:, None], drawn, coupled)

    def ranked(self, outputs: Tensor, level: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k best continuations of each node: target ids, ranking log-scores and log q, each [R, nodes, k]."""
        found = self.read(outputs, level, k) or self.written(outputs, level, k)
        return self.ids[found.columns], found.scores, found.logprobs

    def written(self, outputs: Tensor, level: int, k: int) -> Ranking:
        """The k best draft ids after each of outputs [R, n, H], from logits that are written down.

        Under the coupled rule the target's noise is known, so the tokens that noise favours rank first: the score is
        the log-probability of being the target's draw if the target agreed with the head, softened by their gap.
        """
        values = self.values(outputs)
        logq = values.log_softmax(-1)
        score = logq
        if self.start.coupled and not self.sampling.all_greedy:
            noise = gumbel(self.sampling.seed, self.counter(values, level), Stream.TARGET, self.ids)
            score = (logq + noise * (self.sampling.temperature > 0)[:, None, None]).log_softmax(-1)
            if self.start.drawn is not None:
                score = torch.where(self.start.drawn[:, None, None], logq, score)
        best, columns = score.topk(k, dim=-1)
        return Ranking(columns, best, logq.gather(-1, columns))


class _Chain:
    """One token a level, drawn."""

    def __init__(self, expand: Expansion, depth: int) -> None:
        self.expand, self.output, self.depth = expand, expand.root(), depth
        self.tokens, self.logprobs, self.distributions = list[Tensor](), list[Tensor](), list[Tensor]()
        self.sampled = expand.start.drawn is not None or not (expand.start.coupled or expand.sampling.all_greedy)

    def step(self, level: int) -> None:
        expand = self.expand
        if level > 1:
            self.output = expand.follow(self.output, self.tokens, level - 1)
        newest = self.output[:, -1:]
        found = None if self.sampled else expand.read(newest, level, 1, level - 1)
        if found is None:
            self._write(expand.values(newest, level - 1), level)
        else:
            self._add(found.columns[..., 0], found.logprobs[..., 0])

    def _write(self, values: Tensor, level: int) -> None:
        """Draw from written values [R, 1, Vd]."""
        drawn = self.expand.draw(values, level)
        logq = values.log_softmax(-1)
        self._add(drawn, logq.gather(-1, drawn[..., None])[..., 0])
        if self.sampled:
            self.distributions.append(_in_target_vocabulary(self.expand, logq))

    def _add(self, drawn: Tensor, logprobs: Tensor) -> None:
        self.tokens.append(drawn if self.expand.head.target_ids is None else self.expand.ids[drawn])
        self.logprobs.append(logprobs)

    def done(self) -> Drafted:
        parents = torch.arange(-1, self.depth - 1, device=self.output.device).expand(len(self.output), self.depth)
        q = torch.cat(self.distributions, dim=1) if self.sampled else None
        return Drafted(torch.cat(self.tokens, dim=1), parents, torch.cat(self.logprobs, dim=1), q)


def _in_target_vocabulary(expand: Expansion, logq: Tensor) -> Tensor:
    """log q [R, 1, Vd] -> q [R, 1, V] float64, zero outside the draft vocabulary."""
    q = logq.softmax(-1, dtype=torch.float64)
    if expand.head.target_ids is None:
        return q
    wide = q.new_zeros(*q.shape[:2], expand.head.record.vocab_size)
    return wide.scatter_(-1, expand.ids.expand_as(q), q)


class _Static:
    """Fill a given tree: the r-th child of a node is the r-th best token after it."""

    def __init__(self, expand: Expansion, parents: Sequence[int]) -> None:
        device, rows = expand.ids.device, expand.start.output.shape[0]
        self.expand, self.outputs, self.offset = expand, expand.root(), 0
        self.levels = static_levels(parents)
        self.depth = len(self.levels)
        self.parents = torch.tensor(parents, device=device).expand(rows, -1)
        self.tokens = torch.zeros(rows, len(parents), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, len(parents), device=device)

    def step(self, level: int) -> None:
        expand, this = self.expand, self.levels[level - 1]
        index = _index(this, self.tokens.device)
        ids, _, logq = expand.ranked(self.outputs, level, max(this.ranks) + 1)
        self.tokens[:, index.nodes] = ids[:, index.parents, index.ranks]
        self.logprobs[:, index.nodes] = logq[:, index.parents, index.ranks]
        if this.expanded:
            drafted = self.tokens[:, index.nodes[index.expanded]]
            above = self.outputs[:, index.parents[index.expanded]]
            masks = index.masks.expand(self.tokens.shape[0], -1)
            self.outputs = expand.run(above, drafted, level, self.offset, masks)
            self.offset += len(this.expanded)

    def done(self) -> Drafted:
        return Drafted(self.tokens, self.parents, self.logprobs)


class _Index(NamedTuple):
    """A StaticLevel as index tensors."""

    nodes: Tensor
    parents: Tensor
    ranks: Tensor
    expanded: Tensor
    masks: Tensor


def _index(level: StaticLevel, device: torch.device) -> _Index:
    return _Index(*(torch.tensor(part, dtype=torch.int64, device=device) for part in level))


class Growth(Protocol):
    """A dynamic tree under construction, see `speculator.tree.TreeGrowth`."""

    def frontier(self) -> Frontier: ...

    def grow(self, found: Reading | Ranking) -> None: ...

    def select(self, nodes: int) -> Grown: ...


class _Dynamic:
    """EAGLE-2's tree: expand the best k nodes of every level, keep the best `nodes` candidates of all."""

    def __init__(self, expand: Expansion, shape: DraftShape) -> None:
        self.expand, self.nodes, self.outputs = expand, shape.nodes, expand.root()
        self.depth = shape.depth
        self.k = min(shape.branching, expand.head.record.draft_vocab_size)
        self.growth = self._growth()

    def _growth(self) -> Growth:
        ids = self.expand.head.target_ids
        if not in_kernels(self.outputs.device):
            return TreeGrowth(ids)
        from speculator.kernels.tree import KernelGrowth

        return KernelGrowth(self.k, self.depth, self.expand.start.context, ids)

    def step(self, level: int) -> None:
        if level > 1:
            self._run(self.growth.frontier(), level - 1)
        found = self.expand.reading(self.outputs, level, self.k)
        self.growth.grow(found or self.expand.written(self.outputs, level, self.k))

    def _run(self, frontier: Frontier, level: int) -> None:
        above, offset = gather_rows(self.outputs, frontier.parents), (level - 1) * self.k
        self.outputs = self.expand.run(above, frontier.tokens, level, offset, frontier.masks, frontier.positions)

    def done(self) -> Drafted:
        return Drafted(*self.growth.select(self.nodes))
