"""Decode attention on compressed pages on a CUDA or Metal GPU: checked against float64, then timed beside FP16.

    python bench/gpu_attention.py [--json FILE] [--model PATH] [--only STAGE ...]
    python bench/gpu_attention.py --only one --tokens 16384 --format 4/4      a few calls, for a profiler

FP16 is mx.fast.scaled_dot_product_attention over a contiguous float16 cache. Each call's output is the next call's
query, so calls cannot overlap. "kernels" is what CUDA's profiler sees on the GPU, "call" is by the clock and takes the
host in (_gpu_time.py). Owns nothing else: correctness in CI is tests/metal's and tests/cuda's business.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from _gpu_time import Step, call_us, has_profiler, kernel_us
from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv.backends.base import (
    AttentionCall,
    ExactBuffers,
    LayerShape,
    Means,
    PageIds,
    PageWrites,
    RowSpan,
    SequenceView,
    StepPlan,
    StepRows,
)
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.cache.layer_cache import LayerSource, TurboQuantKVCache
from turboquant_kv.cache.step import step_for
from turboquant_kv.codec import reference
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import Rotary

FORMATS = ("4/4", "4/3", "3/3")
MODEL_FORMATS = (("4/4", "mlx-ops"), ("4/4", "gpu"), ("4/3", "mlx-ops"), ("4/3", "gpu"))
# Trellis codes beside the scalar ones of the same bits: format, the other, and how much of its speed is asked for.
TRELLIS_FORMATS = (("3t/2t", "3/2", 0.85), ("2t/2t", "2/2", 0.85), ("4/3t", "4/3", 0.85), ("4t/3t", "4/3", 0.85))


def checks(backend: str, rng: np.random.Generator, part: int = 0, num_parts: int = 1) -> list[Row]:
    """Largest relative error of decode steps over random histories, per shape and dtype; every num_parts-th of them."""
    rows = []
    shapes = [
        *(
            (hq, hkv, d, dv, name, t)
            for hq, hkv, d, dv, t in ((40, 8, 128, 128, 1), (14, 2, 64, 64, 1))
            for name in (*FORMATS, "4t/3t", "3t/2t")
        ),
        *((8, 8, 128, 128, "4/4", 1), (8, 2, 256, 256, "4/3", 1), (7, 1, 80, 80, "3/3", 2)),
        *((8, 2, 96, 128, "8/4", 1), (4, 1, 192, 128, "4/2", 1), (9, 1, 112, 64, "2/8", 1)),
        *((8, 2, 128, 128, "3/4", 5), (16, 2, 64, 128, "2/2", 8), (4, 2, 512, 512, "4/4", 1)),
        *((8, 2, 256, 256, "2t/2t", 1), (7, 1, 80, 80, "3t/3t", 2), (8, 2, 96, 128, "4/3t", 1)),
        *((4, 1, 192, 128, "2t/3t", 1), (9, 1, 112, 64, "3t/8", 1), (4, 2, 512, 512, "3t/2t", 1)),
        *((8, 2, 256, 256, "4t/3t", 1), (7, 1, 80, 96, "4t/4t", 2), (8, 2, 64, 128, "4/4t", 1)),
    ]
    dtypes = (mx.float16, mx.bfloat16, mx.float32)  # all three for the first shape, then in turn: each is compiled
    cases = [*zip(shapes[:1] * 3, dtypes, strict=True), *zip(shapes[1:], itertools.cycle(dtypes), strict=False)]
    for (hq, hkv, d, dv, format_name, t), dtype in cases[part::num_parts]:
        fmt = KVFormat.parse(format_name)
        num_tokens = int(rng.integers(300, 700))
        error = decode_error(backend, fmt, (hq, hkv, d, dv), t, num_tokens, dtype, rng)
        # float16 queries and tables cost 1e-3, bfloat16 outputs 4e-3; a moved code 2e-3 (tests/turboquant_kv)
        limit = {mx.float32: 4e-3, mx.float16: 4e-3, mx.bfloat16: 1e-2}[dtype]
        name = f"error {fmt.name} {hq}/{hkv} heads D={d}/{dv} T={t} {str(dtype)[9:]}"
        rows.append(Row.at_most(name, error, "", limit))
        print_rows(rows[-1:])
    for format_name, dtype in list(zip((*FORMATS, "3t/2t"), (*dtypes, mx.float16), strict=True))[part::num_parts]:
        fmt = KVFormat.parse(format_name)
        error = prefill_error(backend, fmt, (40, 8, 128), int(rng.integers(200, 400)), dtype, rng)
        limit = {mx.float32: 4e-3, mx.float16: 4e-3, mx.bfloat16: 1e-2}[dtype]
        rows.append(Row.at_most(f"error {fmt.name} prefill {str(dtype)[9:]}", error, "", limit))
        lengths = [int(n) for n in rng.integers(1, 1500, size=5)]
        error = ragged_error(backend, fmt, (40, 8, 128), lengths, dtype, rng)
        rows.append(Row.at_most(f"error {fmt.name} batch of {lengths} {str(dtype)[9:]}", error, "", limit))
        print_rows(rows[-2:])
    return rows


def prefill_error(
    backend: str,
    fmt: KVFormat,
    heads_dim: tuple[int, int, int],
    num_tokens: int,
    dtype: mx.Dtype,
    rng: np.random.Generator,
) -> float:
    """Relative error of a prompt's second chunk, 150 queries that begin anywhere in a page."""
    hq, hkv, dim = heads_dim
    n = num_tokens + 150
    k, v = (mx.array(rng.standard_normal((1, hkv, n, dim)).astype(np.float32)).astype(dtype) for _ in "kv")
    q = mx.array(rng.standard_normal((1, hq, 150, dim)).astype(np.float32)).astype(dtype)
    cache = TurboQuantKVCache(LayerSource(fmt, backend))
    cache.update_and_fetch(k[:, :, :num_tokens], v[:, :, :num_tokens])
    mx.eval(cache.attend(mx.zeros((1, hq, num_tokens, dim), dtype), scale=1.0, mask="causal", sinks=None))
    cache.update_and_fetch(k[:, :, num_tokens:], v[:, :, num_tokens:])
    out = cache.attend(q, scale=dim**-0.5, mask="causal", sinks=None)
    k64, v64, q64, out64 = (np.array(x[0].astype(mx.float32), np.float64) for x in (k, v, q, out))
    want = reference.attend(q64, k64, v64, fmt, num_tokens, dim**-0.5)
    return float(np.linalg.norm(out64 - want) / np.linalg.norm(want))


def decode_error(
    backend: str,
    fmt: KVFormat,
    heads_dims: tuple[int, int, int, int],
    num_rows: int,
    num_tokens: int,
    dtype: mx.Dtype,
    rng: np.random.Generator,
) -> float:
    hq, hkv, d, dv = heads_dims
    k, v = (
        mx.array(
            (rng.standard_normal((1, hkv, num_tokens + num_rows, n)) + rng.standard_normal(n)).astype(np.float32)
        ).astype(dtype)
        for n in (d, dv)
    )
    q = mx.array(rng.standard_normal((1, hq, num_rows, d)).astype(np.float32)).astype(dtype)
    cache = TurboQuantKVCache(LayerSource(fmt, backend))
    cache.update_and_fetch(k[:, :, :num_tokens], v[:, :, :num_tokens])
    cache.attend(mx.zeros((1, hq, num_tokens, d), dtype), scale=1.0, mask="causal", sinks=None)
    cache.update_and_fetch(k[:, :, num_tokens:], v[:, :, num_tokens:])
    out = cache.attend(q, scale=d**-0.5, mask="causal", sinks=None)
    k64, v64, q64, out64 = (np.array(x[0].astype(mx.float32), np.float64) for x in (k, v, q, out))
    want = reference.attend(q64, k64, v64, fmt, num_tokens, d**-0.5)
    return float(np.linalg.norm(out64 - want) / np.linalg.norm(want))


def ragged_error(
    backend: str,
    fmt: KVFormat,
    heads_dim: tuple[int, int, int],
    lengths: Sequence[int],
    dtype: mx.Dtype,
    rng: np.random.Generator,
) -> float:
    """Largest relative error of one batched decode step over the rows of a ragged batch."""
    hq, hkv, dim = heads_dim
    source = LayerSource(fmt, backend)
    rows, histories = [], []
    for n in lengths:
        k, v = (mx.array(rng.standard_normal((1, hkv, n + 1, dim)).astype(np.float32)).astype(dtype) for _ in "kv")
        histories.append((k, v))
        rows.append(TurboQuantKVCache(source))
        rows[-1].update_and_fetch(k[:, :, :n], v[:, :, :n])
        mx.eval(rows[-1].attend(mx.zeros((1, hq, n, dim), dtype), scale=1.0, mask="causal", sinks=None))
    batch = TurboQuantKVCache.merge(rows)
    q = mx.array(rng.standard_normal((len(lengths), hq, 1, dim)).astype(np.float32)).astype(dtype)
    batch.update_and_fetch(*(mx.concatenate([h[i][:, :, -1:] for h in histories]) for i in (0, 1)))
    out = batch.attend(q, scale=dim**-0.5, mask=None, sinks=None)
    errors = []
    for b, (k, v) in enumerate(histories):
        k64, v64, q64, out64 = (np.array(x.astype(mx.float32), np.float64) for x in (k[0], v[0], q[b], out[b]))
        want = reference.attend(q64, k64, v64, fmt, lengths[b], dim**-0.5)
        errors.append(float(np.linalg.norm(out64 - want) / np.linalg.norm(want)))
    return max(errors)


def random_storage(
    backend: Any,
    shape: LayerShape,
    fmt: KVFormat,
    num_pages: int,
    rng: np.random.Generator,
    means: Means | None = None,
) -> Any:
    """A storage full of random codes, made without encoding."""
    storage = backend.new_store(shape, fmt, means)
    for arrays in storage._arrays:
        arrays.grow(num_pages)
        mx.random.seed(int(rng.integers(1 << 30)))
        arrays._codes = mx.random.randint(0, 256, arrays._codes.shape, mx.uint8)
        arrays._scales = mx.random.uniform(0.05, 0.15, arrays._scales.shape, mx.float16)
        mx.eval(arrays._codes, arrays._scales)
    return storage


def step_of(backend: Any, shape: LayerShape, fmt: KVFormat, pages: Sequence[PageIds]) -> tuple[StepPlan, ExactBuffers]:
    """A decode step of sequences of these pages and half a page each; exact rows lie behind each other."""
    views, at = [], 0
    for ids in pages:
        start = fmt.page_start(len(ids))
        sink, window = RowSpan(0, at, fmt.sink_tokens), RowSpan(start, at + fmt.sink_tokens, 32)
        views.append(SequenceView(start + 31, 1, ids, sink, window))
        at += fmt.sink_tokens + 32
    k, v = (mx.random.normal((shape.num_kv_heads, at, d)).astype(shape.dtype) for d in (shape.k_dim, shape.v_dim))
    mx.eval(k, v)
    return backend.prepare_step(StepRows(views)), ExactBuffers(k, v, k, v)


def speed(
    name: str,
    hq: int,
    hkv: int,
    dim: int,
    lengths: Sequence[int],
    rng: np.random.Generator,
    target: float | None,
    formats: Sequence[str] = FORMATS,
) -> list[Row]:
    """One batch of sequences of these lengths: FP16 and each format, timed beside the first of them."""
    shape = LayerShape(hkv, dim, dim, mx.float16)
    q = mx.random.normal((len(lengths), hq, 1, dim)).astype(mx.float16)
    k, v = (mx.random.normal((len(lengths), hkv, max(lengths), dim)).astype(mx.float16) for _ in "kv")
    mask = None
    if len(set(lengths)) > 1:  # mlx-lm's batches pad to the longest row and mask
        mask = mx.arange(max(lengths))[None, None, None] < mx.array(list(lengths))[:, None, None, None]
    mx.eval(q, k, v, *([] if mask is None else [mask]))

    def plain(x: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(x, k, v, scale=0.1, mask=mask)

    base = figures(name, "f16", plain, q, None, None)
    rows = list(base)
    backend: Any = choose_backend("gpu")
    for format_name in formats:
        fmt = KVFormat.parse(format_name)
        counts = [max(1, n // fmt.page_tokens - 1) for n in lengths]
        storage = random_storage(backend, shape, fmt, sum(counts), rng)
        order = rng.permutation(sum(counts))  # pages lie where a real pool would leave them: anywhere
        pages = np.split(order.astype(np.int64), np.cumsum(counts)[:-1])
        plan, exact = step_of(backend, shape, fmt, pages)  # once for all layers, as in a model's step

        def step(x: mx.array, storage: Any = storage, plan: Any = plan, exact: Any = exact) -> mx.array:
            out: mx.array = storage.attend(AttentionCall(x, plan, exact, 0.1))
            return out

        rows += figures(name, fmt.name, step, q, base, target)
        if format_name == formats[0]:
            first = rows[-len(base)].value
        elif target is not None:
            what = f"{name} {fmt.name} beside {formats[0]}"
            rows.append(Row.at_most(what, rows[-len(base)].value, "us", first, first))
    return rows


def figures(
    name: str, what: str, step: Step, query: mx.array, base: Sequence[Row] | None, target: float | None
) -> list[Row]:
    """Kernels' time, which carries the target, and time by the clock; the latter alone where there is no profiler."""
    rows = []
    for kind, measure in (("kernels", kernel_us), ("call", call_us))[0 if has_profiler() else 1 :]:
        value = measure(step, query)
        carried = target if kind == "kernels" or not has_profiler() else None
        if base is None:
            rows.append(Row.plain(f"{name} {what} {kind}", value, "us"))
        else:
            rows.append(Row.at_least_ratio(f"{name} {what} {kind}", value, "us", base[len(rows)].value, carried))
    print_rows(rows)
    return rows


def speed_once(num_tokens: int, fmt: KVFormat, rng: np.random.Generator) -> None:
    """Ten calls of the headline shape."""
    shape = LayerShape(8, 128, 128, mx.float16)
    backend: Any = choose_backend("gpu")
    count = num_tokens // fmt.page_tokens - 1
    storage = random_storage(backend, shape, fmt, count, rng)
    plan, exact = step_of(backend, shape, fmt, [rng.permutation(count).astype(np.int64)])
    x = mx.random.normal((1, 40, 1, 128)).astype(mx.float16)
    for _ in range(10):
        x = storage.attend(AttentionCall(x, plan, exact, 0.1))
    mx.eval(x)


def speeds(rng: np.random.Generator) -> list[Row]:
    """The headline shape, and a ragged batch of it."""
    rows = []
    for n, target in ((1024, 1.3), (4096, 1.3), (16384, 2.0), (65536, 3.0), (131072, 3.0)):
        rows += speed(f"40/8 D=128 {n // 1024}K", 40, 8, 128, [n], rng, target)
    ragged = [1, 2, 4, 8, 13, 20, 32, 48]
    rows += speed("40/8 D=128 batch 8, 128K in all", 40, 8, 128, [1024 * n for n in ragged], rng, 2.5)
    return rows


def trellis_speeds(rng: np.random.Generator) -> list[Row]:
    """Trellis formats beside the scalar ones of the same bits, at the headline shape and with heads of 64 dims."""
    rows = []
    for num_heads, dim, num_tokens in ((40, 128, 16384), (40, 128, 131072), (64, 64, 32768)):
        for trellis, scalar, share in TRELLIS_FORMATS:
            name = f"{num_heads}/8 D={dim} {num_tokens // 1024}K"
            measured = speed(name, num_heads, 8, dim, [num_tokens], rng, None, (scalar, trellis))
            num_kinds = len(measured) // 3  # of FP16 and two formats
            first, second = measured[num_kinds].value, measured[2 * num_kinds].value
            beside = Row.at_least(f"{name} speed of {trellis} over {scalar}", first / second, "", share)
            print_rows([beside])
            rows += [*measured, beside]
    return rows


def turning_speeds(rng: np.random.Generator) -> list[Row]:
    """Decode attention with key means that turn with position beside the same with one mean, alternately."""
    rows, backend = [], choose_backend("gpu")
    for num_heads, dim, num_tokens in ((40, 128, 16384), (40, 128, 131072), (9, 64, 16384), (64, 64, 32768)):
        num_kv_heads = 3 if num_heads == 9 else 8
        shape, fmt = LayerShape(num_kv_heads, dim, dim, mx.float16), KVFormat()
        mean = rng.standard_normal((num_kv_heads, dim)).astype(np.float32)
        turning = Rotary(10000.0 ** (-np.arange(dim // 2) / (dim // 2)), 1, dim // 2)
        count = num_tokens // fmt.page_tokens - 1
        order = rng.permutation(count).astype(np.int64)
        plan, exact = step_of(backend, shape, fmt, [order])
        query = mx.random.normal((1, num_heads, 1, dim)).astype(mx.float16)
        steps = []
        for means in (Means(mean, mean), Means(mean, mean, turning)):
            storage = random_storage(backend, shape, fmt, count, rng, means)

            def step(x: mx.array, storage: Any = storage, plan: Any = plan, exact: Any = exact) -> mx.array:
                out: mx.array = storage.attend(AttentionCall(x, plan, exact, 0.1))
                return out

            steps.append(step)
        measure = kernel_us if has_profiler() else call_us
        pairs = [[measure(step, query) for step in steps] for _ in range(3)]
        constant, turned = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        name = f"{num_heads}/{num_kv_heads} D={dim} {num_tokens // 1024}K 4/4 with means that turn"
        rows.append(Row.at_most(name, turned, "us", 1.10 * constant, constant))
        print_rows(rows[-1:])
    return rows


def other_shapes(rng: np.random.Generator) -> list[Row]:
    """Other groups and dims, at 4/4."""
    rows = []
    for group in (1, 2, 4, 7, 8):
        for n in (4096, 32768):
            rows += speed(f"G={group} D=128 {n // 1024}K", 8 * group, 8, 128, [n], rng, 1.0, FORMATS[:1])
    for dim in (64, 96, 256):
        for n in (4096, 32768):
            rows += speed(f"40/8 D={dim} {n // 1024}K", 40, 8, dim, [n], rng, 1.0, FORMATS[:1])
    return rows


def page_speeds(rng: np.random.Generator, num_old: int = 14336, num_new: int = 2048) -> list[Row]:
    """A prefill chunk of 2048 tokens behind 14K others, one layer of the headline shape: attention and encoding."""
    shape, fmt = LayerShape(8, 128, 128, mx.bfloat16), KVFormat(4, 3)
    q = mx.random.normal((1, 40, num_new, 128)).astype(shape.dtype)
    k, v = (mx.random.normal((1, 8, num_old + num_new, 128)).astype(shape.dtype) for _ in "kv")
    cache = TurboQuantKVCache(LayerSource(fmt, "gpu"))
    cache.update_and_fetch(k[:, :, :num_old], v[:, :, :num_old])
    mx.eval(cache.attend(mx.zeros((1, 40, num_old, 128), shape.dtype), scale=0.1, mask="causal", sinks=None), q, k, v)
    assert cache.sequence is not None
    pool: Any = cache.sequence.pool
    step = step_for(pool, 0, [cache.sequence.shared], num_new, None)
    exact = pool.stores[0].append(step.plan, k[:, :, num_old:], v[:, :, num_old:])
    step.done(0)
    ids, new = cache.sequence.page_ids[-num_new // fmt.page_tokens :], (k[0, :, -num_new:], v[0, :, -num_new:])
    pages = PageWrites.following(ids, 0, fmt.page_tokens)

    def encode(x: mx.array) -> mx.array:
        rows = mx.depends([new[0]], [x])[0]
        pool.stores[0].encode(pages, rows, new[1])
        chained: mx.array = mx.depends([x], [pool.stores[0]._arrays[0].codes, pool.stores[0]._arrays[1].codes])[0]
        return chained

    def ours(x: mx.array) -> mx.array:
        out: mx.array = pool.stores[0].attend(AttentionCall(x, step.plan, exact, 0.1))
        return out

    measure = kernel_us if has_profiler() else call_us
    plain = measure(lambda x: mx.fast.scaled_dot_product_attention(x, k, v, scale=0.1, mask="causal"), q, 10)
    rows = [
        Row.plain("2048 of 16K attention f16", plain, "us"),
        Row.plain(f"2048 of 16K attention {fmt.name}", measure(ours, q, 10), "us", plain),
        Row.plain(f"2048 of 16K encoding {fmt.name}", measure(encode, q, 10), "us"),
    ]
    print_rows(rows)
    return rows


def end_to_end(
    model_path: Path,
    formats: Sequence[tuple[str, str]] = MODEL_FORMATS,
    num_prompts: int = 6,
) -> list[Row]:
    """The embedded model: needles found, answers equal to mlx-ops', tokens per second, peak memory."""
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import dequantize_model

    from turboquant_kv.cache.calibration import calibrate, calibration_text
    from turboquant_kv.cache.runtime import KVRuntime

    model, tokenizer = load(str(model_path))[:2]
    model = dequantize_model(model)  # so small a model is faster so, and its first prompt does not wait for compilers
    calibration = calibrate(model, tokenizer.encode(calibration_text()))
    lines = (model_path.parent / "heldout" / "prompts.jsonl").read_text().splitlines()
    prompts = [p for p in map(json.loads, lines) if p["kind"].startswith("needle-2048")][:num_prompts]
    rows: list[Row] = []
    answers: dict[str, list[list[int]]] = {}
    for fmt, backend in ((None, "mlx-ops"), *((KVFormat.parse(text), name) for text, name in formats)):
        runtime = KVRuntime(model, fmt, calibration=calibration, backend=backend)
        label = "f16" if fmt is None else f"{fmt.name} {backend}"
        mx.reset_peak_memory()
        tokens, times, found = [], [], 0
        for prompt in prompts:
            ids = tokenizer.apply_chat_template(prompt["messages"], add_generation_prompt=True)
            caches, out, stamps = runtime.make_cache(), [], []
            for token, _ in generate_step(mx.array(ids), model, prompt_cache=caches, max_tokens=48):
                stamps.append(time.perf_counter())
                if token in tokenizer.eos_token_ids:
                    break
                out.append(int(token))
            tokens.append(out)
            times += [b - a for a, b in itertools.pairwise(stamps)][2:]
            found += str(prompt["check"]["value"]).lower() in tokenizer.decode(out).lower()
        answers[label] = tokens
        rows.append(
            Row.plain(f"model {label} decode", 1 / statistics.median(times), "tok/s", rows[0].value if rows else None)
        )
        rows.append(Row.plain(f"model {label} peak", mx.get_peak_memory() / 2**20, "MiB"))
        rows.append(Row.plain(f"model {label} needles found of {len(prompts)}", found, ""))
        if backend == "gpu" and fmt is not None and f"{fmt.name} mlx-ops" in answers:
            same = sum(a == b for a, b in zip(tokens, answers[f"{fmt.name} mlx-ops"], strict=True))
            rows.append(Row.at_least(f"model {label} answers equal to mlx-ops'", same, "", len(prompts)))
        print_rows(rows[-4:])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--model", type=Path, default=Path("server/turboserve/models/tiny/model"))
    parser.add_argument(
        "--only",
        nargs="*",
        default=["checks", "speeds", "trellis", "turning", "prefill", "shapes", "model"],
        choices=["checks", "speeds", "trellis", "turning", "prefill", "shapes", "model", "one"],
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--format", default="4/4")
    parser.add_argument("--part", default="1/1", help="of the checks, so that several processes can share them")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    print(f"seed {args.seed}, {mx.device_info().get('device_name', mx.default_device())}")
    rows: list[Row] = []
    if "checks" in args.only:
        part, num_parts = map(int, args.part.split("/"))
        rows += checks("gpu", rng, part - 1, num_parts)
    if "speeds" in args.only:
        rows += speeds(rng)
    if "trellis" in args.only:
        rows += trellis_speeds(rng)
    if "turning" in args.only:
        rows += turning_speeds(rng)
    if "prefill" in args.only:
        rows += page_speeds(rng)
    if "shapes" in args.only:
        rows += other_shapes(rng)
    if "model" in args.only:
        rows += end_to_end(args.model)
    if "one" in args.only:
        speed_once(args.tokens, KVFormat.parse(args.format), rng)
    write_rows(args.json, rows)
    missed = [row.name for row in rows if row.met is False]
    print(f"{len(rows)} figures, missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
