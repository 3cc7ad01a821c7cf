"""Every codec by its name. A new codec is one line here, beside its own files (docs/codec.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .codec import Codec, ScaleKind
from .limits import SUPPORTED_BITS, UnsupportedFormatError
from .scalar import ScalarCodec
from .trellis import TRELLIS_BITS, TrellisCodec

CODECS: dict[str, Callable[[ScaleKind], Codec]] = {
    **{str(bits): partial(ScalarCodec, bits) for bits in SUPPORTED_BITS},
    **{f"{bits}t": partial(TrellisCodec, bits) for bits in TRELLIS_BITS},
}
"""Makes the codec of a name with a given meaning of the stored scale."""


def codec_named(name: str, scale: ScaleKind = "unbiased") -> Codec:
    """The codec of that name. Raises UnsupportedFormatError for a name or a scale kind that does not exist."""
    make = CODECS.get(name)
    if make is None:
        raise UnsupportedFormatError(f"no codec {name[:20]!r}; there are {', '.join(CODECS)}")
    return make(scale)


def scalar_tables() -> bytes:
    """Tables of the scalar codecs, one after the other: what a store of saved caches has in its fingerprint.

    No other codec's: each new one would make all that is stored unreadable. They say so in their own saved names.
    """
    return b"".join(ScalarCodec(bits).table().tobytes() for bits in SUPPORTED_BITS)
