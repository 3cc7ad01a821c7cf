"""How much memory a server takes while it is measured: of the GPU, or of its process. Linux only."""

from __future__ import annotations

import shutil
import subprocess
import threading

import mlx.core as mx
from _servers import Served


class MemoryWatch:
    """How much memory a server took while it was watched: of the GPU, or of the process where there is none."""

    def __init__(self, served: Served) -> None:
        self._served, self._before, self._most = served, 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._before = self._most = self._used()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown_bytes(self) -> int:
        return self._most - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            self._most = max(self._most, self._used())

    def _used(self) -> int:
        if shutil.which("nvidia-smi") is None or mx.default_device() == mx.Device(mx.cpu):
            return self._served.resident_bytes
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return sum(int(line) for line in done.stdout.split() if line.isdigit()) << 20
