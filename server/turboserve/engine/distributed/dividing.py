"""What a rank has for itself, and what it agrees upon before: memory, means of its heads, a folder for its part."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from turboquant_kv.cache import calibration
from turboquant_kv.cache.calibration import Calibration, CalibrationFileError
from turboserve.engine.distributed.ranks import Ranks, machine
from turboserve.machine_memory import MemoryInfo

log = logging.getLogger(__name__)


def own_share(memory: MemoryInfo, ranks: Ranks) -> MemoryInfo:
    """Of the machine's memory, where ranks on it share that; a CUDA GPU's is one rank's alone."""
    if ranks.size == 1:
        return memory
    machines = ranks.exchange("machine", machine())
    num_here = 1 if mx.cuda.is_available() else machines.count(machines[ranks.rank])
    return MemoryInfo(memory.total_bytes // num_here, memory.available_bytes // num_here)


def store_folder(folder: Path, ranks: Ranks) -> Path:
    """Where this rank's part of conversations is stored: ranks on one machine may be given one folder."""
    return folder if ranks.size == 1 else folder / f"rank-{ranks.rank}-of-{ranks.size}"


def calibration_of_rank(
    ranks: Ranks, model: Any, tokenizer: Any, cache_dir: Path, weights_fingerprint: str
) -> Calibration:
    """Means and factors of this rank's heads; what layers lose, by which their codecs are chosen, is that of all ranks.

    Stored like a whole model's. Measuring is work of all ranks together, so stored ones are used if every rank has its
    own, of one measurement. Raises what `calibrate` raises.
    """
    path = calibration.path_for(cache_dir, weights_fingerprint)
    known = _stored(path, weights_fingerprint)
    seen = ranks.exchange("stored means", None if known is None else _told(known))
    if known is not None and all(told == seen[0] for told in seen):
        return known
    tokens = tokenizer.encode(calibration.calibration_text(), add_special_tokens=False)
    own = calibration.calibrate(model, tokens)
    measured = replace(own, divergences=_of_all(ranks, own))
    try:
        calibration.save(path, measured, weights_fingerprint)
    except OSError as error:
        log.warning("calibration cannot be stored, so the next start measures it again: %s", error)
    return measured


def _stored(path: Path, weights_fingerprint: str) -> Calibration | None:
    if not path.exists():
        return None
    try:
        return calibration.load(path, weights_fingerprint)
    except CalibrationFileError as error:
        log.warning("calibration is measured again: %s", error)
        return None


def _told(known: Calibration) -> str:
    return json.dumps({str(i): by_codec for i, by_codec in sorted(known.divergences.items())}, sort_keys=True)


def _of_all(ranks: Ranks, own: Calibration) -> dict[int, dict[str, float]]:
    """The mean over ranks, whose heads are equally many, as files keep it; places that some rank left out have none."""
    said = ranks.exchange("divergences", {str(i): dict(d) for i, d in own.divergences.items()})
    places = sorted(set.intersection(*(set(map(int, one)) for one in said)))
    found: dict[int, dict[str, float]] = {}
    for i in places:
        codecs = said[0][str(i)]
        sums = {codec: sum(float(one[str(i)][codec]) for one in said) for codec in codecs}
        found[i] = {codec: _as_stored(total / ranks.size) for codec, total in sums.items()}
    return found


def _as_stored(value: float) -> float:
    """Files hold float32; later starts compare what they read."""
    rounded: Any = mx.array(value, mx.float32).item()
    return float(rounded)
