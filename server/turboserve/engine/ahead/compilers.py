"""The processes that compile beside loading, as the server sees them: started before the weights are read, waited for
behind them, ended with it; and how many modules the server had to compile by itself all the same.

Nothing here can keep a model from being served: what the processes do not compile, the server compiles.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from turboquant_kv.backends.gpu.nvrtc import FOLDER_VARIABLE
from turboserve.engine.ahead.modules import modules_in
from turboserve.engine.ahead.shares import Job
from turboserve.engine.progress import Progress, step

log = logging.getLogger(__name__)

LIMIT_S = 180.0  # from their start; a module takes seconds, a process has a dozen
LOOK_S = 0.05
PREFIX = "turboserve-compile-"  # of temporary folders
STALE_S = 3600.0  # one of that age is of a server that was killed
MARKS = "compiled-for"  # folder of marks beside the modules


@dataclass(slots=True)
class _Process:
    units: tuple[str, ...]
    popen: subprocess.Popen[bytes]
    said: Path  # standard error and output, files: nobody has to read while they are written
    told: Path


@dataclass(slots=True)
class Compilers:
    """Processes under way. `stop` in any case, from the thread that started them."""

    limit_s: float
    _folder: Path  # temporary, of everything that they have
    _processes: list[_Process] = field(default_factory=list)
    _began_s: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls, job: Job, shares: Sequence[tuple[str, ...]], server_folder: Path, limit_s: float = LIMIT_S
    ) -> Compilers:
        """A process for each share. Raises OSError, with none left, when there is no room or no process to be had.

        job: what all are told; who does what, and where, is filled in. server_folder: of the server's own modules.
        """
        _remove_stale(Path(tempfile.gettempdir()))
        compilers = cls(limit_s, Path(tempfile.mkdtemp(prefix=PREFIX)))
        try:
            own = [compilers._folder / f"{i}" for i in range(len(shares))]
            known = modules_in(server_folder)
            for folder in own:
                _fill(folder, server_folder, known)
            for i, units in enumerate(shares):
                others = (str(server_folder), *(str(folder) for folder in own if folder is not own[i]))
                told = replace(job, units=units, own=str(own[i]), others=others, limit_s=limit_s)
                compilers._add(replace(told, ended=str(compilers._ended)))
        except OSError:
            compilers.stop()
            raise
        return compilers

    def _add(self, job: Job) -> None:
        said, told = (self._folder / f"{len(self._processes)}.{stream}" for stream in ("stderr", "stdout"))
        env = {**os.environ, FOLDER_VARIABLE: job.own, "OPENBLAS_NUM_THREADS": "1"}
        with said.open("wb") as stderr, told.open("wb") as stdout:
            popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "turboserve.engine.ahead.process"],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env=env,
            )
        self._processes.append(_Process(job.units, popen, said, told))
        assert popen.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `wait` tells
            popen.stdin.write(job.to_json().encode() + b"\n")
            popen.stdin.flush()  # and left open: its end tells the process that this one is gone

    @property
    def num_processes(self) -> int:
        return len(self._processes)

    @property
    def pids(self) -> list[int]:
        return [process.popen.pid for process in self._processes]

    def wait(self, progress: Progress) -> float:
        """Until all have ended or the limit is over; the seconds from their start. Failures are logged."""
        with step(progress, "compiling kernels"):
            while self._are_running() and time.monotonic() - self._began_s < self.limit_s:
                time.sleep(LOOK_S)
        took_s = time.monotonic() - self._began_s
        for process in self._processes:
            self._report(process)
        self.stop()
        return took_s

    def _are_running(self) -> bool:
        running = [process for process in self._processes if process.popen.poll() is None]
        if not any("kernels" in process.units for process in running):
            with suppress(OSError):  # a full disk, or a folder that somebody has cleaned up
                self._ended.touch()  # nobody is to wait for a process that was killed
        return bool(running)

    @property
    def _ended(self) -> Path:
        return self._folder / "kernels-ended"

    def _report(self, process: _Process) -> None:
        units, code = ", ".join(process.units), process.popen.poll()
        for line in _read(process.told).splitlines():
            with suppress(ValueError, KeyError, TypeError):
                told = json.loads(line)
                unit, seconds, count = told["unit"], told["seconds"], told["modules"]
                log.debug(
                    "compiled ahead: %s in %s s, %d modules: %s", unit, seconds, count, told["error"] or told["note"]
                )
                if told["error"]:
                    log.warning("not all of %s is compiled ahead: %s", told["unit"], told["error"])
        if code == 0:
            return
        last = _read(process.said).decode(errors="replace").strip().splitlines()[-1:]
        how = f"took over {self.limit_s:g} s" if code is None else f"ended with status {code}"
        log.warning(
            "a process that compiles kernels (%s) %s: the server compiles what is missing%s",
            *(units, how, f". It said: {last[0][:300]}" if last else ""),
        )

    def stop(self) -> None:
        """End whoever runs, and take their folders away. May be called again."""
        for process in self._processes:
            process.popen.kill()
            process.popen.wait()
            if process.popen.stdin is not None:
                with suppress(OSError):
                    process.popen.stdin.close()
        self._processes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def _read(path: Path) -> bytes:
    """Nothing of a file that is not there any more."""
    with suppress(OSError):
        return path.read_bytes()
    return b""


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or gone
            if time.time() - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path)


def _fill(folder: Path, source: Path, known: set[Path]) -> None:
    """A process's folder with all modules that there are. They are linked: MLX writes only what it does not find."""
    folder.mkdir()
    for module in known:
        (folder / module).parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".txt", ".ptx"):
            path = (source / module).with_suffix(suffix)
            with suppress(FileNotFoundError):
                try:
                    os.link(path, (folder / module).with_suffix(suffix))
                except OSError:  # another file system
                    shutil.copyfile(path, (folder / module).with_suffix(suffix))
