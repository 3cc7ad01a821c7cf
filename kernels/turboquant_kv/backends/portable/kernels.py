"""Which fast twin computes which codec on the portable backends. A new codec with one is a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from turboquant_kv.backends.portable.codes import ScalarKernels
from turboquant_kv.backends.portable.kit import ArrayKit, CodecKernels
from turboquant_kv.backends.portable.trellis_codes import TrellisKernels
from turboquant_kv.codec.codec import Codec
from turboquant_kv.codec.format import UnsupportedFormatError
from turboquant_kv.codec.scalar import ScalarCodec
from turboquant_kv.codec.trellis import TrellisCodec

KERNELS: dict[type[Codec], Callable[[ArrayKit, Any], CodecKernels]] = {
    ScalarCodec: ScalarKernels,
    TrellisCodec: TrellisKernels,
}
"""By a codec's class: makes its kernels for an array library."""


@cache
def kernels_for(kit: ArrayKit, codec: Codec) -> CodecKernels:
    """One object for all layers. Raises UnsupportedFormatError for a codec without portable kernels."""
    make = KERNELS.get(type(codec))
    if make is None:
        raise UnsupportedFormatError(f"codec {codec.name!r} has no kernels in {kit.xp.__name__}")
    return make(kit, codec)
