"""KV memory of the server under load, from /v1/kv/stats; servers without it have none to show."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx

from turboserve.bench_client.asking import Target

INTERVAL_S = 0.25
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class KVSample:
    """What all KV caches take at one time, idle conversations included."""

    num_bytes: int
    raw_bytes: int
    num_tokens: int
    kv_format: str


async def sample(client: httpx.AsyncClient, target: Target) -> KVSample | None:
    """None when the server does not say."""
    try:
        reply = await client.get(f"{target.url}/kv/stats", headers=target.headers, timeout=TIMEOUT_S)
        stats = reply.raise_for_status().json()
        return KVSample(
            int(stats["kv_bytes"]["total"]),
            int(stats["raw_equivalent_bytes"]),
            int(stats["tokens"]),
            str(stats["kv_format"]),
        )
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


class KVWatch:
    """Remembers the largest sample while it runs, as a context; `start` is None for a server without figures."""

    def __init__(self, client: httpx.AsyncClient, target: Target) -> None:
        self._client, self._target = client, target
        self._task: asyncio.Task[None] | None = None
        self.start: KVSample | None = None
        self.peak: KVSample | None = None
        self.num_missed = 0

    async def __aenter__(self) -> KVWatch:
        self.start = self.peak = await sample(self._client, self._target)
        if self.start is not None:
            self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await asyncio.sleep(INTERVAL_S)  # statistics follow the engine within a quarter of a second
            await self._look()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._look()

    async def _look(self) -> None:
        seen = await sample(self._client, self._target)
        if seen is None:
            self.num_missed += 1
        elif self.peak is None or seen.num_bytes > self.peak.num_bytes:
            self.peak = seen
