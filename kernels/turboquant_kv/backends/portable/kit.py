"""What the portable storage asks of an array library, and of a codec's fast twin on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.base import Array, LayerShape


@dataclass(frozen=True, slots=True)
class ArrayKit:
    """How a backend's arrays differ from the other's, beyond `xp` (numpy or mlx.core)."""

    xp: Any
    from_numpy: Callable[[npt.NDArray[Any]], Array]
    to_numpy: Callable[[Array], npt.NDArray[Any]]
    to_floats: Callable[[Array], Array]  # exact rows to float32
    from_floats: Callable[[Array, LayerShape], Array]  # and back to exact rows
    look_up: Callable[[npt.NDArray[np.float32]], Callable[[Array], Array]]  # table -> (indices -> rows, flattened)


class CodecKernels(Protocol):
    """A codec in float32 on one array library: the same bytes as its reference twin."""

    def encode(self, y: Array) -> tuple[Array, Array]:
        """Rotated, centred vectors y (..., D) float32 to codes (..., code_bytes) uint8 and scales (...) float16."""
        ...

    def decode(self, codes: Array, head_dim: int) -> Array:
        """Codes (..., code_bytes) to the unscaled values (..., head_dim) float32 that they stand for, rotated."""
        ...
