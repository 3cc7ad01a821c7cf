"""Memory as the running server reports it: JSON, Prometheus' own tools, and a real Prometheus scraping it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.server import Server
from tests.e2e.test_openai_client import ask, filler, say

from turboserve.cli.main import main

CONFIG = Path(__file__).parents[2] / "config" / "prometheus.yml"


def gauges(server: Server) -> dict[str, float]:
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {
        sample.name + "".join(f"[{v}]" for v in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_stats_metrics_and_usage_agree(server: Server) -> None:
    server.forget_sessions()  # so that all there is is shown, and all of it compressed
    ask(server, [say(f"{filler(50, 77)} Hello!")], max_tokens=4)
    stats = server.wait_until_idle()
    metrics = gauges(server)
    assert stats["kv_bytes"]["compressed"] > 0
    for kind in ("compressed", "exact", "slack", "uncompressed"):
        assert metrics[f"turboserve_kv_bytes[{kind}]"] == stats["kv_bytes"][kind]
    assert metrics["turboserve_kv_raw_equivalent_bytes"] == stats["raw_equivalent_bytes"]
    assert metrics["turboserve_kv_budget_bytes"] == stats["kv_budget_bytes"]
    assert metrics["turboserve_kv_compression_ratio"] == pytest.approx(
        stats["raw_equivalent_bytes"] / stats["kv_bytes"]["total"], rel=1e-3
    )
    assert 0 < stats["tokens"] <= sum(c["tokens"] for c in stats["conversations"]), "shared tokens count once"
    assert stats["kv_bytes"]["total"] == int(stats["details"]["kv_allocated_bytes"])
    assert stats["raw_equivalent_bytes"] == stats["tokens"] * stats["bytes_per_token"]["raw"]
    assert metrics["turboserve_generation_tokens_total"] > 0


def test_the_stats_command_prints_them(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    ask(server, [say("Hello!")], max_tokens=4)
    stats = server.wait_until_idle()
    with pytest.raises(SystemExit) as ended:
        main(["stats", "--url", server.url])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"{stats['tokens']:,}" in printed
    assert f"{stats['raw_equivalent_bytes'] / stats['kv_bytes']['total']:.2f}x" in printed
    assert stats["conversations"][0]["id"] in printed
    with pytest.raises(SystemExit) as failed:
        main(["stats", "--url", f"http://127.0.0.1:{free_port()}"])
    assert failed.value.code == 1
    assert "turboserve serve" in capsys.readouterr().err


def test_metrics_pass_promtool(server: Server) -> None:
    promtool = shutil.which("promtool")
    text = server.get("/metrics").text
    assert len(list(text_string_to_metric_families(text))) > 10
    if promtool is None:
        pytest.importorskip("promtool", reason="Debian's package `prometheus` is not installed")
    # vLLM's names have the colons that Prometheus would leave to recording rules.
    own = "".join(line for line in text.splitlines(keepends=True) if "vllm:" not in line)
    done = subprocess.run([str(promtool), "check", "metrics"], input=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_prometheus_scrapes_the_server_with_our_configuration(server: Server, tmp_path: Path) -> None:
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.importorskip("prometheus", reason="Debian's package `prometheus` is not installed")
    target = server.url.removeprefix("http://")
    config = CONFIG.read_text()
    key_file = tmp_path / "key"
    key_file.write_text("any")
    for old, new in (("turboserve:8000", target), ("/run/secrets/turboserve_api_key", str(key_file)), (" 5s", " 1s")):
        assert old in config
        config = config.replace(old, new)
    (tmp_path / "prometheus.yml").write_text(config.replace("scrape_timeout: 4s", "scrape_timeout: 1s"))
    port = free_port()
    process = subprocess.Popen(
        [
            str(prometheus),
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        value = wait_for_sample(port, "turboserve_kv_budget_bytes")
    finally:
        process.terminate()
        process.wait(timeout=30)
    assert value == server.stats()["kv_budget_bytes"]


def wait_for_sample(port: int, name: str) -> float:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            reply = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": name}, timeout=5)
        except httpx.TransportError:
            reply = None  # not listening yet
        if reply is not None and reply.status_code != 503:  # 503: starting
            found = reply.raise_for_status().json()["data"]["result"]
            if found:
                return float(found[0]["value"][1])
        time.sleep(0.3)
    raise AssertionError(f"no sample of {name} arrived")
