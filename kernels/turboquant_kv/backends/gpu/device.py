"""What the machine's GPU offers to the kernels: MLX tells the compute capability, this file knows the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

MIN_CAPABILITY = (8, 0)  # of CUDA devices: asynchronous copies and the tensor cores' products


@dataclass(frozen=True, slots=True)
class Device:
    """What a GPU offers to a kernel."""

    processors: int
    shared_bytes: int  # of one thread block at most
    has_bulk_copies: bool
    has_group_products: bool  # of four warps (wgmma), which no later kind of device has either


HOPPER = Device(132, 227 << 10, True, True)
BLACKWELL = Device(132, 227 << 10, True, False)  # its number of processors is not told
AMPERE = Device(108, 163 << 10, False, False)
SMALL = Device(84, 99 << 10, False, False)  # consumers' cards; their number of processors varies and is not told


@cache
def compute_capability() -> tuple[int, int]:
    """Of the CUDA device that MLX uses; (0, 0) where there is none."""
    if not mx.cuda.is_available():
        return 0, 0
    info = mx.device_info()
    return int(info["compute_capability_major"]), int(info["compute_capability_minor"])


def this_device() -> Device:
    """The CUDA device that MLX uses, by its compute capability: MLX tells no more."""
    capability = compute_capability()
    if capability[0] in (9, 10):
        return HOPPER if capability[0] == 9 else BLACKWELL
    return AMPERE if capability == (8, 0) else SMALL
