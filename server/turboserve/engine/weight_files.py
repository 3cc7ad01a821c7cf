"""A model's weight files before they are loaded: whether they are whole, and which shapes they hold.

Reads the safetensors headers only: https://huggingface.co/docs/safetensors describes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turboserve.errors import StartupError
from turboserve.weight_sizes import MODEL_FILES

Shapes = Mapping[str, tuple[int, ...]]
"""Of each tensor, by its name in the files."""

MOST_HEADER_BYTES = 100 << 20  # as the format's own library has it
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def read_shapes(folder: Path) -> Shapes:
    """Of all weights in a model's folder. Raises StartupError for a file that is not whole."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob(MODEL_FILES)):
        try:
            shapes |= _shapes_of(path)
        except OSError as exc:
            raise StartupError(f"{path} cannot be read ({exc.strerror}): fetch the model again.") from exc
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise StartupError(f"{path} is damaged or not complete: fetch the model again.") from exc
    return shapes


def _shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Raises ValueError and its like unless header and length of the file agree."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MOST_HEADER_BYTES, num_bytes - 8):
            raise ValueError("length of the header")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    shapes = {}
    for name, tensor in header.items():
        shape, (first, end) = tuple(tensor["shape"]), tensor["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, first, end)) or end > num_bytes - 8 - header_bytes:
            raise ValueError("extent of a tensor")
        element_bytes = _BYTES.get(tensor["dtype"])
        if element_bytes is not None and end - first != math.prod(shape) * element_bytes:
            raise ValueError("length of a tensor")
        shapes[name] = shape
    return shapes
