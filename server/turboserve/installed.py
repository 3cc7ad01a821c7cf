"""What is installed beside the server, told without importing MLX: one line for `turboserve --version`."""

from __future__ import annotations

import importlib
from importlib import metadata

from turboserve import __version__

# Distributions that bring MLX's compute library. On Linux, exactly one should be there.
MLX_BACKENDS = {"mlx-metal": "metal", "mlx-cuda-12": "cuda12", "mlx-cuda-13": "cuda13", "mlx-cpu": "cpu"}


def version_line() -> str:
    """`turboserve 0.1.0 (mlx 0.32.4: cpu; CPU kernels: avx512-vnni)`."""
    found = [name for distribution, name in MLX_BACKENDS.items() if _version(distribution)]
    mlx = f"mlx {_version('mlx') or 'missing'}: {', '.join(found) or 'no backend'}"
    return f"turboserve {__version__} ({mlx}; CPU kernels: {_cpu_kernels()})"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_kernels() -> str:
    """The instruction set that they would use here."""
    try:
        kernels = importlib.import_module("turboquant_kv.native._kernels")
    except ImportError:
        return "not built"
    return str(kernels.isa_levels()[0])
