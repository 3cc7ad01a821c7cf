"""The first thing that imports MLX: after the BLAS is in place, with a cure when the backend is missing.

On Linux `mlx` itself holds no library: `mlx-cpu`, `mlx-cuda-12` and `mlx-cuda-13` bring it, one at a time.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

from turboquant_kv import blas
from turboquant_kv.backends.gpu.nvrtc import FOLDER_VARIABLE, remove_damaged
from turboserve.descriptors import limits_kept
from turboserve.errors import StartupError

log = logging.getLogger(__name__)

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CUDA13_DRIVER_MAJOR = 580  # the first driver branch that runs CUDA 13


def load_backend() -> blas.BlasStatus:
    """Interpose the BLAS and import MLX. Raises StartupError naming the command that installs what is missing."""
    # One prompt at a time is tokenised; handing it to a pool of threads, one for each core, costs more than the work.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Of transformers only tokenizers are used; that its own models lack PyTorch is no news to anybody here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Once a thread has met more than 800 structures of CUDA graphs, MLX raises an error for each other one that it does
    # not hold: meant for training loops, which always run the same ones. Those used last stay kept either way.
    os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")
    status = blas.interpose()
    try:
        import mlx.core  # noqa: F401  here and not above: the order is the point

        with limits_kept():
            import mlx_lm.utils  # noqa: F401  would lower the limit of open files
    except ImportError as exc:
        raise StartupError(explain_import_error(str(exc), best_extra())) from exc
    return status


def keep_compiled_kernels(cache_dir: Path) -> None:
    """Let MLX keep the CUDA kernels it compiles in our cache folder, so that a restart compiles none of them again.

    Left alone, MLX keeps them in the folder for temporary files, which others can write to and a reboot empties. It
    finds them by name, so each kind of GPU and each version gets a folder. Metal has a cache of its own.
    """
    import mlx.core as mx

    if not mx.cuda.is_available() or FOLDER_VARIABLE in os.environ:
        return
    info = mx.device_info()
    capability = f"sm{info['compute_capability_major']}{info['compute_capability_minor']}"
    folder = cache_dir.expanduser() / "cuda-kernels" / f"mlx-{metadata.version('mlx')}-{capability}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        log.warning("compiled kernels cannot be kept in %s: %s", folder, exc.strerror or exc)
        return
    for name in remove_damaged(folder, time.time()):
        log.warning("%s was left half written by a process that was ended: it is compiled again", name)
    os.environ[FOLDER_VARIABLE] = str(folder)  # read by the first kernel that MLX compiles


def explain_import_error(message: str, extra: str) -> str:
    """One line for what `import mlx.core` said. `extra` is the backend this machine should have."""
    install = f"pip install 'turboserve[{extra}]'" if extra else "pip install turboserve"
    if "GLIBC" in message:
        return "this system's C library is too old for MLX (glibc 2.35 or newer is needed): use a newer distribution"
    if "libcuda" in message or "libcudart" in message or "libcublas" in message:
        return (
            f"MLX's CUDA backend finds no CUDA driver ({message}): "
            "pip uninstall -y mlx-cuda-12 mlx-cuda-13, then pip install 'turboserve[cpu]'"
        )
    if "libmlx" in message or "No module named 'mlx" in message:
        return f"MLX has no backend installed: {install}"
    return f"MLX cannot be imported ({message}): {install}"


def best_extra() -> str:
    """The extra that fits this machine: cpu, cuda12 or cuda13 on Linux, none elsewhere."""
    if not sys.platform.startswith("linux"):
        return ""
    version = NVIDIA_DRIVER.read_text() if NVIDIA_DRIVER.is_file() else ""
    return extra_for_driver(version, has_nvidia_smi=shutil.which("nvidia-smi") is not None)


def extra_for_driver(version_text: str, *, has_nvidia_smi: bool) -> str:
    """Choose by the kernel module's banner; a container may hide it and still show nvidia-smi."""
    if match := re.search(r"\s(\d{3,})\.\d+", version_text):
        return "cuda13" if int(match[1]) >= CUDA13_DRIVER_MAJOR else "cuda12"
    return "cuda12" if has_nvidia_smi else "cpu"


def device_name() -> str:
    """MLX's default device for people: `cpu (x86_64)`, `gpu (Apple M4 Max)`."""
    import mlx.core as mx

    device = mx.default_device()
    if device.type != mx.DeviceType.gpu:
        return f"cpu ({platform.machine()})"
    return f"gpu ({mx.device_info().get('device_name', 'unknown')})"
