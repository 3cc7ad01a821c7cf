"""Which variant and which tuning of the decode kernel a shape gets on a device."""

from __future__ import annotations

from functools import lru_cache

from turboquant_kv.backends.gpu.arena import decode_arena
from turboquant_kv.backends.gpu.device import Device
from turboquant_kv.backends.gpu.shape import DecodeShape, Variant, has_whole_blocks
from turboquant_kv.backends.gpu.source import Dialect
from turboquant_kv.backends.gpu.tuning import PORTABLE, SIMD, Tuning

# Matrices cost the same for one row as for eight. Modelled from counted operations and published throughputs, not
# measured: from so many rows on, the worse of the model's two assumptions loses less with them (docs/metal.md).
MIN_SIMD_ROWS = 3
STATIC_BYTES = 4096  # shared memory beside the arena, generously


def variant_for(dialect: Dialect, shape: DecodeShape, device: Device | None = None) -> Variant:
    """Matrices where they are written for it, fit the device and are expected to pay, the portable body elsewhere."""
    if dialect == "metal":
        return "simd" if shape.has_simd and shape.group * shape.num_rows >= MIN_SIMD_ROWS else "portable"
    if shape.has_mma and (device is None or fits(shape, tuning_for(shape, "mma", device), device)):
        return "mma"
    return "portable"


def fits(shape: DecodeShape, tuning: Tuning, device: Device) -> bool:
    """Whether a block of the tensor-core variant has enough shared memory."""
    return decode_arena(shape, tuning).num_bytes + STATIC_BYTES <= device.shared_bytes


@lru_cache(maxsize=256)
def tuning_for(shape: DecodeShape, variant: Variant, device: Device) -> Tuning:
    """Constants but for tensor cores: as many warps in a block as registers allow, fewer where memory is small."""
    if variant != "mma":
        return SIMD if variant == "simd" else PORTABLE
    narrow = max(shape.k_dim, shape.v_dim) <= 128
    trellis = shape.k_trellis or shape.v_trellis
    by_bytes = trellis or max(shape.k_bits, shape.v_bits) >= 3  # pairs of codes are found by whole bytes
    bulk = device.has_bulk_copies
    choices = [
        Tuning(12 if narrow else 8, shape.tile, 2, 256 if by_bytes else 128, bulk, device.processors),
        Tuning(8, shape.tile, 2, 128, bulk, device.processors),
        Tuning(4, 16 if has_whole_blocks(shape, 16) else shape.tile, 2, 128, bulk, device.processors),
    ]
    return next((t for t in choices if fits(shape, t, device)), choices[-1])
