"""What the reference codec and attention mean, on cases small enough to work out another way."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from tests.turboquant_kv.product_form import decode_product, draw_sketch, encode_product, inner_product

from turboquant_kv.codec.codebook import centroids
from turboquant_kv.codec.format import SUPPORTED_BITS, KVFormat, ScaleKind, UnsupportedFormatError
from turboquant_kv.codec.packing import unpack
from turboquant_kv.codec.reference import attend, decode, encode, exact_pairs
from turboquant_kv.codec.rotation import rotation_matrix, unrotate
from turboquant_kv.codec.scalar import ScalarCodec
from turboquant_kv.codec.scalar_reference import quantise

R = rotation_matrix(64, 2504, "k")
every_scale = pytest.mark.parametrize("scale", get_args(ScaleKind))
# Relative; the one rounding of a scale to float16 is at most 2^-11 = 5e-4.
HALF = 2e-3


@pytest.mark.parametrize("bits", [1, *SUPPORTED_BITS])
def test_quantise_takes_the_nearest_centroid(bits: int, rng: np.random.Generator) -> None:
    y = rng.standard_normal((50, 64)) * 2
    chosen = np.abs(y - centroids(bits)[quantise(y, bits)])
    # a threshold is a midpoint rounded to float32: up to 3e-7 off
    assert np.all(chosen <= np.min(np.abs(y[..., None] - centroids(bits)), axis=-1) + 1e-6)


def test_a_tie_takes_the_lower_code() -> None:
    assert quantise(np.array([0.0, 1e-30, -1e-30]), 2).tolist() == [1, 2, 1]


@every_scale
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_decode_is_scale_times_unrotated_centroids(bits: int, scale: ScaleKind, rng: np.random.Generator) -> None:
    mean, codec = rng.standard_normal(64), ScalarCodec(bits, scale)
    encoded = encode(rng.standard_normal((2, 3, 64)), codec, R, mean)
    assert encoded.scales.dtype == np.float16
    assert encoded.scales.shape == (2, 3)
    levels = centroids(bits)[unpack(encoded.codes, bits, 64)].astype(np.float64)
    expected = encoded.scales[..., None].astype(np.float64) * unrotate(levels, 2504, "k") + mean
    assert np.allclose(decode(encoded, codec, 64, R, mean), expected, rtol=0, atol=1e-5)  # R is float32


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_each_scale_keeps_what_it_promises(bits: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((200, 64)) * 3
    codecs = {scale: ScalarCodec(bits, scale) for scale in get_args(ScaleKind)}
    hat = {scale: decode(encode(x, codec, R), codec, 64, R) for scale, codec in codecs.items()}
    energy = np.sum(x * x, axis=-1)

    assert np.allclose(np.sum(x * hat["unbiased"], axis=-1), energy, rtol=HALF)
    assert np.allclose(np.linalg.norm(hat["norm"], axis=-1), np.sqrt(energy), rtol=HALF)
    fitted = hat["least_squares"]
    projection = np.sum(x * fitted, axis=-1) / np.sum(fitted**2, axis=-1)  # 1 where no other scale is closer
    assert np.allclose(projection, 1, rtol=HALF)
    stored = encode(x, codecs["plain"], R).scales
    assert np.allclose(stored, np.sqrt(energy / 64), rtol=HALF)


@every_scale
def test_eight_bits_are_nearly_exact(scale: ScaleKind, rng: np.random.Generator) -> None:
    x, codec = rng.standard_normal((100, 64)), ScalarCodec(8, scale)
    error = decode(encode(x, codec, R), codec, 64, R) - x
    # expected is 4e-5; reaching 2e-4 would take a coordinate beyond 5.6 sigma, where the table ends at 4.6
    assert np.mean(np.sum(error**2, axis=-1) / np.sum(x**2, axis=-1)) < 2e-4


@every_scale
def test_zero_vectors_and_mean_vectors_come_back_exactly(scale: ScaleKind, rng: np.random.Generator) -> None:
    mean, codec = rng.standard_normal(64), ScalarCodec(3, scale)
    encoded = encode(np.stack([mean, mean]), codec, R, mean)
    assert np.array_equal(encoded.scales, [0, 0])
    assert np.array_equal(decode(encoded, codec, 64, R, mean), [mean, mean])


@every_scale
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4])
def test_codes_do_not_depend_on_magnitude(scale: ScaleKind, magnitude: float, rng: np.random.Generator) -> None:
    x, codec = rng.standard_normal((10, 64)), ScalarCodec(4, scale)
    small, large = encode(x, codec, R), encode(x * magnitude, codec, R)
    # scaling rounds in the last place of float64, which moves a coordinate across a threshold once in 10^12
    assert np.array_equal(small.codes, large.codes)
    assert np.allclose(large.scales.astype(np.float64), small.scales.astype(np.float64) * magnitude, rtol=HALF)


@every_scale
def test_beyond_float16_scales_saturate_or_vanish(scale: ScaleKind, rng: np.random.Generator) -> None:
    x, codec = rng.standard_normal(64), ScalarCodec(4, scale)
    encoded = encode(np.stack([x * 1e9, x * 1e-30, x * 1e-300]), codec, R)
    assert encoded.scales.tolist() == [65504, 0, 0]
    assert np.all(np.isfinite(decode(encoded, codec, 64, R)))


@every_scale
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_bad_value_shows_in_its_vector_only(scale: ScaleKind, poison: float, rng: np.random.Generator) -> None:
    x, codec = rng.standard_normal((3, 64)), ScalarCodec(4, scale)
    clean = encode(x, codec, R)
    x[1, 5] = poison
    encoded = encode(x, codec, R)
    assert np.isnan(encoded.scales).tolist() == [False, True, False]
    assert np.array_equal(encoded.codes[[0, 2]], clean.codes[[0, 2]])


def test_misuse_is_refused() -> None:
    with pytest.raises(UnsupportedFormatError):
        encode(np.ones(64), ScalarCodec(5), R)
    with pytest.raises(ValueError, match="exactly 128 codes"):
        decode(encode(np.ones(64), ScalarCodec(4), R), ScalarCodec(4), 128, R)


# --- the product form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_product_form_estimates_the_product_with_its_decoded_vector(
    kind: str, bits: int, rng: np.random.Generator
) -> None:
    sketch = draw_sketch(64, rng, "gaussian" if kind == "gaussian" else "orthogonal")
    x, q = rng.standard_normal((2, 5, 64))
    encoded = encode_product(x, bits, R, sketch)
    assert encoded.codes.codes.shape[-1] + encoded.signs.shape[-1] == 64 * bits // 8
    decoded = decode_product(encoded, bits, 64, R, sketch)
    assert np.allclose(inner_product(q, encoded, bits, R, sketch), np.sum(q * decoded, axis=-1), rtol=0, atol=1e-9)


def test_product_form_has_no_eight_bits(rng: np.random.Generator) -> None:
    with pytest.raises(UnsupportedFormatError):
        encode_product(np.ones(64), 8, R, draw_sketch(64, rng, "gaussian"))


# --- attention --------------------------------------------------------------------------------------------------

FMT = KVFormat(k_bits=3, v_bits=2, page_tokens=16, sink_tokens=5)


def history(rng: np.random.Generator, num_tokens: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q (4, T, 64), k (2, T, 64) and v (2, T, 80) with an offset for the means to remove."""
    q = rng.standard_normal((4, num_tokens, 64))
    k = rng.standard_normal((2, num_tokens, 64)) + rng.standard_normal((2, 1, 64))
    v = rng.standard_normal((2, num_tokens, 80)) + rng.standard_normal((2, 1, 80))
    return q, k, v


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """One query (Hq, D) over keys (Hkv, n, D) that it may all see."""
    k, v = (np.repeat(a, len(q) // len(a), axis=0) for a in (k, v))
    weights = np.exp(scale * np.einsum("hd,hnd->hn", q, k))
    return np.asarray(np.einsum("hn,hnd->hd", weights / weights.sum(-1, keepdims=True), v))


def test_attend_sees_sinks_and_its_own_page_exactly_and_the_rest_through_codes(rng: np.random.Generator) -> None:
    q, k, v = history(rng)
    k_mean, v_mean = k.mean(1), v.mean(1)
    out = attend(q, k, v, FMT, 0, 0.125, k_mean, v_mean)
    r_k, r_v = rotation_matrix(64, FMT.rotation_seed, "k"), rotation_matrix(80, FMT.rotation_seed, "v")
    for head in range(2):
        k_hat = decode(encode(k[head], FMT.keys, r_k, k_mean[head]), FMT.keys, 64, r_k, k_mean[head])
        v_hat = decode(encode(v[head], FMT.values, r_v, v_mean[head]), FMT.values, 80, r_v, v_mean[head])
        for position in range(60):
            k_seen, v_seen = k[head, : position + 1].copy(), v[head, : position + 1].copy()
            first_exact = max(5, 5 + (position - 5) // 16 * 16)
            k_seen[5:first_exact], v_seen[5:first_exact] = k_hat[5:first_exact], v_hat[5:first_exact]
            heads = slice(2 * head, 2 * head + 2)
            expected = plain_attention(q[heads, position], k_seen[None], v_seen[None], 0.125)
            assert np.allclose(out[heads, position], expected, rtol=0, atol=1e-10)


def test_exact_pairs_by_hand() -> None:
    fmt = KVFormat(page_tokens=16, sink_tokens=2)
    exact = exact_pairs(np.array([1, 17, 18, 40]), 41, fmt)
    assert np.flatnonzero(exact[0, :2]).tolist() == [0, 1]
    assert np.flatnonzero(exact[1, :18]).tolist() == list(range(18))
    assert np.flatnonzero(exact[2, :19]).tolist() == [0, 1, 18]
    assert np.flatnonzero(exact[3]).tolist() == [0, 1, *range(34, 41)]


def test_attend_does_not_depend_on_chunking(rng: np.random.Generator) -> None:
    q, k, v = history(rng)
    whole = attend(q, k, v, FMT, 0, 0.125)
    cut = int(rng.integers(1, 59))
    first = attend(q[:, :cut], k[:, :cut], v[:, :cut], FMT, 0, 0.125)
    second = attend(q[:, cut:], k, v, FMT, cut, 0.125)
    assert np.allclose(np.concatenate([first, second], axis=1), whole, rtol=0, atol=1e-12)


def test_a_short_history_is_exact(rng: np.random.Generator) -> None:
    q, k, v = history(rng, num_tokens=21)  # 5 sinks and one page
    out = attend(q, k, v, FMT, 0, 0.125)
    assert np.allclose(out[:, 20], plain_attention(q[:, 20], k, v, 0.125), rtol=0, atol=1e-12)


def test_means_are_ignored_by_an_uncentred_format(rng: np.random.Generator) -> None:
    q, k, v = history(rng)
    fmt = FMT.with_(centred=False)
    assert np.array_equal(attend(q, k, v, fmt, 0, 0.1, k.mean(1), v.mean(1)), attend(q, k, v, fmt, 0, 0.1))
    assert not np.allclose(attend(q, k, v, FMT, 0, 0.1, k.mean(1), v.mean(1)), attend(q, k, v, fmt, 0, 0.1))


def test_learned_sinks_take_weight_and_give_nothing(rng: np.random.Generator) -> None:
    q, k, v = history(rng, num_tokens=21)
    logits = rng.standard_normal(4)
    scores = np.exp(0.125 * np.einsum("hd,hnd->hn", q[:, 20], np.repeat(k, 2, axis=0)))
    kept = scores.sum(-1) / (scores.sum(-1) + np.exp(logits))
    expected = kept[:, None] * plain_attention(q[:, 20], k, v, 0.125)
    assert np.allclose(attend(q, k, v, FMT, 0, 0.125, sinks=logits)[:, 20], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 7, 100])
def test_window_is_a_mask(window: int, rng: np.random.Generator) -> None:
    q, k, v = history(rng)
    near = np.subtract.outer(np.arange(60), np.arange(60)) < window
    expected = attend(q, k, v, FMT, 0, 0.125, mask=near)
    assert np.allclose(attend(q, k, v, FMT, 0, 0.125, window=window), expected, rtol=0, atol=1e-12)


def test_masks_hide_by_position_and_add_to_logits(rng: np.random.Generator) -> None:
    q, k, v = history(rng, num_tokens=20)
    keep = rng.random((20, 20)) < 0.5
    out = attend(q, k, v, FMT, 0, 0.125, mask=keep)
    additive = attend(q, k, v, FMT, 0, 0.125, mask=np.where(keep, 0.0, -np.inf))
    assert np.array_equal(out, additive)
    for position in range(20):
        seen = np.flatnonzero(keep[position, : position + 1])
        nothing = np.zeros((4, 80))
        expected = plain_attention(q[:, position], k[:, seen], v[:, seen], 0.125) if len(seen) else nothing
        assert np.allclose(out[:, position], expected, rtol=0, atol=1e-12)


def test_attend_refuses_shapes_that_do_not_fit(rng: np.random.Generator) -> None:
    q, k, v = history(rng, num_tokens=10)
    for args in ((q[:3], k, v, 0), (q, k, v, 1), (q, k, v[:, :9], 0)):
        with pytest.raises(ValueError, match="fit together"):
            attend(args[0], args[1], args[2], FMT, args[3], 0.125)
