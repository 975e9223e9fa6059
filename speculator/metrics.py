"""Prometheus: what the worker counted, and how calls ended, on a port of their own.

Owns: metric names and the scrape. Must never be on the path of a step: numbers are read when somebody asks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

import grpc
from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from speculator.core import DrafterCore
from speculator.costs import size
from speculator.totals import BINS, Histogram
from speculator.watch import AcceptanceWatch

CALL_LABELS = ("grpc_type", "grpc_service", "grpc_method")


class ServiceMetrics(Collector):
    """Reads a core's totals, and what its drift alarm found, when scraped.

    `build` becomes the labels of `speculator_build_info`, with the head beside them: figures by head are figures by
    position joined with it, as one process serves one head.
    """

    def __init__(self, core: DrafterCore, build: dict[str, str], watch: AcceptanceWatch | None = None) -> None:
        self._core = core
        self._build = {**build, "head": core.info.draft_model}
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        yield from self._acceptance()
        yield from self._confidence()
        yield from self._histograms()
        yield from self._held()
        yield from self._passes()
        yield from self._given()
        if self._watch is not None:
            yield from _drift(self._watch)

    def _acceptance(self) -> Iterator[Metric]:
        counts = self._core.totals.acceptance.copy()
        yield _counter("speculator_steps", "Rounds: drafts verified.", counts.steps)
        yield _counter("speculator_draft_tokens", "Drafted tokens that were verified.", counts.draft_tokens)
        yield _counter("speculator_accepted_draft_tokens", "Drafted tokens accepted.", counts.accepted_tokens)
        yield _counter("speculator_output_tokens", "Tokens committed after the prompt.", counts.output_tokens)
        yield _by_position("speculator_accepted_tokens_at_position", "Rounds that accepted it.", counts.accepted_at)
        yield _by_position("speculator_drafted_tokens_at_position", "Rounds that judged it.", counts.drafted_at)

    def _confidence(self) -> Iterator[Metric]:
        counts = self._core.totals.confidence
        for name, column in (("judged", counts.judged), ("accepted", counts.accepted)):
            family = CounterMetricFamily(
                f"speculator_confidence_{name}_tokens",
                f"Drafted tokens of chains {name}, by the head's confidence from `bin` to `bin` + {1 / BINS}.",
                labels=["bin"],
            )
            for place, count in enumerate(list(column)):
                family.add_metric([f"{place / BINS:.1f}"], count)
            yield family

    def _histograms(self) -> Iterator[Metric]:
        totals = self._core.totals
        yield _histogram(
            "speculator_step_accepted_tokens", "Drafted tokens accepted a round.", totals.accepted_per_step()
        )
        yield _histogram("speculator_queue_seconds", "Wait before the first engine step.", totals.queue_seconds)
        yield _histogram("speculator_draft_seconds", "Drafting, an engine step.", totals.draft_seconds)
        yield _histogram("speculator_verify_seconds", "Target passes, an engine step.", totals.verify_seconds)
        yield _histogram("speculator_batch_size", "Sessions of an engine step.", totals.batch_size)

    def _held(self) -> Iterator[Metric]:
        usage = self._core.usage()
        free = usage.total_pages - usage.reserved_pages
        pages = {"used": usage.used_pages, "promised": usage.reserved_pages - usage.used_pages, "free": free}
        sessions = {"active": usage.active, "finished": usage.finished}
        rejected = CounterMetricFamily("speculator_rejected", "Work items answered with an error.", labels=["reason"])
        for reason, count in list(self._core.totals.rejected.items()):
            rejected.add_metric([reason], count)
        yield rejected
        yield _gauge("speculator_sessions", "Sessions.", "state", sessions)
        yield _gauge("speculator_kv_blocks", "KV pages.", "state", pages)
        yield GaugeMetricFamily("speculator_queue_size", "Work items that wait or run.", self._core.in_flight)
        info = GaugeMetricFamily("speculator_build_info", "What runs here.", labels=list(self._build))
        info.add_metric(list(self._build.values()), 1)
        yield info

    def _passes(self) -> Iterator[Metric]:
        passes = CounterMetricFamily(
            "speculator_passes", "Passes that recorded graphs exist for, by how they ran.", labels=["pass", "how"]
        )
        for name, counts in self._core.passes_run().items():
            for how, count in zip(("replayed", "eager"), counts, strict=True):
                passes.add_metric([name, how], count)
        yield passes

    def _given(self) -> Iterator[Metric]:
        given = CounterMetricFamily(
            "speculator_policy_drafts",
            "Drafts that the depth policy asked for, by their levels and drafted nodes.",
            labels=["depth", "nodes"],
        )
        for shape, count in self._core.drafts_given().items():
            given.add_metric([str(shape.depth), str(size(shape)[0])], count)
        yield given


def _drift(watch: AcceptanceWatch) -> Iterator[Metric]:
    where = ["position"]
    side = GaugeMetricFamily(
        "speculator_acceptance_drift", "-1 below its band, 1 above it, 0 inside or still learning.", labels=where
    )
    recent = GaugeMetricFamily("speculator_acceptance_recent", "Share accepted of the latest rounds.", labels=where)
    band = GaugeMetricFamily("speculator_acceptance_band", "Where acceptance belongs.", labels=[*where, "bound"])
    for state in watch.states():
        position = str(state.position)
        side.add_metric([position], state.side)
        recent.add_metric([position], state.recent)
        if state.band is not None:
            band.add_metric([position, "low"], state.band.low)
            band.add_metric([position, "high"], state.band.high)
    yield from (side, recent, band)


def _counter(name: str, words: str, value: float) -> Metric:
    return CounterMetricFamily(name, words, value)


def _by_position(name: str, words: str, counts: list[int]) -> Metric:
    family = CounterMetricFamily(name, f"By depth in the draft, 1 is the first token. {words}", labels=["position"])
    for index, count in enumerate(counts):
        family.add_metric([str(index + 1)], count)
    return family


def _histogram(name: str, words: str, values: Histogram) -> Metric:
    return HistogramMetricFamily(name, words, values.cumulative(), values.total)


def _gauge(name: str, words: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, words, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


class CallMetrics:
    """Counts of calls by method and status, under the names that gRPC dashboards know."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter("grpc_server_started", "Calls begun.", CALL_LABELS, registry=registry)
        self._handled = Counter("grpc_server_handled", "Calls ended.", (*CALL_LABELS, "grpc_code"), registry=registry)
        self._seconds = PrometheusHistogram(
            "grpc_server_handling_seconds", "Time of a call.", CALL_LABELS, registry=registry
        )

    def call(self, kind: str, method: str) -> Call:
        """`method` is the full name, /package.Service/Method."""
        _, service, name = method.split("/")
        self._started.labels(kind, service, name).inc()
        return Call(self, (kind, service, name))

    def ended(self, labels: tuple[str, str, str], code: str, seconds: float) -> None:
        self._handled.labels(*labels, code).inc()
        self._seconds.labels(*labels).observe(seconds)


class Call:
    """One call under way; the status it ended with is set by whoever knows it."""

    def __init__(self, metrics: CallMetrics, labels: tuple[str, str, str]) -> None:
        self.code = grpc.StatusCode.CANCELLED.name
        self._metrics = metrics
        self._labels = labels
        self._began = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.ended(self._labels, self.code, time.perf_counter() - self._began)


class MetricsServer:
    """An HTTP endpoint for scrapes, on its own thread."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._server, self._thread = start_http_server(port, host, registry)
        self.port = int(self._server.server_port)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
