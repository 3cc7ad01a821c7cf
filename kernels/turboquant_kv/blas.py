"""Fast float32 products on Linux CPUs: OpenBLAS in place of the reference BLAS of mlx's CPU wheel.

`interpose()` must run before the first `import mlx.core`: it loads a tiny library that answers
`cblas_sgemm` (and its double and complex sisters) with RTLD_GLOBAL, so that the dynamic linker
finds it before the wheel's own. It never fails: where it cannot help, the status says why.
TURBOSERVE_BLAS=off switches it off. macOS has Accelerate and is left alone; CUDA does not multiply here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from turboquant_kv.native import find_library

log = logging.getLogger(__name__)

SWITCH = "TURBOSERVE_BLAS"
CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class BlasStatus:
    """What multiplies float32 matrices. `reason` is empty when `active`, else why the wheel's own BLAS stayed."""

    active: bool
    library: str = ""
    num_threads: int = 0
    reason: str = ""

    def describe(self) -> str:
        """One phrase for logs and stats."""
        if self.active:
            return f"{self.library}, up to {self.num_threads} thread{'s' if self.num_threads != 1 else ''}"
        return f"mlx's own ({self.reason})"


_lock = threading.Lock()
_status: BlasStatus | None = None
_shim: ctypes.CDLL | None = None


def interpose() -> BlasStatus:
    """Put OpenBLAS in front of mlx's BLAS, once; later calls return the first answer. Never raises."""
    global _status
    with _lock:
        if _status is None:
            _status = _try_interpose()
            if not _status.active and _status.reason.startswith("failed"):
                log.warning("BLAS: %s", _status.describe())
        return _status


def status() -> BlasStatus:
    """The answer of `interpose()`, or that it was not called."""
    return _status or BlasStatus(False, reason="interpose() was not called")


def num_calls() -> int:
    """Products answered by OpenBLAS so far: 0 after a product means that mlx does not go through it."""
    return int(_shim.turboquant_blas_calls()) if _shim is not None else 0


def product_address() -> int:
    """Where in memory OpenBLAS's `cblas_sgemm` lies that stays on the calling thread; 0: there is none.

    For the native kernels, whose own threads share out a product.
    """
    function = getattr(_shim, "turboquant_blas_sgemm_alone", None)  # a shim may be older than this file
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


def _try_interpose() -> BlasStatus:
    if os.environ.get(SWITCH, "auto").strip().lower() in ("off", "0", "no", "false"):
        return BlasStatus(False, reason=f"{SWITCH}=off")
    if not sys.platform.startswith("linux"):
        return BlasStatus(False, reason=f"not needed on {sys.platform}")
    if "mlx.core" in sys.modules:
        return BlasStatus(False, reason="failed: mlx.core was imported before turboquant_kv.blas.interpose()")
    shim_path, openblas_path = find_library("turboquant_blas"), _openblas_path()
    if shim_path is None:
        return BlasStatus(False, reason="failed: the shim is not built; reinstall with a C compiler present")
    if openblas_path is None:
        return BlasStatus(False, reason="failed: scipy-openblas32 is not installed")
    try:
        return _load(shim_path, openblas_path)
    except (OSError, AttributeError) as exc:
        return BlasStatus(False, reason=f"failed: {exc}")


def _load(shim_path: Path, openblas_path: Path) -> BlasStatus:
    """Raises OSError or AttributeError; until the last load below nothing is visible to mlx."""
    global _shim
    shim = ctypes.CDLL(str(shim_path), mode=ctypes.RTLD_LOCAL)
    shim.turboquant_blas_open.argtypes = [ctypes.c_char_p, ctypes.c_int]
    shim.turboquant_blas_open.restype = ctypes.c_char_p
    shim.turboquant_blas_calls.restype = ctypes.c_ulong
    num_threads = thread_limit()
    if error := shim.turboquant_blas_open(os.fsencode(openblas_path), num_threads):
        raise OSError(error.decode(errors="replace"))
    library = _describe(ctypes.CDLL(str(openblas_path)))
    ctypes.CDLL(str(shim_path), mode=ctypes.RTLD_GLOBAL)  # opened again: now its symbols come before libmlx's
    _shim = shim
    return BlasStatus(True, library, num_threads)


def _describe(openblas: ctypes.CDLL) -> str:
    """The library's version and the CPU kernels it chose: `OpenBLAS 0.3.34 SkylakeX`."""
    openblas.scipy_openblas_get_config.restype = ctypes.c_char_p
    openblas.scipy_openblas_get_corename.restype = ctypes.c_char_p
    version = " ".join(openblas.scipy_openblas_get_config().decode().split()[:2])
    return f"{version} {openblas.scipy_openblas_get_corename().decode()}"


def _openblas_path() -> Path | None:
    """The shared library inside the scipy-openblas32 wheel, found without importing it."""
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0], "lib").glob("libscipy_openblas*.so"))), None)


def thread_limit() -> int:
    """The most threads for one product: OpenBLAS's environment variables first, then the CPUs this process may use."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        first = os.environ.get(name, "").split(",")[0].strip()
        if first.isascii() and first.isdigit() and int(first) > 0:
            return int(first)
    return usable_cpus()


def usable_cpus() -> int:
    """CPUs that this process may use, by its affinity and its container's quota."""
    affinity = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else (os.cpu_count() or 1)
    return max(1, min(affinity, cgroup_cpus() or affinity))


def cgroup_cpus(root: Path = CGROUP_ROOT) -> int | None:
    """Whole CPUs that a container's quota allows, rounded up; None without a quota. Reads cgroup v2, then v1."""
    try:
        if (v2 := root / "cpu.max").is_file():
            quota, period = v2.read_text().split()[:2]
        else:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        return None if quota in ("max", "-1") else math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None  # no cgroup file system here, or one of another shape: no known limit
