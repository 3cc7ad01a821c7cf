"""What drawing the next tokens costs: one step's sampling alone, and the embedded model's decode steps with it.

    python bench/sampling.py [--rounds 9] [--only steps] [--json FILE]

Sampling alone: B rows over vocabularies of SmolLM and Qwen sizes, greedy and at temperature 1 without and with top-p,
beside drawing row by row with a sort and a wait each, as it was once. Whole steps: answers of the embedded model in
float16 caches, and what top-p, masks and logprobs add to a greedy one. Sampling alone: medians of interleaved rounds.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from turboserve.engine.token_rules import Mask
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
STEP_TARGET = 1.05  # a decode step with top-p or masks, of a greedy one
END_OF_TURN = 8185  # of the embedded model, which is to go on
STEPS_A_ROUND = 4


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
        return lambda: mx.eval(*sampler.sample(logits).arrays())

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


class AllButTheEnd:
    """A rule whose mask is ready, so that what is measured is the engine's own part."""

    is_complete = False

    def __init__(self, num_words: int) -> None:
        self._mask = np.full(num_words, 0xFFFFFFFF, np.uint32)
        self._mask[END_OF_TURN // 32] &= ~np.uint32(1 << END_OF_TURN % 32)

    def fill(self, mask: Mask) -> bool:
        mask[:] = self._mask
        return True

    def accept(self, token: int) -> None:
        pass


@dataclass(frozen=True)
class Kind:
    """What all rows of a loop ask for."""

    name: str
    params: SamplingParams = GREEDY
    num_top: int | None = None
    has_rule: bool = False
    target: float | None = None  # of a greedy step


STEP_KINDS = (
    Kind("greedy"),
    Kind("temperature 1, top_p .95", KINDS["temperature 1, top_p .95"], target=STEP_TARGET),
    Kind("greedy, masks", has_rule=True, target=STEP_TARGET),
    Kind("greedy, logprobs", num_top=0),
    Kind("greedy, 5 top_logprobs", num_top=5),
    Kind("greedy, 20 top_logprobs", num_top=20),
)


def running_loop(batch: int, settings: Settings) -> StepLoop:
    """A loop of the embedded model whose rows all decode."""
    loop = StepLoop(build_parts(settings, lambda line: None), settings, NullTelemetry(), time.monotonic)
    for i in range(batch):
        sampling = replace(GREEDY, seed=i, logit_bias=((END_OF_TURN, -100.0),))
        messages = ({"role": "user", "content": f"Tell me story number {i}."},)
        request = Request(f"r{i}", messages, sampling=sampling, max_tokens=4000)
        loop.add(Generation(request, Nobody(), time.monotonic()))
    while loop.num_waiting or loop.runner.num_rows < batch:
        loop.step()
    return loop


def ask_for(kind: Kind, loop: StepLoop) -> None:
    """From the next draw on all rows are drawn this way."""
    for row in loop.requests.running:
        assert row.sampling is not None
        params = replace(kind.params, logit_bias=row.sampling.params.logit_bias)
        row.sampling = replace(row.sampling, params=params, num_top=kind.num_top)
        row.rule = AllButTheEnd(-(-loop.vocab_len // 32)) if kind.has_rule else None
    loop.runner._sampler = None


def step_rows(rounds: int) -> list[Row]:
    """Whole decode steps, and what each kind of drawing adds to one: its draws alone, less greedy ones, of a step.

    The least of all rounds, since what is sought is far below the differences between two steps.
    """
    rows = []
    for batch in BATCHES:
        loop = running_loop(batch, Settings(kv_format="f16", kv_budget="4GiB", max_running=batch))
        step_ms = least_ms(loop.step, rounds * STEPS_A_ROUND)
        label = f"decode step, embedded model, B={batch}"
        rows.append(Row.plain(f"{label}: greedy", step_ms, "ms"))
        drawn_ms = {kind: draw_ms(kind, loop, rounds * STEPS_A_ROUND) for kind in STEP_KINDS}
        for kind in STEP_KINDS[1:]:
            more_ms = drawn_ms[kind] - drawn_ms[STEP_KINDS[0]]
            target = kind.target and (kind.target - 1) * step_ms
            rows.append(Row.at_most(f"{label}: added by {kind.name}", more_ms, "ms", target, baseline=step_ms))
        print(f"decode steps, B={batch} done", flush=True)
    return rows


def draw_ms(kind: Kind, loop: StepLoop, num: int) -> float:
    """Filling the masks of all running rows, drawing and reading, from logits like a small model's."""
    ask_for(kind, loop)
    logits = mx.random.normal((loop.runner.num_rows, loop.vocab_len)) * 2
    mx.eval(logits)
    runner = loop.runner

    def draw() -> None:
        runner._draw(logits, runner._masks.fill(runner._rows, loop.vocab_len))

    return least_ms(draw, num)


def least_ms(call: Callable[[], Any], num: int) -> float:
    """Of so many calls, after one that warms up."""
    call()
    times = []
    for _ in range(num):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=("steps", "sampling"), help="this half alone")
    add_json_option(parser)
    args = parser.parse_args()
    rows = step_rows(args.rounds) if args.only != "sampling" else []
    rows += sampling_rows(args.rounds) if args.only != "steps" else []
    print_rows(rows)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
