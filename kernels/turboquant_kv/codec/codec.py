"""Codec: everything between a rotated vector and its stored bytes, for one side (keys or values) of a cache.

Only a codec knows bits, tables and the meaning of the stored scale. Centring and rotation are the same for every codec
and are done around it: in float64 by reference.py, fast by the backends. Loads no array library: who only counts bytes
need not have one, so the methods that compute import their module when they are called.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from .limits import SCALE_BYTES, UnsupportedFormatError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ScaleKind = Literal["unbiased", "norm", "least_squares", "plain"]
"""What the one stored 16-bit scalar of a vector means (see docs/codec.md)."""


class Encoded(NamedTuple):
    """Stored vectors: codes (..., code_bytes) uint8 in canonical packing, scales (...) float16."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]


class Codec(ABC):
    """How one vector of keys or values is stored: codes and one float16 that multiplies what they stand for.

    Immutable and compared by value; subclasses are frozen dataclasses. A codec is known by its name (registry.py). What
    the codes of a name mean never changes: other tables or another packing are another codec of another name.
    """

    __slots__ = ()

    scale: ScaleKind

    @property
    @abstractmethod
    def name(self) -> str:
        """The codec's part of a format's name, such as the `4` of `4/3`; lower case, without a slash."""

    @property
    def saved_name(self) -> int | str:
        """What stands for the codec in saved caches: its name and what tells whether its tables are still the same."""
        return f"{self.name}#{self.fingerprint()}"

    @abstractmethod
    def code_bytes(self, head_dim: int) -> int:
        """Bytes of one vector's packed codes."""

    def vector_bytes(self, head_dim: int) -> int:
        """Bytes of one stored vector: packed codes and its scale."""
        return self.code_bytes(head_dim) + SCALE_BYTES

    @abstractmethod
    def table(self) -> NDArray[np.float32]:
        """The values that decoding looks up, float32, read-only: what gives the codes their meaning."""

    @abstractmethod
    def encode(self, y: NDArray[np.float64]) -> Encoded:
        """Compress rotated, centred vectors y (..., head_dim) float64.

        Where float16 ends: scales above 65504 are clamped, those below 6e-5 lose precision and below 3e-8 become 0.
        A zero vector stores scale 0. A vector with a NaN or an infinity stores a NaN scale and harms no other.
        Raises UnsupportedFormatError or ValueError for a head_dim that does not pack.
        """

    @abstractmethod
    def decode(self, codes: NDArray[np.uint8], head_dim: int) -> NDArray[np.float64]:
        """What packed codes (..., code_bytes) stand for, rotated and not yet scaled: (..., head_dim) float64.

        Raises ValueError when the last axis has another length.
        """

    def fingerprint(self) -> str:
        """Stable hash, 16 hexadecimal digits, of name, scale kind and table."""
        told = json.dumps([type(self).__name__, self.name, self.scale])
        return hashlib.sha256(told.encode() + self.table().tobytes()).hexdigest()[:16]


def check_scale(scale: str) -> None:
    """Raises UnsupportedFormatError for what is no ScaleKind."""
    if scale not in get_args(ScaleKind):
        raise UnsupportedFormatError(f"scale={scale!r}: supported are {', '.join(get_args(ScaleKind))}")
