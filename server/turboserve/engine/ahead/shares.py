"""Who compiles what, how many processes there are, and what a process is told. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from turboserve import __version__
from turboserve.engine.weight_files import Shapes
from turboserve.settings import Settings

MIB = 1 << 20
# What can be had apart, the longest first. kernels: our own; graphs: kept graphs and checked guesses; model: prompts
# and plain decode steps; trial: what the kernels are tried against; means: measuring them; the others draw tokens, of
# random logits.
UNITS = ("kernels", "graphs", "model", "trial", "means", "draws", "penalties", "logprobs")
CONTEXT_BYTES = 1024 * MIB  # of device memory that a process has for a start, and works with
LEAST_PROCESSES = 2  # one by itself is no faster than the server, and loads the model once more
DEVICE_SHARE = 0.5  # of what the weights leave free
# Settings that decide what is compiled.
OF_KERNELS = ("kv_format", "projections", "keep_graphs", "speculate", "draft_model", "adapters", "max_running")


@dataclass(frozen=True, slots=True)
class Job:
    """One process's share."""

    units: tuple[str, ...]
    settings: Mapping[str, Any]  # that differ from the defaults, as JSON has them; no secrets
    folder: str  # the model's
    vocab_len: int
    own: str  # the folder in which this process's MLX keeps modules
    others: tuple[str, ...]  # folders that get what it compiled: the server's first
    ended: str  # a file that is there when `kernels` has ended
    capability: tuple[int, int] | None  # of the CUDA device; None: there is none
    num_compilers: int  # processes for `kernels`
    limit_s: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Job:
        """Inverse of to_json."""
        told = json.loads(text)
        lists = {key: tuple(told[key]) for key in ("units", "others")}
        capability = None if told["capability"] is None else (int(told["capability"][0]), int(told["capability"][1]))
        return cls(**{**told, **lists, "capability": capability})


def shares(units: Sequence[str], num_processes: int) -> list[tuple[str, ...]]:
    """Units of each process, every unit once, none empty."""
    return [share for i in range(num_processes) if (share := tuple(units[i::num_processes]))]


def units_for(kv_format: str, plain_format: str) -> tuple[str, ...]:
    """Nothing of ours is compiled where nothing is compressed."""
    without = ("kernels", "trial", "means") if kv_format == plain_format else ()
    return tuple(unit for unit in UNITS if unit not in without)


def num_processes(wanted: int, num_cores: int, num_units: int, free_bytes: int, process_bytes: int) -> tuple[int, str]:
    """How many processes there are to be, and what decided; 0 for none.

    wanted: settings.compile_processes, at most so many. free_bytes: of device memory beside the weights.
    """
    if wanted == 0:
        return 0, "as set"
    by_cores, by_memory = num_cores // 2, int(free_bytes * DEVICE_SHARE) // max(1, process_bytes)
    if by_cores < LEAST_PROCESSES:
        return 0, f"{num_cores} cores"
    if by_memory < LEAST_PROCESSES:
        return 0, f"memory: each takes about {process_bytes // MIB:,} MiB"
    return min(wanted, by_cores, by_memory, num_units), "as many as there are cores and memory for"


def process_bytes(shapes: Shapes, num_bytes: int) -> int:
    """Estimate of the device memory that a miniature's process takes. num_bytes: of all weights."""
    total, kept = 0, 0
    for name, shape in shapes.items():
        numbers = 1
        for n in shape:
            numbers *= n
        parts = name.split(".")
        numbered = [int(part) for part in parts if part.isdigit()]
        total += numbers
        kept += numbers if not numbered or numbered[0] < 2 else 0
    return CONTEXT_BYTES + (num_bytes * kept // total if total else num_bytes)


def fingerprint(config: Mapping[str, Any], shapes: Shapes, settings: Settings, device: str, sources: str) -> str:
    """Of everything that decides what is compiled."""
    versions = [__version__, *(metadata.version(name) for name in ("mlx", "mlx-lm"))]
    told = [getattr(settings, name) for name in OF_KERNELS]
    digest = hashlib.sha256(repr([versions, sources, device, told]).encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(repr(sorted(shapes.items())).encode())
    return digest.hexdigest()[:32]
