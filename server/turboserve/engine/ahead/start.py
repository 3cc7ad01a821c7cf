"""What one start compiles: ahead, in processes, and by itself; decided, counted and told.

A mark beside the modules says that a start with the same model, settings and versions came through: then they are all
there, and no process is started.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from turboquant_kv.backends.gpu.device import compute_capability
from turboquant_kv.backends.gpu.nvrtc import FOLDER_VARIABLE
from turboquant_kv.blas import usable_cpus
from turboquant_kv.cache.backend_choice import kernel_sources
from turboquant_kv.codec.format_name import PLAIN_FORMAT
from turboserve.engine.ahead import shares
from turboserve.engine.ahead.compilers import MARKS, Compilers
from turboserve.engine.ahead.modules import modules_in
from turboserve.engine.ahead.shares import Job
from turboserve.engine.model_config import read_config
from turboserve.engine.progress import Progress
from turboserve.engine.weight_files import read_shapes
from turboserve.engine.weights import config_value
from turboserve.machine_memory import MemoryInfo
from turboserve.settings import Settings
from turboserve.weight_sizes import model_bytes

log = logging.getLogger(__name__)

SECRETS = ("api_key", "api_keys")


@dataclass(slots=True)
class CompiledStart:
    """One start of a server whose MLX keeps compiled modules in a folder. Used by the engine thread."""

    folder: Path
    mark: Path | None  # to be written once all is compiled; None: it is there already, or nobody wants it
    compilers: Compilers | None
    _began_s: float = field(default_factory=time.monotonic)
    _known: set[Path] = field(default_factory=set)  # modules that were there, or that processes compiled
    _ready_s: float = 0.0  # since the beginning: when the weights were there, and nothing was waited for any more
    _built: int = 0

    def wait(self, progress: Progress) -> None:
        """For the processes; this one evaluates nothing that has to be compiled before."""
        if self.compilers is not None:
            loaded_s, count = time.monotonic() - self._began_s, self.compilers.num_processes
            took_s = self.compilers.wait(progress)
            self.compilers = None
            found = modules_in(self.folder)
            waited_s = time.monotonic() - self._began_s - loaded_s
            progress(
                f"kernels      {len(found - self._known)} modules compiled in {count} processes beside loading: "
                f"{took_s:.1f} s; weights took {loaded_s:.1f} s, then {waited_s:.1f} s were waited"
            )
            self._known = found
        self._ready_s = time.monotonic()

    def built(self) -> None:
        """The model is there, with its caches' kernels tried: what follows is the warm-up."""
        self._built = len(modules_in(self.folder) - self._known)
        log.debug("model and caches prepared in %.1f s, after the weights", time.monotonic() - self._ready_s)

    def finish(self, progress: Progress, warmed_s: float) -> None:
        """The server is warm: tells how many modules it had to compile by itself, and marks that they are there."""
        own = modules_in(self.folder) - self._known
        prepared_s = time.monotonic() - self._ready_s - warmed_s
        progress(
            f"kernels      {len(own)} modules compiled by the server itself: {self._built} while it prepared "
            f"({prepared_s:.1f} s), {len(own) - self._built} in its warm-up ({warmed_s:.1f} s)"
        )
        for module in sorted(own):
            log.debug("compiled by the server itself: %s", module)
        if self.mark is None:
            return
        try:
            self.mark.parent.mkdir(parents=True, exist_ok=True)
            self.mark.touch()
        except OSError as exc:
            log.warning("the next start compiles ahead again: %s: %s", self.mark, exc.strerror or exc)

    def stop(self) -> None:
        """End the processes, if there still are any."""
        if self.compilers is not None:
            self.compilers.stop()
            self.compilers = None


class Compiling(NamedTuple):
    """A device for which MLX compiles modules and keeps them in a folder."""

    modules: Path
    device: str  # its name
    capability: tuple[int, int] | None  # of a CUDA device


def compiling_device() -> Compiling | None:
    """This process's; None on CPUs, on Metal, where the system keeps what it compiles, and without a folder."""
    where = os.environ.get(FOLDER_VARIABLE)
    if not where or not mx.cuda.is_available() or mx.default_device() == mx.Device(mx.cpu):
        return None
    return Compiling(Path(where), str(mx.device_info().get("device_name", "")), compute_capability())


def begin(settings: Settings, folder: Path, memory: MemoryInfo, progress: Progress) -> CompiledStart | None:
    """Start compiling for the model in this folder, where that pays; None where MLX keeps no compiled modules.

    Raises StartupError for a model that cannot be read.
    """
    compiling = compiling_device()
    if compiling is None:
        return None
    modules = compiling.modules
    config, shapes = read_config(folder), read_shapes(folder)
    device = f"{compiling.device} {compiling.capability}"
    mark = modules / MARKS / shares.fingerprint(config, shapes, settings, device, kernel_sources())
    found = CompiledStart(modules, None if mark.exists() else mark, None)
    found._known = modules_in(modules)
    if mark.exists():
        progress(f"kernels      {len(found._known)} modules kept from earlier starts")
        return found
    free_bytes = memory.available_bytes - model_bytes(folder)
    units = shares.units_for(settings.kv_format, PLAIN_FORMAT)
    needed = shares.process_bytes(shapes, model_bytes(folder))
    cores = usable_cpus()
    count, why = shares.num_processes(settings.compile_processes, cores, len(units), free_bytes, needed)
    if not count:
        progress(f"kernels      compiled one after the other ({why})")
        return found
    job = Job(
        units=(),
        settings=settings.model_dump(mode="json", exclude_defaults=True, exclude=set(SECRETS)),
        folder=str(folder),
        vocab_len=int(config_value(config, "vocab_size") or 32_768),
        own="",
        others=(),
        ended="",
        capability=compiling.capability,
        num_compilers=max(1, cores // 4),
        limit_s=0.0,
    )
    try:
        found.compilers = Compilers.start(job, shares.shares(units, count), modules)
    except OSError as exc:
        log.warning("kernels are compiled one after the other: no process for them starts (%s)", exc.strerror or exc)
        return found
    progress(f"kernels      being compiled in {count} processes beside loading")
    return found
