"""Whole models on a GPU over compressed caches: a 32B-shaped one against FP16's cache, and the embedded one's answers.

    python bench/gpu_model.py shape32b [--json FILE]        memory, prefill and decode speed at 16K and 64K tokens
    python bench/gpu_model.py tokens FILE                   greedy tokens of the CPU path, to compare with elsewhere
    python bench/gpu_model.py streams --tokens FILE         the same on this GPU, alone and eight at a time

The 32B-shaped model has random 4-bit weights; at 64K its caches are filled with random content instead of a prompt.
Attention alone is bench/gpu_attention.py's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from _gpu_time import has_profiler, kernels_of
from _rows import Row, add_json_option, print_rows, write_rows
from mlx.nn import quantize  # type: ignore[attr-defined]
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen2
from mlx_lm.models.cache import KVCache

from turboquant_kv.backends.base import ExactRows, Means
from turboquant_kv.cache.calibration import Calibration, calibrate, calibration_text
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat

CHUNK = 2048
GROUP = 64
TIE = 0.25  # logits this close may swap places between devices and dtypes


def random_model(layers: int, hidden: int, q_heads: int, kv_heads: int, wide: int, vocabulary: int) -> Any:
    """A Qwen2 of this shape with random 4-bit weights of the usual size; nothing larger is ever in memory."""
    model = qwen2.Model(
        qwen2.ModelArgs(
            model_type="qwen2",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=wide,
            num_attention_heads=q_heads,
            rms_norm_eps=1e-6,
            vocab_size=vocabulary,
            num_key_value_heads=kv_heads,
            max_position_embeddings=1 << 17,
            rope_theta=1e6,
            tie_word_embeddings=False,
        )
    )
    quantize(model, group_size=GROUP, bits=4)
    made = []
    flat: Any = tree_flatten(model.parameters())
    for name, old in flat:
        if old.dtype == mx.uint32:
            octets = mx.random.randint(0, 256, (*old.shape[:-1], 4 * old.shape[-1]), mx.uint8)
            made.append((name, octets.view(mx.uint32)))
        elif name.endswith(("scales", "biases")):
            step = 1 / (4.6 * (old.shape[-1] * GROUP) ** 0.5)  # uniform codes of 4 bits have a deviation of 4.6
            made.append((name, mx.full(old.shape, step if name.endswith("scales") else -7.5 * step, mx.bfloat16)))
        else:
            made.append((name, (mx.ones if "norm" in name else mx.zeros)(old.shape, mx.bfloat16)))
    model.update(tree_unflatten(made))
    mx.eval(model.parameters())
    return model


def finish(runtime: KVRuntime, caches: list[Any]) -> None:
    """Compute all that a prefill chunk has left to do, pages included."""
    runtime.evaluate(caches)
    for source in runtime._sources.values():
        if source.pool is not None:
            storage: Any = source.pool.stores[0]
            mx.eval([a for arrays in storage._arrays for a in (arrays.codes, arrays.scales)])


def prefill(model: Any, runtime: KVRuntime, caches: list[Any], num_tokens: int) -> float:
    """Seconds to take in a random prompt."""
    tokens = mx.random.randint(0, 1000, (1, num_tokens))
    mx.eval(tokens)
    start = time.perf_counter()
    for first in range(0, num_tokens, CHUNK):
        model(tokens[:, first : first + CHUNK], cache=caches)
        finish(runtime, caches)
    mx.synchronize()
    return time.perf_counter() - start


def decode(model: Any, caches: list[Any], num_steps: int) -> float:
    """Median seconds of a greedy step; the next one is built while the GPU works, as mlx-lm does."""
    y = mx.array([[1]])
    stamps = []
    for _ in range(num_steps):
        y_next = mx.argmax(model(y, cache=caches)[:, -1:], axis=-1)
        mx.async_eval(y_next)  # type: ignore[no-untyped-call]
        y.item()
        stamps.append(time.perf_counter())
        y = y_next
    mx.eval(y)
    return statistics.median(b - a for a, b in itertools.pairwise(stamps[2:]))


def filled(runtime: KVRuntime, num_tokens: int) -> list[Any]:
    """Caches of that many tokens with random content."""
    caches = runtime.make_cache()
    page_ids: Any = None
    ends: dict[int, tuple[ExactRows, ExactRows]] = {}
    for i, cache in enumerate(caches):
        shape = runtime.shapes[i]
        assert shape is not None
        if isinstance(cache, TurboQuantKVCache):
            pool = cache.source.pool
            assert pool is not None and cache.sequence is not None
            if page_ids is None:
                page_ids = pool.allocate((num_tokens - pool.fmt.sink_tokens - 1) // pool.fmt.page_tokens)
            storage: Any = pool.stores[cache.source.layer]
            for arrays in storage._arrays:
                arrays._codes = mx.random.randint(0, 256, arrays._codes.shape, mx.uint8)
                arrays._scales = mx.random.uniform(0.05, 0.15, arrays._scales.shape, mx.float16)
                mx.eval(arrays._codes, arrays._scales)
            dims, heads, dtype = (shape.k_dim, shape.v_dim), shape.num_kv_heads, shape.dtype
            k_sink, v_sink, k_tail, v_tail = (
                mx.random.normal((heads, n, d)).astype(dtype) for n in (pool.fmt.sink_tokens, 1) for d in dims
            )
            ends[cache.source.layer] = ExactRows(k_sink, v_sink), ExactRows(k_tail, v_tail)
            if len(ends) == len(pool.stores):
                cache.sequence.shared.fill(page_ids, ends)
        else:
            assert isinstance(cache, KVCache)
            cache.update_and_fetch(
                *(
                    mx.random.normal((1, shape.num_kv_heads, num_tokens, d)).astype(shape.dtype)
                    for d in (shape.k_dim, shape.v_dim)
                )
            )
            mx.eval(cache.keys, cache.values)
    return caches


# What the 32B shape must reach at 16K and 64K tokens: GB held, and speeds as multiples of f16's.
TARGETS: dict[str, dict[str, float]] = {
    "4/3": {"allocated GB": 1.00, "prefill": 0.95, "decode": 1.0, "long decode": 1.15},
    "3/3": {"allocated GB": 0.87, "prefill": 0.95, "decode": 1.0, "long decode": 1.15},
}


def shape32b(args: argparse.Namespace) -> list[Row]:
    start = time.perf_counter()
    model = random_model(args.layers, args.hidden, args.q_heads, args.kv_heads, args.wide, args.vocabulary)
    print(f"weights {mx.get_active_memory() / 1e9:.1f} GB, made in {time.perf_counter() - start:.1f} s", flush=True)
    rows: list[Row] = []
    base: dict[str, float] = {}
    warm = KVRuntime(model, None)
    prefill(model, warm, warm.make_cache(), 2 * CHUNK)
    for bits in (None, *((int(b[0]), int(b[2])) for b in args.formats)):
        fmt = None if bits is None else KVFormat(*bits)
        figures = figures_of(model, partial(KVRuntime, model, fmt, backend=args.backend), args)
        base = base or figures
        # targets are the headline shape's
        aims = TARGETS.get("" if fmt is None else fmt.name, {}) if args.layers == 64 and args.tokens == 16384 else {}
        rows += rows_of("f16" if fmt is None else fmt.name, figures, base, aims)
        print_rows(rows[-len(figures) :])
        mx.clear_cache()
    return rows


def figures_of(model: Any, new_runtime: Callable[[], KVRuntime], args: argparse.Namespace) -> dict[str, float]:
    """Prefill speed (median of rounds), memory, decode speed at both lengths, launches of a step.

    Every round has a runtime of its own: page arrays that an earlier one grew would not be counted.
    """
    figures: dict[str, float] = {}
    runtime = new_runtime()
    caches = runtime.make_cache()
    prefill(model, runtime, caches, 2 * CHUNK)  # compiles
    speeds = []
    for _ in range(args.rounds):
        runtime.release(caches)
        del caches, runtime
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        runtime = new_runtime()
        caches = runtime.make_cache()
        speeds.append(args.tokens / prefill(model, runtime, caches, args.tokens))
    figures["prefill"] = statistics.median(speeds)
    figures["peak GB"] = (mx.get_peak_memory() - before) / 1e9
    figures["cache GB"] = sum(c.nbytes for c in caches) / 1e9
    figures["allocated GB"] = (mx.get_active_memory() - before) / 1e9
    figures["decode"] = 1 / decode(model, caches, args.steps)
    if has_profiler():
        chunk = runtime.make_cache()
        times = {name: sum(t) for name, t in kernels_of(lambda: _one_chunk(model, runtime, chunk)).items()}
        figures["encoding"] = sum(t for name, t in times.items() if "turboquant_encode" in name) / sum(times.values())
        runtime.release(chunk)
        figures["launches"] = sum(map(len, kernels_of(lambda: _profiled(model, caches)).values())) / (8 * args.layers)
    runtime.release(caches)
    del caches
    mx.clear_cache()
    caches = filled(runtime, args.long_tokens)
    figures["long decode"] = 1 / decode(model, caches, args.steps)
    runtime.release(caches)
    return figures


def _one_chunk(model: Any, runtime: KVRuntime, caches: list[Any]) -> None:
    prefill(model, runtime, caches, CHUNK)


def _profiled(model: Any, caches: list[Any]) -> None:
    decode(model, caches, 8)


NAMES = {
    "prefill": "prefill tok/s",
    "peak GB": "peak over weights in prefill GB",
    "cache GB": "pages and exact rows GB",
    "allocated GB": "allocated after prefill GB",
    "decode": "decode tok/s",
    "encoding": "encoding's share of a chunk's GPU time",
    "launches": "launches per layer and decode step",
    "long decode": "decode at the long length tok/s",
}


def rows_of(name: str, figures: dict[str, float], base: dict[str, float], aims: dict[str, float]) -> list[Row]:
    rows = []
    for key, value in figures.items():
        label = f"32B {name} {NAMES[key]}"
        if key == "launches":
            rows.append(Row.at_most(label, value, "", base[key] + 2 if figures is not base else None, base[key]))
        elif key == "encoding":
            rows.append(Row.at_most(label, value, "", 0.03))
        elif key.endswith("GB"):
            rows.append(Row.at_most(label, value, "", aims.get(key), base[key]))
        else:
            aim = aims.get(key)
            rows.append(Row.at_least(label, value, "", None if aim is None else aim * base[key], base[key]))
    return rows


def prompts_of(model_path: Path, tokenizer: Any, num_prompts: int) -> list[tuple[list[int], str]]:
    """Held-out prompts of different lengths, and what to find in their answers."""
    lines = map(json.loads, (model_path.parent / "heldout" / "prompts.jsonl").read_text().splitlines())
    chosen = [p for p in lines if p["kind"].startswith(("needle-512", "needle-1024", "needle-2048", "small_talk"))]
    chosen.sort(key=lambda p: p["kind"])
    picked = [chosen[i * len(chosen) // num_prompts] for i in range(num_prompts)]
    return [
        (tokenizer.apply_chat_template(p["messages"], add_generation_prompt=True), str(p["check"].get("value", "")))
        for p in picked
    ]


def load_embedded(
    args: argparse.Namespace, calibration: Calibration | None = None
) -> tuple[Any, Any, KVRuntime, Calibration]:
    """The embedded model with its weights expanded, many times faster on a CPU and, at this size, on a GPU too."""
    from mlx_lm import load
    from mlx_lm.utils import dequantize_model

    model, tokenizer = load(str(args.model))[:2]
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    model = dequantize_model(model)
    calibration = calibration or calibrate(model, tokenizer.encode(calibration_text()))
    runtime = KVRuntime(model, KVFormat(4, 3), calibration=calibration, backend=args.backend)
    return model, tokenizer, runtime, calibration


def greedy(
    model: Any, caches: list[Any], prompts: list[list[int]], num_tokens: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and the margin of each over the second best; prompts one after the other, then all rows together."""
    firsts = []
    for ids, cache in zip(prompts, caches, strict=True):
        firsts.append(model(mx.array(ids)[None], cache=cache)[:, -1])
        mx.eval(firsts[-1])
    rows = caches[0] if len(caches) == 1 else [type(c[0]).merge(c) for c in map(list, zip(*caches, strict=True))]
    logits = mx.concatenate(firsts)
    tokens: list[list[int]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    for _ in range(num_tokens):
        best: Any = mx.sort(logits.astype(mx.float32), axis=-1)[:, -2:].tolist()
        chosen = mx.argmax(logits, axis=-1)
        chosen_ids: Any = chosen.tolist()
        for i, (token, (second, first)) in enumerate(zip(chosen_ids, best, strict=True)):
            tokens[i].append(token)
            margins[i].append(first - second)
        logits = model(chosen[:, None], cache=rows)[:, -1]
    return tokens, margins


def tokens_command(args: argparse.Namespace) -> list[Row]:
    mx.set_default_device(mx.cpu)
    model, tokenizer, runtime, calibration = load_embedded(args)
    prompts = prompts_of(args.model, tokenizer, args.prompts)
    answers = [greedy(model, [runtime.make_cache()], [ids], args.steps) for ids, _ in prompts]
    found = [
        {"prompt": ids, "value": value, "tokens": t[0], "margins": m[0]}
        for (ids, value), (t, m) in zip(prompts, answers, strict=True)
    ]
    means = {i: [m.k.tolist(), m.v.tolist()] for i, m in calibration.layers.items()}
    args.file.write_text(json.dumps({"answers": found, "means": means}))
    return []


def agreement(wanted: list[dict[str, Any]], tokens: list[list[int]]) -> tuple[int, int]:
    """Rows that agree to the end or part at a near tie, and rows that agree to the end."""
    fine = same = 0
    for want, got in zip(wanted, tokens, strict=True):
        parts = [i for i, (a, b) in enumerate(zip(want["tokens"], got, strict=True)) if a != b]
        same += not parts
        fine += not parts or want["margins"][parts[0]] < TIE
    return fine, same


def streams(args: argparse.Namespace) -> list[Row]:
    held = json.loads(args.tokens_file.read_text())
    wanted = held["answers"]
    # the CPU's means: those of other weights' rounding are another cache
    stored = {int(i): [np.array(side, np.float32) for side in sides] for i, sides in held["means"].items()}
    means = {i: Means(k, v) for i, (k, v) in stored.items()}
    model, tokenizer, runtime, _ = load_embedded(args, Calibration(means, "from the CPU"))
    prompts = [w["prompt"] for w in wanted]
    steps = len(wanted[0]["tokens"])
    alone = [greedy(model, [runtime.make_cache()], [ids], steps)[0][0] for ids in prompts]
    together, _ = greedy(model, [runtime.make_cache() for _ in prompts], prompts, steps)
    rows = []
    for name, tokens in (("alone", alone), (f"{len(prompts)} streams", together)):
        fine, same = agreement(wanted, tokens)
        rows.append(Row.at_least(f"{name}: answers that part from the CPU's at near ties only", fine, "", len(prompts)))
        rows.append(Row.plain(f"{name}: answers equal to the CPU's", same, ""))
        texts = [tokenizer.decode(t).lower() for t in tokens]
        found = sum(w["value"].lower() in text for w, text in zip(wanted, texts, strict=True))
        on_cpu = sum(w["value"].lower() in tokenizer.decode(w["tokens"]).lower() for w in wanted)
        rows.append(Row.at_least(f"{name}: needles found", found, "", on_cpu))
    print(f"{runtime.backend_name}, prompts of {sorted(map(len, prompts))} tokens, {steps} greedy tokens each")
    print_rows(rows)
    runtime.check_integrity()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    shape = commands.add_parser("shape32b")
    for name, value in (("layers", 64), ("hidden", 5120), ("q-heads", 40), ("kv-heads", 8), ("wide", 27648)):
        shape.add_argument(f"--{name}", type=int, default=value)
    for name, value in (
        ("vocabulary", 152064),
        ("tokens", 16384),
        ("long-tokens", 65536),
        ("steps", 48),
        ("rounds", 2),
    ):
        shape.add_argument(f"--{name}", type=int, default=value)
    shape.add_argument("--formats", nargs="*", default=["4/3", "3/3"])
    shape.set_defaults(run=shape32b, backend="gpu")
    tokens = commands.add_parser("tokens")
    tokens.add_argument("file", type=Path)
    tokens.add_argument("--prompts", type=int, default=8)
    tokens.add_argument("--steps", type=int, default=32)
    tokens.set_defaults(run=tokens_command, backend="auto")
    both = commands.add_parser("streams")
    both.add_argument("--tokens", dest="tokens_file", type=Path, required=True)
    both.set_defaults(run=streams, backend="gpu")
    for command in (shape, tokens, both):
        add_json_option(command)
        command.add_argument("--model", type=Path, default=Path("server/turboserve/models/tiny/model"))
        command.add_argument("--backend")
    args = parser.parse_args()
    mx.random.seed(int(np.random.default_rng().integers(1 << 30)))
    write_rows(args.json, args.run(args))


if __name__ == "__main__":
    main()
