"""Device state by row: what the engine remembers of a session between steps.

Owns: one slot per session that never moves, written by index. Must never know session ids, protocols or scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speculator.errors import DraftNotFoundError
from speculator.sampling import GREEDY_BELOW, RowSampling
from speculator.types import Rule, SamplingParams


class Rows:
    """State of `count` rows. `output` are the newest true outputs of the head's modules, from which drafts start.

    `root` are the last committed tokens, kept by recorded rounds alone.
    """

    def __init__(
        self, count: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device, modules: int = 1
    ) -> None:
        self.device, self.vocab, self.count = device, vocab, count
        self.cached = torch.zeros(count, dtype=torch.int64, device=device)
        self.root = torch.zeros(count, dtype=torch.int64, device=device)
        self.output = torch.zeros(count, modules, width, dtype=dtype, device=device)
        self.params: list[SamplingParams] = [SamplingParams()] * count
        self.speculate = [False] * count
        self._seen: Tensor | None = None  # [count, V] bool, only once somebody asks for a repetition penalty
        self._noted: list[tuple[Tensor, Tensor]] | None = None  # rows [R], what they had not seen [R, V], since `held`
        self._q: dict[int, tuple[int, Tensor | None]] = {}
        self._samplings: dict[tuple[int, ...], RowSampling] = {}

    def open(self, row: int, params: SamplingParams, speculate: bool) -> None:
        self.close(row)
        self.params[row], self.speculate[row] = params, speculate
        if params.repetition_penalty != 1.0:
            self.watch()
        if self._seen is not None:
            self._seen[row] = False

    def watch(self) -> Tensor:
        """[count, V] bool, the tokens that sessions with a repetition penalty have seen, in one place from now on."""
        if self._seen is None:
            self._seen = torch.zeros(self.count, self.vocab, dtype=torch.bool, device=self.device)
        return self._seen

    def close(self, row: int) -> None:
        self._q.pop(row, None)
        self._samplings.clear()
        self.params[row], self.speculate[row] = SamplingParams(), False

    def coupled(self, row: int, chain: bool) -> bool:
        """Whether verdicts on a row's draft, a `chain` or a tree, are the coupled rule's.

        When greedy all rules are one, but for trees that block verification refuses.
        """
        params = self.params[row]
        greedy = params.temperature < GREEDY_BELOW and (chain or params.rule is not Rule.BLOCK)
        return params.rule is Rule.COUPLED or greedy

    def sampling(self, rows: Sequence[int]) -> RowSampling:
        """The sampling parameters of a batch as device tensors; kept until a row is opened or closed."""
        key = tuple(rows)
        if key not in self._samplings:
            if len(self._samplings) > 256:
                self._samplings.clear()
            self._samplings[key] = RowSampling.from_params([self.params[r] for r in key], self.device)
        return self._samplings[key]

    def note(self, rows: Tensor, tokens: Tensor, counts: Tensor, sampling: RowSampling) -> None:
        """Remember committed `tokens` [R, T] (the first `counts` [R] of each) for the repetition penalty."""
        if self._seen is not None and sampling.any_penalty:
            fresh = self.mark(rows, tokens, counts)
            if self._noted is not None:
                self._noted.append((rows, fresh))

    def mark(self, rows: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        """`note`, not to be taken back: what the rows had not seen [R, V]."""
        seen = self.watch()
        valid = torch.arange(tokens.shape[1], device=self.device) < counts[:, None]
        fresh = torch.zeros(rows.shape[0], self.vocab + 1, dtype=torch.bool, device=self.device)
        fresh = fresh.scatter_(1, tokens.masked_fill(~valid, self.vocab), True)[:, : self.vocab] & ~seen[rows]
        seen[rows] |= fresh
        return fresh

    def seen(self, rows: Tensor, sampling: RowSampling) -> Tensor | None:
        """[R, V] bool tokens that the penalty applies to, None when no row asks for one."""
        return self._seen[rows] if self._seen is not None and sampling.any_penalty else None

    def held(self) -> dict[int, tuple[int, Tensor | None]]:
        """What `keep_q` holds as a step begins, to be given to `hold_again` where the step does not count."""
        self._noted = []
        return dict(self._q)

    def hold_again(self, held: dict[int, tuple[int, Tensor | None]]) -> None:
        """As it was when `held` was asked: what drafts were drawn from, and which tokens were seen."""
        self._q = dict(held)
        for rows, fresh in self._noted or ():
            self.watch()[rows] &= ~fresh
        self._noted = []

    def keep_q(self, row: int, draft_id: int, q: Tensor | None) -> None:
        """Hold the distributions [N, V] that a draft was drawn from (None: point masses) until the row's next draft."""
        self._q[row] = (draft_id, q)

    def q(self, row: int, draft_id: int) -> Tensor | None:
        """[N, V]; verifying a drawn draft without its q would bias the output, so a lost one is an error."""
        held, q = self._q.get(row, (0, None))
        if held != draft_id:
            raise DraftNotFoundError(f"the distribution of draft {draft_id} is no longer held; propose again")
        return q
