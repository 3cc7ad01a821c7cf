"""`turboserve bench kernels` measures and prints; bad options are one line."""

from __future__ import annotations

import re
import sys

import mlx.core as mx
import pytest
from tests.turboserve.cli.test_main import run

from turboserve.cli import bench_kernels
from turboserve.cli.bench_kernels import KernelBench
from turboserve.cli.main import main
from turboserve.errors import StartupError


def test_the_table_has_a_row_per_length(capsys: pytest.CaptureFixture[str]) -> None:
    bench = KernelBench(4, 2, 64, (256, 512), ("4/4", "3/3"), num_calls=1)
    assert bench_kernels.run(bench) == 0
    lines = capsys.readouterr().out.splitlines()
    fastest = "float16" if mx.metal.is_available() or mx.cuda.is_available() else "float32"
    assert lines[0].startswith("backend ") and f"MLX's own attention in {fastest}, BLAS: " in lines[1]
    assert lines[2].split() == ["tokens", fastest, "4/4", "3/3"]
    assert [int(line.split()[0]) for line in lines[3:]] == [256, 512]
    for line in lines[3:]:
        plain, first, ratio = (float(x) for x in re.findall(r"[\d.]+", line)[1:4])
        assert plain > 0 and first > 0 and ratio == pytest.approx(plain / first, rel=0.5, abs=0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="macOS has Accelerate")
def test_mlx_gets_the_blas_that_a_server_gives_it() -> None:
    """Beside the reference BLAS of mlx's CPU wheel anything looks fast."""
    result = run("bench", "kernels", "--heads", "2/1", "--dim", "64", "--lengths", "256", "--formats", "4/4")
    assert result.returncode == 0, result.stderr
    assert "BLAS: OpenBLAS" in result.stdout or mx.cuda.is_available(), result.stdout


def test_options_are_read_and_refused() -> None:
    assert bench_kernels.parse_lengths(["300", "4K"]) == (300, 4096)
    for options in (
        ["--heads", "40"],
        ["--lengths", "long"],
        ["--heads", "3/2"],
        ["--lengths", "10"],
        ["--formats", "5/5"],
    ):
        with pytest.raises(SystemExit) as status:
            main(["bench", "kernels", *options])
        assert status.value.code == 1


def test_heads_must_share_out() -> None:
    with pytest.raises(StartupError, match="evenly"):
        KernelBench(5, 2).check()
