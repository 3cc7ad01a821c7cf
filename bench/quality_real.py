"""What the presets cost on real models, and what others' formats cost there: every quality target as a row.

    python bench/quality_real.py MODEL_FOLDER [MODEL_FOLDER ...] --json quality_real.json
    python bench/quality_real.py MODEL_FOLDER --quick          # short texts, no far positions: a minute or two
    python bench/quality_real.py --planted                     # a random model with a key bias of norm 900, alone

The models are folders that mlx-lm can load. Teacher-forced through the serving path (turboquant_kv.evaluation), texts
built into `turboserve eval`; `r44` is what others ship at 3.9x: rotation, Lloyd-Max, one norm, uncentred, nothing
exact. Targets that name a model apply to those whose folder name contains `smollm2` or `qwen`.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

import mlx.core as mx
from mlx_lm import load
from mlx_lm.models import qwen2
from mlx_lm.models.cache import make_prompt_cache

from turboquant_kv.cache.calibration import Calibration, calibrate, calibration_text
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.format_name import PRESETS, parse_format_name
from turboquant_kv.evaluation import Evaluation, Plan, Result, compare, evaluate, standard_rivals
from turboquant_kv.evaluation.shifted import at_offset, shifted
from turboserve.cli.eval import built_in_texts

FAR = (0, 8192, 32768)
LONG = (4096, 8192)  # further lengths of text on SmolLM2
RATIO_TOKENS = 16_384
AROUND = 192  # tokens to both sides, a multiple of half of every page: how full the newest page is, averages out
RIVAL = "r44"
LEAST_RATIO = {"balanced": (4.2, 4.35), "compact": (5.6, 5.9), "tiny": (6.8, 7.2)}  # head dimension 64, 128
CALIBRATION_SECONDS = 20.0
BIAS_NORM = 900.0
PLANTED_KL = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--quick", action="store_true", help="256 tokens a text, near positions only")
    parser.add_argument("--planted", action="store_true", help="the random model with a planted bias as well")
    parser.add_argument("--tokens", type=int, default=1024, help="of each text (default 1024)")
    parser.add_argument("--backend", default="auto")
    add_json_option(parser)
    args = parser.parse_args()
    rows: list[Row] = [*ratio_rows()]
    for folder in args.models:
        rows += of_model(folder, args)
    if args.planted:
        rows += planted_rows()
    print("\n## Targets")
    print_rows([row for row in rows if row.target is not None])
    write_rows(args.json, rows)


def ratio_rows() -> Iterator[Row]:
    """Of the formats themselves, exact ends in float16."""
    for preset, least in LEAST_RATIO.items():
        fmt = KVFormat.parse(parse_format_name(preset))
        for head_dim, ratio in zip((64, 128), least, strict=True):
            layers, around = [(fmt, head_dim, 1)], range(RATIO_TOKENS - AROUND, RATIO_TOKENS + AROUND)
            yield Row.at_least(f"{preset} ratio at 16K, D={head_dim}", ratio_of(layers), "x", ratio)
            yield Row.plain(f"{preset} ratio on average around 16K, D={head_dim}", ratio_of(layers, around), "x")


def ratio_of(layers: list[tuple[KVFormat, int, int]], lengths: Sequence[int] = (RATIO_TOKENS,)) -> float:
    """float16 over all bytes at these numbers of tokens; layers: format, head dimension, KV heads."""
    held = raw = 0
    for fmt, dim, heads in layers:
        token = 2 * 2 * dim * heads
        for n in lengths:
            held += fmt.num_pages(n) * fmt.page_bytes(heads, dim, dim) + fmt.exact_rows(n) * token
            raw += n * token
    return raw / held


def of_model(folder: Path, args: argparse.Namespace) -> list[Row]:
    name = folder.name
    model, tokenizer = load(str(folder))[:2]
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    started = time.perf_counter()
    calibration = calibrate(model, tokenizer.encode(calibration_text(), add_special_tokens=False))
    seconds = time.perf_counter() - started
    rows = [Row.at_most(f"{name}: calibration", seconds, "s", CALIBRATION_SECONDS)]
    rivals = [rival for rival in standard_rivals() if rival.name == RIVAL]
    texts, formats = built_in_texts(), list(PRESETS.values())

    def run(tokens: int, offsets: tuple[int, ...], needles: int = 0, names: list[str] = formats) -> Evaluation:
        plan = Plan(num_tokens=tokens, offsets=offsets, num_needles=needles)
        return evaluate(
            model, tokenizer, names, texts, plan, rivals=rivals, calibration=calibration, backend=args.backend
        )

    tokens, offsets = (256, (0,)) if args.quick else (args.tokens, FAR)
    evaluation = run(tokens, offsets, needles=8)
    show(name, evaluation)
    rows += model_ratio_rows(name, model, calibration, args.backend)
    rows += balanced_rows(name, evaluation)
    rows += compact_rows(name, evaluation)
    rows += tiny_rows(name, evaluation)
    if "smollm2" in name and not args.quick:
        for length in LONG:
            longer = run(length, (0,), needles=8, names=[PRESETS["compact"], PRESETS["tiny"]])
            show(f"{name}, {length} tokens", longer)
            rows += compact_rows(f"{name} at {length}", longer, share=1 / 3)
            rows += tiny_rows(f"{name} at {length}", longer)
    return rows


def show(name: str, evaluation: Evaluation) -> None:
    print(f"\n## {name}: KL by text, perplexity ratio, needle log-probability")
    for result in evaluation.results:
        print(result.name, result.description)
        for run in result.runs:
            kl, ratio = run.comparison.kl.mean(), run.comparison.perplexity_ratio
            print(f"  {run.text:20s} at {run.offset:6d}  KL {kl:.5f}  perplexity x{ratio:.4f}")
        if result.needles is not None:
            told, base = (np.mean(x) for x in (result.needles.log_probability, result.needles.base_log_probability))
            print(f"  needles {told:.3f} (uncompressed {base:.3f})", flush=True)


def model_ratio_rows(name: str, model: Any, calibration: Calibration, backend: str) -> Iterator[Row]:
    """With the layers that the guard gave a larger codec."""
    for preset, format_name in PRESETS.items():
        runtime = KVRuntime(model, KVFormat.parse(format_name), calibration=calibration, backend=backend)
        shapes = runtime.layers.shapes
        layers = [(fmt, shapes[i].k_dim, shapes[i].num_kv_heads) for i, fmt in runtime.layer_formats.items()]  # type: ignore[union-attr]
        least = LEAST_RATIO[preset][layers[0][1] >= 128]
        yield Row.at_least(f"{name}: {preset} ratio at 16K ({runtime.description})", ratio_of(layers), "x", least)


def near(result: Result) -> list[Any]:
    return [run.comparison for run in result.runs if run.offset == 0]


def mean_kl(result: Result, offset: int = 0) -> float:
    return float(np.mean([run.comparison.kl.mean() for run in result.runs if run.offset == offset]))


def perplexity(result: Result) -> float:
    """Geometric mean over texts of compressed over uncompressed."""
    return float(np.exp(np.mean([np.log(c.perplexity_ratio) for c in near(result)])))


def needles(result: Result) -> float:
    assert result.needles is not None
    return float(np.mean(result.needles.log_probability))


def balanced_rows(name: str, evaluation: Evaluation) -> Iterator[Row]:
    result, rival = evaluation.result(PRESETS["balanced"]), evaluation.result(RIVAL)
    texts, base = near(result), mean_kl(rival)
    yield Row.at_most(f"{name}: balanced perplexity over texts", perplexity(result), "x", 1.01, perplexity(rival))
    yield Row.at_most(f"{name}: balanced perplexity, worst text", max(c.perplexity_ratio for c in texts), "x", 1.02)
    yield Row.at_most(f"{name}: balanced KL", mean_kl(result), "nats", 0.005, base)
    yield Row.at_most(f"{name}: balanced KL, worst text", max(float(c.kl.mean()) for c in texts), "nats", 0.010)
    for offset in evaluation.plan.offsets[1:]:
        limit = 1.3 * mean_kl(result)
        yield Row.at_most(f"{name}: balanced KL at {offset}", mean_kl(result, offset), "nats", limit, mean_kl(result))


def compact_rows(name: str, evaluation: Evaluation, share: float = 1 / 4) -> Iterator[Row]:
    result, rival = evaluation.result(PRESETS["compact"]), evaluation.result(RIVAL)
    limit = share * mean_kl(rival) if "smollm2" in name else 0.020
    yield Row.at_most(f"{name}: compact KL", mean_kl(result), "nats", limit, mean_kl(rival))
    yield Row.at_most(f"{name}: compact perplexity", perplexity(result), "x", 1.025, perplexity(rival))
    yield Row.at_least(f"{name}: compact needles", needles(result), "nats", needles(rival))
    for offset in evaluation.plan.offsets[1:]:
        yield Row.plain(f"{name}: compact KL at {offset}", mean_kl(result, offset), "nats", mean_kl(result))


def tiny_rows(name: str, evaluation: Evaluation) -> Iterator[Row]:
    result, rival = evaluation.result(PRESETS["tiny"]), evaluation.result(RIVAL)
    yield Row.at_most(f"{name}: tiny KL", mean_kl(result), "nats", 0.75 * mean_kl(rival), mean_kl(rival))
    yield Row.plain(f"{name}: tiny perplexity", perplexity(result), "x", perplexity(rival))
    yield Row.at_least(f"{name}: tiny needles", needles(result), "nats", needles(rival) - 0.6)


def planted_rows() -> Iterator[Row]:
    """A small random model one of whose layers has a bias of norm 900 on its keys: uncentred, and as shipped.

    The bias makes attention choose single tokens, so that errors of values no longer average: what keys alone cost is
    the row with values of 8 bits.
    """
    without, planted = _small_model(0.0), _small_model(BIAS_NORM)
    balanced = KVFormat.parse(PRESETS["balanced"])
    keys_alone = balanced.with_(v_bits=8)
    for offset in (0, 32768):
        uncentred = _small_kl(planted, keys_alone.with_(k_bits=4, centred=False), offset)
        keys = _small_kl(planted, keys_alone, offset)
        yield Row.at_most(f"planted bias at {offset}: KL of {keys_alone.name}", keys, "nats", PLANTED_KL, uncentred)
        control, shipped = (_small_kl(model, balanced, offset) for model in (without, planted))
        yield Row.plain(
            f"planted bias at {offset}: KL of {balanced.name}, over the same without it", shipped, "nats", control
        )


def _small_model(bias_norm: float) -> Any:
    mx.random.seed(0)
    args = qwen2.ModelArgs(
        **{"model_type": "qwen2", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 512, "rms_norm_eps": 1e-6, "vocab_size": 512},
    )
    model: Any = qwen2.Model(args)
    rng = np.random.default_rng(0)
    attention = model.layers[1].self_attn
    direction = rng.standard_normal(attention.k_proj.bias.shape).reshape(2, -1)
    direction *= bias_norm / np.linalg.norm(direction, axis=1, keepdims=True)
    attention.k_proj.bias = mx.array(direction.reshape(-1).astype(np.float32))
    attention.q_proj.weight *= 3  # random models attend evenly: errors of keys would not show
    mx.eval(model.parameters())
    return model


def _small_kl(model: Any, fmt: KVFormat, offset: int) -> float:
    rng = np.random.default_rng(1)
    means = None
    if fmt.centred:
        means = shifted(calibrate(model, [int(t) for t in rng.integers(0, 512, 1024)]), offset)
    tokens = [int(t) for t in rng.integers(0, 512, 600)]
    runtime = KVRuntime(model, fmt, calibration=means)
    attends = [True] * len(model.layers)
    compressed = at_offset(runtime.make_cache(), offset, attends)
    base = at_offset(make_prompt_cache(model), offset, attends)
    return float(compare(model, tokens, base, {"": compressed})[""].kl.mean())


if __name__ == "__main__":
    main()
