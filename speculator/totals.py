"""What has happened since the start, as plain numbers that one thread writes and a scrape may read a moment later.

Owns: counters and histograms without locks or libraries, cheap enough to be updated in every step.
Must never import torch, grpc, protobuf or prometheus_client, nor name a session.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from speculator.answers import Acceptance, Timing
from speculator.types import Draft, StepTimes

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
ACCEPTED = 17  # buckets at least, so that a scrape has the same ones from the start
BINS = 10
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


class Histogram:
    """Counts of observations by upper bound; the last count is everything above the last bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Pairs (upper bound, observations at or below it), the form of a Prometheus histogram."""
        names = [repr(bound) for bound in self.bounds] + ["+Inf"]
        running, rows = 0, []
        for name, count in zip(names, self.counts, strict=True):
            running += count
            rows.append((name, float(running)))
        return rows


class Confidence:
    """Drafted tokens of chains by the head's confidence exp(log q), a tenth a bin: judged ones, accepted ones."""

    def __init__(self) -> None:
        self.judged, self.accepted = [0] * BINS, [0] * BINS

    def record(self, draft: Draft, judged: int, accepted: int) -> None:
        """One round. Trees, whose siblings share one chance, are left out, and drafts without log q or with NaN."""
        if not draft.logprobs or not draft.is_chain:
            return
        for depth in range(min(judged, accepted + 1)):
            if math.isnan(draft.logprobs[depth]):
                continue
            place = min(BINS - 1, int(BINS * math.exp(min(0.0, draft.logprobs[depth]))))
            self.judged[place] += 1
            self.accepted[place] += depth < accepted


class Totals:
    """Everything the worker counts. Rejections are counted by the event loop, all else by the worker's thread."""

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self.confidence = Confidence()
        self.queue_seconds = Histogram(SECONDS)
        self.draft_seconds = Histogram(SECONDS)
        self.verify_seconds = Histogram(SECONDS)
        self.batch_size = Histogram(SIZES)
        self.rejected: dict[str, int] = {}

    def step(self, batch: int, times: StepTimes) -> None:
        """One engine step over `batch` sessions."""
        self.batch_size.observe(batch)
        if times.draft:
            self.draft_seconds.observe(times.draft)
        self.verify_seconds.observe(times.feed + times.verify)

    def item(self, timing: Timing, tokens: int) -> None:
        """One answered work item that committed `tokens` tokens."""
        self.queue_seconds.observe(timing.queue)
        self.acceptance.output_tokens += tokens

    def accepted_per_step(self) -> Histogram:
        """Rounds by accepted drafts, a bucket for each number."""
        rounds = list(self.acceptance.rounds)
        histogram = Histogram(tuple(float(j) for j in range(max(ACCEPTED, len(rounds)))))
        histogram.counts[: len(rounds)] = rounds
        histogram.total = float(sum(j * count for j, count in enumerate(rounds)))
        return histogram

    def reject(self, reason: str) -> None:
        self.rejected[reason] = self.rejected.get(reason, 0) + 1
