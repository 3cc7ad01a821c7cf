"""Gauges read from the engine's statistics at scrape time.

The names match the series that vLLM dashboards read where it has one. Counting happens in
`telemetry.py`; nothing here changes any state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from turboserve import __version__
from turboserve.engine.protocol import Engine, EngineStats


class EngineCollector(Collector):
    """Prometheus gauges of one engine. Registered with `Telemetry.use_readings`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        ready = self._engine.unready_reason() is None
        yield gauge("ready", "1 when requests submitted now would be worked on.", float(ready))
        stats = self._engine.stats()
        yield info(stats)
        yield gauge("num_requests_running", "Requests in prefill or decode.", stats.num_running)
        yield gauge("num_requests_waiting", "Requests queued.", stats.num_waiting)
        yield from kv_gauges(stats)
        yield conversations(stats)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: registering must not ask an engine that is still loading for statistics."""
        return []


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"turboserve_{name}", text, value=value)


def info(stats: EngineStats) -> GaugeMetricFamily:
    labels = ("version", "model", "kv_format", "kv_backend", "dtype")
    family = GaugeMetricFamily("turboserve_info", "What is being served; always 1.", labels=labels)
    family.add_metric((__version__, stats.model_id, stats.kv_format, stats.kv_backend, stats.model_dtype), 1)
    return family


def kv_gauges(stats: EngineStats) -> Iterator[GaugeMetricFamily]:
    kv = stats.kv
    by_kind = GaugeMetricFamily("turboserve_kv_bytes", "Bytes of KV caches now allocated.", labels=("kind",))
    by_kind.add_metric(("compressed",), kv.compressed)
    by_kind.add_metric(("exact",), kv.exact)
    by_kind.add_metric(("slack",), kv.slack)
    by_kind.add_metric(("uncompressed",), kv.uncompressed)
    yield by_kind
    yield gauge("kv_raw_equivalent_bytes", "Bytes the same tokens would take uncompressed.", kv.raw_equivalent)
    yield gauge("kv_compression_ratio", "Raw-equivalent bytes over allocated bytes.", kv.ratio)
    yield gauge("kv_budget_bytes", "Bytes that KV caches may take.", stats.kv_budget_bytes)
    yield gauge("kv_tokens", "Tokens held in KV caches.", kv.tokens)
    usage_ratio = kv.total / stats.kv_budget_bytes if stats.kv_budget_bytes else 0.0
    yield gauge("kv_cache_usage_ratio", "Allocated KV bytes over the budget, 0 to 1.", usage_ratio)


def conversations(stats: EngineStats) -> GaugeMetricFamily:
    family = GaugeMetricFamily("turboserve_kv_conversations", "Conversations held in memory.", labels=("tier",))
    for tier in ("running", "memory"):
        family.add_metric((tier,), sum(held.tier == tier for held in stats.conversations))
    return family
