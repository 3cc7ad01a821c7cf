"""One start as an operator sees it: what is compiled beside loading, what by the server itself, and what is kept."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from turboserve.engine.ahead import start
from turboserve.engine.ahead.compilers import MARKS, Compilers
from turboserve.engine.ahead.start import CompiledStart, Compiling, begin, compiling_device
from turboserve.engine.loading import build_parts
from turboserve.errors import StartupError
from turboserve.machine_memory import MemoryInfo
from turboserve.settings import Settings

GIB = 1 << 30
MEMORY = MemoryInfo(80 * GIB, 80 * GIB)
CORES = 8


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a machine whose MLX keeps what it compiles, with cores for several processes."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setattr(start, "compiling_device", lambda: Compiling(folder, "a device", None))
    monkeypatch.setattr(start, "usable_cpus", lambda: CORES)
    own = tmp_path / "temporary"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    yield folder
    assert not [*own.iterdir()], "a start left files behind"


def settings_for(folder: Path, tmp_path: Path, **changed: Any) -> Settings:
    own = {"model": str(folder), "kv_format": "4/4", "kv_budget": "64MiB", "cache_dir": tmp_path / "cache"}
    return Settings(**{**own, "max_running": 2, "api_key": "k-0123456789", **changed})


def test_a_start_compiles_beside_loading_and_the_next_one_does_not(folder: Path, tmp_path: Path, modules: Path) -> None:
    (modules / "kept.ptx").write_bytes(b"code")
    settings, lines = settings_for(folder, tmp_path), list[str]()
    parts = build_parts(settings, lines.append)
    assert isinstance(parts.compiled, CompiledStart) and parts.compiled.compilers is None
    told = [line for line in lines if line.startswith("kernels")]
    assert told[0] == f"kernels      being compiled in {CORES // 2} processes beside loading"
    assert told[1].startswith(f"kernels      0 modules compiled in {CORES // 2} processes beside loading: ")
    (modules / "missed.ptx").write_bytes(b"code")
    parts.compiled.finish(lines.append, 0.0)
    assert lines[-1].startswith("kernels      1 modules compiled by the server itself: 0 while it prepared")
    assert lines[-1].endswith("1 in its warm-up (0.0 s)")
    again, other = list[str](), list[str]()
    found = begin(settings, folder, MEMORY, again.append)
    assert found is not None and found.compilers is None
    assert again == ["kernels      2 modules kept from earlier starts"]
    changed = begin(settings_for(folder, tmp_path, kv_format="4/3", compile_processes=0), folder, MEMORY, other.append)
    assert changed is not None and changed.compilers is None
    assert other == ["kernels      compiled one after the other (as set)"]


def test_a_server_that_cannot_load_its_model_ends_the_processes(
    folder: Path, tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def watched(*arguments: Any) -> Any:
        found = begin(*arguments)
        assert found is not None and found.compilers is not None
        started.extend(found.compilers.pids)
        return found

    monkeypatch.setattr("turboserve.engine.loading.begin_compiling", watched)
    with pytest.raises(StartupError, match="dequantize"):
        build_parts(settings_for(folder, tmp_path, dequantize="perhaps"), lambda line: None)
    assert started
    for pid in started:  # this process's children, and waited for
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_no_secret_is_passed_on(folder: Path, tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(Compilers, "start", lambda job, *rest: told.append(job))
    settings = settings_for(folder, tmp_path, api_keys=("another",))
    begin(settings, folder, MEMORY, lambda line: None)
    (job,) = told
    assert "k-0123456789" not in job.to_json() and "another" not in job.to_json()
    assert job.vocab_len == 8192 and job.settings["kv_format"] == "4/4"


def test_a_machine_that_starts_no_process_compiles_as_before(
    folder: Path, tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with caplog.at_level(logging.WARNING):
        found = begin(settings_for(folder, tmp_path), folder, MEMORY, lambda line: None)
    assert found is not None and found.compilers is None
    assert "no process for them starts (No such file or directory)" in caplog.text


def test_a_folder_that_takes_no_mark_is_told(
    folder: Path, tmp_path: Path, modules: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = begin(settings_for(folder, tmp_path, compile_processes=0), folder, MEMORY, lambda line: None)
    assert found is not None
    (modules / MARKS).write_text("a file in its place")
    with caplog.at_level(logging.WARNING):
        found.finish(lambda line: None, 0.0)
    assert "the next start compiles ahead again" in caplog.text


def test_a_cpu_keeps_nothing_compiled() -> None:
    assert compiling_device() is None
