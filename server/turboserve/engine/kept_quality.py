"""What `turboserve eval` measured, kept in the cache folder beside the calibration, so that a server can show it.

One file for each model's weights and dtype. A later run replaces the figures of the formats that it measured.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path

from turboquant_kv.evaluation import Evaluation
from turboserve.messages import FormatQuality

log = logging.getLogger(__name__)

FILE_VERSION = 1


def kept_quality(cache_dir: Path, weights_fingerprint: str) -> tuple[FormatQuality, ...]:
    """Smallest divergence first; empty for a file that is missing, damaged or of another version."""
    path = _path(cache_dir, weights_fingerprint)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["version"] != FILE_VERSION:
            return ()
        return tuple(sorted((_read(one) for one in saved["formats"]), key=lambda one: one.kl_mean))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read, so no quality is shown: %s", path, error)
        return ()


def keep_quality(cache_dir: Path, weights_fingerprint: str, evaluation: Evaluation) -> None:
    """At the first offset, which is what a conversation's beginning sees; other programs' codecs are left out."""
    measured = [_measured(evaluation, result.name) for result in evaluation.results if result.kind == "format"]
    known = {one.kv_format: one for one in (*kept_quality(cache_dir, weights_fingerprint), *measured)}
    path = _path(cache_dir, weights_fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        saved = {"version": FILE_VERSION, "formats": [asdict(one) for one in known.values()]}
        part.write_text(json.dumps(saved), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        log.warning("the figures cannot be kept, so a server will not show them: %s", error)


def _path(cache_dir: Path, weights_fingerprint: str) -> Path:
    return cache_dir / "quality" / f"{weights_fingerprint}.json"


def _measured(evaluation: Evaluation, name: str) -> FormatQuality:
    figures = evaluation.result(name).figures(evaluation.plan.offsets[0])
    return FormatQuality(
        kv_format=name,
        kl_mean=figures.kl_mean.mean,
        flips=figures.flips.mean,
        perplexity_ratio=figures.perplexity_ratio.mean,
        num_tokens=sum(evaluation.text_tokens.values()),
        measured_unix_s=time.time(),
    )


def _read(saved: dict[str, object]) -> FormatQuality:
    """Raises TypeError or ValueError for what is none, KeyError for what lacks a figure."""
    figures = {name: float(str(saved[name])) for name in ("kl_mean", "flips", "perplexity_ratio", "measured_unix_s")}
    return FormatQuality(kv_format=str(saved["kv_format"]), num_tokens=int(str(saved["num_tokens"])), **figures)
