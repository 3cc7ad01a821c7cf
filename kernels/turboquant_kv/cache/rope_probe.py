"""How each layer's keys turn with position, learnt from the model's own rope module rather than from its configuration.

A rope module is linear in what it turns, so what it does to the unit vectors at a few positions says all: which dims
are partners, how fast each pair turns, by what it grows. What is found is tried at positions up to FAR and dropped
where it does not hold (bases that change with length); whether a layer uses its module at all only its keys can tell,
and calibration.py looks at those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.codec.rotary import Rotary

FAR = 32768  # positions reached by doubling while a pair's angle is followed
_TRIED = (0, 1, 3, 100, 1031, 8209, FAR)
# Float32 angles of large positions: 32768 radians are known to 0.002.
_TOLERANCE = 0.01

Matrix = npt.NDArray[np.float64]


def learn_rotary(model: Any, head_dims: dict[int, int], numbers: Sequence[int] | None = None) -> dict[int, Rotary]:
    """Rotations by cache; of layers without a rope module, or with one that is not understood, none.

    head_dims: of the keys of the caches that are wanted, by their place among the model's caches. numbers: the layer
    that each of the model's caches belongs to; None: it is the place.
    """
    layers = getattr(model, "layers", None) or ()
    found: dict[int, Rotary] = {}
    known: dict[tuple[int, int], Rotary | None] = {}  # modules are often shared, or equal in all layers
    for i, dim in head_dims.items():
        number = i if numbers is None else numbers[i]
        if number >= len(layers):
            continue
        modules = list(_rope_modules(layers[number]))
        if len(modules) != 1:
            continue
        key = id(modules[0]), dim
        if key not in known:
            known[key] = rotary_of(modules[0], dim)
        rotary = known[key]
        if rotary is not None:
            equal = next((other for other in found.values() if other.fingerprint() == rotary.fingerprint()), rotary)
            found[i] = equal  # one object for all layers, so that they share tables
    return found


def has_rope(model: Any) -> bool:
    """Whether a layer has a rope module, understood or not."""
    return any(True for layer in getattr(model, "layers", None) or () for _ in _rope_modules(layer))


def _rope_modules(layer: Any) -> Iterator[Any]:
    seen: set[int] = set()
    for name, module in layer.named_modules() if hasattr(layer, "named_modules") else ():
        last = name.rpartition(".")[2]
        is_rope = "rope" in type(module).__name__.lower() or last in ("rope", "rotary_emb")
        if is_rope and callable(module) and id(module) not in seen:
            seen.add(id(module))
            yield module


def rotary_of(rope: Any, dim: int) -> Rotary | None:
    """What a rope module does to keys of `dim` dims, or None if it is no turn of pairs by position."""
    try:
        at_start, at_one = _matrix(rope, dim, 0), _matrix(rope, dim, 1)
    except Exception:  # another signature: whatever it is, it is not understood
        return None
    rotary = _layout(at_start, at_one)
    if rotary is None:
        return None
    try:
        for doubled in (2**k for k in range(1, FAR.bit_length())):
            rotary = _refined(rotary, _matrix(rope, dim, doubled), doubled)
        identity = np.eye(dim)
        for position in _TRIED:
            expected = rotary.turned(identity, np.full(dim, position))
            if np.abs(expected - _matrix(rope, dim, position)).max() > _TOLERANCE * rotary.amplitude:
                return None
    except Exception:  # refuses far positions, for one
        return None
    return rotary


def _matrix(rope: Any, dim: int, position: int) -> Matrix:
    """(dim, dim): row i is what becomes of unit vector i at a position."""
    turned = rope(mx.eye(dim)[None, :, None], offset=position)
    return np.array(turned.astype(mx.float32), np.float64).reshape(dim, dim)


def _layout(at_start: Matrix, at_one: Matrix) -> Rotary | None:
    """Pairs, amplitude and the angles of the first step; None where no layout of pairs explains the matrices."""
    dim = len(at_one)
    amplitude = float(np.abs(np.diag(at_start)).max())
    mixes = np.abs(at_one - np.diag(np.diag(at_one))) > 1e-12  # a pair's rows have an entry outside the diagonal
    if not mixes.any() or amplitude <= 0:
        return None
    first = int(np.flatnonzero(mixes.any(axis=1))[0])
    gap = int(np.flatnonzero(mixes[first])[0]) - first
    if gap < 1 or first != 0:
        return None
    stride = 2 if gap == 1 else 1
    num_pairs = gap if stride == 1 else (int(np.flatnonzero(mixes.any(axis=1))[-1]) + 1) // 2
    if stride * (num_pairs - 1) + gap >= dim:
        return None
    index = stride * np.arange(num_pairs)
    angles = np.arctan2(at_one[index, index + gap], at_one[index, index])
    return Rotary(angles, stride, gap, amplitude)


def _refined(rotary: Rotary, matrix: Matrix, position: int) -> Rotary:
    """Frequencies from the angles at a position, of which all but the multiple of a full turn is seen."""
    a, b = rotary.first, rotary.second
    angles = np.arctan2(matrix[a, b], matrix[a, a])
    expected = rotary.frequencies * position
    turns = np.round((expected - angles) / (2 * np.pi))
    return Rotary((angles + 2 * np.pi * turns) / position, rotary.stride, rotary.gap, rotary.amplitude)
