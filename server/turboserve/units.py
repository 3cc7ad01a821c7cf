"""Amounts of bytes as people write them: "512MiB", "2 GB", "4096". Parses; knows nothing of what they mean."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "kib": 1 << 10,
    "m": 10**6, "mb": 10**6, "mib": 1 << 20,
    "g": 10**9, "gb": 10**9, "gib": 1 << 30,
    "t": 10**12, "tb": 10**12, "tib": 1 << 40,
}  # fmt: skip
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.ASCII)


def try_parse_bytes(text: str) -> int | None:
    """The number of bytes, rounded down; None when `text` is not an amount."""
    match = _AMOUNT.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        return None
    return int(Decimal(match[1]) * _UNITS[match[2]])
