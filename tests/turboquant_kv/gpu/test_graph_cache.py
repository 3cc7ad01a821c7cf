"""MLX's count of CUDA graph structures, which ends a long process unless it is told not to."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import pytest

CHECK = "MLX_ENABLE_CACHE_THRASHING_CHECK"
MANY_STRUCTURES = """
import mlx.core as mx
for length in range(1, 12):
    x = mx.ones(8)
    for _ in range(length):
        x = mx.sin(x)
    mx.eval(x)
print("through")
"""


@pytest.mark.skipif(not mx.cuda.is_available(), reason="graphs are CUDA's")
@pytest.mark.parametrize("setting", ["0", "1"])
def test_more_structures_than_mlx_counts_are_met(setting: str) -> None:
    """With a count that ends after a few: the server's setting gets through, MLX's own does not."""
    environment = {**os.environ, CHECK: setting, "MLX_CUDA_GRAPH_CACHE_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", MANY_STRUCTURES], env=environment, capture_output=True, text=True, check=False
    )
    assert ("through" in done.stdout) == (setting == "0"), done.stderr[-2000:]
    assert (done.returncode == 0) == (setting == "0")
