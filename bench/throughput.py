"""The whole server's throughput and latency beside mlx_lm.server's: both run on one machine and are asked in turn.

    PYTHONPATH=. python bench/throughput.py MODEL_FOLDER --json throughput.json
    PYTHONPATH=. python bench/throughput.py FOLDER --make smollm2 --tokenizer A_FOLDER --only streams arrivals
    PYTHONPATH=. python bench/throughput.py MODEL_FOLDER --only cpu

Sections, each a few minutes on a GPU; rows are written after every one, so that a time limit costs only what is left:

    streams    all tokens/s of 1 to 64 streams, greedy beside the baseline and sampled beside greedy
    ragged     eight prompts of 1K to 16K tokens: tokens/s once all are read, and memory
    arrivals   median TTFT of simultaneous arrivals, and of one long prompt
    intruder   inter-token times of a running stream while a 16K prompt comes in
    overhead   what the server adds to the model's own batched step, per token
    shape32b   decode and prefill of a Qwen2.5-32B shape with random 4-bit weights, in process, beside f16's cache
    cpu        eight streams beside one; the section for machines without a GPU

By default all that make sense on the device. Beyond --baseline-streams, where the baseline's server drops connections,
its BatchGenerator in this process stands in, without HTTP. Load and figures are turboserve.bench_client's, processes
_servers.py's.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from _rows import Row, add_json_option, print_rows, write_rows
from _servers import Served, mlx_lm_server, turboserve

from turboquant_kv import blas

blas.interpose()  # before MLX, like both servers

import mlx.core as mx
from _decode_steps import chained_step_s, random_caches
from _in_process import generator_rate, own_step_s, prefilled_s
from _memory_watch import MemoryWatch
from _random_folders import SHAPES, make_folder, random_model
from mlx_lm.utils import load_tokenizer

from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboserve.bench_client import report
from turboserve.bench_client.asking import Clock, Outcome, Target, ask
from turboserve.bench_client.figures import percentile, tokens_between
from turboserve.bench_client.mix import Mix, Pace, Span, TokenScale
from turboserve.bench_client.session import Plan, Server, measure
from turboserve.engine.expanded_products import choose_expanded_products
from turboserve.engine.scheduler import LARGE_GPU_PREFILL_TOKENS
from turboserve.errors import StartupError
from turboserve.settings import Settings

STREAM_TARGETS = {1: 1.0, 8: 1.2, 32: 1.2, 64: 1.2}  # of the baseline's tokens/s; other numbers have none
SAMPLED_TARGET = 0.95  # of greedy
RAGGED_TARGET = 3.0
SHAPE_TARGETS = {"decode": 1.0, "long decode": 1.2, "prefill": 1.0}  # of f16
OVERHEAD_TARGET_S = 0.3e-3
CPU_TARGET = 3.0
CONTEXT_SLACK = 64  # tokens that the chat template may add to what was asked for
CHUNK = 2048


class Bench:
    """Both servers with one model, and what is asked of them. A baseline that failed is started anew."""

    def __init__(self, args: argparse.Namespace, cache_dir: Path) -> None:
        self.args, self.cache_dir = args, cache_dir
        self.tokenizer = load_tokenizer(args.model)
        self._open = {"ours": ExitStack(), "theirs": ExitStack()}
        self._seeds = itertools.count(time.time_ns() % (1 << 30))
        self.ends = float("inf")  # of the section
        flags = ["--kv-format", args.kv_format, "--max-running", str(max(args.streams)), *args.flag]
        self.ours = self._started("ours", turboserve(cache_dir, str(args.model), *flags))
        self.theirs = self._new_baseline()

    def _started(self, which: str, server: AbstractContextManager[Served]) -> Served:
        return self._open[which].enter_context(server)

    def _new_baseline(self) -> Served:
        concurrency = ["--decode-concurrency", str(max(self.args.streams))]
        return self._started("theirs", mlx_lm_server(self.args.model, *concurrency))

    def close(self) -> None:
        for stack in self._open.values():
            stack.close()

    @property
    def left_s(self) -> float:
        return max(1.0, self.ends - time.monotonic())

    @property
    def our_target(self) -> Target:
        return Target(f"{self.ours.url}/v1", self.args.model.resolve().name)

    @property
    def their_target(self) -> Target:
        return Target(f"{self.theirs.url}/v1", str(self.args.model))

    def mix(self, prompts: Span, answer_tokens: int, **options: Any) -> Mix:
        """Of prompts that never came before; answers are kept from ending by a bias against end tokens."""
        end_tokens = tuple(int(i) for i in self.tokenizer.eos_token_ids)
        options = {"temperature": 0.0, **options}
        answers = Span(answer_tokens, answer_tokens)
        return Mix(prompts, answers, end_tokens=end_tokens, seed=next(self._seeds), **options)

    def plan(self, mix: Mix, streams: int, rounds: int | None = None) -> Plan:
        pace = Pace(streams, num_requests=streams * self.args.requests)
        return Plan(mix, pace, rounds or self.args.rounds, warm_up=streams, timeout_s=self.left_s)

    def both(self, plan: Plan) -> tuple[Server, Server | None]:
        """Ours and the baseline's; None when that one failed. Raises SystemExit when ours failed."""
        try:
            ours, theirs = measure(plan, [self.our_target, self.their_target])
        except StartupError as exc:
            print(f"baseline: {exc}", flush=True)
            self._restart_baseline()
            return self.alone(plan), None
        self._check(plan, ours)
        if theirs.has_failed:
            print("\n".join(["baseline:", *report.notes(plan, theirs)]), flush=True)
            self._restart_baseline()
            return ours, None
        return ours, theirs

    def alone(self, plan: Plan) -> Server:
        """Ours. Raises SystemExit when it failed."""
        (ours,) = measure(plan, [self.our_target])
        self._check(plan, ours)
        return ours

    def _check(self, plan: Plan, ours: Server) -> None:
        if ours.has_failed:
            raise SystemExit("\n".join(["turboserve:", *report.notes(plan, ours), *self.ours.lines[-20:]]))

    def _restart_baseline(self) -> None:
        self._open["theirs"].close()
        self.theirs = self._new_baseline()

    def longest_prompt(self, wanted: int, answer_tokens: int) -> int:
        """As long as wanted, or as the model's context allows."""
        limit = int(self.ours.stats()["max_context_tokens"]) - answer_tokens - CONTEXT_SLACK
        if wanted > limit:
            print(
                f"prompts are of {limit} tokens instead of {wanted}, for the model's context is no longer", flush=True
            )
        return min(wanted, limit)


# --- sections


def streams_section(bench: Bench) -> list[Row]:
    args, rows = bench.args, []
    for num_streams in args.streams:
        greedy = bench.mix(Span(args.prompt_tokens, args.prompt_tokens), args.answer_tokens)
        plan = bench.plan(greedy, num_streams)
        has_server = num_streams <= args.baseline_streams
        ours, theirs = bench.both(plan) if has_server else (bench.alone(plan), None)
        rate = ours.medians["tokens_per_s"]
        if theirs is not None:
            base, whose = theirs.medians["tokens_per_s"], "mlx_lm.server"
        else:
            base, whose = (
                generator_rate(args.model, num_streams, args.prompt_tokens, args.answer_tokens),
                "its generator",
            )
        factor = STREAM_TARGETS.get(num_streams)
        name = f"{args.kv_format}, {num_streams} streams: all tokens/s beside {whose}"
        rows.append(Row.at_least(name, rate, "1/s", None if factor is None else factor * base, base))
        if theirs is not None:
            drawn = bench.mix(greedy.prompt_tokens, args.answer_tokens, temperature=1.0)
            ours, theirs = bench.both(bench.plan(drawn, num_streams))
            rate_drawn = ours.medians["tokens_per_s"]
            drawn_base = None if theirs is None else theirs.medians["tokens_per_s"]
            name = f"{args.kv_format}, {num_streams} streams, temperature 1: all tokens/s beside mlx_lm.server"
            aim = None if factor is None or drawn_base is None else factor * drawn_base
            rows.append(Row.at_least(name, rate_drawn, "1/s", aim, drawn_base))
        mix = bench.mix(greedy.prompt_tokens, args.answer_tokens, temperature=1.0, top_p=0.95)
        sampled = bench.alone(bench.plan(mix, num_streams)).medians["tokens_per_s"]
        name = f"{args.kv_format}, {num_streams} streams: temperature 1, top_p .95 beside greedy"
        rows.append(Row.at_least(name, sampled, "1/s", SAMPLED_TARGET * rate, rate))
        print_rows(rows[-3:])
    return rows


def ragged_section(bench: Bench) -> list[Row]:
    args = bench.args
    shortest, wanted = args.ragged
    prompts = Span(shortest, max(shortest, bench.longest_prompt(wanted, args.ragged_answer)))
    plan = Plan(
        bench.mix(prompts, args.ragged_answer),
        Pace(args.ragged_streams, num_requests=args.ragged_streams),
        timeout_s=bench.left_s,
    )
    figures: list[tuple[float, float, dict[str, float]] | None] = []
    for served, target in ((bench.ours, bench.our_target), (bench.theirs, bench.their_target)):
        with MemoryWatch(served) as watch:
            (server,) = measure(plan, [target])
        if server.has_failed:
            print("\n".join([served.name, *report.notes(plan, server)]), flush=True)
            figures.append(None)
        else:
            figures.append((rate_after_prefill(server.outcomes), watch.grown_bytes / (1 << 20), server.medians))
    if figures[0] is None:
        raise SystemExit("the ragged prompts failed")
    rate, grown, medians = figures[0]
    base_rate, base_grown, _ = figures[1] or (None, None, None)
    what = f"{args.kv_format}, {args.ragged_streams} streams of {prompts} tokens"
    rows = [
        Row.at_least(
            f"{what}: all tokens/s after prefill", rate, "1/s", base_rate and RAGGED_TARGET * base_rate, base_rate
        ),
        Row.plain(f"{what}: memory grown", grown, "MiB", base_grown),
    ]
    if "kv_peak_bytes" in medians:
        rows.append(Row.plain(f"{what}: KV memory, peak", medians["kv_peak_bytes"] / (1 << 20), "MiB"))
    return rows


def arrivals_section(bench: Bench) -> list[Row]:
    args, rows = bench.args, []
    cases = [(n, args.prompt_tokens) for n in args.arrivals]
    cases.append((1, bench.longest_prompt(args.long_prompt, 16)))
    for num_streams, prompt_tokens in cases:
        plan = bench.plan(bench.mix(Span(prompt_tokens, prompt_tokens), 16), num_streams)
        plan = Plan(plan.mix, Pace(num_streams, num_requests=num_streams), plan.rounds, num_streams, plan.timeout_s)
        ours, theirs = bench.both(plan)
        base = None if theirs is None else theirs.medians["ttft_p50_s"]
        name = f"{args.kv_format}, {num_streams} prompts of {prompt_tokens} tokens at once: median TTFT"
        rows.append(Row.at_most(name, ours.medians["ttft_p50_s"], "s", base, base))
    return rows


def intruder_section(bench: Bench) -> list[Row]:
    args = bench.args
    prompt_tokens = bench.longest_prompt(args.intruder, 16)
    found = []
    for target in (bench.our_target, bench.their_target):
        rounds = [asyncio.run(disturbed_gaps(bench, target, prompt_tokens)) for _ in range(args.rounds)]
        found.append([(percentile(one, 99) or 0.0, max(one)) for one in rounds if one])
    rows = []
    for i, figure in enumerate(("p99", "largest")):
        ours, theirs = ([one[i] for one in rounds] for rounds in found)
        if not ours:
            raise SystemExit("the running stream had no two tokens while the prompt was read: lengthen --intruder")
        base = statistics.median(theirs) if theirs else None
        name = f"{args.kv_format}, inter-token time while {prompt_tokens} tokens come in, {figure}"
        rows.append(Row.plain(name, statistics.median(ours), "s", base))
    return rows


def overhead_section(bench: Bench) -> list[Row]:
    """(A decode step as served - the model's own batched step) / rows: HTTP, scheduling, sampling, text, all of it.

    As served: rows over the rate of tokens from the last stream's first token to the first stream's end. The model's
    own: the same weights, caches and lengths in this process, argmax instead of sampling, each step handed over
    before the one before it is read.
    """
    args, num_rows = bench.args, bench.args.overhead_rows
    mix = bench.mix(Span(args.prompt_tokens, args.prompt_tokens), 2 * args.answer_tokens)
    served = bench.alone(Plan(mix, Pace(num_rows, num_requests=num_rows), args.rounds, num_rows, bench.left_s))
    step_s = num_rows / median_rate(served)
    settings = Settings(model=str(args.model), kv_format=args.kv_format, cache_dir=bench.cache_dir)
    own_s = own_step_s(settings, num_rows, args.prompt_tokens + args.answer_tokens, args.own_steps)
    name = f"{args.kv_format}, {num_rows} streams: server's time per token beside the model's step"
    return [
        Row.plain(f"{args.kv_format}, {num_rows} rows: a step as served beside the model's own", step_s, "s", own_s),
        Row.at_most(name, (step_s - own_s) / num_rows, "s", OVERHEAD_TARGET_S),
    ]


def shape32b_section(args: argparse.Namespace) -> list[Row]:
    """Speeds of each format at both lengths, formats in turns."""
    config = {**SHAPES["qwen32b"], "num_hidden_layers": args.shape_layers}
    if args.shape_hidden:
        num_heads = args.shape_hidden // 128
        config |= {"hidden_size": args.shape_hidden, "intermediate_size": 2 * args.shape_hidden}
        config |= {"num_attention_heads": num_heads, "num_key_value_heads": max(1, num_heads // 5)}
    model = random_model(config)
    names = ["f16", *args.shape_formats]
    runtimes = {name: KVRuntime(model, None if name == "f16" else KVFormat.parse(name)) for name in names}
    speeds: dict[tuple[str, str], list[float]] = {}
    short, long = args.shape_tokens
    for round_number in range(args.rounds + 1):
        for name, runtime in runtimes.items():
            caches = runtime.make_cache()
            seconds = prefilled_s(model, runtime, caches, short, CHUNK)
            step_s = chained_step_s(partial(model, cache=caches), 1, args.shape_steps)
            if round_number:  # the first one compiles
                speeds.setdefault((name, "prefill"), []).append(short / seconds)
                speeds.setdefault((name, "decode"), []).append(1 / step_s)
            runtime.release(caches)
            del caches
            mx.clear_cache()
    held = {name: random_caches(runtime, long) for name, runtime in runtimes.items()}
    for round_number in range(args.rounds + 1):
        for name, caches in held.items():
            step_s = chained_step_s(partial(model, cache=caches), 1, args.shape_steps)
            if round_number:
                speeds.setdefault((name, "long decode"), []).append(1 / step_s)
    rows = []
    for name in args.shape_formats:
        for figure, factor in SHAPE_TARGETS.items():
            value, base = (statistics.median(speeds[one, figure]) for one in (name, "f16"))
            num_tokens = long if figure == "long decode" else short
            label = f"32B shape, {name}, {num_tokens} tokens: {figure.removeprefix('long ')} beside f16"
            rows.append(Row.at_least(label, value, "1/s", factor * base, base))
    del held, caches
    mx.clear_cache()
    return rows + expanded_rows(
        args, model, runtimes, {name: statistics.median(speeds[name, "prefill"]) for name in names}
    )


def expanded_rows(
    args: argparse.Namespace, model: Any, runtimes: dict[str, KVRuntime], stored: dict[str, float]
) -> list[Row]:
    """Prefill in a large GPU's chunks by weights that are expanded for each product, where a trial has it so.

    stored: tokens/s by weights as they are stored, of each runtime.
    """
    chosen = choose_expanded_products(model, "auto")
    print(f"prompts      {chosen}", flush=True)
    if not any(trial.least_rows for trial in chosen.trials):
        return []
    num_tokens, speeds = args.shape_tokens[0], dict[str, list[float]]()
    for round_number in range(args.rounds + 1):
        for name, runtime in runtimes.items():
            caches = runtime.make_cache()
            seconds = prefilled_s(model, runtime, caches, num_tokens, LARGE_GPU_PREFILL_TOKENS)
            if round_number:
                speeds.setdefault(name, []).append(num_tokens / seconds)
            runtime.release(caches)
            del caches
            mx.clear_cache()
    found = {name: statistics.median(one) for name, one in speeds.items()}
    what = f"{num_tokens} tokens: prefill, weights expanded,"
    rows = [Row.plain(f"32B shape, f16, {what} beside weights as stored", found["f16"], "1/s", stored["f16"])]
    for name in args.shape_formats:
        aim = SHAPE_TARGETS["prefill"] * found["f16"]
        rows.append(Row.at_least(f"32B shape, {name}, {what} beside f16", found[name], "1/s", aim, found["f16"]))
    return rows


def cpu_section(bench: Bench) -> list[Row]:
    args, rows = bench.args, []
    for prompt_tokens in args.cpu_prompts:
        rates = []
        for num_streams in (1, args.cpu_streams):
            plan = Plan(
                bench.mix(Span(prompt_tokens, prompt_tokens), args.answer_tokens),
                Pace(num_streams, num_requests=num_streams),
                args.rounds,
                timeout_s=bench.left_s,
            )
            is_compared = num_streams == 1 <= args.baseline_streams
            ours, theirs = bench.both(plan) if is_compared else (bench.alone(plan), None)
            rates.append(median_rate(ours))
            what = f"{args.kv_format}, {num_streams} streams of {prompt_tokens} tokens"
            if num_streams == 1:
                base = None if theirs is None else median_rate(theirs)
                rows.append(Row.plain(f"{what}: tokens/s after prefill beside mlx_lm.server", rates[0], "1/s", base))
            rows.append(Row.plain(f"{what}: all tokens/s, prefill included", ours.medians["tokens_per_s"], "1/s"))
        name = (
            f"{args.kv_format}, {args.cpu_streams} streams of {prompt_tokens} tokens: tokens/s after prefill beside one"
        )
        rows.append(Row.at_least(name, rates[1], "1/s", CPU_TARGET * rates[0], rates[0]))
        print_rows(rows[-4:])
    return rows


# --- figures


def median_rate(server: Server) -> float:
    """Of rate_after_prefill, over the rounds."""
    return statistics.median(rate_after_prefill(one.outcomes) for one in server.rounds)


def rate_after_prefill(outcomes: Sequence[Outcome]) -> float:
    """Tokens/s of all streams from the last one's first token to the first one's end.

    Where a stream ended before the last one began, to the last end. Raises SystemExit when nothing came then.
    """
    began = max(outcome.chunk_s[0] for outcome in outcomes)
    ended = min(outcome.chunk_s[-1] for outcome in outcomes)
    if ended <= began:
        print("a stream ended before the last one began: lengthen the answers", flush=True)
        ended = max(outcome.chunk_s[-1] for outcome in outcomes)
    if ended <= began:
        raise SystemExit("answers are too short to measure a rate")
    # the token at `began` was made before it
    return (tokens_between(outcomes, began, ended) - 1) / (ended - began)


async def disturbed_gaps(bench: Bench, target: Target, prompt_tokens: int) -> list[float]:
    """Inter-token times of a stream between the sending of a long prompt and its first token, over either end too.

    Raises SystemExit when a request fails.
    """
    scale = TokenScale(1.0, 0.0)
    bodies = []
    for num_prompt, num_answer in ((100, bench.args.intruder_answer), (prompt_tokens, 2)):
        mix = bench.mix(Span(num_prompt, num_prompt), num_answer)
        bodies.append(mix.body(mix.ask(0, 0, scale), target.model))
    clock = Clock()
    running, intruder = Outcome(0, 0, 0.0), Outcome(1, 1, 0.0)
    async with httpx.AsyncClient(timeout=httpx.Timeout(bench.left_s)) as client:
        first = asyncio.create_task(ask(client, target, bodies[0], running, clock, bench.left_s))
        while not first.done() and len(running.chunk_s) < 8:
            await asyncio.sleep(0.005)
        intruder.sent_s = clock()
        await ask(client, target, bodies[1], intruder, clock, bench.left_s)
        seen = len(running.chunk_s)
        while not first.done() and len(running.chunk_s) == seen:  # a gap that spans the end belongs to it
            await asyncio.sleep(0.005)
        first.cancel()  # the rest of its answer is of no interest
        await asyncio.gather(first, return_exceptions=True)
    if intruder.error or running.error or not intruder.chunk_s:
        raise SystemExit(f"{target.url}: {intruder.error or running.error}: {intruder.detail or running.detail}")
    until = intruder.chunk_s[0]
    if running.chunk_s[-1] < until:
        print("the running stream ended before the prompt was read: lengthen --intruder-answer", flush=True)
    return [b - a for a, b in itertools.pairwise(running.chunk_s) if b > intruder.sent_s and a < until]


# --- choosing

SERVED: dict[str, Callable[[Bench], list[Row]]] = {
    "streams": streams_section,
    "ragged": ragged_section,
    "arrivals": arrivals_section,
    "intruder": intruder_section,
    "overhead": overhead_section,
    "cpu": cpu_section,
}
SECTIONS = [*SERVED, "shape32b"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an mlx-lm folder")
    parser.add_argument("--make", choices=list(SHAPES), help="write random weights of this shape there first")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer --make copies")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections")
    parser.add_argument("--limit-s", type=float, default=280.0, help="of a section: requests end by then")
    parser.add_argument("--rounds", type=int, default=3, help="figures are medians over them")
    parser.add_argument("--cache-dir", type=Path, help="where compiled kernels and means are kept; else nowhere")
    parser.add_argument("--kv-format", default="4/4")
    parser.add_argument("--flag", action="append", default=[], help="more for `turboserve serve`, as --flag=--x=y")
    sizes = parser.add_argument_group("sizes, in tokens or as they are called")
    sizes.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    sizes.add_argument("--baseline-streams", type=int, default=8, help="of more, its generator stands in")
    sizes.add_argument("--requests", type=int, default=1, help="of each stream in a round")
    sizes.add_argument("--prompt-tokens", type=int, default=300)
    sizes.add_argument("--answer-tokens", type=int, default=128)
    sizes.add_argument("--ragged", type=int, nargs=2, default=[1024, 16384], help="shortest and longest prompt")
    sizes.add_argument("--ragged-streams", type=int, default=8)
    sizes.add_argument("--ragged-answer", type=int, default=1536)
    sizes.add_argument("--arrivals", type=int, nargs="+", default=[8, 32])
    sizes.add_argument("--long-prompt", type=int, default=5000)
    sizes.add_argument("--intruder", type=int, default=16384)
    sizes.add_argument("--intruder-answer", type=int, default=4000)
    sizes.add_argument("--overhead-rows", type=int, default=32)
    sizes.add_argument("--own-steps", type=int, default=48)
    sizes.add_argument("--cpu-prompts", type=int, nargs="+", default=[300, 2048])
    sizes.add_argument("--cpu-streams", type=int, default=8)
    sizes.add_argument("--shape-layers", type=int, default=64)
    sizes.add_argument("--shape-hidden", type=int, default=0, help="narrower, a multiple of 128, for a trial")
    sizes.add_argument("--shape-formats", nargs="+", default=["4/3", "3/3"])
    sizes.add_argument("--shape-tokens", type=int, nargs=2, default=[16384, 65536])
    sizes.add_argument("--shape-steps", type=int, default=24)
    add_json_option(parser)
    args = parser.parse_args()
    if args.make and args.tokenizer is None:
        parser.error("--make needs --tokenizer")
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    args.only = args.only or (["cpu"] if on_cpu else [name for name in SECTIONS if name != "cpu"])
    return args


@contextmanager
def both_servers(args: argparse.Namespace) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, args.cache_dir or Path(folder))
        try:
            yield bench
        finally:
            bench.close()


def main() -> None:
    args = parse_arguments()
    if args.make and not (args.model / "config.json").exists():
        make_folder(args.make, args.model, args.tokenizer)
    rows: list[Row] = []
    failed = []

    def run(name: str, section: Callable[[], list[Row]]) -> None:
        began = time.perf_counter()
        try:
            found = section()
        except (SystemExit, Exception) as exc:  # the others are worth having
            failed.append(name)
            found = []
            if not isinstance(exc, SystemExit):
                traceback.print_exc()
            print(f"{name} FAILED: {exc}", flush=True)
        print(f"== {name}: {time.perf_counter() - began:.0f} s", flush=True)
        print_rows(found)
        rows.extend(found)
        write_rows(args.json, rows)

    served = [name for name in args.only if name in SERVED]
    if served:
        with both_servers(args) as bench:
            for name in served:
                bench.ends = time.monotonic() + args.limit_s
                run(name, partial(SERVED[name], bench))
    if "shape32b" in args.only:
        run("shape32b", partial(shape32b_section, args))
    missed = [row.name for row in rows if row.met is False]
    print(f"{len(rows)} figures; missed: {'; '.join(missed) or 'none'}; failed sections: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main()
