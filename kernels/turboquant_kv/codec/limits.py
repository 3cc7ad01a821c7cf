"""What every other module of the codec rests on: the error, the supported sizes, the bytes of packed codes.

Loads no array library.
"""

from __future__ import annotations

CODEBOOK_BITS = (1, 2, 3, 4, 8)
"""Bit widths with a scalar codebook; 1 is the first stage of the 2-bit product form, and no format's."""
SUPPORTED_BITS = (2, 3, 4, 8)
"""Bit widths of the scalar codecs that a format may name."""
SUPPORTED_HEAD_DIMS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512)
"""Dimensions that have a rotation. Vectors of others are stored as ones of the next, zeros behind (`stored_dim`)."""
MOST_PADDING = 1.25  # of the stored to the true dimension: beyond that the padding costs more than the codec is worth
MIN_TRELLIS_DIM = 64
SCALE_BYTES = 2  # one float16 per vector


class UnsupportedFormatError(ValueError):
    """A codec, bit width, head dimension or option that nothing here implements."""


def code_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one vector's codes of `bits` each; tight, so 3 bits cost 3 bits."""
    return head_dim * bits // 8


def check_head_dim(head_dim: int) -> None:
    """Raises UnsupportedFormatError unless a Hadamard rotation of this size is implemented."""
    if head_dim not in SUPPORTED_HEAD_DIMS:
        raise UnsupportedFormatError(
            f"head_dim {head_dim} has no rotation here; supported: {', '.join(map(str, SUPPORTED_HEAD_DIMS))}"
        )


def stored_dim(head_dim: int) -> int:
    """The dimension as which vectors of `head_dim` are stored: itself, or the next that has a rotation.

    Raises UnsupportedFormatError where that is more than a quarter longer.
    """
    found = next((dim for dim in SUPPORTED_HEAD_DIMS if dim >= head_dim), None)
    if found is None or found > MOST_PADDING * head_dim:
        check_head_dim(head_dim)
        raise AssertionError(f"{head_dim} is supported and yet too short")
    return found
