"""Rows of a running batch: forked, measured and cut without disturbing the batch."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat

FMT = KVFormat(4, 4, page_tokens=16, sink_tokens=8)
KINDS_AND_FORMATS = [(kind, fmt) for kind in small_models.EVERY_KIND for fmt in (None, FMT)]


def prefilled(model: Any, runtime: KVRuntime, prompts: list[list[int]]) -> list[list[Any]]:
    rows = []
    for prompt in prompts:
        rows.append(runtime.make_cache())
        logits_of(model, rows[-1], prompt, [])
    return rows


def decode(model: Any, batch: list[Any], tokens: list[int]) -> np.ndarray[Any, Any]:
    """(B, vocab) after one more token of each row."""
    return np.array(model(mx.array(tokens)[:, None], cache=batch)[:, -1].astype(mx.float32))


@pytest.mark.parametrize(("kind", "fmt"), KINDS_AND_FORMATS)
def test_a_row_forks_off_a_running_batch(kind: str, fmt: KVFormat | None, rng: np.random.Generator) -> None:
    model = small_models.EVERY_KIND[kind]()
    runtime = KVRuntime(model, fmt)
    prompts = [random_tokens(rng, n) for n in (30, 70, 45)]
    batch = runtime.merge_rows(prefilled(model, runtime, prompts))
    undisturbed = runtime.merge_rows(prefilled(model, runtime, prompts))
    steps = [random_tokens(rng, 3) for _ in range(6)]
    for step in steps[:3]:
        decode(model, batch, step)
        decode(model, undisturbed, step)
    history = prompts[1] + [step[1] for step in steps[:3]]

    whole = runtime.usable_prefix_row(batch, 1, 200)
    assert whole == len(history)
    cut = runtime.usable_prefix_row(batch, 1, 60)
    can_be_cut = kind in small_models.ALL_COMPRESSED or (fmt is not None and kind in ("sliding", "with_sinks"))
    assert cut == ((60 if fmt is None else 56) if can_be_cut else 0)
    for length in {whole, cut} - {0}:
        used = runtime.unique_bytes()
        fork = runtime.fork_row(batch, 1, length)
        assert runtime.unique_bytes() == used, "a fork costs nothing"
        assert runtime.usable_prefix(fork, 1000) == length
        more = random_tokens(rng, 20)
        # in the row's own chunks: its decoded tokens were computed over codes, in one chunk they would not be
        chunks = [n for n in (len(prompts[1]), *range(len(prompts[1]) + 1, length + 1)) if n < length]
        want = logits_of(model, runtime.make_cache(), history[:length] + more, [*chunks, length])[length:]
        got = logits_of(model, fork, more, [])
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 5e-3
        runtime.release(fork)
    for step in steps[3:]:
        assert np.array_equal(decode(model, batch, step), decode(model, undisturbed, step))
    runtime.check_integrity()


@pytest.mark.parametrize(("kind", "fmt"), KINDS_AND_FORMATS)
def test_a_row_is_measured_as_if_it_had_left(kind: str, fmt: KVFormat | None, rng: np.random.Generator) -> None:
    model = small_models.EVERY_KIND[kind]()
    runtime = KVRuntime(model, fmt)
    batch = runtime.merge_rows(prefilled(model, runtime, [random_tokens(rng, n) for n in (30, 70)]))
    decode(model, batch, [1, 2])
    for index in (0, 1):
        left = [cache.extract(index) for cache in batch]
        assert runtime.measure_row(batch, index) == runtime.measure(left)


def test_unique_bytes_count_shared_pages_and_rows_once(rng: np.random.Generator) -> None:
    model = small_models.dense()
    runtime = KVRuntime(model, FMT)
    (caches,) = prefilled(model, runtime, [random_tokens(rng, 60)])
    alone = runtime.unique_bytes()
    assert alone == runtime.measure(caches).total
    forks = [runtime.fork(caches, 60) for _ in range(3)]
    assert runtime.unique_bytes() == alone
    logits_of(model, forks[0], random_tokens(rng, 20), [])
    assert alone < runtime.unique_bytes() < 2 * alone, "only what was written since is the fork's own"
    for held in (caches, *forks):
        runtime.release(held)
    assert runtime.unique_bytes() == 0


def test_a_plain_fork_that_was_cut_keeps_no_more_than_it_needs(rng: np.random.Generator) -> None:
    model = small_models.dense()
    runtime = KVRuntime(model, None)
    (caches,) = prefilled(model, runtime, [random_tokens(rng, 600)])
    fork = runtime.fork(caches, 200)
    assert runtime.measure(fork).total == runtime.bytes_for(200)
    assert runtime.measure(caches).total == runtime.bytes_for(600)
    more = random_tokens(rng, 4)
    want = logits_of(model, runtime.fork(caches, 600), more, [])
    assert np.array_equal(logits_of(model, caches, more, []), want), "the original is untouched"
