"""The Codec contract: bytes, names, fingerprints, and that a new codec is used without a change anywhere else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from tests.turboquant_kv import small_models
from tests.turboquant_kv.histories import (
    History,
    encode_pages,
    expected,
    feed,
    new_cache,
    random_queries,
    relative_error,
)
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.backends.portable import kernels
from turboquant_kv.backends.portable.kit import ArrayKit
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.codec import reference, registry
from turboquant_kv.codec.codec import Codec, Encoded, ScaleKind
from turboquant_kv.codec.format import SUPPORTED_HEAD_DIMS, KVFormat, UnsupportedFormatError
from turboquant_kv.codec.registry import codec_named
from turboquant_kv.codec.rotation import Which, rotation_matrix
from turboquant_kv.codec.scalar import ScalarCodec
from turboquant_kv.codec.scales import fitted_scale, stored, unit_variance

BASE = KVFormat(page_tokens=16, sink_tokens=8, centred=False)


# --- what every codec promises --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", get_args(ScaleKind))
@pytest.mark.parametrize("name", registry.CODECS)
def test_a_codec_stores_the_bytes_that_it_counts_and_scales_what_its_codes_stand_for(
    name: str, scale: ScaleKind, rng: np.random.Generator
) -> None:
    codec = codec_named(name, scale)
    assert (codec.name, codec.scale) == (name, scale)
    errors: list[float] = []  # one of each vector: a single short one's may be a third above the mean
    for head_dim in SUPPORTED_HEAD_DIMS:
        y = rng.standard_normal((3, 2, head_dim)) * rng.uniform(0.1, 10, (3, 2, 1))
        y[0, 0] = 0
        encoded = codec.encode(y)
        assert encoded.codes.dtype == np.uint8
        assert encoded.scales.dtype == np.float16
        assert encoded.codes.shape == (3, 2, codec.code_bytes(head_dim))
        assert encoded.codes[0, 0].nbytes + encoded.scales[0, 0].nbytes == codec.vector_bytes(head_dim)
        values = codec.decode(encoded.codes, head_dim)
        assert values.shape == y.shape
        assert np.isin(values, codec.table()).all()
        assert encoded.scales[0, 0] == 0
        missed = np.linalg.norm(y - values * encoded.scales[..., None], axis=-1)
        errors.extend((missed.ravel()[1:] / np.linalg.norm(y, axis=-1).ravel()[1:]).tolist())
        with pytest.raises(ValueError, match="bytes do not hold"):
            codec.decode(encoded.codes[..., :-1], head_dim)
    # more bits come closer, even with the scale that shrinks or stretches most
    assert np.mean(errors) < {"2": 0.4, "2t": 0.35, "3": 0.22, "3t": 0.18, "4": 0.12, "4t": 0.1, "8": 0.01}[name]


def test_codecs_are_compared_by_value() -> None:
    assert codec_named("4") == ScalarCodec(4) != ScalarCodec(3)
    assert ScalarCodec(4, "norm") != ScalarCodec(4)
    assert len({ScalarCodec(4), codec_named("4"), ScalarCodec(4, "plain")}) == 2


def test_fingerprints_are_what_they_were() -> None:
    """What is on disk is found by these: a change here makes every stored conversation unreadable."""
    told = {name: codec_named(name).fingerprint() for name in registry.CODECS}
    assert told == PINNED_CODECS
    assert len({ScalarCodec(4, scale).fingerprint() for scale in get_args(ScaleKind)}) == 4
    assert [fmt.fingerprint() for fmt in PINNED_FORMATS] == ["d713d0d427e9be91", "5fdc489e1749c049", "b3f0c4bae04cd35c"]


def test_stores_are_found_again() -> None:
    """KVFamily's fingerprint, as it is since means turn with position."""
    model, base = small_models.dense(), KVFormat(page_tokens=16, sink_tokens=8)
    assert KVFamily(model, base=base).fingerprint == "f647c79ec93274eada56759d945a2466"
    assert KVFamily(model, base=base.with_(k_bits=2, scale="norm")).fingerprint == "fa09ae6d7880f5ebedcba7be31fe1a2e"


PINNED_CODECS = {
    "2": "a9483d266ab6e362",
    "3": "2e3345dbaaf3820a",
    "4": "7babcd3d1b86298a",
    "8": "c57ef848f4e67be2",
    "2t": "2a8959cf93c3b4b3",
    "3t": "a84af3a67d6afff4",
    "4t": "1940a8193225a8ea",
}
PINNED_FORMATS = (
    KVFormat(page_tokens=64),
    KVFormat(4, 3, page_tokens=64),
    KVFormat(8, 2, scale="norm", page_tokens=16, sink_tokens=0, centred=False, rotation_seed=1),
)


# --- formats that name codecs ---------------------------------------------------------------------------------------


def test_saved_formats_are_what_they_were() -> None:
    """Byte for byte: prompt cache files and stored conversations carry this text."""
    assert json.dumps(KVFormat(4, 3, page_tokens=64).to_dict()) == (
        '{"k_bits": 4, "v_bits": 3, "scale": "unbiased", "page_tokens": 64, "sink_tokens": 32, '
        '"centred": true, "rotation_seed": 2504}'
    )
    for fmt in PINNED_FORMATS:
        assert KVFormat.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt
    assert KVFormat.from_dict({"k_bits": 8}) == KVFormat(8, 4)


@pytest.mark.parametrize(
    "saved",
    [
        *({"k_bits": bits} for bits in (1, 5, True, 4.0, "4", "4#0", None, [4], "04")),
        {"scale": "qjl"},
        {"scale": ["plain"]},
        {"page_tokens": "64"},
        {"bits": 4},
        {"keys": "4"},
        ["k_bits"],
        "4/4",
        None,
    ],
)
def test_what_is_no_saved_format_is_refused(saved: Any) -> None:
    with pytest.raises(UnsupportedFormatError):
        KVFormat.from_dict(saved)


def test_unknown_names_get_one_clear_line() -> None:
    with pytest.raises(
        UnsupportedFormatError, match=r"^KV format '4/t9': no codec 't9'; there are 2, 3, 4, 8, 2t, 3t, 4t$"
    ):
        KVFormat.parse("4/t9")
    with pytest.raises(UnsupportedFormatError, match=r"^no codec '1'; there are 2, 3, 4, 8, 2t, 3t, 4t$"):
        KVFormat(keys=ScalarCodec(1))
    with pytest.raises(UnsupportedFormatError, match=r"^scale='qjl': supported are unbiased, norm, "):
        KVFormat(scale="qjl")  # type: ignore[arg-type]


def test_one_format_has_one_meaning_of_scales() -> None:
    with pytest.raises(UnsupportedFormatError, match="must mean the same"):
        KVFormat(keys=ScalarCodec(4, "norm"))
    fmt = KVFormat(keys=ScalarCodec(4, "norm"), values=ScalarCodec(3, "norm"), page_tokens=32)
    assert fmt == KVFormat(4, 3, "norm", 32)
    assert fmt.with_codecs("8/2") == KVFormat(8, 2, "norm", 32)
    assert fmt.with_(scale="plain", v_bits=8, sink_tokens=0) == KVFormat(4, 8, "plain", 32, 0)
    assert fmt.with_(keys=ScalarCodec(2, "norm")) == KVFormat(2, 3, "norm", 32)


# --- a made-up codec ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SignCodec(Codec):
    """One sign per coordinate."""

    scale: ScaleKind = "unbiased"

    @property
    def name(self) -> str:
        return "s1"

    def code_bytes(self, head_dim: int) -> int:
        return head_dim // 8

    def table(self) -> npt.NDArray[np.float32]:
        return np.array([-1, 1], np.float32)

    def encode(self, y: npt.NDArray[np.float64]) -> Encoded:
        z, rms = unit_variance(y)
        codes = np.packbits(z > 0, axis=-1, bitorder="little")
        return Encoded(codes, stored(rms * fitted_scale(z, self.decode(codes, y.shape[-1]), self.scale)))

    def decode(self, codes: npt.NDArray[np.uint8], head_dim: int) -> npt.NDArray[np.float64]:
        return np.unpackbits(codes, axis=-1, bitorder="little", count=head_dim) * np.float64(2) - 1.0


class SignKernels:
    """The same in float32: energy over the sum of magnitudes, whatever the codec's scale kind."""

    def __init__(self, kit: ArrayKit, codec: SignCodec) -> None:
        assert (kit.xp, codec.scale) == (np, "unbiased")

    def encode(self, y: Any) -> tuple[Any, Any]:
        scales = (y * y).sum(-1) / np.maximum(np.abs(y).sum(-1), np.float32(1e-30))
        return np.packbits(y > 0, axis=-1, bitorder="little"), scales.astype(np.float16)

    def decode(self, codes: Any, head_dim: int) -> Any:
        return np.unpackbits(codes, axis=-1, bitorder="little", count=head_dim) * np.float32(2) - np.float32(1)


SIGN_CODEC: type[Codec] = SignCodec


@dataclass(frozen=True, slots=True)
class RetunedCodec(SignCodec):
    """Another table under the same name."""

    def table(self) -> npt.NDArray[np.float32]:
        return np.array([-0.8, 0.8], np.float32)


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> KVFormat:
    """All that it takes: a name, and kernels for one backend."""
    monkeypatch.setitem(registry.CODECS, "s1", SignCodec)
    monkeypatch.setitem(kernels.KERNELS, SIGN_CODEC, SignKernels)
    return BASE.with_codecs("s1")


def away_from_zero(rng: np.random.Generator, num_tokens: int, head_dim: int, fmt: KVFormat) -> History:
    """Keys and values whose rotated coordinates have signs that float32 cannot change."""

    def draw(which: Which) -> npt.NDArray[np.float64]:
        shape = 2, num_tokens, head_dim
        rotated = rng.choice([-1, 1], shape) * rng.uniform(0.1, 2, shape)
        rows = rotated @ rotation_matrix(head_dim, fmt.rotation_seed, which)
        return rows.astype(np.float32).astype(np.float64)

    return History(draw("k"), draw("v"), mx.float32)


def test_a_new_codec_is_named_counted_and_saved(signs: KVFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    assert KVFormat.parse("s1") == KVFormat(keys=SignCodec(), values=SignCodec())
    mixed = KVFormat.parse("4/s1")
    assert mixed.name == "4/s1"
    assert mixed.token_bytes(2, 128, 64) == 2 * (64 + 2 + 8 + 2)
    saved = json.loads(json.dumps(mixed.to_dict()))
    assert saved["k_bits"] == 4
    assert saved["v_bits"].startswith("s1#")
    assert KVFormat.from_dict(saved) == mixed
    with pytest.raises(UnsupportedFormatError, match="'s1'"):
        print(mixed.v_bits)
    monkeypatch.setitem(registry.CODECS, "s1", RetunedCodec)
    with pytest.raises(UnsupportedFormatError, match="is now"):
        KVFormat.from_dict(saved)


def test_a_new_codec_is_stored_and_attended_to(signs: KVFormat, rng: np.random.Generator) -> None:
    history = away_from_zero(rng, 90, 64, signs)
    backend = choose_backend("cpu-numpy")
    storage = backend.new_store(LayerShape(2, 64, 64, mx.float32), signs, None)
    storage.grow(4)
    encode_pages(storage, np.arange(4), 0, *(backend.from_mlx(x)[0] for x in history.slice(0, 64)))
    assert storage.allocated_bytes == 4 * signs.page_bytes(2, 64, 64) == 4 * 16 * 2 * 2 * (8 + 2)
    pages = storage.read(np.arange(4))
    want = reference.encode(history.k[:, :64], signs.keys, rotation_matrix(64, signs.rotation_seed, "k"))
    assert np.array_equal(pages.k_codes.swapaxes(0, 1).reshape(2, 64, 8), want.codes)
    # one rounding to float16, of values that float32 sums may put on either side of a midpoint
    assert np.allclose(pages.k_scales.swapaxes(0, 1).reshape(2, 64), want.scales, rtol=1e-3)

    cache = new_cache(signs, "cpu-numpy")
    feed(cache, history, 0, 70, random_queries(rng, 4, 70, 64, mx.float32), 0.125)
    q = random_queries(rng, 4, 20, 64, mx.float32)
    assert relative_error(feed(cache, history, 70, 90, q, 0.125), expected(history, q, signs, 70, 0.125, None)) < 1e-3


def test_a_new_codec_lives_in_a_model(signs: KVFormat, rng: np.random.Generator) -> None:
    """Runtimes, stored conversations and conversions, none of which knows it."""
    model = small_models.dense()
    family = KVFamily(model, base=BASE, backend="cpu-numpy")
    caches = family.runtime("8/s1").make_cache()
    tokens, more = random_tokens(rng, 90), random_tokens(rng, 5)
    logits_of(model, caches, tokens, [])
    assert family.runtime("8/s1").measure(caches).total == family.runtime("8/s1").bytes_for(90)
    again = family.import_caches(*family.export_caches(caches))
    for old, new in zip(caches, family.convert(caches, "8/s1", "8/4"), strict=True):
        (keys, values), (new_keys, new_values) = decoded_pages(old), decoded_pages(new)
        assert np.array_equal(new_keys, keys), "their codec did not change"
        # +-1 is one centroid for all coordinates under a fitted scale: what is left are two scales' roundings
        assert np.allclose(new_values, values, rtol=2e-3, atol=1e-6)
        assert len(np.unique(np.abs(values))) > 1
    assert np.array_equal(logits_of(model, again, more, []), logits_of(model, caches, more, []))


def decoded_pages(cache: TurboQuantKVCache) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """What a cache's pages hold of keys and values, (H, tokens, D), rotated back."""
    assert cache.sequence is not None
    k, v = cache.sequence.pool.stores[cache.sequence.layer].decode(cache.sequence.page_ids, 0)
    return np.asarray(k), np.asarray(v)


@pytest.mark.parametrize("backend", ["cpu-native", "mlx-ops"])
def test_backends_refuse_codecs_without_kernels(backend: str, signs: KVFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(kernels.KERNELS, SIGN_CODEC)
    with pytest.raises(UnsupportedFormatError, match="'s1'"):
        choose_backend(backend).new_store(LayerShape(2, 64, 64, mx.float32), signs, None)
