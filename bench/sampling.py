"""What drawing the next tokens costs: one step's sampling alone, and the embedded model's decode steps with it.

    python bench/sampling.py [--rounds 9] [--json FILE]

Sampling alone: B rows over vocabularies of SmolLM and Qwen sizes, greedy and at temperature 1 without and with top-p,
beside drawing row by row with a sort and a wait each, as it was once. Whole steps: answers of the embedded model in
float16 caches, with top-p beside greedy. Medians of interleaved rounds in one run.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

import mlx.core as mx

from turboserve.engine.generation import Generation
from turboserve.engine.loading import build_parts
from turboserve.engine.protocol import NullTelemetry
from turboserve.engine.sampling import BatchSampler, row_sampling
from turboserve.engine.step_loop import StepLoop
from turboserve.messages import Event, Request, SamplingParams
from turboserve.settings import Settings

BATCHES = (1, 8, 32)
VOCABULARIES = (49152, 151936)
GREEDY = SamplingParams(temperature=0.0)
KINDS = {
    "greedy": GREEDY,
    "temperature 1": SamplingParams(temperature=1.0),
    "temperature 1, top_p .95": SamplingParams(temperature=1.0, top_p=0.95),
    "temperature 1, top_k 20, top_p .95": SamplingParams(temperature=1.0, top_k=20, top_p=0.95),
    "greedy, presence_penalty 1": SamplingParams(temperature=0.0, presence_penalty=1.0),
}
STEP_TARGET = 1.05  # a decode step with top-p, of a greedy one
END_OF_TURN = 8185  # of the embedded model, which is to go on
STEPS_A_ROUND = 12


def row_by_row(logits: mx.array, params: SamplingParams, keys: list[mx.array]) -> None:
    """How tokens were drawn before: every row by itself, sorted, and waited for."""
    for i, key in enumerate(keys):
        scaled = logits[i] / params.temperature
        if params.top_p == 1.0:
            int(mx.random.categorical(scaled, key=key))
            continue
        order = mx.argsort(-scaled)
        ranked = scaled[order]
        before = mx.cumsum(mx.softmax(ranked), inclusive=False)
        ranked = mx.where(before < params.top_p, ranked, -float("inf"))
        int(order[mx.random.categorical(ranked, key=key)])


def sampler_of(params: SamplingParams, batch: int, vocabulary: int) -> BatchSampler:
    sampler = BatchSampler()
    for seed in range(batch):
        sampler.join(row_sampling(replace(params, seed=seed), vocabulary), [1, 2, 3], [])
    return sampler


def step_calls(batch: int, vocabulary: int) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """One step's sampling of every kind, and row by row."""
    rng = np.random.default_rng(batch)
    # As flat as a small model's logits at the beginning of a sentence: top-p .95 keeps thousands of tokens.
    logits = mx.array(rng.normal(scale=2.0, size=(batch, vocabulary)).astype(np.float32))
    keys = [mx.random.key(i) for i in range(batch)]
    mx.eval(logits, keys)

    def batched(params: SamplingParams) -> Callable[[], Any]:
        sampler = sampler_of(params, batch, vocabulary)
        return lambda: mx.eval(sampler.sample(logits).tokens)

    def alone(params: SamplingParams) -> Callable[[], Any]:
        return lambda: row_by_row(logits, params, keys)

    new = {name: batched(params) for name, params in KINDS.items()}
    old = {name: alone(KINDS[name]) for name in ("temperature 1", "temperature 1, top_p .95")}
    return new, old


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call; rounds are interleaved, so a busy moment hits all. The first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def sampling_rows(rounds: int) -> list[Row]:
    rows = []
    for vocabulary in VOCABULARIES:
        for batch in BATCHES:
            new, old = step_calls(batch, vocabulary)
            measured = medians({**new, **{f"{name} (row by row)": call for name, call in old.items()}}, rounds)
            label = f"sampling, B={batch} V={vocabulary}"
            for name in new:
                before = measured.get(f"{name} (row by row)")
                rows.append(Row.plain(f"{label}: {name}", 1e3 * measured[name], "ms", before and 1e3 * before))
            print(f"{label} done", flush=True)
    return rows


class Nobody:
    """A reader that looks at nothing."""

    def put(self, event: Event) -> None:
        pass


def running_loop(params: SamplingParams, batch: int, settings: Settings) -> StepLoop:
    """A loop of the embedded model whose rows all decode."""
    loop = StepLoop(build_parts(settings, lambda line: None), settings, NullTelemetry(), time.monotonic)
    for i in range(batch):
        sampling = replace(params, seed=i, logit_bias=((END_OF_TURN, -100.0),))
        messages = ({"role": "user", "content": f"Tell me story number {i}."},)
        request = Request(f"r{i}", messages, sampling=sampling, max_tokens=4000)
        loop.add(Generation(request, Nobody(), time.monotonic()))
    while loop.num_waiting or loop.runner.num_rows < batch:
        loop.step()
    return loop


def step_rows(rounds: int) -> list[Row]:
    """Whole decode steps with top-p and greedy, alternating."""
    rows = []
    for batch in BATCHES:
        settings = Settings(kv_format="f16", kv_budget="4GiB", max_running=batch)
        kinds = {name: KINDS[name] for name in ("greedy", "temperature 1, top_p .95")}
        loops = {name: running_loop(params, batch, settings) for name, params in kinds.items()}
        times: dict[str, list[float]] = {name: [] for name in loops}
        for i in range(rounds * STEPS_A_ROUND + 2):
            for name, loop in loops.items():
                started = time.perf_counter()
                loop.step()
                if i >= 2:  # the first ones warm up
                    times[name].append(1e3 * (time.perf_counter() - started))
        greedy, top_p = (statistics.median(times[name]) for name in loops)
        label = f"decode step, embedded model, B={batch}"
        rows.append(Row.plain(f"{label}: greedy", greedy, "ms"))
        rows.append(
            Row.at_most(f"{label}: temperature 1, top_p .95", top_p, "ms", STEP_TARGET * greedy, baseline=greedy)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    add_json_option(parser)
    args = parser.parse_args()
    rows = [*step_rows(args.rounds), *sampling_rows(args.rounds)]
    print_rows(rows)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
