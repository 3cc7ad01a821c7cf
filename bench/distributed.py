"""Decode of a large model on one GPU and divided among several: tokens per second, in f16 and compressed.

    mlx.launch -n 2 --backend nccl --python python -- bench/distributed.py --json distributed.json
    mlx.launch -n 2 --backend ring --python python -- bench/distributed.py --tiny --json distributed.json

    (the launcher spins where its standard input is /dev/null; in a script give it one that is silent: < <(sleep 600))

Every rank draws the same random weights (4-bit, or float16 with --dense) and keeps its part; caches hold random
content. Sections, each with rows of its own, which rank 0 writes after every figure:

    link   seconds of a sum over all ranks as long as a decode step has them, and of sending a step's tokens
    one    the whole model on rank 0's device, the others waiting
    many   the model divided among all ranks, beside `one` where that has run, and formats beside f16
    serve  the engine with the embedded model (or --serve-model): rank 0's words to the others, tokens from device to
           device, books compared; the same answers as the whole model gives, and tokens per second beside it

Decode steps keep their graphs where a trial says so, as the server's do. `--graphs auto off` measures each figure both
ways, in caches of the same content; rows of the second way say `graphs off`. Caches in f16 have no
kept graphs, and one row.

A collective of MLX waits for ever for a rank that is stuck, so --limit-s ends the process whatever it waits for. What
does not fit a device in f16 is left out there. Run by itself, without mlx.launch, it measures `one` alone.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv import blas

blas.interpose()  # before MLX, like the server
# Where GPUs are shared with others, NVLink's multicast can put them out of service; whoever wants it sets 1.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")  # as the server has it; 1 is for comparing

import mlx.core as mx
from _decode_steps import chained_step_s, random_caches
from _random_folders import SHAPES, random_model

from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboserve.engine.device import on_cpu
from turboserve.engine.distributed import channel
from turboserve.engine.distributed.place import RANK, place_in
from turboserve.engine.distributed.ranks import ALONE, FirstRank, OtherRank, Ranks, join
from turboserve.engine.distributed.sharding import shard
from turboserve.engine.distributed.step_graphs import RankSteps
from turboserve.engine.generation import Generation
from turboserve.engine.graph_choice import Tried, refused_graphs, try_ways
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.loading import build_follower, build_parts
from turboserve.engine.projections import choose_projections
from turboserve.engine.protocol import NullTelemetry
from turboserve.engine.step_loop import StepLoop
from turboserve.engine.warm_up import Plan, warm_up
from turboserve.messages import Event, Failed, Request, SamplingParams, TextDelta
from turboserve.settings import KeepGraphs, Settings

MANY_TARGET = 1.6  # of one device's tokens/s
FORMAT_TARGET = 1.0  # of f16's in the same set-up
CHAIN = 32  # sums that are timed together
USABLE = 0.9  # of a device's memory
GRACE_S = 30.0  # of the section under way once the time is over
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 2048,
}


class Bench:
    """The group, what was measured so far, and the rows. Every rank goes the same way through it."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args, self.ranks, self.group = args, ranks, ranks.group
        self.rank, self.num_ranks = ranks.rank, ranks.size
        self.rows: list[Row] = []
        self.rates: dict[tuple[str, int, int, str, str], float] = {}  # section, streams, tokens, format, way
        self.failed: list[str] = []
        self.ends = time.monotonic() + args.limit_s

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def add(self, *rows: Row) -> None:
        if self.rank == 0:
            print_rows(rows)
            self.rows.extend(rows)
            write_rows(self.args.json, self.rows)

    def sum(self, value: float) -> float:
        """Over all ranks; also waits for them, which costs no device and no core anything."""
        return float(sum(self.ranks.exchange("bench", value)))

    def from_first(self, value: float) -> float:
        """Rank 0's, on every rank."""
        return self.sum(value if self.rank == 0 else 0.0)

    def has_time(self) -> bool:
        return bool(self.from_first(float(time.monotonic() < self.ends)))

    def attempt(self, name: str, part: Callable[[], None]) -> bool:
        """Whether it worked on every rank."""
        error: BaseException | None = None
        try:
            part()
        except (SystemExit, Exception) as exc:  # the others are worth having
            traceback.print_exc()
            error = exc
        if self.sum(float(error is not None)):
            self.failed.append(name)
            self.say(f"{name} FAILED: {error or 'on another rank'}")
        mx.clear_cache()
        return error is None


def link_section(bench: Bench) -> None:
    config = config_of(bench.args)
    width, num_sums = config["hidden_size"], 2 * config["num_hidden_layers"]
    for streams in bench.args.streams:
        x = mx.ones((streams, 1, width), mx.bfloat16 if "quantization" in config else mx.float16)

        def sums(x: mx.array = x) -> mx.array:
            for _ in range(CHAIN):
                x = mx.distributed.all_sum(x, group=bench.group) / bench.num_ranks
            return x

        seconds = timed(sums) / CHAIN
        bench.add(
            Row.plain(f"link, {streams} streams: one sum over {bench.num_ranks} ranks", seconds * 1e6, "us"),
            Row.plain(f"link, {streams} streams: {num_sums} sums, a step's", seconds * num_sums * 1e3, "ms"),
        )
    tokens = mx.ones((max(bench.args.streams), 1), mx.int32)

    def send() -> mx.array:
        sent = tokens
        for _ in range(CHAIN):
            mine = sent if bench.rank == 0 else sent * 0  # after the one before, or it would not be asked for
            sent = mx.distributed.all_sum(mine, group=bench.group)
        return sent

    bench.add(Row.plain("link: sending a step's tokens on the device", timed(send) / CHAIN * 1e6, "us"))


def timed(make: Callable[[], mx.array]) -> float:
    """Median seconds of five, after one that does not count."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        mx.eval(make())
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[2]


def serve_section(bench: Bench) -> None:
    """Greedy answers of a whole model in rank 0's process, then of the same model divided."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ["f16", *bench.args.formats]:
            for way in bench.args.graphs:
                serve(bench, name, way, Path(folder))


def serve(bench: Bench, name: str, way: KeepGraphs, cache_dir: Path) -> None:
    """In one format, graphs kept in one way."""
    settings = Settings(
        model=bench.args.serve_model,
        kv_format=name,
        kv_budget="1GiB",
        cache_dir=cache_dir,
        keep_graphs=way,
        max_running=max(bench.args.streams),
    )
    whole = None
    if bench.rank == 0:
        whole = answers_of(bench, settings, build_parts(settings, lambda line: None))
    bench.sum(0.0)  # the others wait for it
    ranks = join(place_in(os.environ))
    if not isinstance(ranks, FirstRank):
        build_follower(settings, lambda line: None, ranks).run()
        ranks.close()
        return
    divided = answers_of(bench, settings, build_parts(settings, lambda line: None, ranks))
    assert whole is not None
    for streams, (texts, rate) in divided.items():
        target = 1.0 if name == "f16" else None
        equal = sum(a == b for a, b in zip(texts, whole[streams][0], strict=True)) / streams
        label = f"serve, {name}, {streams} streams{suffix_of(bench, way)}"
        bench.add(
            Row.plain(f"{label}: tokens/s beside the whole model", rate, "1/s", whole[streams][1]),
            Row.at_least(f"{label}: answers that are the whole model's", equal, "", target),
        )


class Reader:
    """Collects an answer's text."""

    def __init__(self) -> None:
        self.text = ""

    def put(self, event: Event) -> None:
        if isinstance(event, Failed):
            raise event.error
        self.text += event.text if isinstance(event, TextDelta) else ""


def answers_of(bench: Bench, settings: Settings, parts: EngineParts) -> dict[int, tuple[list[str], float]]:
    """By number of streams: their texts, and tokens per second, prompts and the first tokens' compiling left out."""
    loop, num_tokens = StepLoop(parts, settings, NullTelemetry(), time.monotonic), bench.args.serve_tokens
    plan = Plan.for_device(loop.prefill_tokens, settings.max_running, parts.loaded.max_context)
    warmed_s, graphs = warm_up(loop.runner, parts, loop.vocab_len, plan, settings.keep_graphs)
    kept: dict[int, tuple[list[str], float]] = {}
    sampling = SamplingParams(temperature=0.0, logit_bias=tuple((i, -100.0) for i in parts.loaded.eos_ids))
    for streams in bench.args.streams:
        readers: list[Reader] = []
        rate = 0.0
        for turn in range(2):  # the first one compiles
            readers = [Reader() for _ in range(streams)]
            for i, reader in enumerate(readers):
                messages = ({"role": "user", "content": f"Tell me story number {i} of a dog and a cat."},)
                request = Request(
                    f"{streams}.{turn}.{i}", messages, sampling=sampling, max_tokens=bench.args.serve_tokens
                )
                loop.add(Generation(request, reader, time.monotonic()))
            while loop.runner.num_rows < streams and loop.has_work:
                loop.step()
            began, before = time.perf_counter(), sum(len(g.answer) for g in loop.requests.running)
            while loop.has_work:
                loop.step()
            rate = (streams * num_tokens - before) / (time.perf_counter() - began)
        kept[streams] = [reader.text for reader in readers], rate
    bench.say(
        f"serve: {loop.snapshot().details.get('distributed', 'whole')}, overlap {loop.overlap}, "
        f"warm-up {warmed_s:.1f} s, step graphs {graphs}"
    )
    loop.close()
    return kept


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    config = {**SHAPES[args.shape], **(TINY if args.tiny else {})}
    if args.layers:
        config["num_hidden_layers"] = args.layers
    if args.dense:
        del config["quantization"]
    return config


def one_section(bench: Bench) -> None:
    if bench.rank == 0:
        measure_all(bench, "one", new_model(bench, is_sharded=False))


def many_section(bench: Bench) -> None:
    measure_all(bench, "many", new_model(bench, is_sharded=True))


def new_model(bench: Bench, *, is_sharded: bool) -> Any:
    began = time.perf_counter()
    mx.random.seed(bench.args.seed)
    config = config_of(bench.args)
    model = random_model(config)
    if is_sharded:
        shard(model, config, bench.group)
        mx.eval(model.parameters())
        mx.clear_cache()

    def agree(joins: bool) -> bool:
        return bool(bench.from_first(float(joins))) if is_sharded else joins

    arranged = choose_projections(model, bench.args.projections, agree)
    held = mx.get_active_memory() / 1e9
    bench.say(f"model: {held:.1f} GB, projections {arranged}, {time.perf_counter() - began:.0f} s")
    return model


def measure_all(bench: Bench, section: str, model: Any) -> None:
    """Every length, number of streams and format; formats in turn, as they are compared."""
    args = bench.args
    runtimes: dict[str, KVRuntime] = {}
    for name in ["f16", *args.formats]:

        def make(name: str = name) -> None:
            fmt = None if name == "f16" else KVFormat.parse(name)
            runtimes[name] = KVRuntime(model, fmt, backend=args.kv_backend, cache_dir=args.cache_dir)
            verdict = runtimes[name].verdict
            bench.say(f"{section} {name}: {verdict.line if verdict else runtimes[name].backend_name}")

        run(bench, section, f"{section}: caches in {name}", make)
    for tokens in args.tokens:
        for streams in args.streams:
            for name, runtime in runtimes.items():
                label = f"{section}, {name}, {streams} streams of {tokens} tokens"
                if not has_room(bench, section, runtime, streams, tokens):
                    bench.say(f"{label}: does not fit, left out")
                    continue
                run(bench, section, label, partial(measure_one, bench, section, model, runtime, streams, tokens))


def run(bench: Bench, section: str, label: str, part: Callable[[], None]) -> None:
    """Alone in `one`, where no other rank takes part."""
    if section == "many":
        if bench.has_time():
            bench.attempt(label, part)
        else:
            bench.failed.append(f"{label} (no time left)")
        return
    try:
        if time.monotonic() > bench.ends:
            raise TimeoutError("no time left")
        part()
    except Exception as exc:
        if not isinstance(exc, TimeoutError):
            traceback.print_exc()
        bench.failed.append(label)
        bench.say(f"{label} FAILED: {exc}")
    mx.clear_cache()


def has_room(bench: Bench, section: str, runtime: KVRuntime, streams: int, tokens: int) -> bool:
    """Whether the caches fit beside the model, on every rank that takes part."""
    info: Any = mx.device_info()
    total = bench.args.memory_gib * (1 << 30) or int(info.get("memory_size") or info.get("total_memory") or 0)
    needed = streams * runtime.bytes_for(tokens) + mx.get_active_memory()
    is_too_large = bool(total) and needed > USABLE * total
    return not (bench.sum(float(is_too_large)) if section == "many" else is_too_large)


def measure_one(bench: Bench, section: str, model: Any, runtime: KVRuntime, streams: int, tokens: int) -> None:
    num_steps = bench.args.steps
    held = [random_caches(runtime, tokens - num_steps) for _ in range(streams)]
    if runtime.fmt is not None:
        measure_ways(bench, section, model, runtime, held, tokens)
        return
    caches = held[0]
    if streams > 1:
        caches = runtime.merge_rows(held)
        for single in held:
            runtime.release(single)
    held.clear()  # f16 would hold every array twice
    runtime.evaluate(caches)
    mx.clear_cache()
    step_s = timed_step_s(partial(model, cache=caches), streams, num_steps)
    note(bench, section, runtime.fmt_name, streams, tokens, bench.args.graphs[0], streams / step_s)
    runtime.release(caches)


def timed_step_s(forward: Callable[[mx.array], mx.array], streams: int, num_steps: int) -> float:
    chained_step_s(forward, streams, 2)  # compiles
    return chained_step_s(forward, streams, num_steps)


def measure_ways(
    bench: Bench, section: str, model: Any, runtime: KVRuntime, held: list[list[Any]], tokens: int
) -> None:
    """Compressed conversations by each of --graphs; a batch shares their pages, so all begin at the same length."""
    steps = RankSteps(model)
    for way in bench.args.graphs:
        batch = runtime.merge_rows(held)
        runtime.evaluate(batch)
        mx.clear_cache()
        tried = choose_graphs(bench, section, steps, batch, len(held), way)
        label = f"{section}, {runtime.fmt_name}, {len(held)} streams of {tokens} tokens{suffix_of(bench, way)}"
        bench.say(f"{label}: graphs {'kept' if tried.is_better else 'built anew'} ({tried.reason})")
        steps.keep(tried.is_better)
        step_s = timed_step_s(partial(steps.forward, batch=batch), len(held), bench.args.steps)
        note(bench, section, runtime.fmt_name, len(held), tokens, way, len(held) / step_s)
        runtime.release(batch)
    for single in held:
        runtime.release(single)


class Ways:
    """Implements graph_choice.Ways; all ranks try at the same time."""

    def __init__(self, steps: RankSteps) -> None:
        self._steps = steps

    @property
    def num_kept(self) -> int:
        return self._steps.num_kept

    def kept(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        self._steps.keep(True)
        return self._steps.forward(tokens, batch)

    def built(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        self._steps.keep(False)
        return self._steps.forward(tokens, batch)

    def cut(self, batch: Sequence[Any], counts: Sequence[int]) -> None:
        for cache in batch:
            cache.evaluate()
            cache.trim_rows(counts)


def choose_graphs(bench: Bench, section: str, steps: RankSteps, caches: list[Any], streams: int, way: str) -> Tried:
    """As the server does: by rank 0's trial, if all ranks can keep graphs."""
    refused = refused_graphs(way, on_cpu=on_cpu())
    if refused is not None:
        return Tried(False, refused.reason)
    tried = try_ways(Ways(steps), caches, streams, way)
    if section == "one":
        return tried
    num_able = bench.sum(float(steps.can_keep))
    is_better = bool(bench.from_first(float(tried.is_better)))
    if is_better and num_able < bench.num_ranks:
        return Tried(False, "not every rank can keep them, or sums between ranks have no order of their own")
    return Tried(is_better, tried.reason)


def suffix_of(bench: Bench, way: str) -> str:
    """Of a figure's label: the first way has today's rows."""
    return "" if way == bench.args.graphs[0] else f", graphs {way}"


def note(bench: Bench, section: str, name: str, streams: int, tokens: int, way: str, rate: float) -> None:
    """The row of a figure: `one` plain, `many` beside `one`, and formats beside f16 in the same set-up."""
    bench.rates[section, streams, tokens, name, way] = rate
    devices = "1 device" if section == "one" else f"{bench.num_ranks} devices"
    label = (
        f"{bench.args.shape}, {name}, {streams} streams of {tokens} tokens, {devices}{suffix_of(bench, way)}: decode"
    )
    target = None if bench.args.tiny else MANY_TARGET
    base = bench.rates.get(("one", streams, tokens, name, way)) if section == "many" else None
    rows = [Row.plain(label, rate, "1/s")]
    if base is not None:
        rows = [Row.at_least(f"{label} beside one", rate, "1/s", target and target * base, base)]
    f16 = bench.rates.get((section, streams, tokens, "f16", bench.args.graphs[0]))
    if name != "f16" and f16 is not None:
        goal = None if bench.args.tiny else FORMAT_TARGET * f16
        rows.append(Row.at_least(f"{label} beside f16", rate, "1/s", goal, f16))
    bench.add(*rows)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "link": link_section,
    "one": one_section,
    "many": many_section,
    "serve": serve_section,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen32b")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the shape has")
    parser.add_argument("--dense", action="store_true", help="float16 weights, where the shape's are quantised")
    parser.add_argument("--tiny", action="store_true", help="narrow, two layers, short: a trial without targets")
    parser.add_argument("--tokens", type=int, nargs="+", help="of each stream [16384 65536; with --tiny 512]")
    parser.add_argument("--streams", type=int, nargs="+", help="[1 8; with --tiny 1 2]")
    parser.add_argument("--formats", nargs="+", default=["4/3"], help="beside f16")
    parser.add_argument("--steps", type=int, help="decode steps that are timed [24; with --tiny 4]")
    parser.add_argument(
        "--projections", choices=["auto", "on", "off"], default="auto", help="as `turboserve serve` has"
    )
    parser.add_argument(
        "--graphs",
        choices=["auto", "on", "off"],
        nargs="+",
        default=["auto"],
        help="of decode steps, as `turboserve serve --keep-graphs` has it; several: figures of each [auto]",
    )
    parser.add_argument("--kv-backend", default="auto", help="of compressed caches")
    parser.add_argument("--cache-dir", type=Path, help="where verdicts on kernels are kept; else nowhere")
    parser.add_argument("--memory-gib", type=float, default=0.0, help="of a device; 0: as it says")
    parser.add_argument("--limit-s", type=float, default=480.0, help="no section or figure begins after it")
    parser.add_argument("--serve-model", default="", help="a folder, for `serve`; else the embedded model")
    parser.add_argument("--serve-tokens", type=int, help="of each answer there [128; with --tiny 16]")
    parser.add_argument("--seed", type=int, default=0)
    add_json_option(parser)
    args = parser.parse_args()
    args.graphs = list(dict.fromkeys(args.graphs))
    args.tokens = args.tokens or ([512] if args.tiny else [16384, 65536])
    args.serve_tokens = args.serve_tokens or (16 if args.tiny else 128)
    args.steps = args.steps or (4 if args.tiny else 24)
    args.streams = args.streams or ([1, 2] if args.tiny else [1, 8])
    return args


def end_when_stuck(limit_s: float) -> None:
    """A peer that is gone leaves this process in a collective, which nothing but its end leaves."""

    def end() -> None:
        print("time is over and a section still runs: ended", flush=True)
        os._exit(3)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()


def joined(limit_s: float) -> Ranks:
    """All ranks; this process alone where no launcher started it. When one is gone, the others end."""
    if RANK not in os.environ:
        return ALONE
    channel.SILENCE_S = limit_s  # whoever compiles kernels says nothing meanwhile
    ranks = join(place_in(os.environ))

    def end(why: str) -> None:
        print(why, flush=True)
        os._exit(3)

    if isinstance(ranks, FirstRank):
        ranks.on_lost = end
    return ranks


def main() -> None:
    args = parse_arguments()
    end_when_stuck(args.limit_s + GRACE_S)
    bench = Bench(args, joined(args.limit_s))
    bench.say(f"{bench.num_ranks} ranks on {mx.default_device()}: {mx.device_info()}")
    for name in args.only:
        if bench.num_ranks == 1 and name != "one":
            continue
        if not bench.has_time():
            bench.failed.append(f"{name} (no time left)")
            continue
        began = time.perf_counter()
        bench.attempt(name, partial(SECTIONS[name], bench))
        bench.say(f"== {name}: {time.perf_counter() - began:.0f} s")
    missed = [row.name for row in bench.rows if row.met is False]
    failed = ", ".join(bench.failed) or "none"
    bench.say(f"{len(bench.rows)} figures; missed: {'; '.join(missed) or 'none'}; failed: {failed}")
    if isinstance(bench.ranks, OtherRank):
        bench.ranks.receive()  # until rank 0 closes
    if isinstance(bench.ranks, FirstRank | OtherRank):
        bench.ranks.close()


if __name__ == "__main__":
    main()
