"""config/prometheus.yml fits docker-compose.yml, and Prometheus accepts it where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config" / "prometheus.yml"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
TOP_LEVEL = {"global", "scrape_configs", "rule_files", "alerting", "storage"}
JOB_KEYS = {"job_name", "metrics_path", "authorization", "static_configs", "scrape_interval", "scrape_timeout"}


def test_scrapes_the_server_of_the_compose_file_with_its_key() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    assert set(config) <= TOP_LEVEL
    (job,) = config["scrape_configs"]
    assert set(job) <= JOB_KEYS
    assert job["metrics_path"] == "/metrics"
    ((target,),) = (entry["targets"] for entry in job["static_configs"])
    host, port = target.split(":")
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")
    assert job["authorization"] == {"type": "Bearer", "credentials_file": "/run/secrets/turboserve_api_key"}


def test_prometheus_accepts_the_file(tmp_path: Path) -> None:
    """The key file exists only inside the container, so a copy of the configuration points at one made here."""
    (tmp_path / "key").write_text("secret")
    text = CONFIG.read_text().replace("/run/secrets/turboserve_api_key", str(tmp_path / "key"))
    assert str(tmp_path / "key") in text
    copy = tmp_path / "prometheus.yml"
    copy.write_text(text)
    for rules in yaml.safe_load(text)["rule_files"]:
        shutil.copy(CONFIG.parent / rules, tmp_path)
    promtool = shutil.which("promtool")
    if promtool is None:  # without Prometheus at hand the structure above is all that can be judged
        assert yaml.safe_load(text)["global"]["scrape_interval"].endswith("s")
        return
    result = subprocess.run([promtool, "check", "config", str(copy)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
