"""What a server is measured against in this process: mlx-lm's generator, the model's own step, a prompt."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from _decode_steps import chained_step_s
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import load

from turboquant_kv.cache.runtime import KVRuntime
from turboserve.engine.loading import build_parts
from turboserve.settings import Settings


def generator_rate(folder: Path, num_streams: int, prompt_tokens: int, answer_tokens: int) -> float:
    """All tokens/s of mlx-lm's BatchGenerator in this process, prefill included; the better of two runs."""
    model, _ = load(str(folder))[:2]
    rates = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        prompts = rng.integers(1, 1000, (num_streams, prompt_tokens)).tolist()
        generator: Any = BatchGenerator(model, completion_batch_size=num_streams)
        began = time.perf_counter()
        generator.insert(prompts, [answer_tokens] * num_streams)
        num_tokens = 0
        while responses := generator.next_generated():
            num_tokens += len(responses)
        rates.append(num_tokens / (time.perf_counter() - began))
        generator.close()
    return max(rates)


def own_step_s(settings: Settings, num_rows: int, num_tokens: int, num_steps: int) -> float:
    """Seconds of the model's batched step in this process, loaded as a server with these settings loads it."""
    parts = build_parts(settings, lambda line: None)
    model, runtime, rng = parts.loaded.model, parts.runtime, np.random.default_rng(0)
    singles = []
    for _ in range(num_rows):
        caches = runtime.make_cache()
        model(mx.array(rng.integers(1, 1000, (1, num_tokens))), cache=caches)
        runtime.evaluate(caches)
        singles.append(caches)
    batch = runtime.merge_rows(singles)
    seconds = chained_step_s(partial(model, cache=batch), num_rows, num_steps)
    for caches in [batch, *singles]:
        runtime.release(caches)
    mx.clear_cache()
    return seconds


def prefilled_s(model: Any, runtime: KVRuntime, caches: list[Any], num_tokens: int, chunk: int) -> float:
    """Seconds to take in a random prompt in chunks."""
    tokens = mx.random.randint(0, 1000, (1, num_tokens))
    mx.eval(tokens)
    began = time.perf_counter()
    for first in range(0, num_tokens, chunk):
        model(tokens[:, first : first + chunk], cache=caches)
        runtime.evaluate(caches)
    mx.synchronize()
    return time.perf_counter() - began
