"""How far a compressed cache moves the embedded model's predictions, beside the format that others ship.

    python bench/quality.py --json quality.json
    python bench/quality.py --sinks 0,4,32,64,128

Teacher-forced: held-out texts run through the model (float32) with each cache, in one pass; the figures compare its
next-token distributions with those of the uncompressed cache, position by position. Owns the comparison of
distributions; whether answers stay right is `evaluate_formats.py`'s question. Method and results: docs/quality.md.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from _rows import Row, add_json_option, write_rows

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

import mlx.core as mx
from _round_trip import RoundTripCache

from turboquant_kv.codec.format import KVFormat
from turboserve.models.tiny.evaluate import calibration_of, load, runtime_for
from turboserve.models.tiny.prompts import load_texts

FORMATS = ("8/4", "4/4", "4/3", "3/3", "2/2")
# Mean KL that these formats may cost with everything compressed but the exact ends; from the same texts' keys and
# values with every token compressed, centred, unbiased.
TARGETS = {"4/4": 0.028, "4/3": 0.063, "3/3": 0.105}
MATCHED = "matched norm, uncentred"  # the better of the two formats that others ship, so the baseline here
NUM_TOKENS = 1024  # of each text
BUDGET_TOKENS = 8192  # context at which the sweep counts bytes


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of cache under comparison. `bytes_at_8k` is None where nothing is really stored."""

    format_name: str
    label: str
    make_cache: Callable[[], list[Any]]
    release: Callable[[list[Any]], None] = lambda caches: None
    bytes_at_8k: int | None = None


@dataclass(slots=True)
class Divergence:
    """Per-token figures of one variant over all texts, in nats."""

    kl: list[npt.NDArray[np.float32]] = field(default_factory=list)
    flips: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    losses: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def add(self, reference: mx.array, log_p: mx.array, targets: mx.array) -> None:
        """reference, log_p (T, V): log-probabilities without and with compression; targets (T,) token ids."""
        kl = (mx.exp(reference) * (reference - log_p)).sum(-1)
        self.kl.append(np.array(kl))
        self.flips.append(np.array(reference.argmax(-1) != log_p.argmax(-1)))
        self.losses.append(-np.array(mx.take_along_axis(log_p, targets[:, None], -1)[:, 0]))

    def figures(self) -> dict[str, float]:
        kl = np.concatenate(self.kl)
        return {
            "kl_mean": float(kl.mean()),
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "top1_flips": float(np.concatenate(self.flips).mean()),
            "perplexity": math.exp(float(np.concatenate(self.losses).mean())),
        }


def held_out_ids(tokenizer: Any, num_texts: int) -> list[mx.array]:
    """The first NUM_TOKENS tokens (1, T) of the first `num_texts` held-out texts that are long enough."""
    encoded = (tokenizer.encode(item.text, add_special_tokens=False) for item in load_texts())
    long_enough = [ids[:NUM_TOKENS] for ids in encoded if len(ids) >= NUM_TOKENS]
    return [mx.array(ids)[None] for ids in long_enough[:num_texts]]


def log_probs(model: Any, ids: mx.array, caches: list[Any]) -> mx.array:
    """(T, V) log-probabilities of the next token, in one pass over ids (1, T)."""
    logits = model(ids, cache=caches)[0].astype(mx.float32)
    result: mx.array = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(result)
    return result


def shipped(model: Any, tokenizer: Any, fmt: KVFormat, label: str) -> Variant:
    """The product's cache in this format."""
    runtime = runtime_for(model, tokenizer, fmt)
    return Variant(fmt.name, label, runtime.make_cache, runtime.release, runtime.bytes_for(BUDGET_TOKENS))


def round_trip(model: Any, tokenizer: Any, fmt: KVFormat, label: str) -> Variant:
    """Every token through the codec and back, the newest included: no exact ends at all."""
    calibration = calibration_of(model, tokenizer, fmt)
    return Variant(fmt.name, label, lambda: RoundTripCache.for_model(model, fmt, calibration))


def comparison(model: Any, tokenizer: Any, names: list[str]) -> Iterator[Variant]:
    """For each format: as shipped, without exact ends, and as others ship it: uncentred, without exact ends.

    Others store the vector's norm, some corrected for the norm that quantising takes away, some raw.
    """
    for name in names:
        fmt = KVFormat.parse(name)
        yield shipped(model, tokenizer, fmt, "shipped")
        yield round_trip(model, tokenizer, fmt, "no exact ends")
        yield round_trip(model, tokenizer, fmt.with_(scale="norm", centred=False), MATCHED)
        yield round_trip(model, tokenizer, fmt.with_(scale="plain", centred=False), "raw norm, uncentred")


def sweep(model: Any, tokenizer: Any, names: list[str], sinks: list[int]) -> Iterator[Variant]:
    """Each format with each number of exact first tokens."""
    for name in names:
        for sink_tokens in sinks:
            fmt = KVFormat.parse(name).with_(sink_tokens=sink_tokens)
            yield shipped(model, tokenizer, fmt, f"sink {sink_tokens}")


def measure(
    model: Any, texts: list[mx.array], baseline: Variant, variants: list[Variant]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Figures of the uncompressed cache and of each variant, over all texts."""
    divergences, uncompressed = [Divergence() for _ in variants], Divergence()
    for ids in texts:
        inputs, targets = ids[:, :-1], ids[0, 1:]
        reference = log_probs(model, inputs, baseline.make_cache())
        uncompressed.add(reference, reference, targets)
        for variant, divergence in zip(variants, divergences, strict=True):
            caches = variant.make_cache()
            divergence.add(reference, log_probs(model, inputs, caches), targets)
            variant.release(caches)
    return uncompressed.figures(), [divergence.figures() for divergence in divergences]


def print_table(variants: list[Variant], uncompressed: dict[str, float], figures: list[dict[str, float]]) -> None:
    print(f"uncompressed perplexity {uncompressed['perplexity']:.2f}")
    print("| K/V bits | cache | KL mean | median | p99 | top-1 flips | perplexity | bytes at 8K |")
    print("|---|---|---|---|---|---|---|---|")
    for variant, row in zip(variants, figures, strict=True):
        num_bytes = "" if variant.bytes_at_8k is None else f"{variant.bytes_at_8k:,}"
        print(
            f"| {variant.format_name} | {variant.label} | {row['kl_mean']:.4f} | {row['kl_median']:.4f} "
            f"| {row['kl_p99']:.3f} | {row['top1_flips']:.1%} | {row['perplexity']:.2f} | {num_bytes} |"
        )


def rows_of(variants: list[Variant], uncompressed: dict[str, float], figures: list[dict[str, float]]) -> list[Row]:
    """One row per figure; the baseline of a mean KL is the rival format's, of a perplexity the uncompressed one."""
    rival = {v.format_name: f["kl_mean"] for v, f in zip(variants, figures, strict=True) if v.label == MATCHED}
    rows = []
    for variant, row in zip(variants, figures, strict=True):
        for name, value in row.items():
            baseline = {"kl_mean": rival.get(variant.format_name), "perplexity": uncompressed["perplexity"]}.get(name)
            target = TARGETS.get(variant.format_name) if (name, variant.label) == ("kl_mean", "shipped") else None
            rows.append(
                Row.at_most(f"{name} {variant.format_name} {variant.label}", value, unit_of(name), target, baseline)
            )
    return rows


def unit_of(name: str) -> str:
    return {"top1_flips": "share", "perplexity": ""}.get(name, "nats")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=4, help="held-out texts (default 4; 22 are long enough)")
    parser.add_argument("--formats", default=",".join(FORMATS), help="KEY_BITS/VALUE_BITS, separated by commas")
    parser.add_argument("--sinks", help="instead: sweep over numbers of exact first tokens, such as 0,4,32,64,128")
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    model, tokenizer = load()
    names = args.formats.split(",")
    if args.sinks:
        variants = list(sweep(model, tokenizer, names, [int(part) for part in args.sinks.split(",")]))
    else:
        variants = list(comparison(model, tokenizer, names))
    baseline = Variant("f16", "uncompressed", runtime_for(model, tokenizer, None).make_cache)
    uncompressed, figures = measure(model, held_out_ids(tokenizer, args.texts), baseline, variants)
    print_table(variants, uncompressed, figures)
    write_rows(args.json, rows_of(variants, uncompressed, figures))


if __name__ == "__main__":
    main()
