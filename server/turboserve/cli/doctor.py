"""`turboserve doctor`: what this machine offers, what is missing, and the command that cures it.

Each check is a function that returns a `Finding`; none raises. Only a failed finding makes the exit
status 1; a warning means that the server works, but slower or with less.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from turboquant_kv import UnsupportedFormatError, blas
from turboquant_kv.backends.gpu.nvrtc import FOLDER_VARIABLE
from turboquant_kv.codec.format_name import PLAIN_FORMAT, PRESETS
from turboserve import __version__
from turboserve.cache.disk import check as disk_check
from turboserve.cli.backend import device_name, keep_compiled_kernels, load_backend
from turboserve.cli.progress import Bars
from turboserve.errors import StartupError
from turboserve.machine_memory import detect_memory
from turboserve.settings import AUTO_FORMAT, Settings

Level = Literal["ok", "warning", "failed"]
MiB, GiB = 1 << 20, 1 << 30
NAME_WIDTH = len("compiled kernels")  # the longest: the first line is written before the others are known
SHOWN_PACKAGES = ("mlx", "mlx-lm", "transformers", "fastapi", "uvicorn", "numpy")
MIN_MEMORY_BYTES = GiB  # the embedded model with its caches and the Python runtime


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `detail` holds the cure when `level` is not ok."""

    name: str
    level: Level
    detail: str


def check_python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def check_versions() -> Finding:
    found, missing = [f"turboserve {__version__}"], []
    for name in SHOWN_PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("packages", "failed", f"not installed: {', '.join(missing)}; pip install turboserve")
    return Finding("packages", "ok", ", ".join(found))


def check_backend(settings: Settings) -> Finding:
    try:
        load_backend()
        keep_compiled_kernels(settings.cache_dir)
    except StartupError as exc:
        return Finding("mlx backend", "failed", str(exc))
    return Finding("mlx backend", "ok", device_name())


def check_blas() -> Finding:
    """Multiply once and see who answered; meaningful only after the backend was imported."""
    status = blas.status()
    if not status.active:
        harmless = not status.reason.startswith("failed")
        return Finding("blas", "ok" if harmless else "warning", status.describe())
    import mlx.core as mx

    before = blas.num_calls()
    with mx.stream(mx.cpu):
        mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
    if blas.num_calls() == before:
        return Finding(
            "blas", "warning", f"{status.library} is loaded, but mlx does not call it; CPU products are slow"
        )
    return Finding("blas", "ok", status.describe())


def check_kv_backend(settings: Settings) -> Finding:
    """What computes attention over compressed caches; meaningful only after MLX was imported. Tries a GPU's kernels."""
    try:
        from turboquant_kv.backends.choice import choose_backend
        from turboquant_kv.backends.native import backend as native
        from turboquant_kv.backends.numpy_ops.backend import NumpyBackend
    except ImportError:
        return Finding("kv backend", "failed", "not known without an MLX backend")
    try:
        name = choose_backend().name
    except UnsupportedFormatError as exc:
        return Finding("kv backend", "failed", str(exc))
    if not name.startswith(NumpyBackend.name):
        return _tried_kernels(settings) or Finding("kv backend", "ok", name)
    _, reason = native.load_kernels()
    return Finding(
        "kv backend", "warning", f"{name}, many times slower: {reason}; reinstall with a C++ compiler present"
    )


def check_layers(settings: Settings) -> Finding | None:
    """What multiplies by a model's weights on a CPU; None on a GPU, and without kernels (`check_kv_backend`)."""
    try:
        import mlx.core as mx

        from turboquant_kv.backends.choice import choose_backend
        from turboquant_kv.backends.native import backend as native

        if mx.default_device().type != mx.DeviceType.cpu or not native.is_available():
            return None
        level = choose_backend("cpu-native").name
    except (ImportError, UnsupportedFormatError):
        return None
    if settings.dequantize != "auto":
        return Finding("layers", "ok", f"by MLX, as dequantize={settings.dequantize} says")
    around = "left to mlx-lm, as projections=off says" if settings.projections == "off" else "around attention as well"
    how = f"{level} multiplies by weights as stored; decoder layers {around}; {_tried_products(settings)}"
    return Finding("layers", "ok", how)


def _tried_products(settings: Settings) -> str:
    """A new trial of what multiplies prompts, for a layer as many models have them."""
    import mlx.core as mx
    import mlx.nn

    from turboserve.engine.native_linears import NativeLinear
    from turboserve.engine.prompt_products import choose_prompt_products

    layers: Any = mlx.nn  # whose stubs say too little
    dense = layers.Linear(1024, 1024, bias=False)
    dense.set_dtype(mx.float16)
    model = layers.Sequential(NativeLinear(layers.QuantizedLinear.from_linear(dense, 64, 4)))
    return f"prompts: {choose_prompt_products(model, settings.projections)} (each model is tried when it is loaded)"


def _tried_kernels(settings: Settings) -> Finding | None:
    """A new trial of a GPU's fused kernels, for layers as many models have them; None where there are none."""
    import mlx.core as mx

    from turboquant_kv.backends.base import LayerShape
    from turboquant_kv.cache.backend_choice import choose
    from turboquant_kv.cache.trial import Case
    from turboquant_kv.codec.format import KVFormat

    name = PRESETS["balanced"] if settings.kv_format in (AUTO_FORMAT, PLAIN_FORMAT) else settings.kv_format
    verdict = choose("auto", [Case(LayerShape(8, 128, 128, mx.float16), KVFormat.parse(name), 32)]).verdict
    if verdict is None:
        return None
    detail = f"{verdict.line} (32 heads over 8 of 128 dims, float16, {name}; each model is tried when it is loaded)"
    return Finding("kv backend", "warning" if verdict.is_fallback else "ok", detail)


def check_compiler() -> Finding:
    """mx.compile on a CPU runs g++ at run time (clang++ on macOS through the same name)."""
    if compiler := shutil.which("g++"):
        return Finding("compiler", "ok", compiler)
    return Finding("compiler", "warning", "no g++: models that use mx.compile fail on the CPU; install g++")


def check_memory() -> Finding:
    try:
        memory = detect_memory()
    except StartupError as exc:
        return Finding("memory", "warning", str(exc))
    detail = f"{memory.available_bytes / GiB:.1f} of {memory.total_bytes / GiB:.1f} GiB available"
    if memory.total_bytes < MIN_MEMORY_BYTES:
        return Finding("memory", "failed", f"{detail}; at least {MIN_MEMORY_BYTES / GiB:.0f} GiB is needed")
    return Finding("memory", "ok", detail)


def check_cache_dir(settings: Settings) -> Finding:
    folder = settings.cache_dir.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as exc:
        reason = exc.strerror or str(exc)
        return Finding("cache folder", "warning", f"{folder}: {reason}; set --cache-dir, or calibrate at every start")
    return Finding("cache folder", "ok", f"{folder}, {shutil.disk_usage(folder).free / GiB:.1f} GiB free")


def check_compiled() -> Finding | None:
    """What MLX keeps compiled for a GPU; None where nothing is kept. Meaningful once the backend was imported."""
    where, name = os.environ.get(FOLDER_VARIABLE), "compiled kernels"
    if not where:
        return None
    folder = Path(where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as exc:
        return Finding(name, "warning", f"{folder}: {exc.strerror or exc}; every start compiles all kernels again")
    count = sum(1 for _ in folder.rglob("*.ptx"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    detail = f"{count} modules in {folder}, {size / MiB:,.0f} MiB" if count else f"none yet in {folder}"
    return Finding(name, "ok", f"{detail}; a model's first start adds what it misses")


def check_store(folder: Path) -> Finding:
    """Read and verify a session store; needs no model."""
    name = "session store"
    if not disk_check.is_store(folder):
        return Finding(name, "failed", f"{folder} is no session store; name the folder given to --kv-store-dir")
    try:
        found = disk_check.check_store(folder)
    except OSError as exc:
        return Finding(name, "failed", f"{folder}: {exc.strerror or exc}")
    detail = (
        f"{found.num_entries} conversations of {len(found.fingerprints)} models, {found.total_bytes / MiB:,.1f} MiB"
    )
    if found.is_in_use:
        detail += ", in use by a server"
    if found.damaged:
        return Finding(
            name, "failed", f"{detail}; {len(found.damaged)} damaged, which the server will drop: {found.damaged[0]}"
        )
    if found.num_leftovers and not found.is_in_use:
        detail += f"; {found.num_leftovers} unfinished files of a killed server, removed at the next start"
    return Finding(name, "ok", detail)


def run_checks(settings: Settings) -> Iterator[Finding]:
    """Findings as they are made, in the order in which one depends on another. A terminal shows what is looked at."""
    checks: tuple[tuple[str, Callable[[], Finding | None]], ...] = (
        ("Python", check_python),
        ("packages", check_versions),
        ("importing MLX", lambda: check_backend(settings)),
        ("multiplying with BLAS", check_blas),
        ("trying what computes attention", lambda: check_kv_backend(settings)),
        ("trying what multiplies by weights", lambda: check_layers(settings)),
        ("compiler", check_compiler),
        ("memory", check_memory),
        ("cache folder", lambda: check_cache_dir(settings)),
        ("compiled kernels", check_compiled),
    )
    bars = Bars()
    for what, check in checks:
        with bars.step(what):
            finding = check()
        if finding is not None:
            yield finding


def verify_store(folder: Path) -> Iterator[Finding]:
    """As `check_store`, while a terminal shows that it is at work: every file is read."""
    with Bars().step(f"verifying {folder}"):
        finding = check_store(folder)
    yield finding


def report(findings: Iterable[Finding]) -> int:
    """Print each finding as soon as it is made. Returns the exit status: 1 when one failed."""
    say, status = Bars(), 0
    for finding in findings:
        say(f"{finding.level:<8} {finding.name:<{NAME_WIDTH}}  {finding.detail}")
        status |= finding.level == "failed"
    return int(status)
