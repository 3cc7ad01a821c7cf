"""One model in several formats: names, shared probing, books over all formats, and the fingerprint."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import deepseek_v3, qwen2
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.cache.calibration import Calibration, calibrate
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.cache.runtime import KVRuntime, UnsupportedModelError
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError

BASE = KVFormat(page_tokens=16, sink_tokens=8)


def test_names_have_one_spelling() -> None:
    family = KVFamily(small_models.dense(), base=BASE)
    assert [family.normalise(n) for n in ("4", " 8/4 ", "F16", "04/3")] == ["4/4", "8/4", "f16", "4/3"]
    assert family.runtime("4") is family.runtime("4/4")
    assert family.runtime("f16").fmt is None
    assert family.runtime("4/3").fmt == BASE.with_(k_bits=4, v_bits=3)
    assert set(family.runtimes) == {"4/4", "f16", "4/3"}
    for nonsense in ("5/4", "bf16", "", "4/4/4", "../4"):
        with pytest.raises(UnsupportedFormatError):
            family.runtime(nonsense)


def test_the_model_is_probed_once_and_measured_at_most_once(rng: np.random.Generator) -> None:
    model = small_models.dense()
    calls = 0

    class Counting:
        layers = model.layers

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return model(*args, **kwargs)

    measured: list[Calibration] = []

    def measure() -> Calibration:
        measured.append(calibrate(model, random_tokens(rng, 90)))
        return measured[-1]

    family = KVFamily(Counting(), base=BASE, calibration=measure)
    probing = calls
    family.runtime("f16")
    assert not measured, "an uncompressed server measures nothing"
    for name in ("4/4", "8/4", "2/2"):
        family.runtime(name)
    assert (calls, len(measured)) == (probing, 1)


def test_books_cover_all_formats(rng: np.random.Generator) -> None:
    model = small_models.dense()
    family = KVFamily(model, base=BASE)
    held = {}
    for name, n in (("4/4", 60), ("8/8", 90)):
        held[name] = family.runtime(name).make_cache()
        logits_of(model, held[name], random_tokens(rng, n), [])
    totals = family.totals()
    assert totals.tokens == 150
    measured = [family.runtime(name).measure(caches).total for name, caches in held.items()]
    assert family.unique_bytes() == sum(measured) == totals.compressed + totals.exact
    assert family.allocated_bytes() == family.unique_bytes() + family.slack_bytes()
    assert family.runtime_of(held["8/8"]) is family.runtime("8/8")
    assert family.runtime_of(family.runtime("f16").make_cache()) is family.runtime("f16")


def test_the_fingerprint_follows_what_gives_pages_their_meaning(rng: np.random.Generator) -> None:
    model = small_models.dense()
    tokens = random_tokens(rng, 90)
    one = KVFamily(model, base=BASE, calibration=calibrate(model, tokens)).fingerprint
    assert one == KVFamily(model, base=BASE, calibration=calibrate(model, tokens)).fingerprint
    bits = BASE.with_(k_bits=8, v_bits=3)
    assert one == KVFamily(model, base=bits, calibration=calibrate(model, tokens)).fingerprint, "another default only"
    others = [
        KVFamily(model, base=BASE, calibration=calibrate(model, tokens[:80])),
        KVFamily(model, base=BASE.with_(rotation_seed=1), calibration=calibrate(model, tokens)),
        KVFamily(model, base=BASE.with_(sink_tokens=16), calibration=calibrate(model, tokens)),
        KVFamily(small_models.dense(num_layers=3), base=BASE, calibration=calibrate(model, tokens)),
    ]
    assert len({one, *(family.fingerprint for family in others)}) == 5


@pytest.mark.parametrize("base", [None, "4t/3t", "3t/2t", "8/2"])
def test_which_format_is_the_default_changes_no_fingerprint(base: str | None) -> None:
    """Also where its pages are longer than others': a store and exports outlive another default."""
    model = small_models.dense()
    one = KVFamily(model)
    other = KVFamily(model, base=None if base is None else KVFormat.parse(base))
    assert other.fingerprint == one.fingerprint
    for name in ("f16", "4t/3t", "3t/2t"):
        assert other.layout_fingerprint(name) == one.layout_fingerprint(name)
    assert one.layout_fingerprint("3t/2t") != one.layout_fingerprint("4t/3t")
    assert KVFamily(model, base=BASE).layout_fingerprint("f16") != one.layout_fingerprint("f16")


def test_latent_attention_is_refused_and_still_runs_uncompressed(rng: np.random.Generator) -> None:
    args = deepseek_v3.ModelArgs(
        model_type="deepseek_v3",
        vocab_size=small_models.VOCAB,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=None,
        kv_lora_rank=128,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        v_head_dim=64,
        qk_nope_head_dim=64,
    )
    mx.random.seed(0)
    model = deepseek_v3.Model(args)
    with pytest.raises(UnsupportedModelError, match="caches latents, 192 numbers"):
        KVRuntime(model, KVFormat())
    family = KVFamily(model)
    runtime = family.runtime("f16")
    rows = [runtime.make_cache() for _ in range(2)]
    tokens = [random_tokens(rng, n) for n in (20, 30)]
    for row, prompt in zip(rows, tokens, strict=True):
        logits_of(model, row, prompt, [])
    batch = runtime.merge_rows(rows)
    out = np.array(model(mx.array([[1], [2]]), cache=batch)[:, -1])
    for b, row in enumerate(rows):
        want = logits_of(model, row, [b + 1], [])[0]
        assert np.linalg.norm(out[b] - want) / np.linalg.norm(want) < 1e-3


def test_a_model_with_a_cache_habit_of_its_own_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it does with other caches, it is still served with mlx-lm's own."""
    model = small_models.dense()
    whole = qwen2.Attention.__call__

    def peeks(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        return whole(self, x, mask, cache) + 0 * cache.keys.sum()

    monkeypatch.setattr(qwen2.Attention, "__call__", peeks)
    family = KVFamily(model)
    assert family.layers.unsupported is not None
    with pytest.raises(UnsupportedModelError, match="asks its KV cache for keys, which a compressed one does not have"):
        family.runtime("4/4")
    rows = [family.runtime("f16").make_cache() for _ in range(2)]
    for row in rows:
        logits_of(model, row, [1, 2, 3], [])
    out = model(mx.array([[1], [2]]), cache=family.runtime("f16").merge_rows(rows))
    assert out.shape == (2, 1, small_models.VOCAB)
