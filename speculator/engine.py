"""The only place where target, head and cache meet: one step feeds, verifies, catches up and drafts.

Owns: the models, the KV cache and the device state of rows. Must never know sessions, protocols or time limits; it
trusts the page tables it is given. All device work of a step is queued before the one transfer that reads results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from speculator import drafting
from speculator.heads.base import DraftHead
from speculator.lookback import Lookback, TrueRows, gather_rows
from speculator.passes import Passes, Verified, eager_passes, rows_of, shifted
from speculator.readout import Draws, target_draws
from speculator.recurrent import recurrence
from speculator.results import Committed, collect
from speculator.round import Rounds
from speculator.round_parts import Report, judge_coupled, keep_path, log_probabilities, report
from speculator.round_result import Flight
from speculator.rows import Rows
from speculator.sampling import RowSampling, coupled_sample, scores, upload
from speculator.tree import Tree, pack, seen_tokens
from speculator.types import DraftShape, EngineInfo, Feed, Rule, SamplingParams, Step, StepResult, StepTimes
from speculator.under_way import UnderWay, device_failures
from speculator.verify import DraftQ, Verdict, verify
from target.batch import Batch, causal_positions
from target.cache import PagedCache
from target.decoder import Decoder
from target.states import StateCache

CatchUp = Callable[[Batch, Tensor, Tensor], Tensor]


class Decided(NamedTuple):
    """What the passes of a step came to, still on the device, and the seconds that queueing them took."""

    committed: list[Committed]
    drafted: list[drafting.Drafted]
    times: StepTimes


class Engine:
    """Runs steps over rows. `head` None serves the target alone."""

    def __init__(
        self,
        info: EngineInfo,
        model: Decoder,
        head: DraftHead | None,
        cache: PagedCache,
        passes: Passes | None = None,
        states: StateCache | None = None,
    ) -> None:
        self.info, self.model, self.head, self.cache = info, model, head, cache
        self.device = cache.layers[0].device
        self.recurrent = recurrence(model, info.max_rows, states)
        self.passes: Passes = passes or eager_passes(model, head, cache, self.recurrent.cache)
        width = head.record.hidden_size if head else 1
        dtype, back = cache.layers[0].dtype, head.lookback if head else 0
        # one row is spare: the padding of a recorded round
        self.rows = Rows(info.max_rows + 1, width, info.vocab_size, dtype, self.device, 1 + back)
        # heads of several modules run the rows again that rested on drafted tokens
        feature = head.record.feature_size if head else 0
        self.lookback = Lookback(info.max_rows + 1, back, feature, dtype, self.device) if back else None
        self.rounds: Rounds | None = None  # whole rounds, where they are recorded
        self.times = StepTimes()
        self.landed_at = 0.0  # when the last round that was under way had ended
        self.fallen = False  # whether the one before failed, on top of which others may have been launched
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext  # around every wait for the device
        self._drafts = 0

    def open(self, row: int, sampling: SamplingParams, speculate: bool) -> None:
        """Give a row to a new session."""
        self.rows.open(row, sampling, speculate and self.head is not None)
        if self.rounds:
            self.rounds.open(row, sampling)
        self.recurrent.clear(row)

    def close(self, row: int) -> None:
        self.rows.close(row)
        self.recurrent.clear(row)

    def finish(self) -> None:
        """No step follows: whatever other ranks still wait for has arrived when this returns."""
        return None

    @property
    def launches(self) -> bool:
        """Whether `launch` may take a step."""
        return self.rounds is not None

    def passes_run(self) -> dict[str, tuple[int, int]]:
        """By pass: how many were replayed, how many ran eager that could have been; empty where nothing is recorded."""
        return self.passes.tally() | (self.rounds.tally() if self.rounds else {})

    @torch.inference_mode()
    def step(self, steps: Sequence[Step]) -> list[StepResult]:
        """Run one step of each row; NumericalError when any row met NaN or infinity (then no result counts).

        After a step that failed its parts can run again: what verdicts rest on is as it was.
        """
        held = self.rows.held()
        try:
            with device_failures():
                return self._step(steps)
        except Exception:
            self.rows.hold_again(held)
            raise

    @torch.inference_mode()
    def launch(self, steps: Sequence[Step]) -> UnderWay | None:
        """Start a step that is one recorded round, and wait for nothing; None, and nothing begun, for any other step.

        One more may be launched before its results are collected: steps `ahead`, of the same rows or some of them.
        """
        begun = time.perf_counter()
        if self.rounds is None or not self.rounds.takes(steps):
            return None
        self.fallen &= steps[0].ahead
        with device_failures():
            flight = self.rounds.launch(steps, self._next_draft)
        return None if flight is None else UnderWay(self, steps, flight, begun)

    def landed(self, flight: Flight) -> None:
        """The results of a recorded round are on the host and count."""
        if self.rounds:
            self.rounds.landed(flight.outcome)

    def _step(self, steps: Sequence[Step]) -> list[StepResult]:
        start = time.perf_counter()
        self.recurrent.begin(steps)
        flight = self.rounds.launch(steps, self._next_draft) if self.rounds else None
        launched = time.perf_counter() - start
        decided = self._decide(steps, self._by_passes(steps, flight))
        with self.waiting():
            results = collect(steps, decided.committed, decided.drafted, flight)
        if flight:
            self.landed(flight)
        self._hold(steps, decided.drafted)
        self.recurrent.commit(steps, results)
        times, end = decided.times, time.perf_counter()
        draft = times.draft + end - start - launched - sum(times)
        self.times = StepTimes(times.feed, times.verify + launched, draft)
        return results

    def _decide(self, steps: Sequence[Step], rest: Sequence[int]) -> Decided:
        """Queue the work of the steps `rest`, pass by pass."""
        start = time.perf_counter()
        feeds = [i for i in rest if steps[i].feed]
        rounds = [i for i in rest if steps[i].draft is not None]
        committed = [self._feed(steps, feeds)] if feeds else []
        fed = time.perf_counter()
        committed += [self._verify(steps, rounds)] if rounds else []
        verified = time.perf_counter()
        drafted = [self._propose(steps, group) for group in self._groups(steps, rest)]
        return Decided(committed, drafted, StepTimes(fed - start, verified - fed, time.perf_counter() - verified))

    def _by_passes(self, steps: Sequence[Step], flight: Flight | None) -> list[int]:
        """The steps that no recorded round took, their rows set to where they stand."""
        rest = [i for i in range(len(steps)) if flight is None or i not in flight.outcome.steps]
        if rest:
            self.rows.cached[self._ints([steps[i].row for i in rest])] = self._ints([steps[i].cached for i in rest])
        if self.rounds:
            for i in rest:
                self.rounds.forget(steps[i].row)
        return rest

    def _ints(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return upload(torch.tensor(values, dtype=torch.int64), self.device)

    def _pages(self, steps: Iterable[Step]) -> Tensor:
        tables = [list(s.pages) for s in steps]
        width = max(len(t) for t in tables)
        return self._ints([t + [0] * (width - len(t)) for t in tables])

    # feed: tokens the caller decided on

    def _feed(self, steps: Sequence[Step], picked: Sequence[int]) -> Committed:
        """Run prompt chunks; sample the token after those that do not know theirs."""
        chosen = [steps[i] for i in picked]
        feeds = [s.feed for s in chosen if s.feed]
        rows = self._ints([s.row for s in chosen])
        sampling = self.rows.sampling([s.row for s in chosen])
        counts = self._ints([len(f.tokens) for f in feeds])
        batch = self._feed_batch(chosen, feeds, rows, counts)
        fed = self.recurrent.feed(self.passes, batch, rows)
        self.rows.note(rows, batch.tokens, counts, sampling)
        following, logprobs, finite = self._following(feeds, fed.final, counts, batch, rows, sampling)
        self.rows.note(rows, following[:, None], torch.ones_like(counts), sampling)
        true_rows = TrueRows(batch, fed.features, shifted(batch.tokens, counts, following))
        self._catch_up(chosen, rows, true_rows, self.passes.feed_head)
        self.rows.cached[rows] = batch.context + counts
        sampled = self._ints([int(f.following is None) for f in feeds])
        return Committed(picked, following[:, None], sampled, torch.zeros_like(following[:, None]), logprobs, finite)

    def _feed_batch(self, chosen: Sequence[Step], feeds: Sequence[Feed], rows: Tensor, counts: Tensor) -> Batch:
        width = max(len(f.tokens) for f in feeds)
        tokens = self._ints([list(f.tokens) + [0] * (width - len(f.tokens)) for f in feeds])
        context = self.rows.cached[rows]
        longest = max(s.cached for s in chosen) + width
        if len(chosen) > 1:
            longest = max(s.cached + len(f.tokens) for s, f in zip(chosen, feeds, strict=True))
        return Batch(tokens, causal_positions(context, width), context, counts, self._pages(chosen), longest=longest)

    def _following(
        self, feeds: Sequence[Feed], final: Tensor, counts: Tensor, batch: Batch, rows: Tensor, sampling: RowSampling
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The token after each chunk [R], its log-probability [R, 1] if drawn, and which rows are finite [R]."""
        last = gather_rows(final, (counts - 1)[:, None])
        finite = last.isfinite().all(-1).all(-1)
        known = self._ints([-1 if f.following is None else f.following for f in feeds])
        if all(f.following is not None for f in feeds):
            return known, torch.zeros(known.shape[0], 1, device=self.device), finite
        draws = self._draw(last, (batch.context + counts)[:, None], rows, sampling)
        following = torch.where(known < 0, draws.tokens[:, 0], known)
        return following, draws.logprobs, finite & draws.finite[:, 0]

    def _draw(self, last: Tensor, position: Tensor, rows: Tensor, sampling: RowSampling) -> Draws:
        """The target's tokens at `position` [R, 1], after final states [R, 1, H]."""
        draws = target_draws(partial(self.model.read, last), sampling, position)
        if draws is not None:
            return draws
        logits = self.model.logits(last)
        seen = self.rows.seen(rows, sampling)
        values = scores(logits, sampling, None if seen is None else seen[:, None])
        tokens = coupled_sample(values, sampling, position)
        return Draws(tokens, log_probabilities(logits, tokens), logits.isfinite().all(-1))

    # verify: a draft below the last committed token

    def _verify(self, steps: Sequence[Step], picked: Sequence[int]) -> Committed:
        """Run [root, drafted nodes] through the target, keep what the rule accepts, and let the head catch up."""
        chosen = [steps[i] for i in picked]
        rows = self._ints([s.row for s in chosen])
        tree = pack([s.draft for s in chosen], [s.root for s in chosen], self.device)
        batch = self._verify_batch(chosen, tree, self.rows.cached[rows])
        verified = self.recurrent.verify(self.passes, batch, rows)
        verdict, said = self._judge(chosen, tree, verified, rows)
        self.recurrent.accept(verdict.kept)
        true_rows = keep_path(self.cache, batch, verdict, verified.features)
        self.rows.note(rows, true_rows.following, verdict.kept, self.rows.sampling([s.row for s in chosen]))
        self._catch_up(chosen, rows, true_rows, self.passes.catch_up)
        self.rows.cached[rows] = batch.context + verdict.kept
        return Committed(picked, verdict.tokens, verdict.kept, verdict.path, *said)

    def _verify_batch(self, chosen: Sequence[Step], tree: Tree, context: Tensor) -> Batch:
        ends = [s.cached + 1 + (len(s.draft.tokens) if s.draft else 0) for s in chosen]
        return Batch(
            tokens=tree.tokens,
            positions=context[:, None] + tree.depths,
            context=context,
            counts=tree.counts,
            pages=self._pages(chosen),
            ancestors=None if tree.chain else tree.ancestors,
            longest=max(ends),
        )

    def _judge(self, chosen: Sequence[Step], tree: Tree, verified: Verified, rows: Tensor) -> tuple[Verdict, Report]:
        """Apply each row's own rule."""
        if all(self.rows.coupled(s.row, tree.chain) for s in chosen):
            sampling = self.rows.sampling([s.row for s in chosen])
            seen = self.rows.seen(rows, sampling)
            below = None if seen is None else seen_tokens(seen, tree)
            return judge_coupled(tree, verified, sampling, self.rows.cached[rows] + 1, below)
        rules = [self.rows.params[s.row].rule for s in chosen]
        verdict = self._judge_rules(rules, chosen, tree, verified.logits, rows)
        return verdict, report(tree, verdict, verified.logits)

    def _judge_rules(
        self, rules: Sequence[Rule], chosen: Sequence[Step], tree: Tree, logits: Tensor, rows: Tensor
    ) -> Verdict:
        """Rows of one rule are judged together."""
        if len(set(rules)) == 1:
            return self._judge_rule(rules[0], chosen, tree, logits, rows)
        shape = (len(chosen), tree.max_depth + 1)
        whole = Verdict(rows.new_zeros(shape), torch.zeros_like(rows), rows.new_zeros(shape))
        for rule in set(rules):
            picked = [i for i, r in enumerate(rules) if r is rule]
            index = self._ints(picked)
            # chains that share a batch with trees are packed as trees
            drafts = [chosen[i].draft for i in picked]
            part = tree.select(index, chain=all(d is None or d.is_chain for d in drafts))
            judged = self._judge_rule(rule, [chosen[i] for i in picked], part, logits[index], rows[index])
            for field, values in zip(whole, judged, strict=True):
                field[index] = values
        return whole

    def _judge_rule(self, rule: Rule, chosen: Sequence[Step], tree: Tree, logits: Tensor, rows: Tensor) -> Verdict:
        sampling = self.rows.sampling([s.row for s in chosen])
        seen = self.rows.seen(rows, sampling)
        values = scores(logits, sampling, None if seen is None else seen_tokens(seen, tree))
        q = None if rule is Rule.COUPLED else self._draft_q(chosen, tree)
        return verify(rule, tree, values, sampling, self.rows.cached[rows] + 1, q)

    def _draft_q(self, chosen: Sequence[Step], tree: Tree) -> DraftQ | None:
        """What the drafts were drawn from: the client's own q, or the q kept of our draft; else point masses."""
        held = [self.rows.q(s.row, s.draft.draft_id) if s.draft and s.draft.draft_id else None for s in chosen]
        drafts = [s.draft for s in chosen]
        return DraftQ.from_drafts(drafts, tree.tokens.shape[1], self.info.vocab_size, self.device, held)

    # catch up: the head over committed tokens with true features

    def _catch_up(self, chosen: Sequence[Step], rows: Tensor, true_rows: TrueRows, run: CatchUp) -> None:
        """Run the head over true rows and keep its newest outputs; sessions without speculation sit out."""
        picked = [i for i, s in enumerate(chosen) if self.rows.speculate[s.row]]
        if self.head is None or not picked:
            return
        if len(picked) < len(chosen):
            index = self._ints(picked)
            batch, features, following = true_rows
            true_rows, rows = TrueRows(rows_of(batch, index), features[index], following[index]), rows[index]
        if self.lookback:
            true_rows = self.lookback.extend(rows, true_rows)
        self.rows.output[rows] = run(*true_rows)

    # propose

    def _groups(self, steps: Sequence[Step], picked: Sequence[int]) -> list[list[int]]:
        """Indices of `picked` steps that draft together: one shape, one way of drawing."""
        groups: dict[tuple[DraftShape, bool], list[int]] = {}
        for i in picked:
            step = steps[i]
            if step.propose is not None and self.rows.speculate[step.row] and step.propose.depth > 0:
                coupled = self.rows.params[step.row].rule is Rule.COUPLED
                groups.setdefault((step.propose, coupled), []).append(i)
        return list(groups.values())

    def _propose(self, steps: Sequence[Step], picked: Sequence[int]) -> drafting.Drafted:
        """Draft one shape for several rows."""
        assert self.head is not None
        chosen = [steps[i] for i in picked]
        index = [s.row for s in chosen]
        context = self.rows.cached[self._ints(index)]
        start = drafting.Start(
            output=self.rows.output[self._ints(index)],
            context=context,
            pages=self._pages(chosen),
            longest=self._longest(context, chosen),
            sampling=self.rows.sampling(index),
            coupled=self.rows.params[index[0]].rule is Rule.COUPLED,
        )
        shape = chosen[0].propose
        assert shape is not None
        return self._number(self.passes.draft(start, shape), picked, index)

    def _hold(self, steps: Sequence[Step], drafts: Sequence[drafting.Drafted]) -> None:
        """Let recorded rounds verify drafts that count now: a step that failed runs again over those before."""
        for drafted in drafts if self.rounds else ():
            index, shape = [steps[i].row for i in drafted.steps], steps[drafted.steps[0]].propose
            assert self.rounds is not None and shape is not None
            self.rounds.hold(index, self._ints(index), shape, drafted)

    def _longest(self, context: Tensor, chosen: Sequence[Step]) -> int:
        """A bound on the cached length after this step's commits; exact where looking costs nothing."""
        if self.device.type == "cpu":
            return int(context.max())
        return max(s.cached + len(s.feed.tokens if s.feed else s.draft.tokens if s.draft else ()) + 1 for s in chosen)

    def _number(self, drafted: drafting.Drafted, picked: Sequence[int], rows: Sequence[int]) -> drafting.Drafted:
        ids = [self._next_draft() for _ in rows]
        for i, row in enumerate(rows):
            self.rows.keep_q(row, ids[i], None if drafted.q is None else drafted.q[i])
        return drafted._replace(steps=picked, ids=ids)

    def _next_draft(self) -> int:
        self._drafts += 1
        return self._drafts
