"""Where compressed pages are stored and computed on. The choice is made once and has a name to show."""

from __future__ import annotations

import logging
from functools import lru_cache

import mlx.core as mx

from turboquant_kv.backends.base import Backend
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.device import MIN_CAPABILITY, compute_capability
from turboquant_kv.backends.mlx_ops.backend import MlxBackend
from turboquant_kv.backends.native import backend as native
from turboquant_kv.backends.native.backend import NativeBackend
from turboquant_kv.backends.numpy_ops.backend import NumpyBackend
from turboquant_kv.codec.format import UnsupportedFormatError

log = logging.getLogger(__name__)

_BACKENDS: dict[str, type[NumpyBackend] | type[MlxBackend]] = {
    NumpyBackend.name: NumpyBackend,
    NativeBackend.name: NativeBackend,
    MlxBackend.name: MlxBackend,
    GpuBackend.name: GpuBackend,
}


def choose_backend(name: str = "auto") -> Backend:
    """The backend called `name`; `auto` takes native kernels on the CPU, fused ones on CUDA, MLX operations on Metal.

    CUDA devices before compute capability 8.0 get MLX operations, too. That is for caches by themselves: for a whole
    model cache/backend_choice.py tries a GPU's kernels first, Metal's as well.
    Without compiled kernels `auto` falls back to NumPy, says so in the log once, and in the backend's name.
    Raises UnsupportedFormatError for an unknown name, and for cpu-native where its kernels are not built.
    """
    if name == "auto":
        if mx.default_device() != mx.Device(mx.cpu):
            return GpuBackend() if compute_capability() >= MIN_CAPABILITY else MlxBackend()
        kernels, reason = native.load_kernels()
        return NativeBackend() if kernels is not None else _numpy_instead(reason)
    if name not in _BACKENDS:
        raise UnsupportedFormatError(f"KV backend {name!r}: expected auto, {' or '.join(_BACKENDS)}")
    return _BACKENDS[name]()


def _numpy_instead(reason: str) -> Backend:
    _warn_once(reason)
    backend = NumpyBackend()
    backend.name = f"{NumpyBackend.name} (native kernels missing)"
    return backend


@lru_cache
def _warn_once(reason: str) -> None:
    log.warning(
        "The native CPU kernels are not built (%s): attention over compressed caches runs in NumPy, many times slower. "
        "Reinstall with a C++ compiler present.",
        reason,
    )
