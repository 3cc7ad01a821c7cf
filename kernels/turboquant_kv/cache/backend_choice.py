"""Which backend a model's compressed layers get: the one asked for, or, by `auto`, what a trial on the device says.

On a GPU `auto` tries the fused kernels (trial.py) against MLX operations and takes what is right and faster. Owns what
is tried, the memory of verdicts, in this process and in a folder, and that nobody can miss a fallback: each one is a
warning in the log, a remembered one too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.base import Backend, LayerShape, Means
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.device import MIN_CAPABILITY, compute_capability
from turboquant_kv.backends.mlx_ops.backend import MlxBackend
from turboquant_kv.cache.trial import Case, Plan, Verdict, try_fused
from turboquant_kv.codec.format import KVFormat

log = logging.getLogger(__name__)

FILE_VERSION = 1
# A driver may end the process instead of raising. Once may have been the user, who ended it; twice is a reason.
MAX_UNFINISHED = 2
FOLDER = "kv-kernels"  # inside the cache folder

_known: dict[str, Verdict] = {}  # by fingerprint, of this process


class Candidates(NamedTuple):
    """What competes on a device."""

    fused_name: str
    new_fused: Callable[[], Backend]  # raises where the device has no such kernels
    ops: Backend


class Chosen(NamedTuple):
    """The backend, and the verdict it follows from; None where nothing was tried."""

    backend: Backend
    verdict: Verdict | None


def device_candidates() -> Candidates | None:
    """Of this machine; None where there is nothing to try: on a CPU, and on GPUs without fused kernels."""
    if mx.default_device() == mx.Device(mx.cpu):
        return None
    if mx.metal.is_available():
        return Candidates("gpu-metal", GpuBackend, MlxBackend())
    if compute_capability() >= MIN_CAPABILITY:
        return Candidates("gpu-cuda", GpuBackend, MlxBackend())
    return None


def choose(
    name: str,
    cases: Sequence[Case],
    folder: Path | None = None,
    *,
    candidates: Callable[[], Candidates | None] | None = None,
    plan: Plan | None = None,
) -> Chosen:
    """The backend called `name` for layers of these kinds; only `auto` tries anything, and only on a GPU.

    folder: a cache folder in which verdicts are remembered; None: for this process alone. candidates, plan: instead of
    the device's and the usual one. Raises what `choose_backend` raises.
    """
    competing = (candidates or device_candidates)() if name == "auto" and cases else None
    if competing is None:
        return Chosen(choose_backend(name), None)
    verdict = _verdict(competing, cases, folder, plan)
    if not verdict.is_fallback:
        return Chosen(competing.new_fused(), verdict)
    path = None if folder is None else _path(folder, fingerprint_of(competing.fused_name, cases, plan))
    log.warning("KV backend: %s%s", verdict.line, "" if path is None else f". To try again, remove {path}")
    return Chosen(competing.ops, verdict)


def cases_of(
    shapes: Sequence[LayerShape],
    formats: Sequence[KVFormat],
    means: Sequence[Means | None],
    num_q_heads: Sequence[int],
    capped: Sequence[bool],
) -> list[Case]:
    """The kinds of layers among a model's compressed ones, each with how many there are.

    Kernels may treat long and short means that turn differently: the layer with the longest stands for all, and the
    one with the shortest is judged as well, but not timed.
    """
    kinds: dict[_Kind, list[Means | None]] = {}
    for shape, fmt, mean, num_heads, is_capped in zip(shapes, formats, means, num_q_heads, capped, strict=True):
        turn = None if mean is None or mean.rotary is None else mean.rotary.fingerprint()
        is_balanced = mean is not None and mean.key_factors is not None
        heads = num_heads or shape.num_kv_heads
        kind = _Kind(shape, fmt, heads, mean is not None, turn, is_balanced, is_capped)
        kinds.setdefault(kind, []).append(mean)
    cases = []
    for kind, found in kinds.items():
        shortest, *_, longest = sorted([*found, *found], key=_longest)
        cases.append(Case(kind.shape, kind.fmt, kind.num_q_heads, longest, len(found), kind.is_capped))
        if kind.turn is not None and shortest is not longest:
            cases.append(Case(kind.shape, kind.fmt, kind.num_q_heads, shortest, 0, kind.is_capped))
    return cases


class _Kind(NamedTuple):
    """What layers share that the same kernels serve."""

    shape: LayerShape
    fmt: KVFormat
    num_q_heads: int
    has_means: bool
    turn: str | None  # fingerprint of how key means turn with position
    is_balanced: bool  # keys against queries
    is_capped: bool  # attention scores


def _longest(means: Means | None) -> float:
    return 0.0 if means is None else float(np.linalg.norm(means.k, axis=1).max())


def _verdict(competing: Candidates, cases: Sequence[Case], folder: Path | None, plan: Plan | None) -> Verdict:
    """The remembered verdict, or a new one."""
    fingerprint = fingerprint_of(competing.fused_name, cases, plan)
    if fingerprint in _known:
        return _known[fingerprint]
    path = None if folder is None else _path(folder, fingerprint)
    saved = {} if path is None else _read(path)
    found = _remembered(saved, path)
    if found is None:
        num_unfinished = int(saved.get("unfinished", 0))
        if path is not None and num_unfinished >= MAX_UNFINISHED:
            detail = f"the last {num_unfinished} trials ended the whole process"
            found = Verdict(competing.fused_name, competing.ops.name, "failed", detail)
        else:
            _write(path, {"unfinished": num_unfinished + 1})
            found = try_fused(cases, competing.new_fused, competing.ops, name=competing.fused_name, plan=plan)
            _write(path, {"verdict": found.to_dict()})
    _known[fingerprint] = found
    return found


def _path(folder: Path, fingerprint: str) -> Path:
    return folder / FOLDER / f"{fingerprint}.json"


def fingerprint_of(fused_name: str, cases: Sequence[Case], plan: Plan | None = None) -> str:
    """Of everything that a verdict depends on: device, MLX, our kernels, the layers and what is asked of them."""
    info: Mapping[str, Any] = mx.device_info()
    device = [str(info.get(key, "")) for key in ("device_name", "architecture")]
    digest = hashlib.sha256(repr([fused_name, device, metadata.version("mlx"), kernel_sources(), plan]).encode())
    for case in cases:
        digest.update(
            repr([case.shape, case.fmt.to_dict(), case.num_q_heads, case.num_layers, case.is_capped]).encode()
        )
        if case.means is not None:
            turn = "" if case.means.rotary is None else case.means.rotary.fingerprint()
            digest.update(turn.encode() + case.means.k.tobytes() + case.means.v.tobytes())
            if case.means.key_factors is not None:
                digest.update(b"balanced" + case.means.key_factors.tobytes())
    return digest.hexdigest()[:32]


@lru_cache
def kernel_sources() -> str:
    """Hash of all text that kernels and backends are made of."""
    digest = hashlib.sha256()
    root = Path(str(resources.files("turboquant_kv")))
    for path in sorted([*root.glob("src/*.h"), *root.glob("backends/**/*.py"), *root.glob("cache/trial.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _remembered(saved: Mapping[str, Any], path: Path | None) -> Verdict | None:
    if "verdict" not in saved:
        return None
    try:
        return Verdict.from_dict(saved["verdict"])
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s cannot be read, so kernels are tried again: %s", path, error)
        return None


def _read(path: Path) -> dict[str, Any]:
    """What a file says; nothing for one that is missing, damaged or of another version."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["version"] == FILE_VERSION:
            return dict(saved)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read, so kernels are tried again: %s", path, error)
    return {}


def _write(path: Path | None, content: Mapping[str, Any]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"version": FILE_VERSION, **content}), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        log.warning("the verdict on GPU kernels cannot be stored, so the next start tries them again: %s", error)
