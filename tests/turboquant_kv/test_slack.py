"""Memory of unused pages goes back when another format needs it, and nobody notices but the books."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.codec.format import KVFormat

BASE = KVFormat(page_tokens=16, sink_tokens=8)


def filled(family: KVFamily, model: Any, name: str, tokens: list[int]) -> list[Any]:
    caches = family.runtime(name).make_cache()
    logits_of(model, caches, tokens, [])
    return caches


@pytest.mark.parametrize("backend", ["cpu-numpy", "cpu-native", "mlx-ops"])
def test_conversations_do_not_notice(backend: str, rng: np.random.Generator) -> None:
    model = small_models.dense()
    family = KVFamily(model, base=BASE, backend=backend)
    names = ["4/4", "4/3", "4/4", "4/4", "f16"]
    rows = [
        filled(family, model, name, random_tokens(rng, int(n)))
        for name, n in zip(names, (90, 50, 70, 40, 30), strict=True)
    ]
    runtime = family.runtime("4/4")
    fork = runtime.fork(rows[2], runtime.usable_prefix(rows[2], 60))
    more = random_tokens(rng, 40)
    want_of_fork = logits_of(model, runtime.fork(fork, 60), more, [])
    batch = runtime.merge_rows([rows[1], rows[2], rows[3]])
    twin = runtime.merge_rows([rows[1], rows[2], rows[3]])
    want = np.array(model(mx.array([[1], [2], [3]]), cache=twin))
    runtime.release(twin)
    for caches in (rows[0], rows[2]):
        runtime.release(caches)
    used = family.unique_bytes()
    slack = family.slack_bytes()
    assert slack > 0
    given = family.trim()
    assert (family.unique_bytes(), family.slack_bytes()) == (used, slack - given)
    assert family.slack_bytes() == 0 or backend == "mlx-ops"  # whose arrays grow by some pages at a time
    family.check_integrity()
    assert np.array_equal(np.array(model(mx.array([[1], [2], [3]]), cache=batch)), want)
    assert np.array_equal(logits_of(model, fork, more, []), want_of_fork)
    for caches in (*rows, batch, fork):
        runtime.release(caches)
    assert family.unique_bytes() == 0
    family.trim()
    assert family.allocated_bytes() == 0 or backend == "mlx-ops"
    family.check_integrity()


def test_a_format_that_nobody_uses_any_more_costs_nothing(rng: np.random.Generator) -> None:
    model = small_models.dense()
    family = KVFamily(model, base=BASE)
    old = filled(family, model, "8/8", random_tokens(rng, 300))
    new = family.convert(old, "8/8", "4/3")
    before = logits_of(model, family.runtime("4/3").fork(new, 300), [1, 2], [])
    family.runtime("8/8").release(old)
    assert family.runtime("8/8").allocated_bytes() > 0
    assert family.trim() > 0
    assert family.runtime("8/8").allocated_bytes() == 0
    assert family.allocated_bytes() == family.runtime("4/3").measure(new).total
    assert np.array_equal(logits_of(model, new, [1, 2], []), before)
    again = filled(family, model, "8/8", random_tokens(rng, 50))
    spare = family.slack_bytes()
    assert family.trim() == spare, "exact rows that the pool took in stock"
    assert family.trim() == 0
    assert family.runtime("8/8").allocated_bytes() == family.runtime("8/8").measure(again).total


def test_only_what_is_wanted_or_worth_a_copy_is_given_back(rng: np.random.Generator) -> None:
    model = small_models.dense()
    family = KVFamily(model, base=BASE)
    held = {
        name: [filled(family, model, name, random_tokens(rng, length)) for _ in range(number)]
        for name, number, length in (("4/4", 6, 200), ("4/3", 15, 1500))
    }
    runtime, other = family.runtime("4/4"), family.runtime("4/3")
    runtime.release(held["4/4"][0])
    for caches in held["4/3"][:8]:
        other.release(caches)
    slack = runtime.slack_bytes()
    assert family.trim(1) > 0
    assert (runtime.slack_bytes(), other.slack_bytes()) == (slack, 0), "the one that gives most for its copy"
    for _ in range(3):
        other.release([filled(family, model, "4/3", random_tokens(rng, 30))[0]])
    assert other.slack_bytes() < other.allocated_bytes() / 8
    assert family.trim() == slack
    assert other.slack_bytes() > 0


def test_one_format_alone_keeps_its_slack_while_it_is_used(rng: np.random.Generator) -> None:
    model = small_models.dense()
    family = KVFamily(model, base=BASE)
    runtime = family.runtime("4/4")
    rows = [filled(family, model, "4/4", random_tokens(rng, 100)) for _ in range(3)]
    runtime.release(rows.pop())
    assert family.trim() == 0, "its next conversation takes it"
    assert family.trim(1) > 0, "unless somebody says that it is wanted"
    while rows:
        runtime.release(rows.pop())
    assert family.trim() > 0
    assert family.allocated_bytes() == 0


def test_pages_held_by_their_numbers_are_not_moved(rng: np.random.Generator) -> None:
    model = small_models.dense()
    family = KVFamily(model, base=BASE)
    caches = filled(family, model, "4/4", random_tokens(rng, 90))
    assert isinstance(caches[0], TurboQuantKVCache) and caches[0].sequence is not None
    pool = caches[0].sequence.pool
    pool.share([2])
    family.runtime("4/4").release(caches)
    before = pool.stores[0].read(np.array([2]))
    free_rows = pool.exact.num_free
    assert pool.trim() == free_rows * pool.raw_token_bytes > 0, "exact rows have no such holders"
    assert pool.trim() == 0
    assert np.array_equal(pool.stores[0].read(np.array([2])).k_codes, before.k_codes)
    pool.free([2])
    assert pool.trim() > 0
    assert pool.allocated_bytes == 0
