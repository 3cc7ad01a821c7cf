"""The trellis codec: its code, the search against every path there is, packing, and the error it promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from turboquant_kv.codec import trellis_reference as trellis
from turboquant_kv.codec.format import SUPPORTED_HEAD_DIMS, KVFormat
from turboquant_kv.codec.limits import UnsupportedFormatError
from turboquant_kv.codec.registry import codec_named
from turboquant_kv.codec.trellis import TRELLIS_BITS, TrellisCodec

every_width = pytest.mark.parametrize("bits", TRELLIS_BITS)
# D of isotropic vectors with the unbiased scale: measured on 40,000 vectors (docs/codec.md); scalar codes of equal bits
# have .1305, .0347 and .0092.
DISTORTION = {2: 0.0955, 3: 0.0240, 4: 0.00650}


def decoded_levels(branch: np.ndarray, own: np.ndarray) -> list[int]:
    """Straight from the module's formula."""
    b = [0, 0, 0, *(int(x) for x in branch)]
    return [4 * int(o) + 2 * (b[i + 3] ^ b[i + 1] ^ b[i]) + b[i + 2] for i, o in enumerate(own)]


@every_width
def test_no_path_is_better_than_the_one_that_is_found(bits: int, rng: np.random.Generator) -> None:
    length, book = 7, trellis.levels(bits).astype(np.float64)
    z = rng.standard_normal((3, length))
    for vector, levels in zip(z, trellis.search(z, book), strict=True):
        assert np.sum((vector - book[levels]) ** 2) == pytest.approx(least_error(vector, book), rel=1e-12)


def least_error(vector: np.ndarray, book: np.ndarray) -> float:
    """Over all branch bits; own bits are free in each coordinate."""
    errors = []
    for branch in itertools.product((0, 1), repeat=len(vector)):
        subsets = decoded_levels(np.array(branch), np.zeros(len(vector), int))
        errors.append(sum(np.min((x - book[s::4]) ** 2) for x, s in zip(vector, subsets, strict=True)))
    return float(min(errors))


@every_width
@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_packing_is_lossless_and_laid_out_as_it_says(bits: int, head_dim: int, rng: np.random.Generator) -> None:
    branch = rng.integers(0, 2, head_dim)
    own = rng.integers(0, 2 ** (bits - 1), head_dim)
    levels = np.array(decoded_levels(branch, own), np.uint8)
    packed = trellis.pack(levels, bits)
    assert packed.shape == (head_dim * bits // 8,)
    np.testing.assert_array_equal(trellis.unpack(packed, bits, head_dim), levels)
    words = packed[: head_dim // 8].view("<u2")
    for i in range(head_dim):
        block, k = divmod(i, 16)
        assert words[block] >> (2 * (k % 8) + k // 8) & 1 == branch[i]
    rest = packed[head_dim // 8 :]
    for i in range(head_dim):
        block, k = divmod(i, 16)
        high = rest[-(head_dim // 8) :].view("<u2")[block] >> (2 * (k % 8) + k // 8) & 1
        low = rest[: head_dim // 4].view("<u4")[block] >> (2 * k) & 3 if bits > 2 else 0
        assert own[i] == {2: high, 3: low, 4: low | high << 2}[bits]


def test_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="do not hold exactly 64 trellis codes of 3 bits"):
        trellis.unpack(np.zeros(23, np.uint8), 3, 64)
    with pytest.raises(UnsupportedFormatError, match="no trellis of 5 bits"):
        TrellisCodec(5)


@every_width
def test_the_table_is_symmetric_and_tuned(bits: int, rng: np.random.Generator) -> None:
    book = trellis.levels(bits).astype(np.float64)
    assert np.all(np.diff(book) > 0)
    np.testing.assert_array_equal(book, -book[::-1])
    z = rng.standard_normal((6000, 128))  # of the outermost levels of 32 few values are nearest
    z /= np.sqrt(np.mean(z * z, axis=1, keepdims=True))
    found = trellis.search(z, book)
    for level in range(len(book)):  # each level is the mean of what it stands for
        assert np.mean(z[found == level]) == pytest.approx(book[level], abs=0.03)


@every_width
def test_distortion_is_a_quarter_to_a_third_below_the_scalar_codecs(bits: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4000, 128))
    codec, scalar = codec_named(f"{bits}t"), codec_named(str(bits))

    def distortion(used: object) -> float:
        encoded = used.encode(x)  # type: ignore[attr-defined]
        back = used.decode(encoded.codes, 128) * encoded.scales[..., None].astype(np.float64)  # type: ignore[attr-defined]
        return float(np.mean(np.sum((x - back) ** 2, axis=-1) / np.sum(x * x, axis=-1)))

    measured = distortion(codec)
    assert measured == pytest.approx(DISTORTION[bits], rel=0.03)
    assert measured < 0.76 * distortion(scalar)


def test_vectors_that_are_zero_or_not_finite_harm_no_other(rng: np.random.Generator) -> None:
    y = rng.standard_normal((4, 64))
    y[1], y[2, 7] = 0.0, np.nan
    encoded = codec_named("3t").encode(y)
    assert encoded.scales[1] == 0
    assert np.isnan(encoded.scales[2])
    alone = codec_named("3t").encode(y[[0, 3]])
    np.testing.assert_array_equal(encoded.codes[[0, 3]], alone.codes)
    np.testing.assert_array_equal(encoded.scales[[0, 3]], alone.scales)


def test_saved_formats_carry_the_tables_fingerprint() -> None:
    fmt = KVFormat.parse("3t/2t")
    saved = fmt.to_dict()
    assert saved["k_bits"] == f"3t#{codec_named('3t').fingerprint()}"
    assert KVFormat.from_dict(saved) == fmt
    with pytest.raises(UnsupportedFormatError, match="is now"):
        KVFormat.from_dict({**saved, "k_bits": "3t#0123456789abcdef"})
