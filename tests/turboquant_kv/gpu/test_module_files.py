"""On a CUDA device: MLX takes the module that was written for a kernel, and not one that it compiles itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

# Encodes pages as a model's step does.
LAUNCH = """
import mlx.core as mx
from turboquant_kv.backends.base import LayerShape
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.cache.trial import Case, judge
from turboquant_kv.codec.format import KVFormat
print(judge(Case(LayerShape(1, 64, 64, mx.float16), KVFormat.parse("4/4"), 2), GpuBackend()).error)
"""


def launched(folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "MLX_PTX_CACHE_DIR": str(folder)}
    return subprocess.run([sys.executable, "-c", LAUNCH], env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="Metal keeps what it compiles by itself")
def test_mlx_takes_the_modules_that_are_written_for_our_kernels(tmp_path: Path) -> None:
    first = launched(tmp_path)
    assert first.returncode == 0, first.stderr
    ours = sorted(tmp_path.rglob("custom_kernel_turboquant_*.ptx"))
    assert ours, first.stderr
    before = {path: path.stat().st_mtime_ns for path in ours}
    second = launched(tmp_path)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in ours} == before
    for path in ours:  # what is in the file is what is launched: no other way shows which module MLX took
        kept = path.read_bytes()
        path.write_bytes(b"no code")
        assert launched(tmp_path).returncode != 0, f"{path.name} is not what MLX loads"
        path.write_bytes(kept)
