"""The BLAS shim: right products through mlx, proof that mlx calls it, and clear refusals.

mlx may already live in this process, so everything that must happen before its import runs in a child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turboquant_kv import blas

ROOT = Path(__file__).resolve().parents[2]
LINUX = sys.platform.startswith("linux")

PRODUCTS = """
import json, sys
from turboquant_kv import blas
status = blas.interpose()
import numpy as np, mlx.core as mx
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(int(sys.argv[1]))
num_calls, worst = blas.num_calls(), 0.0

def check(got, want, inner):
    # Each of `inner` products below 1 is rounded to eps/2 and added with another eps/2 of a partial sum that
    # stays near sqrt(inner): measured in units of inner * eps, anything above a few is a wrong element.
    global worst
    worst = max(worst, float(np.abs(np.array(got) - want).max() / (inner * 1.2e-7)))

def draw(*shape):
    return rng.uniform(-1, 1, shape).astype(np.float32)

for m, n, k in [(1, 1, 1), (1, 7, 5), (1, 64, 129), (1, 513, 65), (2, 3, 5), (3, 1, 9), (17, 31, 33), (64, 64, 64),
                (65, 1, 127), (600, 700, 700)]:
    a, b, c = draw(m, k), draw(k, n), draw(m, n)
    want = a.astype(np.float64) @ b
    x, y = mx.array(a), mx.array(b)
    xt, yt = mx.array(np.ascontiguousarray(a.T)).T, mx.array(np.ascontiguousarray(b.T)).T
    for left in (x, xt):
        for right in (y, yt):
            check(left @ right, want, k)
            check(mx.addmm(mx.array(c), left, right, alpha=-1.5, beta=0.5), -1.5 * want + 0.5 * c, 3 * k)
    check(mx.addmm(mx.array(c), x, y, alpha=1.0, beta=0.0), want, k)
    batch = draw(3, m, k)
    check(mx.array(batch) @ y, batch.astype(np.float64) @ b, k)
    wide = mx.array(draw(m, 2 * k))
    check(wide[:, ::2] @ y, np.array(wide)[:, ::2].astype(np.float64) @ b, k)
print(json.dumps({"active": status.active, "reason": status.reason, "threads": status.num_threads,
                  "library": status.library, "calls": blas.num_calls() - num_calls, "worst": worst}))
"""


def run_child(code: str, *args: str, **env: str) -> dict[str, object]:
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "server")])
    result = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": paths} | env,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


def test_products_agree_with_numpy(seed: int) -> None:
    answer = run_child(PRODUCTS, str(seed), TURBOSERVE_BLAS="auto")
    assert float(str(answer["worst"])) < 4  # measured below 1; a wrong element gives 10^4 and more
    assert answer["active"] is LINUX, answer["reason"]
    if LINUX:
        assert int(str(answer["calls"])) > 50  # mlx really went through the shim


def test_switched_off_leaves_mlx_alone(seed: int) -> None:
    answer = run_child(PRODUCTS, str(seed), TURBOSERVE_BLAS="off")
    assert (answer["active"], answer["calls"]) == (False, 0)
    assert float(str(answer["worst"])) < 4


STATUS = """
import json, sys
{before}
from turboquant_kv import blas
status = blas.interpose()
assert blas.interpose() is status and blas.status() is status
print(json.dumps({{"active": status.active, "reason": status.reason, "threads": status.num_threads,
                  "library": status.library, "text": status.describe()}}))
"""


@pytest.mark.skipif(not LINUX, reason="macOS needs no shim")
def test_too_late_says_so() -> None:
    answer = run_child(STATUS.format(before="import mlx.core"), TURBOSERVE_BLAS="auto")
    assert answer["active"] is False
    assert "mlx.core was imported before" in str(answer["reason"])


@pytest.mark.skipif(not LINUX, reason="macOS needs no shim")
def test_missing_openblas_says_so() -> None:
    answer = run_child(STATUS.format(before="sys.modules['scipy_openblas32'] = None"), TURBOSERVE_BLAS="auto")
    assert answer["active"] is False
    assert "scipy-openblas32 is not installed" in str(answer["text"])


@pytest.mark.skipif(not LINUX, reason="macOS needs no shim")
def test_thread_count_follows_the_environment() -> None:
    answer = run_child(STATUS.format(before=""), TURBOSERVE_BLAS="auto", OMP_NUM_THREADS="1,4", OPENBLAS_NUM_THREADS="")
    assert answer["active"] is True
    assert (answer["threads"], str(answer["text"]).endswith("1 thread")) == (1, True)
    assert str(answer["library"]).startswith("OpenBLAS")


# One row of products into an output that holds NaN: with beta = 0 it must be written, never read.
UNINITIALISED = """
import ctypes, json
import numpy as np
from turboquant_kv import blas
from turboquant_kv.native import find_library
assert blas.interpose().active
shim = ctypes.CDLL(str(find_library("turboquant_blas")))
as_pointer = lambda a: a.ctypes.data_as(ctypes.c_void_p)
num_nan = 0
for trans_b in (111, 112):
    k, n = 37, 53
    a = np.ones((1, k), np.float32)
    b = np.ones((k, n) if trans_b == 111 else (n, k), np.float32)
    c = np.full((1, n), np.nan, np.float32)
    shim.cblas_sgemm(101, 111, trans_b, 1, n, k, ctypes.c_float(1), as_pointer(a), k, as_pointer(b), b.shape[1],
                     ctypes.c_float(0), as_pointer(c), n)
    num_nan += int((c != k).sum())
print(json.dumps({"wrong": num_nan}))
"""


@pytest.mark.skipif(not LINUX, reason="macOS needs no shim")
def test_output_is_not_read_when_beta_is_zero() -> None:
    assert run_child(UNINITIALISED, TURBOSERVE_BLAS="auto") == {"wrong": 0}


def test_cgroup_quota_bounds_the_threads(tmp_path: Path) -> None:
    assert blas.cgroup_cpus(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert blas.cgroup_cpus(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    assert blas.cgroup_cpus(tmp_path) == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert blas.cgroup_cpus(tmp_path) is None
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    assert blas.cgroup_cpus(tmp_path) == 3
    (tmp_path / "cpu.max").write_text("garbage")
    assert blas.cgroup_cpus(tmp_path) is None
