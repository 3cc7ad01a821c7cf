"""What `turboserve stats` prints of a reply of /v1/kv/stats."""

from __future__ import annotations

from dataclasses import replace

from turboquant_kv.kv_bytes import KVBytes
from turboserve.api.kv_replies import kv_statistics
from turboserve.cli import stats
from turboserve.messages import AdmissionStats, CacheEvents, ConversationStats, DiskStatus, EngineStats

MIB = 1 << 20
KV = KVBytes(tokens=100, compressed=3 * MIB, exact=MIB, raw_equivalent=16 * MIB)
BUSY = EngineStats(
    model_id="m",
    kv_format="4/3",
    kv_backend="b",
    model_dtype="float32",
    kv=KV,
    kv_budget_bytes=8 * MIB,
    kv_token_bytes=1.0,
    kv_token_raw_bytes=4.0,
    max_context_tokens=1,
    num_running=1,
    num_waiting=2,
    conversations=(ConversationStats("abc", "disk", KV, hits=3, idle_s=7.0, is_pinned=True),),
    num_conversations={"running": 1, "memory": 2, "disk": 1200},
    kv_committed_bytes=5 * MIB,
    events=CacheEvents(
        spills={"memory": 1200},
        refusals={"queue": 2, "budget": 1},
        prefix_query_tokens=200,
        prefix_hit_tokens=50,
        integrity_failures=1,
    ),
    admission=AdmissionStats(4, 110, 100, 0, 0),
    disk=DiskStatus(True, False, "read-only", 2 * MIB, 4 * MIB, 9),
)


def printed(engine_stats: EngineStats) -> str:
    return "\n".join(stats.lines(kv_statistics(engine_stats).model_dump()))


def test_a_busy_server() -> None:
    text = printed(BUSY)
    for words in (
        "1 running, 2 waiting",
        "4.0 MiB of 8.0 MiB budget, 5.0 MiB held or promised",
        "uncompressed   16.0 MiB would hold the same in float32: 4.00x",
        "conversations  1 running, 2 memory, 1,200 disk; ratios beside uncompressed in float32",
        "2.0 MiB of 4.0 MiB in 9 files; nothing is written: read-only",
        "50 of 200 found in kept caches (25%)",
        "spills         1,200 memory",
        "refusals       1 budget, 2 queue",
        "+10.0% reserved over used, 4 requests",
        "1 checks FAILED",
        "1 running, 2 memory, 1,200 disk",
        "abc       100 tokens      4.0 MiB  4.00x  3 hits  disk, idle 7 s, pinned",
        "and 1,202 more",
    ):
        assert words in text
    assert "evictions" not in text, "what never happened is left out"


def test_an_idle_server() -> None:
    idle = replace(
        BUSY,
        kv=KVBytes(),
        conversations=(),
        num_conversations={},
        events=CacheEvents(),
        admission=AdmissionStats(),
        disk=DiskStatus(),
    )
    text = printed(idle)
    assert "disk           off" in text and "0 of 0 found" in text and "0 running, 0 memory, 0 disk" in text
    assert "FAILED" not in text and "admission" not in text and "more" not in text


def test_of_several_models_each_is_shown() -> None:
    one = kv_statistics(BUSY).model_dump()
    shown = [
        {"model": "m", "status": "loaded", "statistics": one},
        {"model": "n", "status": "failed", "statistics": None},
    ]
    listed = {"object": "kv.stats.list", "memory_bytes": 3 * MIB, "memory_budget_bytes": 9 * MIB, "data": shown}
    lines = list(stats.lines(listed))
    assert lines[0] == "processes      3.0 MiB of 9.0 MiB for all models"
    assert lines[2:-2] == list(stats.lines(one))
    assert lines[-1] == "n  failed"
