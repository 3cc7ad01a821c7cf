"""A day in short: many requests of all kinds, while the server's memory and descriptors stay as they were.

    python -m tests.stress.day [--requests 100000] [--clients 8] [--seed N]

Short chats, chats in sessions that are deleted, streams that are left, bodies that are refused, counts and lists.
Memory is compared between the second and the last tenth: the first one fills caches up to their limits.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from tests.e2e.server import Server, running_server
from tests.stress.http_clients import Footprint, ask, stream_chat
from tests.stress.plan import CITIES, NAMES

NUM_SAMPLES = 100
MAX_GROWTH_BYTES = 48 << 20  # of RSS: allocators keep a little more with time, a leak of 1 KB a request takes 90 MB
MAX_MORE_DESCRIPTORS = 4
# So small that the first tenth fills it, and conversations make way from then on.
FLAGS = ("--kv-budget", "24MiB", "--max-queued", "1000", "--log-level", "warning")


@dataclass
class Day:
    """What was asked so far, and what the server held meanwhile."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    samples: list[Footprint] = field(default_factory=list)
    seconds: float = 0.0

    def tenth(self, number: int) -> float:
        """Median RSS of that tenth of the samples, in bytes."""
        size = max(1, len(self.samples) // 10)
        return median(sample.rss_bytes for sample in self.samples[number * size : (number + 1) * size])

    @property
    def growth_bytes(self) -> float:
        return self.tenth(9) - self.tenth(1)


def run_day(server: Server, num_requests: int, num_clients: int, seed: int) -> Day:
    """Raises AssertionError for a status that should not be, and for descriptors that stay open."""
    day = Day()
    began_s = time.monotonic()
    before = Footprint.of(server.process.pid)
    for part in range(NUM_SAMPLES):
        size = num_requests * (part + 1) // NUM_SAMPLES - num_requests * part // NUM_SAMPLES
        asyncio.run(_ask_many(server.url, day, size, num_clients, np.random.default_rng((seed, part))))
        day.samples.append(Footprint.of(server.process.pid))
    server.wait_until_idle()
    deadline = time.monotonic() + 30
    while (now := Footprint.of(server.process.pid)).num_descriptors > before.num_descriptors + MAX_MORE_DESCRIPTORS:
        assert time.monotonic() < deadline, f"{now.num_descriptors} descriptors instead of {before.num_descriptors}"
        time.sleep(0.1)
    day.seconds = time.monotonic() - began_s
    return day


async def _ask_many(url: str, day: Day, num_requests: int, num_clients: int, rng: np.random.Generator) -> None:
    kinds = [str(kind) for kind in rng.choice(list(KINDS), num_requests, p=list(KINDS.values()))]
    numbers = [int(number) for number in rng.integers(1 << 30, size=num_requests)]
    todo = iter(zip(kinds, numbers, strict=True))

    async def client() -> None:
        for kind, number in todo:
            day.statuses[kind, await _ask_one(url, kind, number)] += 1

    await asyncio.gather(*(client() for _ in range(num_clients)))


# How often each kind comes.
KINDS = {"chat": 0.45, "left": 0.1, "session": 0.1, "refused": 0.2, "count": 0.1, "list": 0.05}
EXPECTED = {"chat": 200, "left": 200, "session": 200, "refused": 400, "count": 200, "list": 200}


async def _ask_one(url: str, kind: str, number: int) -> int:
    """One request's status. Raises AssertionError when it is another than its kind has."""
    text = f"Call {number}. I am {NAMES[number % len(NAMES)]} of {CITIES[number % len(CITIES)]}."
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1 + number % 3}
    status, reply = 200, b""
    if kind == "left":
        await stream_chat(url, {**body, "max_tokens": 20}, leave_after=1 + number % 3)
    elif kind == "session":
        named = {**body, "session_id": f"day-{number}"}
        status, reply = await ask(url, "POST", "/v1/chat/completions", named)
        gone, _ = await ask(url, "DELETE", f"/v1/sessions/day-{number}")
        assert gone in (200, 204, 404), gone  # 404: it made way meanwhile
    elif kind == "refused":
        wrong = [b"{", b"[]", b'{"messages":[]}', b'{"messages":[{"role":"alien"}]}', b'{"max_tokens":-1}']
        status, reply = await ask(url, "POST", "/v1/chat/completions", wrong[number % len(wrong)])
    elif kind == "count":
        status, reply = await ask(url, "POST", "/tokenize", {"content": text})
    elif kind == "list":
        status, reply = await ask(url, "GET", "/v1/sessions?limit=20")
    else:
        status, reply = await ask(url, "POST", "/v1/chat/completions", body)
    assert status == EXPECTED[kind], (kind, status, reply[:500])
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/turboserve").expanduser())
    args = parser.parse_args()
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    print(f"seed {seed}")
    with running_server(args.cache_dir, *FLAGS) as server:
        day = run_day(server, args.requests, args.clients, seed)
    print(f"{sum(day.statuses.values())} requests in {day.seconds:.0f} s: {dict(day.statuses)}")
    rss = " ".join(f"{day.tenth(i) / (1 << 20):.0f}" for i in range(10))
    print(f"RSS by tenths in MiB: {rss}; growth {day.growth_bytes / (1 << 20):.1f} MiB")
    print(f"descriptors {day.samples[0].num_descriptors} to {day.samples[-1].num_descriptors}")
    assert day.growth_bytes <= MAX_GROWTH_BYTES, "memory grows"


if __name__ == "__main__":
    main()
