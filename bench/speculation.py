"""Speculative decoding beside plain decoding: tokens per second of the same answers, in one process, round by round.

    PYTHONPATH=.:kernels:server python bench/speculation.py MODEL_FOLDER --json speculation.json
    PYTHONPATH=.:kernels:server python bench/speculation.py MODEL_FOLDER --draft DRAFT_FOLDER --streams 1 4

Three tasks: code copied with a change, a text summed up in its own words (both greedy), and a story (sampled), by one
stream and by several at once. Answers end by themselves, or after a number of tokens; timing begins when all
prompts have been read. Rounds of both kinds take turns, so that a ratio compares neighbours in time; figures are
medians. `same` is the share of answers that are equal token by token: rounding of a wider product may decide a tie.
Without a folder the embedded model is measured. Owns the tasks and the rows; the engine's step loop does the work.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

from turboserve.engine.generation import Generation
from turboserve.engine.loading import build_parts
from turboserve.engine.protocol import NullTelemetry
from turboserve.engine.speculation import Speculation
from turboserve.engine.speculation_choice import new_speculation
from turboserve.engine.step_loop import StepLoop
from turboserve.messages import Event, Failed, Request, SamplingParams
from turboserve.models.tiny.prompts import load_texts
from turboserve.settings import Settings

COPY_TARGET = 1.3  # tokens per second by those without, of one stream that copies
FREE_TARGET = 0.95  # the same where there is nothing to look up
CODE = '''def report(orders, rate):
    """Sum up orders by customer, with tax."""
    totals = {}
    for order in orders:
        customer = order["customer"]
        amount = order["price"] * order["count"]
        if customer not in totals:
            totals[customer] = {"net": 0.0, "tax": 0.0, "orders": 0}
        totals[customer]["net"] += amount
        totals[customer]["tax"] += amount * rate
        totals[customer]["orders"] += 1
    lines = []
    for customer, total in sorted(totals.items()):
        gross = total["net"] + total["tax"]
        lines.append(f"{customer}: {total['orders']} orders, {gross:.2f} in all")
    return "\\n".join(lines)
'''
GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, top_p=0.95, seed=1)


def tasks() -> dict[str, tuple[str, SamplingParams]]:
    """What is asked, and how answers are drawn."""
    text = " ".join(load_texts()[5].text.split()[:300])
    return {
        "copy": (f"Copy this code and rename `rate` to `tax_rate`. Answer with the code only.\n\n{CODE}", GREEDY),
        "summarise": (f"Sum this up, and quote its most important sentences.\n\n{text}", GREEDY),
        "story": ("Tell a story about a lighthouse keeper and a storm.", SAMPLED),
    }


class Answer:
    """Counts what comes."""

    def __init__(self) -> None:
        self.failed: Failed | None = None

    def put(self, event: Event) -> None:
        if isinstance(event, Failed):
            self.failed = event


class Bench:
    """One loaded model, asked with and without speculation."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        parts = build_parts(settings, lambda line: print(line, flush=True))
        self.settings, self.parts, self.clock = settings, parts, clock
        self.loop = StepLoop(parts, settings, NullTelemetry(), time.monotonic)
        self._number = self.num_steps = 0

    def speculation(self) -> Speculation:
        """One that has learnt nothing yet."""
        return new_speculation(self.parts.draft, self.settings, self.loop.vocab_len, self.clock)

    def answers(
        self, speculation: Speculation | None, text: str, sampling: SamplingParams, streams: int, num_tokens: int
    ) -> tuple[float, list[list[int]]]:
        """Tokens per second of all streams together once all prompts are read, and the answers."""
        loop, rows = self.loop, []
        loop.runner.speculation = None
        for stream in range(streams):
            self._number += 1
            message = {"role": "user", "content": f"{text}\n\n({stream + 1})"}
            request = Request(
                f"r{self._number}",
                (message,),
                sampling=sampling,
                max_tokens=num_tokens,
                tenant=str(self._number),
            )
            rows.append(Generation(request, Answer(), time.monotonic()))
            loop.add(rows[-1])
        while any(not row.answer for row in rows):
            loop.step()
        loop.runner.speculation = speculation
        before, began = sum(len(row.answer) for row in rows), self.clock()
        self.num_steps = 0
        while loop.has_work:
            loop.step()
            self.num_steps += 1
        seconds = self.clock() - began
        for row in rows:
            if isinstance(row.sink, Answer) and row.sink.failed is not None:
                raise SystemExit(f"{row.request_id}: {row.sink.failed.error}")
        return (sum(len(row.answer) for row in rows) - before) / seconds, [row.answer for row in rows]

    def rows(self, streams: Sequence[int], rounds: int, num_tokens: int) -> list[Row]:
        """All figures."""
        found = []
        for name, (text, sampling) in tasks().items():
            for count in streams:
                found += self._task(name, text, sampling, count, rounds, num_tokens)
                print_rows(found[-5:])
        return found

    def _task(
        self, name: str, text: str, sampling: SamplingParams, streams: int, rounds: int, num_tokens: int
    ) -> list[Row]:
        speculation, speeds = self.speculation(), dict[str, list[float]](off=[], on=[])
        same, num_answers, steps = 0, 0, {"off": 0, "on": 0}
        for _ in range(rounds):
            results: dict[str, Any] = {}
            for kind, one in (("off", None), ("on", speculation)):
                speed, results[kind] = self.answers(one, text, sampling, streams, num_tokens)
                speeds[kind].append(speed)
                steps[kind] += self.num_steps
            same += sum(a == b for a, b in zip(results["off"], results["on"], strict=True))
            num_answers += streams
        off, on = statistics.median(speeds["off"]), statistics.median(speeds["on"])
        ratio = statistics.median(b / a for a, b in zip(speeds["off"], speeds["on"], strict=True))
        target = {"copy": COPY_TARGET, "story": FREE_TARGET}.get(name) if streams == 1 else None
        label = f"{name}, {streams} streams"
        drafted = max(1, speculation.num_drafted)
        return [
            Row.plain(f"{label}: tokens per second", on, "1/s", off),
            Row.at_least(f"{label}: median ratio of rounds", ratio, "x", target),
            Row.plain(f"{label}: steps", steps["on"], "", steps["off"]),
            Row.plain(f"{label}: accepted of drafted", speculation.num_accepted / drafted, ""),
            Row.plain(f"{label}: same answers", same / num_answers, ""),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--draft", default="", metavar="FOLDER", help="a draft model; without one, prompt look-up")
    parser.add_argument("--kv-format", default="4/4")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time: for a CPU that others use as well")
    parser.add_argument("--cache-dir", type=Path, help="where calibrations are kept; without one they are made anew")
    add_json_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache_dir:
        settings = Settings(
            model=arguments.model,
            kv_format=arguments.kv_format,
            speculate="draft" if arguments.draft else "lookup",
            draft_model=arguments.draft,
            cache_dir=arguments.cache_dir or Path(cache_dir),
        )
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        rows = Bench(settings, clock).rows(arguments.streams, arguments.rounds, arguments.answer_tokens)
    print_rows(rows)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
