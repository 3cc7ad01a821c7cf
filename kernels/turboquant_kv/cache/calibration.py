"""Means of keys and values, and what keys lose in each layer, measured once per model on a built-in text.

softmax(q.(k - m)) = softmax(q.k) and sum p (v - m) + m = sum p v for any constant m, so codes may hold
centred vectors at no cost to the decode; the mean chosen here is what makes that worth doing.
Owns measuring and the file beside the model's fingerprint; leaves the use to the backends.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xxhash
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turboquant_kv.backends.base import Means
from turboquant_kv.cache import key_guard
from turboquant_kv.codec.limits import SUPPORTED_HEAD_DIMS

log = logging.getLogger(__name__)

# Long enough for stable means (they moved KL by under 3% between 1K and 4K tokens of text), short enough for seconds.
NUM_TOKENS = 2048
CHUNK_TOKENS = 512
# The first tokens' keys serve as attention sinks and are unlike all others; they stay exact anyway.
SKIPPED_TOKENS = 32
FILE_VERSION = "2"


class CalibrationFileError(ValueError):
    """A stored calibration is damaged or of another model."""


@dataclass(frozen=True)
class Calibration:
    """Means by layer index; layers that are not plain KV caches have none. `origin` is shown in stats.

    divergences: what keys lose at each number of bits, by layer (key_guard.py); layers not measured have none.
    """

    layers: Mapping[int, Means]
    origin: str
    divergences: key_guard.Divergences = field(default_factory=dict)


def calibration_text() -> str:
    """The built-in text: prose, code, data and dialogue."""
    return resources.files("turboquant_kv").joinpath("data/calibration.txt").read_text(encoding="utf-8")


def calibrate(model: Any, token_ids: list[int]) -> Calibration:
    """Run the model over the tokens with uncompressed caches and average what they hold.

    Raises ValueError when there are too few tokens.
    """
    tokens = token_ids[:NUM_TOKENS]
    if len(tokens) <= 2 * SKIPPED_TOKENS:
        raise ValueError(f"calibration needs more than {2 * SKIPPED_TOKENS} tokens, got {len(tokens)}")
    caches = make_prompt_cache(model)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        model(mx.array([tokens[start : start + CHUNK_TOKENS]]), cache=caches)
        mx.eval([c.state for c in caches])
    means = {i: _means_of(c) for i, c in enumerate(caches) if type(c) is KVCache and not c.empty()}
    del caches  # their memory, before more is needed
    measured = {i: m for i, m in means.items() if m.k.shape[1] in SUPPORTED_HEAD_DIMS}
    divergences = key_guard.measure(model, tokens, measured)
    return Calibration(means, f"built-in text, {len(tokens)} tokens", divergences)


def _means_of(cache: Any) -> Means:
    k, v = cache.keys_and_values()
    mean_k, mean_v = (x[0, :, SKIPPED_TOKENS:].astype(mx.float32).mean(axis=1) for x in (k, v))
    return Means(np.array(mean_k), np.array(mean_v))


def calibration_for(model: Any, tokenizer: Any, cache_dir: Path, weights_fingerprint: str) -> Calibration:
    """The stored calibration of these weights, or a new one, which is then stored.

    A damaged file is measured again and replaced; a folder that cannot be written only costs the
    measurement at the next start.
    """
    path = cache_dir / "calibration" / f"{weights_fingerprint}.safetensors"
    if path.exists():
        try:
            return load(path, weights_fingerprint)
        except CalibrationFileError as error:
            log.warning("calibration is measured again: %s", error)
    calibration = calibrate(model, tokenizer.encode(calibration_text(), add_special_tokens=False))
    try:
        save(path, calibration, weights_fingerprint)
    except OSError as error:
        log.warning("calibration cannot be stored, so the next start measures it again: %s", error)
        return replace(calibration, origin=f"{calibration.origin}; not stored: {error.strerror}")
    return calibration


def save(path: Path, calibration: Calibration, weights_fingerprint: str) -> None:
    """Write atomically, with a checksum of the contents (safetensors itself accepts flipped bits)."""
    arrays = {
        f"{i}.{side}": np.ascontiguousarray(getattr(means, side))
        for i, means in calibration.layers.items()
        for side in ("k", "v")
    }
    for i, by_bits in calibration.divergences.items():
        arrays[f"{i}.divergence"] = np.array([by_bits[bits] for bits in key_guard.KEY_BITS], np.float32)
    metadata = {
        "version": FILE_VERSION,
        "weights": weights_fingerprint,
        "origin": calibration.origin,
        "checksum": _checksum(arrays),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".safetensors")
    os.close(handle)
    try:
        mx.save_safetensors(name, {key: mx.array(a) for key, a in arrays.items()}, metadata)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load(path: Path, weights_fingerprint: str) -> Calibration:
    """Raises CalibrationFileError for anything that is not exactly what `save` wrote for these weights."""
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        values = {name: np.array(a) for name, a in arrays.items()}
    except (RuntimeError, OSError, ValueError) as error:
        raise CalibrationFileError(f"{path}: {error}") from error
    if metadata.get("version") != FILE_VERSION or metadata.get("weights") != weights_fingerprint:
        raise CalibrationFileError(f"{path}: written for other weights or by another version")
    if metadata.get("checksum") != _checksum(values):
        raise CalibrationFileError(f"{path}: contents do not match their checksum")
    layers = sorted({int(name.split(".")[0]) for name in values})
    means = {i: Means(values[f"{i}.k"], values[f"{i}.v"]) for i in layers}
    measured = {i: values[f"{i}.divergence"].tolist() for i in layers if f"{i}.divergence" in values}
    divergences = {i: dict(zip(key_guard.KEY_BITS, row, strict=True)) for i, row in measured.items()}
    return Calibration(means, metadata["origin"], divergences)


def _checksum(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
