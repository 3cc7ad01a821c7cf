"""The machine's memory: what an operator may write as the KV budget, and what the machine offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from turboserve.errors import StartupError
from turboserve.machine_memory import MemoryInfo, MiB, detect_memory, resolve_budget

GiB = 1 << 30
MEMORY = MemoryInfo(total_bytes=16 * GiB, available_bytes=12 * GiB)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MiB", 512 * MiB),
        ("2GB", 2 * 10**9),
        ("1.5gib", 3 * GiB // 2),
        (" 4096 ", 4096),
        ("30%", int(16 * GiB * 0.3)),
        ("100 %", 16 * GiB),
    ],
)
def test_explicit_budgets(text: str, expected: int) -> None:
    assert abs(resolve_budget(text, MEMORY, weights_bytes=GiB) - expected) <= 1


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "0", "0%", "101%", "5 parsecs", "1e9", "GB", "12%%", "٣GB"])
def test_nonsense_is_refused_with_the_value_and_what_was_expected(text: str) -> None:
    with pytest.raises(StartupError) as caught:
        resolve_budget(text, MEMORY, weights_bytes=0)
    assert repr(text) in str(caught.value)


def test_auto_leaves_weights_and_headroom() -> None:
    assert resolve_budget("auto", MEMORY, weights_bytes=4 * GiB) == 8 * GiB - int(0.1 * 16 * GiB)


def test_auto_without_room_names_the_cure() -> None:
    with pytest.raises(StartupError, match="--kv-budget"):
        resolve_budget("auto", MEMORY, weights_bytes=12 * GiB)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", "MemTotal: 8388608 kB\nMemFree: 100 kB\nMemAvailable: 4194304 kB\n")
    return tmp_path


def test_memory_of_a_plain_linux_machine(root: Path) -> None:
    assert detect_memory(root) == MemoryInfo(8 * GiB, 4 * GiB)


def test_a_cgroup_limit_is_respected_and_its_page_cache_counts_as_free(root: Path) -> None:
    write(root, "sys/fs/cgroup/memory.max", f"{2 * GiB}\n")
    write(root, "sys/fs/cgroup/memory.current", f"{GiB}\n")
    write(root, "sys/fs/cgroup/memory.stat", f"anon 5\ninactive_file {GiB // 2}\n")
    assert detect_memory(root) == MemoryInfo(2 * GiB, 2 * GiB - GiB // 2)


def test_the_tightest_cgroup_on_the_way_up_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/outer/inner\n")
    write(root, "sys/fs/cgroup/memory.max", "max\n")
    write(root, "sys/fs/cgroup/outer/memory.max", f"{GiB}\n")
    write(root, "sys/fs/cgroup/outer/inner/memory.max", f"{3 * GiB}\n")
    assert detect_memory(root).total_bytes == GiB


def test_cgroup_version_one_without_a_limit(root: Path) -> None:
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert detect_memory(root) == MemoryInfo(8 * GiB, 4 * GiB)


def test_a_gpu_limit_caps_both_figures(root: Path) -> None:
    assert detect_memory(root, device_limit_bytes=3 * GiB) == MemoryInfo(3 * GiB, 3 * GiB)


def test_this_machine_has_some_memory() -> None:
    info = detect_memory()
    assert 0 < info.available_bytes <= info.total_bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's heap")
def test_free_heap_goes_back_to_the_system() -> None:
    """In a process of its own: blocks below one that is still in use."""
    program = """
import ctypes, re
import subprocess
import sys
from pathlib import Path
from turboserve.machine_memory import give_back_heap
libc = ctypes.CDLL(None)
if not hasattr(libc, "malloc_trim"):
    raise SystemExit
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
blocks = [libc.malloc(100_000) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
kept = libc.malloc(100_000)
for block in blocks:
    libc.free(block)
before = resident()
give_back_heap()
assert before - resident() > 100 << 20, (before, resident())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
