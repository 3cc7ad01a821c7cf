"""The machine's memory: how much this process may use, and how much of it KV caches may take.

Detection reads /proc, cgroup files and sysctl; resolving the budget setting is pure. No MLX in here: the
caller passes the limit of a GPU if there is one.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path

from turboserve.errors import StartupError
from turboserve.units import try_parse_bytes

MiB = 1 << 20
_SHARE = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_EXPECTED = 'a number of bytes such as "512MiB" or "2GB", a share of memory such as "30%", or "auto"'

HEADROOM_SHARE = 0.10  # left to activations, the operating system and everyone else
MIN_HEADROOM_BYTES = 256 * MiB  # one prefill chunk's activations and the Python process itself
MIN_BUDGET_BYTES = 16 * MiB  # below this not even short chats of a small model fit

_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number for "no limit"


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes this process may use (`total`), and those free for it before the model was loaded."""

    total_bytes: int
    available_bytes: int


def give_back_heap() -> None:
    """Return free memory of the C library's heap to the system: GNU's keeps all that lies below a block still in use.

    Arrays of many sizes leave hundreds of MiB so. Some milliseconds; elsewhere than on GNU's library nothing is done.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], object] | None:
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def resolve_budget(text: str, memory: MemoryInfo, weights_bytes: int) -> int:
    """The KV budget in bytes. Raises StartupError for a bad setting or too little memory."""
    wanted = text.strip().lower()
    if wanted == "auto":
        return _auto_budget(memory, weights_bytes)
    if wanted.endswith("%"):
        return _share_of(memory, wanted, text)
    num_bytes = try_parse_bytes(wanted)
    if num_bytes is None:
        raise StartupError(f"kv_budget={text!r}: expected {_EXPECTED}.")
    if num_bytes < 1:
        raise StartupError(f"kv_budget={text!r}: must be more than 0 bytes.")
    return num_bytes


def _auto_budget(memory: MemoryInfo, weights_bytes: int) -> int:
    headroom = max(int(HEADROOM_SHARE * memory.total_bytes), MIN_HEADROOM_BYTES)
    budget = memory.available_bytes - weights_bytes - headroom
    if budget < MIN_BUDGET_BYTES:
        raise StartupError(
            f"Not enough memory for KV caches: {_mib(memory.available_bytes)} available, of which weights take "
            f"{_mib(weights_bytes)} and {_mib(headroom)} stay free. Free some memory, choose a smaller model, "
            "or set --kv-budget."
        )
    return budget


def _share_of(memory: MemoryInfo, wanted: str, text: str) -> int:
    share = wanted[:-1].strip()
    if not _SHARE.fullmatch(share) or not 0 < Decimal(share) <= 100:
        raise StartupError(f"kv_budget={text!r}: expected {_EXPECTED}.")
    return int(memory.total_bytes * Decimal(share) / 100)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MiB:,.0f} MiB"


def detect_memory(root: Path = Path("/"), device_limit_bytes: int | None = None) -> MemoryInfo:
    """Memory this process may use: the machine's, within its cgroup and the GPU's limit.

    `root` stands for the file system's root, `device_limit_bytes` for a GPU's working-set limit.
    Raises StartupError when the platform tells nothing.
    """
    info = _linux_memory(root) if (root / "proc/meminfo").exists() else _macos_memory()
    if device_limit_bytes is None:
        return info
    return MemoryInfo(min(info.total_bytes, device_limit_bytes), min(info.available_bytes, device_limit_bytes))


def _linux_memory(root: Path) -> MemoryInfo:
    fields = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    total = fields["MemTotal"]
    available = fields.get("MemAvailable", fields["MemFree"])
    for limit, used in _cgroup_limits(root):
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return MemoryInfo(total, available)


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) of every memory cgroup above this process, v2 and v1; page cache counts as free."""
    base = root / "sys/fs/cgroup"
    found = []
    for folder in _cgroup_folders(root, base):
        for limit_name, used_name, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _read_number(folder / limit_name)
            if limit is None or limit >= _UNLIMITED:
                continue
            used = (_read_number(folder / used_name) or 0) - _stat_value(folder / "memory.stat", cache_key)
            found.append((limit, max(used, 0)))
    return found


def _cgroup_folders(root: Path, base: Path) -> list[Path]:
    folders = [base, base / "memory"]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = base if not controllers else base / "memory"
        if not controllers or "memory" in controllers.split(","):
            here = top / path.lstrip("/")
            folders += [here, *(p for p in here.parents if top in p.parents)]
    return folders


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _stat_value(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == key), 0)


def _macos_memory() -> MemoryInfo:
    if sys.platform != "darwin":
        raise StartupError("Cannot tell how much memory there is: set --kv-budget to a number of bytes such as 2GB.")
    total = int(subprocess.run(["sysctl", "-n", "hw.memsize"], capture_output=True, check=True, text=True).stdout)
    # macOS compresses and reclaims on demand; it tells no "available". Three quarters is what
    # Metal recommends as a working set.
    return MemoryInfo(total, total * 3 // 4)
