"""Health, readiness, models, KV statistics and the metrics page."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.turboserve.api.conftest import Ask, Service, error_of
from tests.turboserve.api.scripted import MODEL_ID

from turboquant_kv.kv_bytes import KVBytes
from turboserve.api.vllm_metrics import SAME
from turboserve.messages import ConversationStats
from turboserve.telemetry import INTER_TOKEN_BUCKETS_S, Telemetry


def samples(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_health_and_ready(client: httpx.Client) -> None:
    for method in ("GET", "HEAD"):
        assert client.request(method, "/health").status_code == 200
    assert client.get("/ready").json() == {"status": "ready", "model": MODEL_ID}


def test_ready_tells_why_not(client: httpx.Client, service: Service) -> None:
    try:
        service.engine.unready = "the model is still being loaded"
        reply = client.get("/ready")
        assert reply.status_code == 503
        error = error_of(reply)
        told = "The engine is not ready: the model is still being loaded. Try again in 5 seconds."
        assert (error["code"], error["message"]) == ("engine_unavailable", told)
        assert client.get("/health").status_code == 200
        assert samples(client.get("/metrics").text)["turboserve_ready", ()] == 0
    finally:
        service.engine.unready = None


def test_models(client: httpx.Client) -> None:
    listing = client.get("/v1/models").json()
    assert listing["object"] == "list" and [entry["id"] for entry in listing["data"]] == [MODEL_ID]
    assert client.get(f"/v1/models/{MODEL_ID}").json() == listing["data"][0]


def test_root_names_the_routes(client: httpx.Client) -> None:
    assert "POST /v1/chat/completions" in client.get("/").json()["routes"]


def test_kv_stats(client: httpx.Client) -> None:
    stats = client.get("/v1/kv/stats").json()
    assert stats["model"] == MODEL_ID and stats["kv_format"] == "4/3"
    assert stats["bytes_per_token"] == {"compressed": 4.0, "raw": 16.0}
    assert stats["layers"] == {"compressed": 4, "uncompressed": 1}
    kinds = stats["kv_bytes"]
    assert kinds["total"] == kinds["compressed"] + kinds["exact"] + kinds["slack"] + kinds["uncompressed"] == 400
    assert stats["ratio"] == stats["raw_equivalent_bytes"] / kinds["total"] == 4.0
    first, second = stats["conversations"]
    assert (first["id"], first["tier"], first["hits"], first["idle_s"]) == ("c1", "memory", 2, 1.5)
    assert (first["kv_format"], first["pinned"], first["explicit"], first["disk_bytes"]) == ("4/3", True, False, 0)
    assert second["tier"] == "running" and second["kv_bytes"]["total"] == 400
    assert stats["num_conversations"] == {"running": 1, "memory": 1, "disk": 3}
    assert (stats["kv_committed_bytes"], stats["kv_scratch_bytes"]) == (900, 50)
    assert stats["prefix_tokens"] == {"queried": 120, "hit": 80}
    assert stats["events"]["evictions"] == {"memory": 4, "ttl": 1} and stats["events"]["spills"] == {}
    assert stats["admission"]["last"] == {"estimated_bytes": 1000, "actual_bytes": 800}
    assert stats["disk"]["reason"] == "No space left on device." and stats["disk"]["kv_bytes"]["total"] == 400


def test_kv_stats_and_metrics_stay_bounded(client: httpx.Client, service: Service) -> None:
    """A thousand conversations are counted, the largest are shown."""

    def held(index: int) -> ConversationStats:
        return ConversationStats(f"c{index}", "memory", KVBytes(tokens=index, exact=index), hits=0, idle_s=0.0)

    try:
        service.engine.extra = tuple(held(index) for index in range(1000))
        shown = client.get("/v1/kv/stats").json()["conversations"]
        assert [entry["id"] for entry in shown] == [f"c{999 - rank}" for rank in range(20)]
        page = samples(client.get("/metrics").text)
        ranks = {labels for name, labels in page if name.startswith("turboserve_session_")}
        assert ranks == {(("rank", str(rank)),) for rank in range(1, 11)}
        assert page["turboserve_session_kv_bytes", (("rank", "2"),)] == 998
        assert not [labels for _, labels in page for label, value in labels if value.startswith("c99")]
    finally:
        service.engine.extra = ()


def test_metrics_count_and_measure(ask: Ask, client: httpx.Client, service: Service) -> None:
    label = (("route", "/v1/chat/completions"), ("status", "400"))
    before = samples(client.get("/metrics").text).get(("turboserve_http_requests_total", label), 0)
    assert ask(n=0).status_code == 400
    page = samples(client.get("/metrics").text)
    assert page["turboserve_http_requests_total", label] == before + 1
    assert page["turboserve_kv_bytes", (("kind", "compressed"),)] == 300
    assert page["turboserve_kv_compression_ratio", ()] == 4
    assert page["turboserve_kv_budget_bytes", ()] == 4000
    assert page["turboserve_kv_cache_usage_ratio", ()] == 0.1
    assert page["turboserve_kv_conversations", (("tier", "memory"),)] == 1
    assert page["turboserve_kv_conversations", (("tier", "disk"),)] == 3
    assert page["turboserve_kv_evictions_total", (("reason", "ttl"),)] == 1
    assert page["turboserve_kv_admission_last_error_ratio", ()] == 0.25
    assert page["turboserve_kv_store_bytes", ()] == 700 and page["turboserve_kv_store_writable", ()] == 0
    assert page["turboserve_kv_store_held_bytes", (("kind", "compressed"),)] == 300
    assert page["turboserve_kv_committed_bytes", ()] == 900
    assert page["turboserve_kv_integrity_failures_total", ()] == 0
    verdict = ("fused", "gpu-metal"), ("outcome", "slower"), ("taken", "mlx-ops")
    assert page["turboserve_kv_kernel_trial", verdict] == 1
    assert page["turboserve_kv_kernel_trial_step_seconds", (("backend", "gpu-metal"), ("tokens", "1024"))] == 2e-4
    assert page["turboserve_rows_apart", ()] == 1
    assert page["turboserve_num_requests_running", ()] == 0


def test_engine_calls_show_on_the_page() -> None:
    telemetry = Telemetry()
    telemetry.add_prompt_tokens(100, 60)
    telemetry.add_generation_tokens(7)
    telemetry.add_draft_tokens(9, 4)
    telemetry.request_finished("stop")
    telemetry.request_failed("engine_failure")
    telemetry.request_refused("queue_full")
    telemetry.request_cancelled("prefill")
    for observe in (telemetry.observe_ttft, telemetry.observe_e2e):
        observe(0.02)
    telemetry.observe_queue_time(0.001)
    page = samples(telemetry.exposition().decode())
    assert page["turboserve_prompt_tokens_total", ()] == page["turboserve_prefix_cache_queries_total", ()] == 100
    assert page["turboserve_prefix_cache_hits_total", ()] == 60
    assert page["turboserve_generation_tokens_total", ()] == 7
    assert page["turboserve_draft_tokens_total", ()] == 9
    assert page["turboserve_accepted_draft_tokens_total", ()] == 4
    assert page["turboserve_request_success_total", (("finished_reason", "stop"),)] == 1
    assert page["turboserve_request_cancelled_total", (("stage", "prefill"),)] == 1
    assert page["turboserve_time_to_first_token_seconds_count", ()] == 1
    assert page["turboserve_request_queue_time_seconds_sum", ()] == pytest.approx(0.001)


@given(st.lists(st.tuples(st.one_of(st.floats(0, 10), st.sampled_from(INTER_TOKEN_BUCKETS_S)), st.integers(1, 99))))
def test_tokens_of_one_moment_are_counted_as_if_each_were_told(groups: list[tuple[float, int]]) -> None:
    telemetry, registry = Telemetry(), CollectorRegistry()
    name = "turboserve_inter_token_latency_seconds"
    single = Histogram(
        name, "Time between two tokens of one request.", buckets=INTER_TOKEN_BUCKETS_S, registry=registry
    )
    for seconds, num_requests in groups:
        telemetry.observe_inter_token(seconds, num_requests)
        for _ in range(num_requests):
            single.observe(seconds)
    ours = [line for line in telemetry.exposition().decode().splitlines() if name in line]
    expected = generate_latest(registry).decode().splitlines()
    assert [line for line in ours if "_sum" not in line] == [line for line in expected if "_sum" not in line]
    sums = [float(line.split()[1]) for line in (*ours, *expected) if "_sum" in line]
    assert sums[0] == pytest.approx(sums[1])


def test_vllms_names_say_what_ours_say(ask: Ask, client: httpx.Client, service: Service) -> None:
    """Each series of vLLM's name equals ours, but for `model_name` and for reasons that vLLM has no word for."""
    ask()
    service.telemetry.request_finished("stop")
    service.telemetry.request_finished("tool_calls")
    service.telemetry.observe_ttft(0.3)
    service.telemetry.add_draft_tokens(5, 2)
    page = samples(client.get("/metrics").text)
    model = ("model_name", MODEL_ID)
    twins = {**SAME, "turboserve_num_requests_running": "vllm:num_requests_running"}
    twins["turboserve_num_requests_waiting"] = "vllm:num_requests_waiting"
    num_compared = 0
    for (name, labels), value in page.items():
        ours = next((ours for ours in twins if re.fullmatch(ours + "(_total|_bucket|_sum|_count)?", name)), None)
        if ours is not None:
            assert page[twins[ours] + name.removeprefix(ours), tuple(sorted((*labels, model)))] == value, name
            num_compared += 1
    assert num_compared > 60 and page["vllm:spec_decode_num_draft_tokens_total", (model,)] >= 5
    stops = [page["turboserve_request_success_total", (("finished_reason", r),)] for r in ("stop", "tool_calls")]
    assert page["vllm:request_success_total", (("finished_reason", "stop"), model)] == sum(stops)
    preemptions = [value for (name, _), value in page.items() if name == "turboserve_kv_preemptions_total"]
    assert page["vllm:num_preemptions_total", (model,)] == sum(preemptions)


def test_metrics_page_is_valid(ask: Ask, client: httpx.Client) -> None:
    ask()
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(reply.text))
    assert all(family.documentation for family in families)
    assert len({family.name for family in families}) == len(families)
    promtool = shutil.which("promtool")
    if promtool:  # Prometheus' own linter, where it is installed
        # vLLM's own names have colons, which the linter keeps for recording rules.
        ours = "".join(line for line in reply.text.splitlines(keepends=True) if "vllm:" not in line)
        check = subprocess.run([promtool, "check", "metrics"], input=ours, text=True, capture_output=True)
        assert check.returncode == 0, check.stdout + check.stderr


def test_scanning_paths_does_not_grow_the_labels(client: httpx.Client) -> None:
    def num_series() -> int:
        return sum(name == "turboserve_http_requests_total" for name, _ in samples(client.get("/metrics").text))

    client.get("/scan/0")
    client.get("/metrics")
    before = num_series()
    for index in range(20):
        client.get(f"/scan/{index}")
        client.get(f"/v1/models/none-{index}")
    assert num_series() <= before + 1


def test_the_http_layer_imports_no_mlx() -> None:
    code = (
        "import sys, turboserve.api.app, turboserve.api.http_server; "
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy'}; "
        "sys.exit(','.join(heavy & {name.split('.')[0] for name in sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
