"""`turboserve stats`: what a running server's conversations cost, from its /v1/kv/stats. Prints; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from turboserve.errors import StartupError

MAX_CONVERSATIONS = 20  # a screenful, largest first


def fetch(url: str, api_key: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """The statistics of the server at `url`. Raises StartupError with one line naming the fix."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        reply = httpx.get(f"{url.rstrip('/')}/v1/kv/stats", headers=headers, timeout=timeout_s)
        reply.raise_for_status()
        stats: dict[str, Any] = reply.json()
    except httpx.HTTPStatusError as exc:
        hint = "; set TURBOSERVE_API_KEY" if exc.response.status_code == 401 else ""
        raise StartupError(f"{url} answered {exc.response.status_code}{hint}") from exc
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
        raise StartupError(f"no turboserve answers at {url}: {exc}; start one with `turboserve serve`") from exc
    return stats


def lines(stats: Mapping[str, Any]) -> Iterator[str]:
    """The report: totals, then the largest conversations."""
    kv = stats["kv_bytes"]
    yield f"{stats['model']}  format {stats['kv_format']}  backend {stats['kv_backend']}  {stats['model_dtype']}"
    yield f"requests       {stats['requests']['running']} running, {stats['requests']['waiting']} waiting"
    yield f"tokens held    {stats['tokens']:,}"
    yield f"KV memory      {mib(kv['total'])} of {mib(stats['kv_budget_bytes'])} budget"
    kinds = ", ".join(f"{kind} {mib(kv[kind])}" for kind in ("compressed", "exact", "slack", "uncompressed"))
    yield f"               {kinds}"
    yield f"uncompressed   {mib(stats['raw_equivalent_bytes'])} would hold the same: {stats['ratio']:.2f}x"
    conversations = sorted(stats["conversations"], key=lambda c: int(c["kv_bytes"]["total"]), reverse=True)
    for c in conversations[:MAX_CONVERSATIONS]:
        state = c["tier"] if c["tier"] == "running" else f"idle {c['idle_s']:.0f} s"
        size = mib(c["kv_bytes"]["total"])
        yield f"  {c['id']}  {c['tokens']:>8,} tokens  {size:>11}  {c['ratio']:.2f}x  {c['hits']} hits  {state}"
    if len(conversations) > MAX_CONVERSATIONS:
        yield f"  and {len(conversations) - MAX_CONVERSATIONS} more"


def mib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"
