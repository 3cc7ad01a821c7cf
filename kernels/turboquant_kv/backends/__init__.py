"""Where compressed pages are stored and computed on. The choice is made once and has a name to show."""

from __future__ import annotations

import mlx.core as mx

from turboquant_kv.backends.base import Backend
from turboquant_kv.backends.cpu import NumpyBackend
from turboquant_kv.backends.mlx_ops import MlxBackend
from turboquant_kv.backends.native import NativeBackend
from turboquant_kv.format import UnsupportedFormatError

_BACKENDS: dict[str, type[NumpyBackend] | type[MlxBackend]] = {
    NumpyBackend.name: NumpyBackend,
    NativeBackend.name: NativeBackend,
    MlxBackend.name: MlxBackend,
}


def choose_backend(name: str = "auto") -> Backend:
    """The backend called `name`; `auto` takes NumPy on the CPU and MLX operations on a GPU.

    Raises UnsupportedFormatError for an unknown name, and for cpu-native where its kernels are not built.
    """
    if name == "auto":
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        name = NumpyBackend.name if on_cpu else MlxBackend.name
    if name not in _BACKENDS:
        raise UnsupportedFormatError(f"KV backend {name!r}: expected auto, {' or '.join(_BACKENDS)}")
    return _BACKENDS[name]()
