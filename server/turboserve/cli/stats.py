"""`turboserve stats`: what a running server's conversations cost, from its /v1/kv/stats. Prints; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from turboserve.cli.figures import mib, uncompressed_in

EVENT_KINDS = ("evictions", "requantisations", "spills", "restores", "preemptions", "refusals")


def lines(stats: Mapping[str, Any]) -> Iterator[str]:
    """The report: totals, then what happened, then the largest conversations; of several models one after another."""
    if stats["object"] == "kv.stats.list":
        yield f"processes      {mib(stats['memory_bytes'])} of {mib(stats['memory_budget_bytes'])} for all models"
        for one in stats["data"]:
            yield ""
            yield from lines(one["statistics"]) if one["statistics"] else [f"{one['model']}  {one['status']}"]
        return
    yield f"{stats['model']}  format {stats['kv_format']}  backend {stats['kv_backend']}  {stats['model_dtype']}"
    yield f"requests       {stats['requests']['running']} running, {stats['requests']['waiting']} waiting"
    yield from _memory(stats)
    yield from _disk(stats["disk"])
    yield from _history(stats)
    yield from _conversations(stats)


def _memory(stats: Mapping[str, Any]) -> Iterator[str]:
    kv = stats["kv_bytes"]
    yield f"tokens held    {stats['tokens']:,}"
    committed = f"{mib(stats['kv_committed_bytes'])} held or promised"
    yield f"KV memory      {mib(kv['total'])} of {mib(stats['kv_budget_bytes'])} budget, {committed}"
    kinds = ", ".join(f"{kind} {mib(kv[kind])}" for kind in ("compressed", "exact", "slack", "uncompressed"))
    yield f"               {kinds}"
    raw = f"{mib(stats['raw_equivalent_bytes'])} would hold the same in {stats['model_dtype']}"
    yield f"uncompressed   {raw}: {stats['ratio']:.2f}x"


def _disk(disk: Mapping[str, Any]) -> Iterator[str]:
    if not disk["enabled"]:
        yield "disk           off" + (f": {disk['reason']}" if disk["reason"] else "")
        return
    state = "" if disk["writable"] else f"; nothing is written: {disk['reason']}"
    yield f"disk           {mib(disk['bytes'])} of {mib(disk['limit_bytes'])} in {disk['entries']} files{state}"


def _history(stats: Mapping[str, Any]) -> Iterator[str]:
    """Since start; kinds that never happened are left out."""
    prefix = stats["prefix_tokens"]
    share = prefix["hit"] / prefix["queried"] if prefix["queried"] else 0.0
    yield f"prompt tokens  {prefix['hit']:,} of {prefix['queried']:,} found in kept caches ({share:.0%})"
    for kind in EVENT_KINDS:
        reasons = stats["events"][kind]
        if reasons:
            yield f"{kind:<14} " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
    seen = stats["admission"]
    if seen["actual_bytes"]:
        over = seen["estimated_bytes"] / seen["actual_bytes"] - 1
        yield f"admission      {over:+.1%} reserved over used, {seen['requests']:,} requests"
    if stats["integrity_failures"]:
        yield f"integrity      {stats['integrity_failures']} checks FAILED; please report this"


def _conversations(stats: Mapping[str, Any]) -> Iterator[str]:
    shown = stats["conversations"]
    by_tier = ", ".join(f"{count:,} {tier}" for tier, count in stats["num_conversations"].items())
    beside = f"; ratios beside {uncompressed_in([stats['model_dtype']])}" if shown else ""
    yield f"conversations  {by_tier}{beside}"
    for c in shown:
        state = c["tier"] if c["tier"] == "running" else f"{c['tier']}, idle {c['idle_s']:.0f} s"
        state += ", pinned" if c["pinned"] else ""
        num_bytes = mib(c["kv_bytes"]["total"])
        yield f"  {c['id']}  {c['tokens']:>8,} tokens  {num_bytes:>11}  {c['ratio']:.2f}x  {c['hits']} hits  {state}"
    more = sum(stats["num_conversations"].values()) - len(shown)
    if more > 0:
        yield f"  and {more:,} more"
