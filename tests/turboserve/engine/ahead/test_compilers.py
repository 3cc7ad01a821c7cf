"""Processes that compile beside loading: real ones, on the CPU; whatever becomes of them, the server starts."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from turboserve.engine.ahead.compilers import PREFIX, STALE_S, Compilers
from turboserve.engine.ahead.shares import UNITS, Job, shares

WAIT_S = 120.0


def job(folder: Path, kv_format: str = "4/4") -> Job:
    return Job((), {"kv_format": kv_format, "max_running": 3}, str(folder), 8192, "", (), "", None, 1, 0.0)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def told(caplog: pytest.LogCaptureFixture) -> set[str]:
    """The units that were done, by the debug log."""
    return {str(r.args[0]) for r in caplog.records if r.msg.startswith("compiled ahead:") and isinstance(r.args, tuple)}


def test_each_process_does_its_share_on_a_miniature(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        compilers = Compilers.start(job(folder), shares(UNITS, 2), tmp_path, WAIT_S)
        pids, own = compilers.pids, compilers._folder
        assert compilers.num_processes == 2 and own.is_dir()
        compilers.wait(lambda line: None)
    assert told(caplog) == set(UNITS)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any(is_alive(pid) for pid in pids) and not own.exists()


def test_a_unit_that_fails_is_told_and_the_next_one_is_done(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = replace(job(folder), folder=str(tmp_path / "nowhere"))
    with caplog.at_level(logging.DEBUG):
        compilers = Compilers.start(broken, [("graphs", "draws")], tmp_path, WAIT_S)
        compilers.wait(lambda line: None)
    assert told(caplog) == {"graphs", "draws"}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    (line,) = [line for line in warnings if line.startswith("not all of ")]
    assert line.startswith("not all of graphs is compiled ahead: StartupError: ") and "config.json" in line
    assert any("the server compiles what is missing" in line for line in warnings)


def test_a_process_that_is_killed_ends_nothing_else(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        compilers = Compilers.start(job(folder), [("graphs",), ("draws",)], tmp_path, WAIT_S)
        os.kill(compilers.pids[0], signal.SIGKILL)
        compilers.wait(lambda line: None)
    assert told(caplog) == {"draws"}
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "(graphs) ended with status -9: the server compiles what is missing" in line


def test_without_the_compiler_of_a_cuda_device_its_kernels_are_left_to_the_server(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        compilers = Compilers.start(replace(job(folder), capability=(9, 0)), [("kernels",)], tmp_path, WAIT_S)
        compilers.wait(lambda line: None)
    assert "not all of kernels is compiled ahead: CompilationError: MLX has loaded no NVRTC" in caplog.text


def test_nobody_waits_for_kernels_of_a_process_that_was_killed(folder: Path, tmp_path: Path) -> None:
    compilers = Compilers.start(job(folder), [("kernels",), ("draws",)], tmp_path, WAIT_S)
    try:
        process = compilers._processes[0].popen
        process.kill()
        process.wait()
        compilers._ended.unlink(missing_ok=True)
        assert compilers._are_running() and compilers._ended.exists()
    finally:
        compilers.stop()


def test_a_process_that_hangs_is_ended_when_its_time_is_over(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compilers = Compilers.start(job(folder), [("graphs",)], tmp_path, 0.5)
    (pid,) = compilers.pids
    os.kill(pid, signal.SIGSTOP)
    with caplog.at_level(logging.WARNING):
        assert compilers.wait(lambda line: None) >= 0.5
    assert "took over 0.5 s: the server compiles what is missing" in caplog.text
    assert not is_alive(pid)


def test_a_temporary_folder_that_is_cleaned_up_ends_nothing(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compilers = Compilers.start(job(folder), [("graphs",)], tmp_path, 0.5)
    shutil.rmtree(compilers._folder)
    (pid,) = compilers.pids
    with caplog.at_level(logging.WARNING):
        compilers.wait(lambda line: None)
    assert "the server compiles what is missing" in caplog.text
    assert not is_alive(pid)


def test_where_there_is_no_room_nothing_is_left(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OSError):
        Compilers.start(job(folder), [("draws",)], tmp_path, WAIT_S)


def test_without_a_program_to_run_nothing_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(OSError):
        Compilers.start(job(folder), [("draws",)], tmp_path, WAIT_S)
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_server_left_is_removed_and_what_another_one_has_is_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, age_s in (("left", 2 * STALE_S), ("used", 10.0)):
        (tmp_path / f"{PREFIX}{name}").mkdir()
        os.utime(tmp_path / f"{PREFIX}{name}", (0.0, time.time() - age_s))
    Compilers.start(job(folder), [("draws",)], tmp_path / "server", WAIT_S).stop()
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}used"]


PARENT = """
import sys, time
from pathlib import Path
from turboserve.engine.ahead.compilers import Compilers
from turboserve.engine.ahead.shares import Job
job = Job((), {}, sys.argv[1], 8192, "", (), "", None, 1, 0.0)
compilers = Compilers.start(job, [("kernels", "graphs")] * 2, Path(sys.argv[2]))
print(*compilers.pids, compilers._folder, flush=True)
time.sleep(600)
"""


def test_processes_end_with_the_server_however_it_ended(folder: Path, tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    ) as parent:
        assert parent.stdout is not None
        *pids, _ = parent.stdout.readline().split()
        assert len(pids) == 2
        parent.kill()
    end_s = time.monotonic() + WAIT_S
    while any(is_alive(int(pid)) for pid in pids):
        assert time.monotonic() < end_s, "they go on without their parent"
        time.sleep(0.05)


def test_modules_that_are_kept_are_there_for_each_process(folder: Path, tmp_path: Path) -> None:
    server = tmp_path / "server"
    (server / "long").mkdir(parents=True)
    for name in ("gather", "long/rest"):
        (server / f"{name}.ptx").write_bytes(b"code")
        (server / f"{name}.txt").write_bytes(b"names")
    compilers = Compilers.start(job(folder), [("draws",), ("draws",)], server, WAIT_S)
    try:
        for i in range(2):
            assert (compilers._folder / f"{i}" / "long" / "rest.ptx").read_bytes() == b"code"
            assert (compilers._folder / f"{i}" / "gather.txt").read_bytes() == b"names"
    finally:
        compilers.stop()
    assert (server / "gather.ptx").read_bytes() == b"code"
