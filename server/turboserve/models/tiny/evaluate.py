"""Measure the embedded model on its held-out prompts and texts, with or without a compressed KV cache.

    python -m turboserve.models.tiny.evaluate --kv-format 4/3 --limit 5

Answers are greedy. It owns loading, asking and counting; what is right stands in `prompts.py`, comparisons
between formats in `bench/evaluate_formats.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from turboquant_kv import blas

if __name__ == "__main__":
    blas.interpose()  # only before mlx is imported does it help

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model

from turboquant_kv.cache.calibration import Calibration, calibration_for
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboserve.models.tiny import MODEL_PATH
from turboserve.models.tiny.prompts import Prompt, Text, is_right, load_prompts, load_texts, select, tool_calls

UNCOMPRESSED = "f16"  # the name of mlx-lm's own cache; it keeps the model's dtype
MAX_ANSWER_TOKENS = 160  # the longest right answer has about 100
PERPLEXITY_TOKENS = 2048  # of each text at most
CACHE_DIR = Path("~/.cache/turboserve").expanduser()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one prompt. `valid` only where a tool call was wanted: did its JSON parse?"""

    prompt_id: str
    kind: str
    text: str
    right: bool
    valid: bool | None


def load(folder: Path = MODEL_PATH, float32: bool = True) -> tuple[Any, Any]:
    """Model and tokenizer of a local folder; `float32` expands 8-bit and bf16 weights, which a CPU runs faster."""
    model, tokenizer = mlx_lm.load(str(folder), tokenizer_config={"trust_remote_code": False})[:2]
    if float32:
        model = dequantize_model(model)
        model.update(tree_map(_to_float32, model.parameters()))
        mx.eval(model.parameters())
    return model, tokenizer


def _to_float32(parameter: mx.array) -> mx.array:
    return parameter.astype(mx.float32) if mx.issubdtype(parameter.dtype, mx.floating) else parameter


@cache
def weights_fingerprint(folder: Path = MODEL_PATH) -> str:
    """Hash of the weight files, under which calibrated means are stored."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def calibration_of(model: Any, tokenizer: Any, fmt: KVFormat | None, folder: Path = MODEL_PATH) -> Calibration | None:
    """The model's means where the format is centred."""
    if fmt is None or not fmt.centred:
        return None
    return calibration_for(model, tokenizer, CACHE_DIR, weights_fingerprint(folder))


def runtime_for(model: Any, tokenizer: Any, fmt: KVFormat | None, folder: Path = MODEL_PATH) -> KVRuntime:
    """Caches of one format, calibrated if it is centred; None gives mlx-lm's own caches."""
    return KVRuntime(model, fmt, calibration=calibration_of(model, tokenizer, fmt, folder))


def parse_format(name: str) -> KVFormat | None:
    """`f16` or KEY_BITS/VALUE_BITS. Raises UnsupportedFormatError."""
    return None if name == UNCOMPRESSED else KVFormat.parse(name)


def text_losses(
    model: Any, tokenizer: Any, runtime: KVRuntime, texts: Iterable[Text], num_tokens: int = PERPLEXITY_TOKENS
) -> Iterator[tuple[str, list[float]]]:
    """(source, losses in nats of tokens 1..) of the first `num_tokens` tokens of each text, teacher-forced."""
    for item in texts:
        ids = mx.array(tokenizer.encode(item.text, add_special_tokens=False)[:num_tokens])[None]  # (1, T)
        caches = runtime.make_cache()
        logits = model(ids[:, :-1], cache=caches).astype(mx.float32)  # (1, T-1, vocabulary)
        losses: Any = nn.losses.cross_entropy(logits, ids[:, 1:])[0].tolist()
        runtime.release(caches)
        yield item.source, losses


def perplexity(losses: Iterable[tuple[str, list[float]]]) -> dict[str, float]:
    """exp of the mean loss per token, by source and for `all`."""
    by_source = defaultdict[str, list[float]](list)
    for source, values in losses:
        by_source[source] += values
        by_source["all"] += values
    return {source: math.exp(sum(values) / len(values)) for source, values in sorted(by_source.items())}


def ask(model: Any, tokenizer: Any, runtime: KVRuntime, prompt: Prompt) -> Answer:
    """The greedy answer to one prompt, in a cache of its own."""
    ids = tokenizer.apply_chat_template(prompt.messages, tools=prompt.tools, add_generation_prompt=True)
    caches = runtime.make_cache()
    text = mlx_lm.generate(model, tokenizer, ids, max_tokens=MAX_ANSWER_TOKENS, prompt_cache=caches)
    runtime.release(caches)
    valid = bool(tool_calls(text)) if prompt.check["kind"] == "tool" else None
    return Answer(prompt.prompt_id, prompt.kind, text, is_right(prompt.check, text), valid)


def counts(answers: Iterable[Answer]) -> dict[str, str]:
    """`right/asked` by kind, and the share of wanted tool calls whose JSON parses."""
    right, valid = defaultdict[str, list[bool]](list), list[bool]()
    for answer in answers:
        right[answer.kind].append(answer.right)
        if answer.valid is not None:
            valid.append(answer.valid)
    figures = {kind: f"{sum(values)}/{len(values)}" for kind, values in right.items()}
    return figures | ({"tool_call, valid JSON": f"{sum(valid)}/{len(valid)}"} if valid else {})


def show_wrong(prompt: Prompt, answer: Answer) -> None:
    question = prompt.messages[-1]["content"][-120:]
    print(f"{prompt.prompt_id}: {question!r}\n  wanted {prompt.answer!r}\n  got    {answer.text!r}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL_PATH)
    parser.add_argument("--kv-format", default=UNCOMPRESSED, help="f16 (mlx-lm's own cache), 8/4, 4/4, 4/3, …")
    parser.add_argument("--as-stored", action="store_true", help="do not expand the weights to float32")
    parser.add_argument("--kinds", default="", help="only kinds that begin with one of these, separated by commas")
    parser.add_argument("--limit", type=int, help="at most so many prompts of a kind, spread evenly")
    parser.add_argument("--texts", type=int, help="at most so many held-out texts, spread evenly")
    parser.add_argument("--show-wrong", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    start = time.monotonic()
    model, tokenizer = load(args.model, float32=not args.as_stored)
    runtime = runtime_for(model, tokenizer, parse_format(args.kv_format), args.model)
    texts = load_texts()
    texts = texts if args.texts is None else texts[:: max(1, len(texts) // max(1, args.texts))][: args.texts]
    by_source = perplexity(text_losses(model, tokenizer, runtime, texts)) if texts else {}
    answers = []
    for prompt in select(load_prompts(), tuple(args.kinds.split(",")), args.limit):
        answers.append(ask(model, tokenizer, runtime, prompt))
        if args.show_wrong and not answers[-1].right:
            show_wrong(prompt, answers[-1])
    figures = {
        "kv_format": args.kv_format,
        "perplexity": {source: round(value, 2) for source, value in by_source.items()},
        "right": counts(answers),
        "seconds": round(time.monotonic() - start),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
