"""The limits of open files: what a library's import leaves of them, and how many connections they allow."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from turboserve.descriptors import connection_limit


@pytest.mark.parametrize("hard", [1024, 3000])
def test_the_server_keeps_the_limits_that_it_was_given(hard: int) -> None:
    """mlx_lm would lower them to 2,048 and 4,096, or fail below."""
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (512, {hard}))\n"
        "from turboserve.cli.backend import load_backend; load_backend()\n"
        "import mlx_lm.utils\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))\n"  # others' wishes are heard again
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"(512, {hard})", "(256, 512)"]


@pytest.mark.parametrize(("soft", "expected"), [(20_000, 4096), (1024, 384), (300, 22), (100, 16), (-1, 4096)])
def test_connections_leave_files_for_everything_else(monkeypatch: pytest.MonkeyPatch, soft: int, expected: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, soft))
    assert connection_limit() == expected
