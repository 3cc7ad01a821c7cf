"""TrellisCodec: coordinates coded together along a trellis, a quarter less error than the scalar codec's per bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .codec import Codec, Encoded, ScaleKind, check_scale
from .limits import UnsupportedFormatError, code_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRELLIS_BITS = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class TrellisCodec(Codec):
    """`bits` per coordinate, levels of twice as many values. Its float64 twin is trellis_reference.py.

    Raises UnsupportedFormatError for other bits and for an unknown scale kind.
    """

    bits: int
    scale: ScaleKind = "unbiased"

    def __post_init__(self) -> None:
        if self.bits not in TRELLIS_BITS:
            raise UnsupportedFormatError(f"no trellis of {self.bits} bits; there are {TRELLIS_BITS}")
        check_scale(self.scale)

    @property
    def name(self) -> str:
        """`3t`."""
        return f"{self.bits}t"

    def code_bytes(self, head_dim: int) -> int:
        return code_bytes(head_dim, self.bits)

    def table(self) -> NDArray[np.float32]:
        """The levels (2**(bits + 1),), ascending."""
        from .trellis_reference import levels

        return levels(self.bits)

    def encode(self, y: NDArray[np.float64]) -> Encoded:
        from . import trellis_reference

        return trellis_reference.encode(y, self.bits, self.scale)

    def decode(self, codes: NDArray[np.uint8], head_dim: int) -> NDArray[np.float64]:
        from . import trellis_reference

        return trellis_reference.decode(codes, self.bits, head_dim)
