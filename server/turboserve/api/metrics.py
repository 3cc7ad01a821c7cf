"""Gauges and counters read from the engine's statistics at scrape time.

The names match the series that vLLM dashboards read where it has one. Counting of requests happens in
`telemetry.py`; nothing here changes any state. The number of series is fixed: conversations appear by
rank, never by name, or a busy day would leave thousands of dead series behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from turboquant_kv.kv_bytes import KVBytes
from turboserve import __version__
from turboserve.api.kv_replies import largest
from turboserve.engine.protocol import Engine
from turboserve.messages import CacheTier, EngineStats

MAX_RANK = 10  # conversations shown on the page, largest first
EVENT_TEXTS = {
    "evictions": "Conversations dropped from memory.",
    "requantisations": "Idle conversations taken to a smaller format.",
    "spills": "Conversations moved from memory to disk.",
    "restores": "Conversations read back from disk.",
    "preemptions": "Running requests put back into the queue.",
    "refusals": "Requests refused for want of KV memory.",
}


class EngineCollector(Collector):
    """Prometheus series of one engine. Registered with `Telemetry.use_readings`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        ready = self._engine.unready_reason() is None
        yield _gauge("ready", "1 when requests submitted now would be worked on.", float(ready))
        stats = self._engine.stats()
        yield _info(stats)
        yield from _kernel_trial(stats)
        text = "1 when requests that run at the same time are computed one by one."
        yield _gauge("rows_apart", text, float(stats.rows_apart))
        yield _gauge("num_requests_running", "Requests in prefill or decode.", stats.num_running)
        yield _gauge("num_requests_waiting", "Requests queued.", stats.num_waiting)
        yield from _kv_gauges(stats)
        yield from _conversations(stats)
        yield from _events(stats)
        yield from _admission(stats)
        yield from _disk(stats)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask an engine that is still loading for statistics."""
        return []


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"turboserve_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"turboserve_{name}", text, value=value)


def _gauge_by(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"turboserve_{name}", text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _by_kind(kv: KVBytes) -> dict[str, float]:
    return {"compressed": kv.compressed, "exact": kv.exact, "slack": kv.slack, "uncompressed": kv.uncompressed}


def _info(stats: EngineStats) -> GaugeMetricFamily:
    labels = ("version", "model", "kv_format", "kv_layers", "kv_backend", "dtype", "weights", "layers")
    family = GaugeMetricFamily("turboserve_info", "What is being served; always 1.", labels=labels)
    layers = stats.details.get("kv_layers", stats.kv_format)
    values = __version__, stats.model_id, stats.kv_format, layers, stats.kv_backend, stats.model_dtype
    how = stats.details.get("weights", ""), stats.details.get("layers", "")
    family.add_metric((*values, *how), 1)
    return family


def _kernel_trial(stats: EngineStats) -> Iterator[Metric]:
    """Nothing where no kernels were tried."""
    trial = stats.kernel_trial
    if trial is None:
        return
    text = "What a trial at start decided on the device's fused kernels; always 1."
    info = GaugeMetricFamily("turboserve_kv_kernel_trial", text, labels=("fused", "taken", "outcome"))
    info.add_metric((trial.fused, trial.taken, trial.outcome), 1)
    yield info
    text = "Seconds of one layer's decode step in that trial, by tokens before it."
    steps = GaugeMetricFamily("turboserve_kv_kernel_trial_step_seconds", text, labels=("backend", "tokens"))
    for (backend, num_tokens), seconds in trial.step_s.items():
        steps.add_metric((backend, str(num_tokens)), seconds)
    yield steps


def _kv_gauges(stats: EngineStats) -> Iterator[Metric]:
    kv = stats.kv
    yield _gauge_by("kv_bytes", "Bytes of KV caches now allocated.", "kind", _by_kind(kv))
    yield _gauge(
        "kv_raw_equivalent_bytes",
        "Bytes the same tokens would take uncompressed, in the model's dtype.",
        kv.raw_equivalent,
    )
    yield _gauge("kv_compression_ratio", "Raw-equivalent bytes, in the model's dtype, over allocated bytes.", kv.ratio)
    yield _gauge("kv_budget_bytes", "Bytes that KV caches may take.", stats.kv_budget_bytes)
    yield _gauge("kv_committed_bytes", "Bytes held, or promised to running requests.", stats.kv_committed_bytes)
    yield _gauge("kv_scratch_bytes", "The most that one step may allocate beside the budget.", stats.kv_scratch_bytes)
    yield _gauge("kv_tokens", "Tokens held in KV caches.", kv.tokens)
    usage_ratio = kv.total / stats.kv_budget_bytes if stats.kv_budget_bytes else 0.0
    yield _gauge("kv_cache_usage_ratio", "Allocated KV bytes over the budget, 0 to 1.", usage_ratio)
    failures = stats.events.integrity_failures
    yield _counter("kv_integrity_failures", "Integrity checks that found a disagreement.", failures)


def _conversations(stats: EngineStats) -> Iterator[Metric]:
    counts: dict[str, float] = {tier: stats.num_conversations.get(tier, 0) for tier in get_args(CacheTier)}
    yield _gauge_by("kv_conversations", "Conversations held, by where they are.", "tier", counts)
    held = {str(rank): c.kv for rank, c in enumerate(largest(stats.conversations)[:MAX_RANK], 1)}
    tokens = {rank: kv.tokens for rank, kv in held.items()}
    kv_bytes = {rank: kv.total for rank, kv in held.items()}
    raw_bytes = {rank: kv.raw_equivalent for rank, kv in held.items()}
    yield _gauge_by("session_tokens", "Tokens of the conversation with this rank by bytes.", "rank", tokens)
    yield _gauge_by("session_kv_bytes", "KV bytes of the conversation with this rank.", "rank", kv_bytes)
    yield _gauge_by(
        "session_kv_raw_equivalent_bytes", "Bytes it would take uncompressed, in the model's dtype.", "rank", raw_bytes
    )


def _events(stats: EngineStats) -> Iterator[Metric]:
    for kind, text in EVENT_TEXTS.items():
        family = CounterMetricFamily(f"turboserve_kv_{kind}", text, labels=("reason",))
        for reason, count in getattr(stats.events, kind).items():
            family.add_metric((reason,), count)
        yield family


def _admission(stats: EngineStats) -> Iterator[Metric]:
    seen = stats.admission
    yield _counter("kv_admission_requests", "Ended requests in the two sums below.", seen.num_requests)
    yield _counter("kv_admission_estimated_bytes", "KV bytes reserved at admission.", seen.estimated_bytes)
    yield _counter("kv_admission_actual_bytes", "KV bytes held at the end.", seen.actual_bytes)
    held = seen.last_actual_bytes
    error = seen.last_estimated_bytes / held - 1 if held else 0.0
    yield _gauge("kv_admission_last_error_ratio", "Reserved over held minus 1, for the last ended request.", error)


def _disk(stats: EngineStats) -> Iterator[Metric]:
    store = stats.disk
    yield _gauge("kv_store_writable", "1 while conversations are written to disk.", float(store.is_writable))
    yield _gauge("kv_store_bytes", "Bytes of the store's files.", store.num_bytes)
    yield _gauge("kv_store_limit_bytes", "Bytes that the store's files may take.", store.limit_bytes)
    yield _gauge("kv_store_entries", "Files in the store.", store.num_entries)
    yield _gauge("kv_store_pending_bytes", "Memory beside the KV budget that waits to be written.", store.pending_bytes)
    yield _counter("kv_store_damaged_files", "Files found damaged, and dropped.", store.num_damaged)
    yield _gauge_by(
        "kv_store_held_bytes", "What stored conversations would take in memory.", "kind", _by_kind(stats.kv_disk)
    )
