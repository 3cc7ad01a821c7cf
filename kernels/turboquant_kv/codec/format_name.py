"""How KV formats are named: in settings, requests, statistics and files. Loads no array library."""

from __future__ import annotations

from functools import lru_cache

from .format import KVFormat, UnsupportedFormatError
from .registry import CODECS

__all__ = ["FORMAT_NAMES", "PLAIN_FORMAT", "PRESETS", "UnsupportedFormatError", "parse_format_name"]

PLAIN_FORMAT = "f16"  # names mlx-lm's own caches: nothing is compressed, the dtype is the model's
PRESETS = {"balanced": "4t/3t", "compact": "3t/2t", "tiny": "2t/2t"}
"""Formats by what they are for: 4.2 to 4.4, 5.6 to 5.9 and 6.8 to 7.2 times less memory than float16 at 16,384 tokens,
everything counted, with head dimensions of 64 to 128 (docs/quality.md says what each costs)."""
FORMAT_NAMES = (
    f"{', '.join(PRESETS)}, KEY_CODEC/VALUE_CODEC from {', '.join(CODECS)} such as 4/4 or 4/3t, "
    "or f16 for no compression"
)
"""What `parse_format_name` takes, for messages to people."""


@lru_cache(maxsize=64)
def parse_format_name(text: str) -> str:
    """The one spelling of a KV format's name: `4` and `04/4` are `4/4`, ` F16 ` is `f16`, `balanced` is `4t/3t`.

    Everything that names a format is read by this. Raises UnsupportedFormatError.
    """
    name = text.strip().lower()
    name = PRESETS.get(name, name)
    return PLAIN_FORMAT if name == PLAIN_FORMAT else KVFormat.parse(name).name
