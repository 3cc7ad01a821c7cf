"""Counters and histograms of one server, in a registry of their own.

Owns every series that is counted as things happen. The engine calls the request and token
methods, the HTTP layer those whose names start with `http_`. Values that are read rather than
counted (running requests, KV bytes) come from a collector that the HTTP layer registers here.
All methods are thread-safe and cheap enough to be called once per token.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

# From one step of a small model to a long prompt on a laptop.
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# From 1000 tokens/s down to one token in five seconds.
INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class GroupedHistogram(Collector):
    """A histogram to which equal observations are added together: a step's tokens all come at the same moment."""

    def __init__(self, name: str, text: str, buckets_s: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, (*buckets_s, math.inf)
        self._labels = [*(str(float(bound)) for bound in buckets_s), "+Inf"]
        self._lock = threading.Lock()
        self._counts, self._sum = [0] * len(self._bounds), 0.0

    def observe(self, amount: float, count: int) -> None:
        """`count` times the same."""
        place = bisect_left(self._bounds, amount)
        with self._lock:
            self._counts[place] += count
            self._sum += amount * count

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client's own."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        sums = map(float, accumulate(counts))
        yield HistogramMetricFamily(self._name, self._text, list(zip(self._labels, sums, strict=True)), total)


class Telemetry:
    """What happened since start. Series names follow vLLM's where it has one, prefixed `turboserve_`."""

    def __init__(self) -> None:
        # `*_created` series double the page and no dashboard reads them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._readings: tuple[Collector, ...] = ()
        self._counted: list[Counter | Histogram | GroupedHistogram] = []
        ProcessCollector(registry=self.registry)
        self._define_engine_series()
        self._define_http_series()

    def _define_engine_series(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._draft_tokens = self._counter("draft_tokens", "Tokens guessed ahead by speculative decoding.")
        self._accepted_draft_tokens = self._counter("accepted_draft_tokens", "Guessed tokens that were right.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in kept KV caches.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in kept KV caches.")
        self._success = self._counter("request_success", "Requests answered in full.", "finished_reason")
        self._failures = self._counter("request_failure", "Requests that ended with an error.", "code")
        self._refused = self._counter("request_refused", "Requests refused before any work.", "reason")
        self._cancelled = self._counter("request_cancelled", "Requests cancelled, by stage reached.", "stage")
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", LATENCY_BUCKETS_S)
        self._inter_token = GroupedHistogram(
            "turboserve_inter_token_latency_seconds", "Time between two tokens of one request.", INTER_TOKEN_BUCKETS_S
        )
        self.registry.register(self._inter_token)
        self._counted.append(self._inter_token)
        self._queue_time = self._histogram(
            "request_queue_time_seconds", "Arrival to start of prefill.", LATENCY_BUCKETS_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", LATENCY_BUCKETS_S)

    def _define_http_series(self) -> None:
        self._http_requests = Counter(
            "turboserve_http_requests",
            "HTTP requests answered, by route template and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self._held_bytes = Gauge(
            "turboserve_http_held_bytes", "Bytes that the bodies of requests under way take.", registry=self.registry
        )
        self._http_disconnects = self._counter(
            "http_disconnects", "Clients that left or stalled before their answer was complete.", "kind"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(f"turboserve_{name}", text, labels, registry=self.registry)
        self._counted.append(counter)
        return counter

    def _histogram(self, name: str, text: str, buckets_s: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"turboserve_{name}", text, buckets=buckets_s, registry=self.registry)
        self._counted.append(histogram)
        return histogram

    # Called by the engine.

    def add_prompt_tokens(self, num_tokens: int, num_cached: int) -> None:
        """Counts one admitted prompt, `num_cached` of whose tokens a kept cache already held.

        0 of a prompt that is counted, when a cache with so many more of its tokens was found meanwhile.
        """
        self._prompt_tokens.inc(num_tokens)
        self._prefix_queries.inc(num_tokens)
        self._prefix_hits.inc(num_cached)

    def add_generation_tokens(self, num_tokens: int) -> None:
        """Counts newly generated tokens."""
        self._generation_tokens.inc(num_tokens)

    def add_draft_tokens(self, num_drafted: int, num_accepted: int) -> None:
        """Counts tokens that were guessed ahead, and those that were right."""
        self._draft_tokens.inc(num_drafted)
        self._accepted_draft_tokens.inc(num_accepted)

    def observe_queue_time(self, seconds: float) -> None:
        """Arrival of a request to the start of its prefill."""
        self._queue_time.observe(seconds)

    def observe_ttft(self, seconds: float) -> None:
        """Arrival of a request to its first token."""
        self._ttft.observe(seconds)

    def observe_inter_token(self, seconds: float, num_requests: int = 1) -> None:
        """Time between two tokens of one request, or of several whose tokens came at the same moments."""
        self._inter_token.observe(seconds, num_requests)

    def observe_e2e(self, seconds: float) -> None:
        """Arrival of a request to its last token."""
        self._e2e.observe(seconds)

    def request_finished(self, reason: str) -> None:
        """A request ended with `stop`, `length` or `tool_calls`."""
        self._success.labels(reason).inc()

    def request_failed(self, code: str) -> None:
        """A request ended with an error other than its cancellation."""
        self._failures.labels(code).inc()

    def request_refused(self, reason: str) -> None:
        """A request was turned away before any work on it.

        `reason` is `queue_full`, `not_ready`, `draining`, or the code of the error it got while it was queued,
        such as `context_length_exceeded`.
        """
        self._refused.labels(reason).inc()

    def request_cancelled(self, stage: str) -> None:
        """A request was cancelled while `queued`, in `prefill` or in `decode`."""
        self._cancelled.labels(stage).inc()

    # Called by the HTTP layer.

    def http_request(self, route: str, status: int) -> None:
        """`route` is a template such as `/v1/models/{model_id}`, never a raw path: labels must stay few."""
        self._http_requests.labels(route, str(status)).inc()

    def held_bytes(self, num_bytes: int) -> None:
        """Bytes of memory that the bodies of requests under way take now."""
        self._held_bytes.set(num_bytes)

    def http_disconnect(self, kind: str) -> None:
        """`stream`, `whole` (not streamed), `stalled` (the reader stopped reading) or `gave_way` (to a new one)."""
        self._http_disconnects.labels(kind).inc()

    def use_readings(self, *collectors: Collector) -> None:
        """Makes `collectors` the source of gauges and of what is derived from counts, in place of earlier ones."""
        for collector in self._readings:
            self.registry.unregister(collector)
        for collector in collectors:
            self.registry.register(collector)
        self._readings = collectors

    def counted(self) -> Iterator[Metric]:
        """The counters and histograms as they stand now, without readings and the process's own series."""
        for metric in self._counted:
            yield from metric.collect()

    def exposition(self) -> bytes:
        """The `/metrics` page in Prometheus text format 0.0.4."""
        return generate_latest(self.registry)
