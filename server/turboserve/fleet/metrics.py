"""One metrics page of all processes: each model's series with a label `model`, and the router's own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from turboserve.fleet.fleet import Fleet
from turboserve.telemetry import Telemetry

logger = logging.getLogger("turboserve.fleet")

STATES = ("unloaded", "loading", "loaded", "stopping", "failed")
EVENT_TEXTS = {
    "starts": "Processes started.",
    "start_failures": "Processes that did not become ready.",
    "crashes": "Processes that ended by themselves while loaded.",
    "idle_unloads": "Models unloaded because nobody asked for them.",
    "evictions": "Models unloaded to make room for others.",
}
# Of the router's own counters; what engines count stays zero here.
ROUTERS_OWN = ("turboserve_http_", "process_")


class FleetCollector(Collector):
    """What the router knows of its models."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "turboserve_fleet_model_state", "1 for the state that the model is in.", labels=("model", "state")
        )
        for model in self._fleet:
            for name in STATES:
                state.add_metric((model.name, name), float(model.state == name))
        yield state
        yield self._gauge("running", "Requests that use the model.", {m.name: m.num_running for m in self._fleet})
        waiting = {m.name: m.num_waiting for m in self._fleet}
        yield self._gauge("waiting", "Requests that wait for the model to be loaded.", waiting)
        needs = {m.name: m.need_bytes for m in self._fleet}
        yield self._gauge("memory_bytes", "What the model's process takes, or would take.", needs)
        budget = self._fleet.budget_bytes
        yield GaugeMetricFamily("turboserve_fleet_memory_budget_bytes", "What all processes may take.", value=budget)
        for event, text in EVENT_TEXTS.items():
            family = CounterMetricFamily(f"turboserve_fleet_{event}", text, labels=("model",))
            for model in self._fleet:
                family.add_metric((model.name,), model.events[event])  # type: ignore[index]
            yield family

    def _gauge(self, name: str, text: str, values: dict[str, int]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"turboserve_fleet_{name}", text, labels=("model",))
        for model_name, value in values.items():
            family.add_metric((model_name,), value)
        return family


def exposition(telemetry: Telemetry, fleet: Fleet, pages: Iterable[tuple[str, str]]) -> bytes:
    """The page, from `pages`: (model's name, its process's page). Families of one name are one family."""
    own = [family for family in telemetry.registry.collect() if family.name.startswith(ROUTERS_OWN)]
    merged = {family.name: family for family in (*own, *FleetCollector(fleet).collect())}
    for model_name, page in pages:
        for family in _families(model_name, page):
            first = merged.setdefault(family.name, family)
            if first is not family:
                first.samples.extend(family.samples)
    registry = CollectorRegistry()
    registry.register(_Families(list(merged.values())))
    return generate_latest(registry)


def _families(model_name: str, page: str) -> Iterator[Metric]:
    try:
        families = list(text_string_to_metric_families(page))
    except ValueError:
        logger.warning("the metrics of %s cannot be read", model_name)
        return
    for family in families:
        labelled = [sample._replace(labels={**sample.labels, "model": model_name}) for sample in family.samples]
        family.samples = labelled
        yield family


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families

    def describe(self) -> Iterable[Metric]:
        return []
