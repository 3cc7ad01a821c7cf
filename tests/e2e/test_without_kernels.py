"""An installation without the compiled CPU kernels: it serves the same answers, and says so wherever somebody looks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.server import Server, running_server
from tests.e2e.test_openai_client import ask, filler, say

# `None` in sys.modules is how Python refuses an import; everything else is as installed.
WITHOUT_KERNELS = (
    "import sys; sys.modules['turboquant_kv.native._kernels'] = None; "
    "from turboserve.cli.main import main; main(sys.argv[1:])"
)
NAME = "cpu-numpy (native kernels missing)"


@pytest.fixture(scope="module")
def slow_server(cache_dir: Path) -> Iterator[Server]:
    with running_server(cache_dir, "--kv-format", "4/3", program=("-c", WITHOUT_KERNELS)) as running:
        yield running


def test_the_answers_are_the_same(slow_server: Server, server: Server) -> None:
    for messages in ([say("Hello!")], [say(f"My name is Greta. {filler(20, 5)}"), say("What is my name?")]):
        slow, fast = (ask(one, messages) for one in (slow_server, server))
        assert slow.choices[0].message.content == fast.choices[0].message.content
        kv, expected = ({**one.usage.model_extra["turboserve"], "session_id": None} for one in (slow, fast))
        assert kv == expected, "the same tokens cost the same bytes"
    assert kv["ratio"] > 2


def test_the_log_says_so_once(slow_server: Server, server: Server) -> None:
    ask(slow_server, [say("Hello!")])
    lines = [line for line in slow_server.lines if "native CPU kernels are not built" in line]
    assert len(lines) == 1 and "WARNING" in lines[0] and "C++ compiler" in lines[0]
    assert not any("kernels are not built" in line for line in server.lines)


def test_metrics_and_statistics_name_what_serves(slow_server: Server) -> None:
    metrics = slow_server.get("/metrics").text
    assert f'kv_backend="{NAME}"' in metrics and 'layers="by mlx-lm (' in metrics
    assert "expanded to float32" in metrics  # the weights
    assert slow_server.stats()["kv_backend"] == NAME


@pytest.mark.parametrize("present", [True, False])
def test_doctor_says_so_and_how_to_cure_it(present: bool, tmp_path: Path) -> None:
    program = ("-m", "turboserve") if present else ("-c", WITHOUT_KERNELS)
    done = subprocess.run(
        [sys.executable, *program, "doctor", "--cache-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "kv backend" in line]
    if present:
        assert line.startswith("ok") and "cpu-native/" in line
        (layers,) = [line for line in done.stdout.splitlines() if line.split()[1] == "layers"]
        assert layers.startswith("ok") and "multiplies by weights as stored; decoder layers around" in layers
    else:
        assert line.startswith("warning") and NAME in line and "C++ compiler" in line
