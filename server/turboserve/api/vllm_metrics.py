"""The series that vLLM has too, under its names, for dashboards and routers that know vLLM.

Only what means the same is here, so that nobody is misled: `vllm:kv_cache_usage_perc` is not, because vLLM counts what
running requests hold as used, where we count kept conversations too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from turboserve.engine.protocol import Engine
from turboserve.telemetry import Telemetry

# What is counted as it happens: our name to vLLM's, both without a counter's `_total`.
SAME = {
    "turboserve_prompt_tokens": "vllm:prompt_tokens",
    "turboserve_generation_tokens": "vllm:generation_tokens",
    "turboserve_prefix_cache_queries": "vllm:prefix_cache_queries",
    "turboserve_prefix_cache_hits": "vllm:prefix_cache_hits",
    "turboserve_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "turboserve_accepted_draft_tokens": "vllm:spec_decode_num_accepted_tokens",
    "turboserve_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "turboserve_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "turboserve_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "turboserve_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
}
SUCCESS = "turboserve_request_success"


class VllmCollector(Collector):
    """One engine's series by vLLM's names, each with vLLM's label `model_name`."""

    def __init__(self, engine: Engine, telemetry: Telemetry) -> None:
        self._engine, self._telemetry = engine, telemetry

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        model = stats.model_id
        for family in self._telemetry.counted():
            if family.name in SAME:
                yield _renamed(family, SAME[family.name], model)
            elif family.name == SUCCESS:
                yield _successes(family, model)
        running = ("vllm:num_requests_running", "Requests in prefill or decode.", stats.num_running)
        waiting = ("vllm:num_requests_waiting", "Requests queued.", stats.num_waiting)
        for name, text, value in (running, waiting):
            gauge = GaugeMetricFamily(name, text, labels=("model_name",))
            gauge.add_metric((model,), value)
            yield gauge
        text = "Running requests put back into the queue."
        preemptions = CounterMetricFamily("vllm:num_preemptions", text, labels=("model_name",))
        preemptions.add_metric((model,), sum(stats.events.preemptions.values()))
        yield preemptions

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask an engine that is still loading for statistics."""
        return []


def _renamed(family: Metric, name: str, model: str) -> Metric:
    twin = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        labels = {**sample.labels, "model_name": model}
        twin.samples.append(sample._replace(name=name + sample.name.removeprefix(family.name), labels=labels))
    return twin


def _successes(family: Metric, model: str) -> Metric:
    """vLLM says `stop` of an answer that ended with calls of functions, too."""
    counts: dict[str, float] = {}
    for sample in family.samples:
        reason = sample.labels["finished_reason"].replace("tool_calls", "stop")
        counts[reason] = counts.get(reason, 0) + sample.value
    twin = CounterMetricFamily("vllm:request_success", family.documentation, labels=("finished_reason", "model_name"))
    for reason, count in counts.items():
        twin.add_metric((reason, model), count)
    return twin
