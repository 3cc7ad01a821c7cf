"""The canonical layout of codes: a tight little-endian bitstream per vector.

Code i of a vector occupies bits [i*b, (i+1)*b) of its byte string, least significant bit first; at 4 bits byte j
holds code[2j] | code[2j+1] << 4. Backends may re-tile losslessly; what is stored or compared is this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .limits import UnsupportedFormatError, code_bytes

Bytes = NDArray[np.uint8]


def pack(codes: Bytes, bits: int) -> Bytes:
    """codes (..., D) uint8, each below 2**bits -> (..., D*bits/8) uint8.

    Raises UnsupportedFormatError for bits outside 1..8, ValueError for another dtype, a code too large
    or a vector that does not end on a byte.
    """
    _check(codes, bits)
    num_codes = codes.shape[-1]
    if num_codes * bits % 8:
        raise ValueError(f"{num_codes} codes of {bits} bits do not fill whole bytes")
    if bits < 8 and codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} needs more than {bits} bits")
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")  # (..., D, bits)
    return np.packbits(stream.reshape(*codes.shape[:-1], num_codes * bits), axis=-1, bitorder="little")


def unpack(packed: Bytes, bits: int, num_codes: int) -> Bytes:
    """packed (..., num_codes*bits/8) uint8 -> codes (..., num_codes) uint8; the inverse of `pack`.

    Raises UnsupportedFormatError for bits outside 1..8, ValueError when the last axis has another length.
    """
    _check(packed, bits)
    if packed.shape[-1] != code_bytes(num_codes, bits) or num_codes * bits % 8:
        raise ValueError(f"{packed.shape[-1]} bytes do not hold exactly {num_codes} codes of {bits} bits")
    stream = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], num_codes, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]  # the missing high bits are filled with zeros


def _check(array: Bytes, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise UnsupportedFormatError(f"bits={bits}: codes are 1 to 8 bits wide")
    if array.dtype != np.uint8 or array.ndim < 1:
        raise ValueError(f"expected a uint8 array of at least one axis, got {array.dtype} of shape {array.shape}")
