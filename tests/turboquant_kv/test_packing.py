"""The canonical bitstream, against its definition bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from turboquant_kv.codec.format import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, UnsupportedFormatError, code_bytes
from turboquant_kv.codec.packing import pack, unpack

every_width = pytest.mark.parametrize("bits", [1, *SUPPORTED_BITS])


@every_width
@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_round_trip_is_tight(bits: int, head_dim: int, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 2**bits, (2, 3, head_dim), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (2, 3, code_bytes(head_dim, bits))
    assert np.array_equal(unpack(packed, bits, head_dim), codes)


@every_width
def test_code_i_occupies_its_bits_of_one_little_endian_number(bits: int, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 2**bits, 64, dtype=np.uint8)
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    assert pack(codes, bits).tobytes() == number.to_bytes(64 * bits // 8, "little")


def test_two_four_bit_codes_share_a_byte() -> None:
    assert pack(np.array([0x1, 0x2, 0xF, 0x0], np.uint8), 4).tolist() == [0x21, 0x0F]


def test_three_bit_codes_cross_bytes() -> None:
    # 8 codes 0..7 are the octal digits of 0o76543210 = 0xFAC688
    assert pack(np.arange(8, dtype=np.uint8), 3).tolist() == [0x88, 0xC6, 0xFA]


def test_views_and_empty_batches(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 8, (128, 4), dtype=np.uint8).T  # not contiguous
    assert np.array_equal(unpack(pack(codes, 3), 3, 128), codes)
    assert pack(np.zeros((0, 128), np.uint8), 3).shape == (0, 48)
    assert unpack(np.zeros((0, 48), np.uint8), 3, 128).shape == (0, 128)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="needs more than 3 bits"):
        pack(np.full(8, 8, np.uint8), 3)
    with pytest.raises(ValueError, match="whole bytes"):
        pack(np.zeros(7, np.uint8), 3)
    with pytest.raises(ValueError, match="uint8"):
        pack(np.zeros(8, np.int64), 3)
    with pytest.raises(ValueError, match="exactly 128 codes"):
        unpack(np.zeros(47, np.uint8), 3, 128)
    with pytest.raises(UnsupportedFormatError):
        pack(np.zeros(8, np.uint8), 9)
