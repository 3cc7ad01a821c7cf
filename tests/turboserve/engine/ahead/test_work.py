"""The unit that compiles our own kernels, with a stand-in for the device's compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tests.turboquant_kv.stand_in_nvrtc import stand_in

from turboserve.engine.ahead import work
from turboserve.engine.ahead.modules import modules_in
from turboserve.engine.ahead.shares import Job
from turboserve.engine.ahead.work import Work


@pytest.mark.parametrize("kv_format", ["4t/3t", "auto", "f16"])
def test_our_kernels_are_compiled_into_all_folders_and_the_end_is_told(
    kv_format: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = stand_in(tmp_path)
    monkeypatch.setattr(work, "mlx_compiler", lambda capability: compiler)
    own, server, ended = tmp_path / "own", tmp_path / "server", tmp_path / "ended"
    own.mkdir()
    settings: dict[str, Any] = {"kv_format": kv_format}
    job = Job(("kernels",), settings, str(folder), 8192, str(own), (str(server),), str(ended), (9, 0), 2, 60.0)
    device = mx.default_device()
    told = Work(job, lambda: None).do("kernels")
    assert ended.exists() and mx.default_device() == device
    assert modules_in(own) == modules_in(server)
    if kv_format == "f16":
        assert not modules_in(own)
        return
    roles = {path.name.split("_")[3] for path in modules_in(server)}
    assert {"encode", "put", "history", "decode"} <= roles
    assert told.startswith(f"{len(modules_in(server)) - 12} of {len(modules_in(server)) - 12} for a start, 12 of 12")


def test_a_compiler_that_fails_leaves_nobody_waiting(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(capability: object) -> object:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(work, "mlx_compiler", broken)
    ended = tmp_path / "ended"
    job = Job(("kernels",), {}, str(folder), 8192, str(tmp_path), (), str(ended), (9, 0), 2, 60.0)
    with pytest.raises(RuntimeError, match="no compiler"):
        Work(job, lambda: None).do("kernels")
    assert ended.exists()
