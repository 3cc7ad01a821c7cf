"""Two hundred streaming chats at once, half of whose clients leave in the middle; the others notice nothing.

    python -m tests.stress.streams [--clients 200] [--seed N]

Every chat that is read to its end has the text that the same chat has alone; afterwards nothing runs or waits, all
descriptors are closed, and the server answers.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tests.e2e.server import Server, running_server
from tests.stress.http_clients import Footprint, stream_chat
from tests.stress.plan import CITIES, NAMES, QUESTIONS

NUM_DIFFERENT = 20
MAX_TOKENS = 24
# Greedy answers part where two tokens are as good as each other (run.py measures these cases one by one).
MAX_PARTED_SHARE = 0.05
MAX_MORE_DESCRIPTORS = 4


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a run that passed."""

    num_whole: int
    num_left: int
    num_parted: int
    seconds: float
    before: Footprint
    after: Footprint


def run_streams(server: Server, num_clients: int, seed: int) -> Figures:
    """Raises AssertionError for what is wrong."""
    return asyncio.run(_run_streams(server, num_clients, np.random.default_rng(seed)))


async def _run_streams(server: Server, num_clients: int, rng: np.random.Generator) -> Figures:
    bodies = [_body(rng, i) for i in range(min(NUM_DIFFERENT, num_clients))]
    alone = [await stream_chat(server.url, body, None) for body in bodies]
    assert all(answer.is_whole for answer in alone)
    await asyncio.to_thread(server.wait_until_idle)
    before = Footprint.of(server.process.pid)
    leaves = [int(rng.integers(1, MAX_TOKENS // 2)) if i % 2 else None for i in range(num_clients)]
    began_s = time.monotonic()
    found = await asyncio.gather(
        *(stream_chat(server.url, bodies[i % len(bodies)], leave) for i, leave in enumerate(leaves))
    )
    seconds = time.monotonic() - began_s
    await asyncio.to_thread(server.wait_until_idle)
    stayed = [(answer, alone[i % len(bodies)]) for i, answer in enumerate(found) if leaves[i] is None]
    for answer, wanted in stayed:
        assert answer.is_whole and answer.finish_reason == wanted.finish_reason, (answer, wanted)
    parted = [(answer.text, wanted.text) for answer, wanted in stayed if answer.text != wanted.text]
    assert len(parted) <= MAX_PARTED_SHARE * len(stayed), parted[:3]
    after = await _settled(server.process.pid, before.num_descriptors + MAX_MORE_DESCRIPTORS)
    assert (await stream_chat(server.url, bodies[0], None)).is_whole
    return Figures(len(stayed), len(found) - len(stayed), len(parted), seconds, before, after)


def _body(rng: np.random.Generator, number: int) -> dict[str, Any]:
    """A chat of its own: the number keeps answers apart."""
    text = f"Chat {number}. My name is {rng.choice(NAMES)} and I live in {rng.choice(CITIES)}. {rng.choice(QUESTIONS)}"
    return {"messages": [{"role": "user", "content": text}], "max_tokens": MAX_TOKENS, "temperature": 0}


async def _settled(pid: int, most_descriptors: int) -> Footprint:
    """Once connections that were left are closed. Raises AssertionError when they stay open."""
    deadline = time.monotonic() + 30
    while (footprint := Footprint.of(pid)).num_descriptors > most_descriptors:
        assert time.monotonic() < deadline, f"{footprint.num_descriptors} descriptors stay open"
        await asyncio.sleep(0.1)
    return footprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/turboserve").expanduser())
    args = parser.parse_args()
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    print(f"seed {seed}")
    with running_server(args.cache_dir, "--max-queued", "1000") as server:
        print(run_streams(server, args.clients, seed))


if __name__ == "__main__":
    main()
