"""Device state by row that only recorded rounds need: the draft to verify next, sampling, bounds, page tables.

Owns: those tensors, and what the host knows of them. Must never know passes or sessions. The last row is spare: padding
of a batch reads and writes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speculator.drafting import Drafted
from speculator.round_parts import RULES
from speculator.sampling import GREEDY_BELOW, RowSampling, upload
from speculator.types import Bounds, Rule, SamplingParams
from speculator.verify import DraftQ, Verdict

# How the target samples; each way is another recorded round, and a later one serves the earlier ones too.
GREEDY, NOISE, FILTERED, EVERY = "greedy", "coupled", "filtered coupled", "every rule"
MODES = (GREEDY, NOISE, FILTERED, EVERY)
MOST_STOPS = 16  # tokens that end a sequence, of which the device knows
NEVER, NO_TOKEN = 1 << 62, -2


def mode_of(params: SamplingParams) -> int:
    """The least general of MODES that serves these parameters, as its index."""
    known = RowSampling.from_params([params], "cpu")
    if known.any_penalty or _rule(params):
        return 3
    if known.all_greedy:
        return 0
    return 2 if known.any_top_k or known.any_top_p or known.any_min_p else 1


class RoundState:
    """State of `rows` rows, the spare one included, with drafts of `nodes` and page tables of `pages`.

    With `every_rule` that of rounds which know every rule and the penalty, too; drafts are then drawn from
    distributions over `vocab` tokens, 0 where they are point masses.
    """

    def __init__(
        self, rows: int, nodes: int, pages: int, device: torch.device, every_rule: bool = False, vocab: int = 0
    ) -> None:
        self.device, self.spare, self.nodes, self.pages = device, rows - 1, nodes, pages
        lengths = {"tokens": (rows, nodes), "parents": (rows, nodes), "tables": (rows, pages)}
        whole = lengths | {name: (rows,) for name in ("top_k", "seed")}
        self.memory = {name: torch.zeros(size, dtype=torch.int64, device=device) for name, size in whole.items()}
        self.memory |= {name: torch.zeros(rows, device=device) for name in ("temperature", "top_p", "min_p")}
        self.memory["limit"] = torch.full((rows,), NEVER, device=device)
        self.memory["stops"] = torch.full((rows, MOST_STOPS), NO_TOKEN, device=device)
        self.memory["ended"] = torch.zeros(rows, dtype=torch.bool, device=device)
        self.memory["room"] = torch.full((rows,), NEVER, device=device)  # levels that the held draft may have
        if every_rule:
            self.memory["penalty"] = torch.ones(rows, device=device)
            self.memory["rule"] = torch.zeros(rows, dtype=torch.int64, device=device)  # of RULES
        if every_rule and vocab:  # [rows, nodes, V], the root's part is not read
            self.memory["q"] = torch.zeros(rows, 1 + nodes, vocab, dtype=torch.float64, device=device)
        self.nobody = torch.tensor([self.spare, -1, 0, 0], device=device)  # the order of padding
        self._held: dict[int, tuple[int, bool]] = {}
        self._left: dict[int, int] = {}
        self._bounds: list[Bounds | None] = [None] * rows
        self._modes, self._rules = [0] * rows, [0] * rows
        self._covered: list[list[int]] = [[] for _ in range(rows)]
        self.open(self.spare, SamplingParams())

    def open(self, row: int, params: SamplingParams) -> None:
        """Give a row to a new session."""
        self.forget(row)
        self._modes[row], self._rules[row], self._covered[row] = mode_of(params), _rule(params), []
        if self._bounds[row] is not None:
            self._bounds[row] = None
            self.memory["limit"][row], self.memory["stops"][row] = NEVER, NO_TOKEN
        sampling = RowSampling.from_params([params], self.device)
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "penalty"):
            if name in self.memory:
                self.memory[name][row] = getattr(sampling, name)[0]
        if "rule" in self.memory:
            self.memory["rule"][row] = self._rules[row]

    def mode(self, rows: Sequence[int]) -> int:
        """The least general of MODES that serves all of `rows`."""
        return max(self._modes[row] for row in rows)

    def sampling(self, rows: Tensor, mode: str) -> RowSampling:
        """Parameters of `rows` [R], and what the host may know of every batch of this mode.

        What no batch of the mode reads stands there without values.
        """
        names = ("temperature", "seed", "top_k", "top_p", "min_p") + (("penalty",) if mode == EVERY else ())
        used = {GREEDY: 0, NOISE: 2, FILTERED: 5, EVERY: 6}[mode]
        taken = {name: self.memory[name][rows if i < used else slice(0)] for i, name in enumerate(names)}
        return RowSampling.alike(taken, greedy=mode == GREEDY, filtered=mode in (FILTERED, EVERY))

    def rule(self, row: int) -> Rule:
        """What drafts of a row are judged by; when greedy, all rules are one."""
        return RULES[self._rules[row]]

    # the draft that the next round verifies

    def holds(self, row: int, draft_id: int) -> bool:
        return draft_id != 0 and self._held.get(row, (0, False))[0] == draft_id

    def made(self, row: int, draft_id: int) -> bool:
        """Whether a round made this draft, and so knows the row's length and its last token."""
        return draft_id != 0 and self._held.get(row) == (draft_id, True)

    def forget(self, row: int) -> None:
        self._held.pop(row, None)
        self._left.pop(row, None)

    def leave(self, row: int, nodes: int) -> None:
        """A round that verified this row was launched; drafted `nodes` of it count for the next one."""
        self._left[row] = nodes

    def left(self, row: int) -> int | None:
        """What `leave` said; None where the last step of the row was no recorded round."""
        return self._left.get(row)

    def number(self, row: int, draft_id: int, made: bool) -> None:
        """The draft of a row that the device holds now, or, where a round has `made` it, will once that has run."""
        self._held[row] = draft_id, made

    def hold(self, rows: Tensor, drafted: Drafted, sound: Tensor | None = None) -> None:
        """Keep drafts of `rows` [R]; what they were drawn from only where `sound` [], if that is in doubt.

        A round that does not count is run again, over the draft that it verified and so over its distributions.
        """
        count = drafted.tokens.shape[1]
        self.memory["tokens"][rows, :count] = drafted.tokens
        self.memory["parents"][rows, :count] = drafted.parents
        if drafted.q is not None:
            held = self.memory["q"][:, 1 : 1 + count]
            held[rows] = drafted.q if sound is None else torch.where(sound, drafted.q, held[rows])

    def q(self, rows: Tensor, queries: int) -> DraftQ | None:
        """What the first drafted tokens of `rows` [R] were drawn from, `queries` with the root; None: point masses."""
        return DraftQ(self.memory["q"][rows, :queries], 1) if "q" in self.memory and queries > 1 else None

    def own_q(self, row: int, nodes: int) -> Tensor | None:
        """[nodes, V] of a row whose drafts are drawn, as the memory it is and stays until the next draft; else None."""
        return self.memory["q"][row, 1 : 1 + nodes] if "q" in self.memory and self._rules[row] else None

    # what ends a sequence

    def bound(self, rows: Sequence[int], bounds: Sequence[Bounds | None]) -> None:
        """Bring what ends the sequences of rows to `bounds`, in one copy of those that are new; None stays as it is."""
        fresh = [(row, b) for row, b in zip(rows, bounds, strict=True) if b is not None and b != self._bounds[row]]
        fresh = [(row, b) for row, b in fresh if len(b.stops) <= MOST_STOPS]
        if not fresh:
            return
        for row, b in fresh:
            self._bounds[row] = b
        words = upload(torch.tensor([[row, b.limit, *_stop_words(b)] for row, b in fresh]), self.device)
        self.memory["limit"][words[:, 0]] = words[:, 1]
        self.memory["stops"][words[:, 0]] = words[:, 2:]

    def bounded(self, row: int) -> bool:
        """Whether the device knows by itself when the sequence of this row ends."""
        return self._bounds[row] is not None

    def end(self, rows: Tensor, context: Tensor, verdict: Verdict) -> None:
        """Note which of `rows` [R] end with a verdict over `context` [R] cached tokens, and levels left to draft."""
        length = context + 1
        limit, stops = self.memory["limit"][rows], self.memory["stops"][rows]
        stopped = (verdict.tokens[:, :, None] == stops[:, None, :]).flatten(1).any(1)
        self.memory["ended"][rows] = stopped | (length + verdict.kept >= limit)
        self.memory["room"][rows] = (limit - length - 2).clamp(min=0)  # below the token that is surely committed next

    # page tables

    def cover(self, rows: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        """Bring the page tables of rows to `tables`, in one copy of those that have changed."""
        changed = [(row, list(pages)) for row, pages in zip(rows, tables, strict=True) if self._stale(row, pages)]
        if not changed:
            return
        for row, pages in changed:
            self._covered[row] = pages
        fresh = upload(torch.tensor([[row, *self._fitting(pages)] for row, pages in changed]), self.device)
        self.memory["tables"][fresh[:, 0]] = fresh[:, 1:]

    def _stale(self, row: int, pages: Sequence[int]) -> bool:
        known = self._covered[row]
        return len(known) != len(pages) or known != list(pages)

    def _fitting(self, pages: list[int]) -> list[int]:
        """The part of a table that a session of the longest context can reach, padded with the null page."""
        return pages[: self.pages] + [0] * (self.pages - len(pages))


def _rule(params: SamplingParams) -> int:
    """Of RULES; when greedy, all rules are one."""
    return RULES.index(Rule.COUPLED if params.temperature < GREEDY_BELOW else params.rule)


def _stop_words(bounds: Bounds) -> list[int]:
    return [*bounds.stops, *[NO_TOKEN] * (MOST_STOPS - len(bounds.stops))]
