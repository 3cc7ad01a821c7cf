"""TurboQuant KV caches: rotate, quantise to a Lloyd-Max codebook, store one scale per vector.

Importing this package loads no array library; take what you need from its modules
(`codebook`, `rotation`, `packing`, `reference`: NumPy only; the cache and its backends: MLX).
"""

from __future__ import annotations

from .codec.format import KVFormat, ScaleKind, UnsupportedFormatError

__all__ = ["KVFormat", "ScaleKind", "UnsupportedFormatError"]
