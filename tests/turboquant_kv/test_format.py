"""KVFormat: parsing, validation, and byte counts that equal what encoding produces."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from turboquant_kv import KVFormat, UnsupportedFormatError
from turboquant_kv.codec.format import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, check_head_dim, code_bytes
from turboquant_kv.codec.format_name import parse_format_name
from turboquant_kv.codec.reference import encode, exact_pairs
from turboquant_kv.codec.rotation import rotation_matrix
from turboquant_kv.codec.scalar import ScalarCodec


@pytest.mark.parametrize(("text", "k_bits", "v_bits"), [("4/3", 4, 3), ("8/4", 8, 4), ("4", 4, 4), (" 2/2 ", 2, 2)])
def test_parse(text: str, k_bits: int, v_bits: int) -> None:
    fmt = KVFormat.parse(text)
    assert (fmt.k_bits, fmt.v_bits) == (k_bits, v_bits)
    assert fmt.name == f"{k_bits}/{v_bits}"
    assert KVFormat.parse(fmt.name) == fmt


@pytest.mark.parametrize("text", ["", "f16", "4/3/2", "4/", "-4/4", "5/4", "4/1", "16/16", "444/4", "٤/٤", "4.0"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UnsupportedFormatError):
        KVFormat.parse(text)


@pytest.mark.parametrize(
    "change",
    [{"k_bits": 1}, {"v_bits": 16}, {"scale": "qjl"}, {"page_tokens": 0}, {"page_tokens": 40}, {"sink_tokens": -1}],
)
def test_fields_are_validated(change: dict[str, object]) -> None:
    with pytest.raises(UnsupportedFormatError):
        KVFormat().with_(**change)


def test_a_128_vector_costs_34_50_66_bytes() -> None:
    assert [ScalarCodec(bits).vector_bytes(128) for bits in (2, 3, 4, 8)] == [34, 50, 66, 130]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_counted_bytes_are_the_encoded_bytes(bits: int, head_dim: int, rng: np.random.Generator) -> None:
    assert head_dim * bits % 8 == 0
    encoded = encode(rng.standard_normal((5, head_dim)), ScalarCodec(bits), rotation_matrix(head_dim, 1, "v"))
    assert encoded.codes.nbytes == 5 * code_bytes(head_dim, bits) == 5 * ScalarCodec(bits).code_bytes(head_dim)
    assert encoded.codes.nbytes + encoded.scales.nbytes == 5 * ScalarCodec(bits).vector_bytes(head_dim)


def test_token_and_page_bytes(rng: np.random.Generator) -> None:
    fmt = KVFormat(k_bits=4, v_bits=3, page_tokens=64)
    k = encode(rng.standard_normal((2, 64, 128)), fmt.keys, rotation_matrix(128, 1, "k"))
    v = encode(rng.standard_normal((2, 64, 80)), fmt.values, rotation_matrix(80, 1, "v"))
    page = sum(array.nbytes for array in (*k, *v))
    assert fmt.page_bytes(2, 128, 80) == page
    assert fmt.token_bytes(2, 128, 80) * 64 == page


@pytest.mark.parametrize("sink_tokens", [0, 5, 32])
def test_num_pages_counts_what_the_last_query_sees_compressed(sink_tokens: int, rng: np.random.Generator) -> None:
    fmt = KVFormat(page_tokens=16, sink_tokens=sink_tokens)
    for num_tokens in [1, *rng.integers(1, 200, 20).tolist(), sink_tokens + 16, sink_tokens + 17]:
        exact = exact_pairs(np.array([num_tokens - 1]), num_tokens, fmt)
        assert np.sum(~exact) == fmt.num_pages(num_tokens) * fmt.page_tokens
    assert fmt.num_pages(0) == 0
    assert fmt.page_start(3) == sink_tokens + 48


def test_fingerprint_separates_every_field() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"k_bits": 8},
        {"v_bits": 3},
        {"scale": "norm"},
        {"page_tokens": 32},
        {"sink_tokens": 0},
        {"centred": False},
        {"rotation_seed": 1},
    ]
    prints = [KVFormat().with_(**change).fingerprint() for change in changes]
    assert len(set(prints)) == len(changes)
    assert prints[0] == KVFormat().fingerprint()


def test_head_dim_check() -> None:
    for head_dim in SUPPORTED_HEAD_DIMS:
        check_head_dim(head_dim)
    with pytest.raises(UnsupportedFormatError, match="head_dim 72"):
        check_head_dim(72)


def test_importing_the_package_loads_no_array_library() -> None:
    code = "import sys, turboquant_kv; sys.exit(any(m in sys.modules for m in ('numpy', 'mlx', 'mlx.core')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("num_around", [0, 192])
@pytest.mark.parametrize(
    ("preset", "least"), [("balanced", (4.19, 4.33)), ("compact", (5.6, 5.86)), ("tiny", (6.78, 7.16))]
)
def test_presets_reach_the_ratios_they_name(preset: str, least: tuple[float, float], num_around: int) -> None:
    """At 16,384 tokens, and on average around there: how full the newest page is makes up to 1.5%."""
    fmt, lengths = KVFormat.parse(parse_format_name(preset)), range(16384 - num_around, 16385 + num_around)
    for head_dim, ratio in zip((64, 128), least, strict=True):
        float16 = 2 * 2 * head_dim
        held = [fmt.num_pages(n) * fmt.page_bytes(1, head_dim, head_dim) + fmt.exact_rows(n) * float16 for n in lengths]
        assert sum(lengths) * float16 / sum(held) >= ratio


def test_pages_are_as_long_as_is_usual_for_their_values() -> None:
    """Values of 2 bits have longer ones, whichever way a format is made; a length that somebody chose stays."""
    named = {name: KVFormat.parse(name).page_tokens for name in ("4t/3t", "4/4", "8/3", "3t/2t", "2t/2t", "8/2")}
    assert named == {"4t/3t": 96, "4/4": 96, "8/3": 96, "3t/2t": 128, "2t/2t": 128, "8/2": 128}
    assert KVFormat("3t", "2t").page_tokens == KVFormat().with_usual_pages("3t/2t").page_tokens == 128
    assert KVFormat.parse("3t/2t").with_usual_pages("4t/3t") == KVFormat.parse("4t/3t")
    assert KVFormat(page_tokens=64).with_usual_pages("3t/2t").page_tokens == 64
    assert KVFormat.parse("3t/2t").with_codecs("8/2t").page_tokens == 128, (
        "a layer with more bits has its model's pages"
    )
    saved = {**KVFormat.parse("3t/2t").to_dict(), "page_tokens": 96}
    assert KVFormat.from_dict(saved).page_tokens == 96
