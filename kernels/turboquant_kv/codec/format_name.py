"""How KV formats are named: in settings, requests, statistics and files. Loads no array library."""

from __future__ import annotations

from .format import KVFormat, UnsupportedFormatError
from .registry import CODECS

__all__ = ["FORMAT_NAMES", "PLAIN_FORMAT", "UnsupportedFormatError", "parse_format_name"]

PLAIN_FORMAT = "f16"  # names mlx-lm's own caches: nothing is compressed, the dtype is the model's
FORMAT_NAMES = f"KEY_BITS/VALUE_BITS from {', '.join(CODECS)}, such as 4/4 or 4/3, or f16 for no compression"
"""What `parse_format_name` takes, for messages to people."""


def parse_format_name(text: str) -> str:
    """The one spelling of a KV format's name: `4` and `04/4` are `4/4`, ` F16 ` is `f16`.

    Everything that names a format is read by this. Raises UnsupportedFormatError.
    """
    name = text.strip().lower()
    return PLAIN_FORMAT if name == PLAIN_FORMAT else KVFormat.parse(name).name
