"""Dashboard and alerts ask only for what the metrics pages show, and Prometheus accepts and fires the rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.turboserve.api.conftest import running
from tests.turboserve.fleet.conftest import Start
from tests.turboserve.fleet.conftest import start as start  # the fixture

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "config" / "alerts.yml"
GRAFANA = ROOT / "config" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "turboserve.json").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def alert_rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        yield from group["rules"]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    asked = [rule["expr"] for rule in alert_rules()]
    asked += [target["expr"] for panel in panels() for target in panel["targets"]]
    return asked + [entry["query"]["query"] for entry in DASHBOARD["templating"]["list"] if entry["type"] == "query"]


def metrics(expression: str) -> set[tuple[str, frozenset[str]]]:
    """(name of a series, the labels that the expression names in its braces)."""
    found = set()
    for name, braces in re.findall(r"\b((?:turboserve|process|vllm)[_:]\w+)\s*(?:\{([^}]*)\})?", expression):
        found.add((name, frozenset(re.findall(r"(\w+)\s*=", braces))))
    return found


def shown(page: str) -> dict[str, set[str]]:
    """Every series that the page may show, also one that has no sample yet, with the labels of those that have."""
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for suffix in SUFFIXES[family.type]:
            series[family.name + suffix] = set()
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def test_every_metric_asked_for_is_on_a_servers_or_a_routers_page(start: Start) -> None:
    with running() as service:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert httpx.post(service.url + "/v1/chat/completions", json=body).status_code == 200
        series = shown(httpx.get(service.url + "/metrics").text)
    for name, given in shown(start({"a": {}}).get("/metrics").text).items():
        series.setdefault(name, set()).update(given)
    of_prometheus = {"instance", "job"}
    asked = {metric for expression in expressions() for metric in metrics(expression)}
    assert len(asked) > 40
    for name, labels in asked:
        assert name in series, name
        if series[name]:  # it has a sample
            assert labels - of_prometheus <= series[name], (name, labels, series[name])


def test_labels_that_are_summed_over_are_ones_that_the_code_gives() -> None:
    """Counters without a sample show no labels, so the code that makes them is asked."""
    made = set()
    for file in ("telemetry.py", "api/metrics.py", "fleet/metrics.py"):
        made |= set(re.findall(r'"(\w+)"', (ROOT / "server/turboserve" / file).read_text()))
    for expression in expressions():
        for labels in re.findall(r"\b(?:by|on) \(([\w, ]+)\)", expression):
            assert set(labels.split(", ")) <= made | {"instance", "job", "le"}, expression


def test_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels())
    cells: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in DASHBOARD["panels"]):
        columns, rows = (range(place[at], place[at] + place[size]) for at, size in (("x", "w"), ("y", "h")))
        own = set(product(columns, rows))
        assert not own & cells and place["x"] + place["w"] <= 24
        cells |= own


def test_grafana_is_provisioned_with_what_compose_mounts() -> None:
    grafana = COMPOSE["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    assert mounts["./config/grafana/provisioning"] == "/etc/grafana/provisioning"
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/turboserve.yml").read_text())["providers"]
    assert mounts["./config/grafana/dashboards"] == provider["options"]["path"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"]) and (GRAFANA / "dashboards" / home.name).exists()
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")


def test_every_alert_says_what_is_wrong_and_how_bad() -> None:
    rules = list(alert_rules())
    assert len({rule["alert"] for rule in rules}) == len(rules) > 10
    for rule in rules:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_page_on_deploying_names_every_alert() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    assert set(re.findall(r"`(TurboServe\w+)`", text)) == {rule["alert"] for rule in alert_rules()}


def test_prometheus_fires_the_alerts(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    for file in (ALERTS, Path(__file__).with_name("alerts_test.yml")):
        shutil.copy(file, tmp_path)
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
