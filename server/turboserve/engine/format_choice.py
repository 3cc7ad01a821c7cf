"""`--kv-format auto`: the smallest format whose divergence on this model stays within the wanted limit.

Measured once per weights by the library's own evaluation, near the beginning of a context and far from it, on a
held-out text that means are not calibrated on; figures are kept beside the calibration. Owns the order of formats and
that file.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.codec.format_name import PLAIN_FORMAT, PRESETS
from turboquant_kv.evaluation import Plan, evaluate
from turboserve.engine.loaded_model import LoadedModel
from turboserve.engine.progress import Progress

log = logging.getLogger(__name__)

# Smallest first.
CANDIDATES = (PRESETS["tiny"], PRESETS["compact"], PRESETS["balanced"], "4/4", "8/4", "8/8")
PLAN = Plan(num_tokens=512, offsets=(0, 32768))
FILE_VERSION = 1


def choose_format(
    loaded: LoadedModel, calibration: Calibration, limit: float, cache_dir: Path, text: str, progress: Progress
) -> str:
    """The first of CANDIDATES whose mean KL in nats is at most `limit` at all of PLAN's offsets; f16 where none is.

    Raises what `turboquant_kv.evaluation.evaluate` raises for a model that cannot be compressed.
    """
    path = cache_dir / "kv-format" / f"{loaded.weights_fingerprint}.json"
    known = _stored(path)
    for name in CANDIDATES:
        if name not in known:
            progress(f"kv format auto: measuring {name}")
            known[name] = _worst_kl(loaded, calibration, name, text)
            _store(path, known)
        if known[name] <= limit:
            progress(f"kv format auto: {name}, mean KL {known[name]:.4f} of at most {limit:g} nats")
            return name
    progress(f"kv format auto: {PLAIN_FORMAT}, because no format stays within {limit:g} nats ({_listed(known)})")
    return PLAIN_FORMAT


def _worst_kl(loaded: LoadedModel, calibration: Calibration, name: str, text: str) -> float:
    evaluation = evaluate(loaded.model, loaded.tokenizer, [name], {"held-out": text}, PLAN, calibration=calibration)
    return max(evaluation.result(name).figures(offset).kl_mean.mean for offset in PLAN.offsets)


def _listed(known: dict[str, float]) -> str:
    figures: Sequence[str] = [f"{name} {known[name]:.4f}" for name in CANDIDATES if name in known]
    return ", ".join(figures)


def _stored(path: Path) -> dict[str, float]:
    """Figures by format; none for a file that is missing, damaged or of another version."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["version"] == FILE_VERSION:
            return {str(name): float(kl) for name, kl in saved["kl"].items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read, so formats are measured again: %s", path, error)
    return {}


def _store(path: Path, known: dict[str, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"version": FILE_VERSION, "kl": known}), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        log.warning("the figures of kv formats cannot be stored, so the next start measures them again: %s", error)
