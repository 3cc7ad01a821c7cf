"""Whole-model speed on the embedded model: decoding, prefill and eight conversations at once, per cache format.

    python bench/end_to_end.py --json end_to_end.json
    python bench/end_to_end.py --formats 4/3 --contexts 256,1024

All formats are measured in one process, turn by turn, so that a ratio compares neighbours in time; figures are medians.
Contexts are filled with random keys and values (their values do not change the work). Owns the timing of whole steps;
attention alone is `cpu_attention.py`'s.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from turboquant_kv.backends.native.backend import NativeStore
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboserve.models.tiny.evaluate import UNCOMPRESSED, calibration_of, load, parse_format

DECODE_TARGETS = {256: 1.0, 1024: 1.0, 8192: 2.0, 16384: 3.0}  # times the uncompressed cache's speed
ENCODE_TARGET = 0.03  # of the time of a prefill
BATCH_TARGET = 3.0  # total tokens/s of eight conversations over one
BATCH, BATCH_CONTEXT = 8, 2048
PREFILL_TOKENS, PREFILL_CHUNK = 4096, 256
FILL_CHUNK = 1024


def fill(runtime: KVRuntime, model: Any, num_tokens: int) -> list[Any]:
    """Caches of one conversation of random keys and values; the first token goes through the model."""
    caches = runtime.make_cache()
    mx.eval(model(mx.array([[1]]), cache=caches))
    held = 1
    while held < num_tokens:  # chunk by chunk: layers take the same tokens, in turn
        n = min(FILL_CHUNK, num_tokens - held)
        for shape, cache in zip(runtime.shapes, caches, strict=True):
            assert shape is not None
            k, v = (mx.random.normal((1, shape.num_kv_heads, n, d), shape.dtype) for d in (shape.k_dim, shape.v_dim))
            if isinstance(cache, TurboQuantKVCache):
                cache.append(k, v)
            else:
                assert isinstance(cache, KVCache)
                mx.eval(cache.update_and_fetch(k, v))
        held += n
    return caches


def seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def decode_step(model: Any, caches: list[Any], batch: int = 1) -> Callable[[], None]:
    tokens = mx.full((batch, 1), 7, dtype=mx.int32)
    return lambda: mx.eval(mx.argmax(model(tokens, cache=caches)[:, -1], axis=-1))


def in_turn(steps: dict[str, Callable[[], None]], rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Median seconds per step of each, measured alternately."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + warm_up):
        for name, step in steps.items():
            elapsed = seconds(step)
            if i >= warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(t) for name, t in times.items()}


def decode_rows(model: Any, runtimes: dict[str, KVRuntime], context: int, rounds: int) -> list[Row]:
    steps = {name: decode_step(model, fill(runtime, model, context)) for name, runtime in runtimes.items()}
    speed = {name: 1 / s for name, s in in_turn(steps, rounds).items()}
    base, rows = speed[UNCOMPRESSED], []
    for name, value in speed.items():
        target = DECODE_TARGETS.get(context) if name != UNCOMPRESSED else None
        bound = None if target is None else target * base
        rows.append(Row.at_least(f"decode at {context} tokens, {name}", value, "tok/s", bound, base))
    return rows


def shown(rows: list[Row]) -> list[Row]:
    """Printed at once: a whole run takes minutes."""
    print_rows(rows)
    sys.stdout.flush()
    return rows


def prefill_step(model: Any, runtime: KVRuntime, tokens: mx.array) -> Callable[[], None]:
    def step() -> None:
        caches = runtime.make_cache()
        for start in range(0, PREFILL_TOKENS, PREFILL_CHUNK):
            model(tokens[:, start : start + PREFILL_CHUNK], cache=caches)  # lm_head stays lazy, as in the server
            runtime.evaluate(caches)

    return step


def prefill_rows(model: Any, runtimes: dict[str, KVRuntime], rounds: int) -> list[Row]:
    tokens = mx.random.randint(0, 4096, (1, PREFILL_TOKENS))
    times = in_turn({name: prefill_step(model, r, tokens) for name, r in runtimes.items()}, rounds, warm_up=1)
    speed = {name: PREFILL_TOKENS / s for name, s in times.items()}
    base = speed[UNCOMPRESSED]
    return [
        Row.at_least(f"prefill of {PREFILL_TOKENS}, {n}", v, "tok/s", None if n == UNCOMPRESSED else base, base)
        for n, v in speed.items()
    ]


def encode_rows(model: Any, runtimes: dict[str, KVRuntime], rounds: int) -> list[Row]:
    """What encoding takes of a prefill, both timed in the same one; of the native kernels, which encode at once."""
    tokens = mx.random.randint(0, 4096, (1, PREFILL_TOKENS))
    spent, encode = [0.0], NativeStore.encode

    def timed(storage: NativeStore, *rows: Any) -> None:
        spent[0] += seconds(lambda: encode(storage, *rows))

    rows = []
    for name, runtime in runtimes.items():
        if name == UNCOMPRESSED or not runtime.backend_name.startswith("cpu-native"):
            continue
        step, shares = prefill_step(model, runtime, tokens), []
        with mock.patch.object(NativeStore, "encode", timed):
            for _ in range(rounds):
                spent[0] = 0.0
                total = seconds(step)
                shares.append(spent[0] / total)
        share = statistics.median(shares)
        rows.append(Row.at_most(f"encoding, share of a prefill of {PREFILL_TOKENS}, {name}", share, "", ENCODE_TARGET))
    return rows


def batch_rows(model: Any, runtimes: dict[str, KVRuntime], rounds: int) -> list[Row]:
    rows = []
    for name, runtime in runtimes.items():
        singles = [fill(runtime, model, BATCH_CONTEXT) for _ in range(BATCH)]
        batched = [layer[0].merge(list(layer)) for layer in zip(*singles, strict=True)]
        steps = {"one": decode_step(model, singles[0]), "all": decode_step(model, batched, BATCH)}
        times = in_turn(steps, rounds)
        one, together = 1 / times["one"], BATCH / times["all"]
        target = None if name == UNCOMPRESSED else BATCH_TARGET * one
        rows.append(
            Row.at_least(f"{BATCH} conversations of {BATCH_CONTEXT} over one, {name}", together, "tok/s", target, one)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="4/4,4/3")
    parser.add_argument("--contexts", default=",".join(map(str, DECODE_TARGETS)))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=25)
    add_json_option(parser)
    args = parser.parse_args()

    model, tokenizer = load(float32=True)
    means = calibration_of(model, tokenizer, KVFormat())
    names = [UNCOMPRESSED, *args.formats.split(",")]
    runtimes = {name: KVRuntime(model, parse_format(name), calibration=means, backend=args.backend) for name in names}
    print("backend", runtimes[names[-1]].backend_name, "| BLAS", blas.status().describe())
    rows: list[Row] = []
    for context in map(int, args.contexts.split(",")):
        rows += shown(decode_rows(model, runtimes, context, args.rounds))
    rows += shown(prefill_rows(model, runtimes, rounds=3))
    rows += shown(encode_rows(model, runtimes, rounds=3))
    rows += shown(batch_rows(model, runtimes, args.rounds))
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
