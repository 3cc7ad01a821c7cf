"""What the cache memory costs: its share of a decode step, and looking up a long prefix among many sessions.

    python bench/manager.py --json manager.json

The embedded model decodes 32 conversations while 1,000 others are stored. Stored ones are forks of one conversation of
random keys and values under token lists of their own, which is what the memory sees of any session: pages, exact
ends, tokens. The share counts admission, growing leases, and the statistics that are published four times a second.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

from end_to_end import fill

from turboserve.cache.memory import Ask, Lease, Memory, Start
from turboserve.engine.engine import SNAPSHOT_INTERVAL_S
from turboserve.engine.generation import Generation
from turboserve.engine.loading import build_parts
from turboserve.engine.protocol import NullTelemetry
from turboserve.engine.step_loop import StepLoop
from turboserve.messages import Event, Request, SamplingParams
from turboserve.settings import Settings

SHARE_TARGET = 0.03
LOOKUP_TARGET_S = 0.002
NUM_RUNNING, NUM_STORED, NUM_STEPS = 32, 1000, 40
PREFIX_TOKENS = 16_000  # the embedded model's context is 16,384
VOCABULARY = 8000
END_OF_TURN = 8185


class Nobody:
    """Reads no answer."""

    def put(self, event: Event) -> None:
        return


class Stopwatch:
    """Replaces an object's method by itself, timed."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds, self._work = 0.0, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._work(*args)
        finally:
            self.seconds += time.perf_counter() - started


def lease_for(memory: Memory, session_id: str | None, prompt: list[int], num_tokens: int, now_s: float) -> Lease:
    """Verdict and lease of one caller's request; there must be room."""
    ask = Ask(Request("", (), tenant="me", session_id=session_id), prompt, num_tokens)
    verdict = memory.verdict(ask, now_s)
    assert isinstance(verdict, Start)
    lease = memory.carry_out(verdict, now_s)
    assert lease is not None
    return lease


def store_sessions(memory: Memory, model: Any, num_sessions: int, shared_tokens: int) -> np.ndarray[Any, Any]:
    """Idle sessions of one caller that begin alike and go their own ways; returns the common beginning."""
    rng = np.random.default_rng(1)
    runtime = memory.family.runtime(memory.family.default)
    parent = fill(runtime, model, shared_tokens + 64)  # type: ignore[arg-type]
    common = rng.integers(0, VOCABULARY, shared_tokens).astype(np.int32)
    for index in range(num_sessions):
        own = rng.integers(0, VOCABULARY, 64).astype(np.int32)
        lease = lease_for(memory, f"s{index}", own.tolist(), shared_tokens + 64, float(index))
        runtime.release(lease.caches)
        tokens = np.concatenate([common, own]).tolist()
        memory.keep(lease, tokens, runtime.fork(parent, shared_tokens + 64), float(index))
    runtime.release(parent)
    return common


def lookup_rows(memory: Memory, common: np.ndarray[Any, Any], rounds: int) -> list[Row]:
    """From a prompt to a lease on what was found, and giving it back."""
    rng = np.random.default_rng(2)
    times = []
    for _ in range(rounds):
        prompt = [*common.tolist(), *rng.integers(0, VOCABULARY, 40).tolist()]
        started = time.perf_counter()
        lease = lease_for(memory, None, prompt, len(prompt) + 40, NUM_STORED + 1.0)
        times.append(time.perf_counter() - started)
        assert lease.cached_len > PREFIX_TOKENS - 200
        memory.drop(lease, lease.caches)
    label = f"finding and leasing a prefix of {len(common)} tokens among {NUM_STORED}"
    return [Row.at_most(label, statistics.median(times), "s", LOOKUP_TARGET_S)]


def step_rows(loop: StepLoop, num_stored: int) -> list[Row]:
    """Whole steps, and the memory's part of them."""
    for index in range(NUM_RUNNING):
        loop.add(Generation(endless_request(index), Nobody(), time.monotonic()))
    while loop.num_waiting or loop.runner.num_rows < NUM_RUNNING:
        loop.step()
    watches = [Stopwatch(loop, "_admit"), Stopwatch(loop, "_grow")]
    steps = [seconds(loop.step) for _ in range(NUM_STEPS)]
    snapshot_s = statistics.median(seconds(loop.snapshot) for _ in range(10))
    step_s = statistics.mean(steps)
    share = sum(watch.seconds for watch in watches) / sum(steps) + snapshot_s / SNAPSHOT_INTERVAL_S
    label = f"{NUM_RUNNING} running, {num_stored} stored"
    return [
        Row.plain(f"decode step, {label}", step_s, "s"),
        Row.plain(f"statistics, {label}", snapshot_s, "s"),
        Row.at_most(f"manager's share of a step, {label}", share, "", SHARE_TARGET),
    ]


def endless_request(index: int) -> Request:
    return Request(
        request_id=f"r{index}",
        messages=({"role": "user", "content": f"Tell me story number {index}."},),
        sampling=SamplingParams(temperature=0.0, logit_bias=((END_OF_TURN, -100.0),)),
        max_tokens=2000,
        tenant="me",
    )


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    add_json_option(parser)
    args = parser.parse_args()
    settings = Settings(kv_format="4/3", kv_budget="16GiB", max_running=NUM_RUNNING)
    parts = build_parts(settings, lambda line: None)
    loop = StepLoop(parts, settings, NullTelemetry(), time.monotonic)
    common = store_sessions(parts.memory, parts.loaded.model, NUM_STORED, PREFIX_TOKENS)
    rows = lookup_rows(parts.memory, common, args.rounds)
    rows += step_rows(loop, NUM_STORED)
    print_rows(rows)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
