"""Requantising: what changes does so by the codec's error only, what need not change stays bit by bit."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.cache.calibration import calibrate
from turboquant_kv.cache.convert import convert
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.codec.format import KVFormat

BASE = KVFormat(page_tokens=16, sink_tokens=8)


def held(family: KVFamily, model: Any, name: str, tokens: list[int]) -> list[Any]:
    caches = family.runtime(name).make_cache()
    logits_of(model, caches, tokens, [])
    return caches


def canonical(cache: TurboQuantKVCache) -> Any:
    assert cache.sequence is not None
    return cache.sequence.pool.stores[0].read(cache.sequence.page_ids)


@pytest.mark.parametrize("backend", ["cpu-numpy", "cpu-native", "mlx-ops"])
def test_a_step_down_keeps_ends_and_the_side_that_need_not_change(backend: str, rng: np.random.Generator) -> None:
    model = small_models.dense()
    tokens = random_tokens(rng, 400)
    family = KVFamily(model, base=BASE, backend=backend, calibration=calibrate(model, tokens))
    caches = held(family, model, "8/4", tokens)
    before = [canonical(c) for c in caches]
    smaller = family.convert(caches, "8/4", "4/4")
    assert family.runtime_of(smaller) is family.runtime("4/4")
    assert family.runtime("4/4").measure(smaller).total == family.runtime("4/4").bytes_for(400)
    for old, new, was in zip(caches, smaller, before, strict=True):
        pages = canonical(new)
        assert np.array_equal(pages.v_codes, was.v_codes)
        assert np.array_equal(pages.v_scales, was.v_scales)
        assert all(np.array_equal(getattr(canonical(old), f), getattr(was, f)) for f in was.__slots__)
        for mine, its in zip(old.sequence.exact_ends(), new.sequence.exact_ends(), strict=True):
            assert mx.array_equal(mx.array(mine.k), mx.array(its.k))
            assert mx.array_equal(mx.array(mine.v), mx.array(its.v))
    # Keys were 8 bits exact to 0.6%: coded again, they are as good as if they had been coded with 4 at once.
    direct = held(family, model, "4/4", tokens)
    more = random_tokens(rng, 20)
    truth = logits_of(model, held(family, model, "f16", tokens), more, [])
    errors = [np.linalg.norm(logits_of(model, c, more, []) - truth) for c in (smaller, direct)]
    assert errors[0] < 1.3 * errors[1]
    for c in (caches, smaller, direct):
        family.runtime("4/4").release(c)
    assert family.unique_bytes() == 0
    family.check_integrity()


@pytest.mark.parametrize("length", [3, 8, 24, 25, 90, 700])
def test_compressing_a_plain_cache_is_what_prefill_would_have_stored(length: int, rng: np.random.Generator) -> None:
    family = KVFamily(small_models.dense(), base=BASE, backend="cpu-numpy")
    plain = held(family, small_models.dense(), "f16", random_tokens(rng, length))
    converted = family.convert(plain, "f16", "4/3")
    for old, new in zip(plain, converted, strict=True):
        fed = TurboQuantKVCache(new.source)
        fed.update_and_fetch(*old.keys_and_values())
        fed.attend(mx.zeros((1, 4, length, 64)), scale=1.0, mask="causal", sinks=None)
        assert new.offset == length
        assert all(np.array_equal(getattr(canonical(new), f), getattr(canonical(fed), f)) for f in ("k_scales",))
        # Encoding another cut of the same rows may round one coordinate to its neighbour code.
        assert (canonical(new).k_codes == canonical(fed).k_codes).mean() > 0.999 if length > 24 else True
    assert family.runtime("4/3").measure(converted).total == family.runtime("4/3").bytes_for(length)


@pytest.mark.parametrize("kind", small_models.EVERY_KIND)
def test_every_layer_mix_can_go_down_and_back_to_plain(kind: str, rng: np.random.Generator) -> None:
    model = small_models.EVERY_KIND[kind]()
    family = KVFamily(model, base=BASE)
    tokens, more = random_tokens(rng, 90), random_tokens(rng, 5)
    caches = held(family, model, "8/8", tokens)
    want = logits_of(model, family.runtime("8/8").fork(caches, 90), more, [])
    for target in ("8/8", "8/4", "f16"):
        converted = family.convert(caches, "8/8", target)
        assert [type(c) for c in converted] == [type(c) for c in family.runtime(target).make_cache()]
        got = logits_of(model, converted, more, [])
        error = np.linalg.norm(got - want)
        if target == "8/4":  # how much a format costs is the model's matter: no more than where it was prefilled so
            prefilled = logits_of(model, held(family, model, target, tokens), more, [])
            assert 0 < error <= 1.5 * np.linalg.norm(prefilled - want)
        else:
            assert error <= {"8/8": 0.0, "f16": 1e-3}[target] * np.linalg.norm(want)
    assert np.array_equal(logits_of(model, caches, more, []), want), "the original stays as it was"


@pytest.mark.parametrize("backend", ["cpu-numpy", "cpu-native", "mlx-ops"])
@pytest.mark.parametrize("length", [5, 40, 129, 161, 470])
def test_pages_may_have_another_length(backend: str, length: int, rng: np.random.Generator) -> None:
    """There and back between 96 and 128 tokens: books agree, and answers are as good as after a prefill."""
    model = small_models.dense()
    tokens, more = random_tokens(rng, length), random_tokens(rng, 20)
    family = KVFamily(model, backend=backend, calibration=calibrate(model, random_tokens(rng, 200)))
    formats = [family.runtime(name).fmt for name in ("4t/3t", "3t/2t")]
    assert [fmt and fmt.page_tokens for fmt in formats] == [96, 128]
    truth = logits_of(model, held(family, model, "f16", tokens), more, [])
    caches = held(family, model, "4t/3t", tokens)
    smaller = family.convert(caches, "4t/3t", "3t/2t")
    back = family.convert(smaller, "3t/2t", "4t/3t")
    by_name = {"3t/2t": smaller, "4t/3t": back}
    for name, converted in by_name.items():
        assert family.runtime(name).measure(converted).total == family.runtime(name).bytes_for(length)
        assert [cache.offset for cache in converted] == [length] * len(converted)
    lost = 0.0  # by prefills in both formats, which both conversions have been through
    for name in by_name:
        direct = held(family, model, name, tokens)
        lost += float(np.linalg.norm(logits_of(model, direct, more, []) - truth))
        family.runtime(name).release(direct)
    for name, converted in by_name.items():
        error = np.linalg.norm(logits_of(model, converted, more, []) - truth)
        assert error <= 1.5 * lost + 1e-3 * np.linalg.norm(truth), name
    for converted in (caches, smaller, back):
        family.runtime("4t/3t").release(converted)
    family.check_integrity()
    assert family.unique_bytes() == 0


@pytest.mark.parametrize("kind", small_models.EVERY_KIND)
def test_every_layer_mix_can_change_the_length_of_its_pages(kind: str, rng: np.random.Generator) -> None:
    model = small_models.EVERY_KIND[kind]()
    family = KVFamily(model)
    tokens, more = random_tokens(rng, 300), random_tokens(rng, 5)
    for name in ("8/8", "8/2"):
        caches = held(family, model, name, tokens)
        want = logits_of(model, family.runtime(name).fork(caches, len(tokens)), more, [])
        other = "8/2" if name == "8/8" else "8/8"
        got = logits_of(model, family.convert(caches, name, other), more, [])
        prefilled = logits_of(model, held(family, model, "8/2", tokens), more, [])
        truth = logits_of(model, held(family, model, "f16", tokens), more, [])
        error = np.linalg.norm(got - want)
        assert np.all(np.isfinite(got)) and error <= 3 * np.linalg.norm(prefilled - truth) + 1e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("kind", ["sliding", "with_sinks"])
@pytest.mark.parametrize("length", [175, 319, 689])
def test_a_window_keeps_no_more_than_its_pages_need(kind: str, length: int, rng: np.random.Generator) -> None:
    """Longer pages keep more behind the window; what is booked for shorter ones does not hold that."""
    model = small_models.EVERY_KIND[kind]()
    family = KVFamily(model, backend="cpu-numpy")
    caches = held(family, model, "8/2", random_tokens(rng, length))
    converted, runtime = family.convert(caches, "8/2", "8/8"), family.runtime("8/8")
    assert runtime.measure(converted).total <= runtime.bytes_for(length)
    more = random_tokens(rng, 3)
    want, got = (logits_of(model, c, more, []) for c in (caches, converted))
    assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)
    family.check_integrity()


@pytest.mark.parametrize("backend", ["cpu-numpy", "cpu-native", "mlx-ops"])
@pytest.mark.parametrize("kind", ["sliding", "with_sinks"])
def test_what_a_window_keeps_may_be_exact_in_a_pool_without_pages(
    kind: str, backend: str, rng: np.random.Generator
) -> None:
    """Forgotten pages have the id 0 then, of which no store has heard."""
    model = small_models.EVERY_KIND[kind]()
    family = KVFamily(model, backend=backend)
    tokens, more = random_tokens(rng, 32 + 3 * 96 + 90), random_tokens(rng, 5)
    caches = held(family, model, "f16", tokens)
    converted = family.convert(caches, "f16", "8/8")
    windows = [c.sequence for c in converted if isinstance(c, TurboQuantKVCache) and c.source.window]
    assert windows and all(len(s.page_ids) == 0 < s.first_page for s in windows if s is not None)
    for part in (more[:3], more[3:]):
        want, got = (logits_of(model, c, part, []) for c in (caches, converted))
        assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)
        for runtime in family.runtimes.values():
            runtime.trim()
    family.check_integrity()


def test_a_row_that_no_page_change_compresses_stays_as_it_is(rng: np.random.Generator) -> None:
    """The sink, and what is newest in both layouts."""
    model = small_models.dense()
    family = KVFamily(model, backend="cpu-numpy", calibration=calibrate(model, random_tokens(rng, 200)))
    caches = held(family, model, "4t/3t", random_tokens(rng, 32 + 3 * 96 + 40))
    for old, new in zip(caches, family.convert(caches, "4t/3t", "3t/2t"), strict=True):
        (sink, tail), (its_sink, its_tail) = old.sequence.exact_ends(), new.sequence.exact_ends()
        assert np.array_equal(sink.k, its_sink.k) and np.array_equal(sink.v, its_sink.v)
        assert (tail.num_rows, its_tail.num_rows) == (40, (3 * 96 + 40) % 128)
        assert np.array_equal(tail.k[:, -40:], its_tail.k[:, -40:]) and np.array_equal(tail.v, its_tail.v[:, -40:])


def test_only_codecs_and_pages_may_differ(rng: np.random.Generator) -> None:
    model = small_models.dense()
    one, other = (KVFamily(model, base=BASE.with_(sink_tokens=n)) for n in (8, 16))
    caches = held(one, model, "4/4", random_tokens(rng, 50))
    with pytest.raises(ValueError, match="more than codecs and pages"):
        convert(caches, other.runtime("4/3").make_cache())
    with pytest.raises(ValueError, match="not 8/4"):
        one.convert(caches, "8/4", "4/4")
    empty = one.convert(one.runtime("4/4").make_cache(), "4/4", "f16")
    assert all(type(c) is KVCache and c.empty() for c in empty)
