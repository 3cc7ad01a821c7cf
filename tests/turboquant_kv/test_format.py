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


@pytest.mark.parametrize(
    ("preset", "least"), [("balanced", (4.2, 4.35)), ("compact", (5.6, 5.9)), ("tiny", (6.8, 7.2))]
)
def test_presets_reach_the_ratios_they_name(preset: str, least: tuple[float, float]) -> None:
    fmt, num_tokens = KVFormat.parse(parse_format_name(preset)), 16384
    for head_dim, ratio in zip((64, 128), least, strict=True):
        pages = fmt.num_pages(num_tokens) * fmt.page_bytes(1, head_dim, head_dim)
        float16 = 2 * 2 * head_dim
        held = pages + fmt.exact_rows(num_tokens) * float16
        assert num_tokens * float16 / held >= ratio
