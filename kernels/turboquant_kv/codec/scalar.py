"""ScalarCodec: each coordinate by itself to the nearest of 2**bits Lloyd-Max centroids, packed tightly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .codec import Codec, Encoded, ScaleKind, check_scale
from .limits import CODEBOOK_BITS, SUPPORTED_BITS, UnsupportedFormatError, code_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ScalarCodec(Codec):
    """TurboQuant's codec: `bits` per coordinate. Its float64 twin is scalar_reference.py.

    Raises UnsupportedFormatError for a width without a codebook and for an unknown scale kind.
    """

    bits: int
    scale: ScaleKind = "unbiased"

    def __post_init__(self) -> None:
        if self.bits not in CODEBOOK_BITS:
            raise UnsupportedFormatError(f"no codebook of {self.bits} bits; there are {_listed(CODEBOOK_BITS)}")
        check_scale(self.scale)

    @property
    def name(self) -> str:
        return str(self.bits)

    @property
    def saved_name(self) -> int:
        """The bits alone: the tables are part of the fingerprint of whoever keeps saved caches (registry.py)."""
        return self.bits

    def code_bytes(self, head_dim: int) -> int:
        return code_bytes(head_dim, self.bits)

    def table(self) -> NDArray[np.float32]:
        """The centroids (2**bits,), ascending."""
        from .codebook import centroids

        return centroids(self.bits)

    def encode(self, y: NDArray[np.float64]) -> Encoded:
        from . import scalar_reference

        return scalar_reference.encode(y, self.bits, self.scale)

    def decode(self, codes: NDArray[np.uint8], head_dim: int) -> NDArray[np.float64]:
        from . import scalar_reference

        return scalar_reference.decode(codes, self.bits, head_dim)


def scalar_codec(codec: Codec, reader: str) -> ScalarCodec:
    """The codec itself, for a reader that has kernels of no other kind. Raises UnsupportedFormatError."""
    if not isinstance(codec, ScalarCodec):
        raise UnsupportedFormatError(f"{reader}: codec {codec.name!r} is none of {_listed(SUPPORTED_BITS)} bits")
    return codec


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
