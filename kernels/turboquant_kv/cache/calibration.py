"""Means of keys and values, factors of keys, and what keys lose in each layer, measured once per model on a text.

sum p (v - m) + m = sum p v for any constant m, so codes may hold centred values at no cost to the decode. Keys turn
with their position, and so does their mean: it is measured before the turn, over keys turned back, and taken off block
by block (codec/rotary.py). Owns measuring and the file beside the model's fingerprint; leaves the use to the backends.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xxhash
from mlx_lm.models.cache import KVCache, make_prompt_cache
from numpy.typing import NDArray

from turboquant_kv.backends.base import Means
from turboquant_kv.cache import key_balance, key_guard
from turboquant_kv.cache.leaves import layer_numbers, leaves, with_leaves
from turboquant_kv.cache.probe import WindowedKVCache, window_of_ring
from turboquant_kv.cache.rope_probe import has_rope, learn_rotary
from turboquant_kv.codec.limits import UnsupportedFormatError, stored_dim
from turboquant_kv.codec.rotary import Rotary

log = logging.getLogger(__name__)

Recordings = Mapping[int, key_guard.Recorded]
"""What layers were given, by place among the model's caches."""

# Long enough for stable means (they moved KL by under 3% between 1K and 4K tokens of text), short enough for seconds.
NUM_TOKENS = 1024
CHUNK_TOKENS = 512
# The first tokens' keys serve as attention sinks and are unlike all others; they stay exact anyway.
SKIPPED_TOKENS = 32
FILE_VERSION = "6"
# Read far from the beginning, to see whether keys and queries turn as they should. Layers where both do need not be run
# there. Of the first 64 tokens near the beginning there are no queries.
CHECKED_TOKENS = 96
# Keys of the same text near and far, turned back, may differ by rounding, which in half precision is below this share.
_SAME_KEYS = 0.05


class CalibrationFileError(ValueError):
    """A stored calibration is damaged or of another model."""


@dataclass(frozen=True)
class Calibration:
    """Means by place among the model's caches (leaves.py); those that hold no keys of attention have none.

    `origin` is shown in stats. divergences: what keys lose with each codec, by the same place (key_guard.py); none of
    those that are not measured.
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
    own = make_prompt_cache(model)
    caches = with_leaves(own, [WindowedKVCache(w) if (w := window_of_ring(c)) else c for c in leaves(own)])
    for start in range(0, len(tokens), CHUNK_TOKENS):
        model(mx.array([tokens[start : start + CHUNK_TOKENS]]), cache=caches)
        mx.eval([c.state for c in leaves(caches)])
    held = {i: c for i, c in enumerate(leaves(caches)) if type(c) in (KVCache, WindowedKVCache) and not c.empty()}
    dims = {i: c.keys.shape[3] for i, c in held.items()}
    measured = [i for i, dim in dims.items() if _can_be_stored(dim)]
    learnt = learn_rotary(model, {i: dims[i] for i in measured}, layer_numbers(caches))
    near = key_guard.record(model, tokens, measured, key_guard.OFFSETS[0])
    seen, tried = _seen_far(model, tokens, near)
    rotaries = {i: rotary for i, rotary in learnt.items() if _turns_so([near, *seen.values()], i, rotary)}
    recorded = [near, *(_given_at(model, tokens, near, rotaries, offset, seen[offset]) for offset in seen)]
    means = {i: _means_of(c, rotaries.get(i)) for i, c in held.items()}
    for i, rotary in rotaries.items():
        means[i] = _balanced(means[i], rotary, recorded[0][i])
    del caches, held  # their memory, before more is needed
    turning = f"key means turn with position in {len(rotaries)} of {len(means)} layers"
    origin = f"built-in text, {len(tokens)} tokens; {turning}; {tried}"
    return Calibration(means, origin, key_guard.measure(recorded, {i: means[i] for i in measured}))


def _seen_far(model: Any, tokens: Sequence[int], near: Recordings) -> tuple[dict[int, Recordings], str]:
    """By offset, what the layers are given of CHECKED_TOKENS far from the beginning, if the model can be there.

    And where keys are known from, in words. Without a rope module nothing turns with position, and a table of learned
    positions has an end.
    """
    first, *far = key_guard.OFFSETS
    is_turning = has_rope(model)
    seen: dict[int, Recordings] = {}
    for offset in far if is_turning else ():
        try:
            given = key_guard.record(model, tokens, list(near), offset, CHECKED_TOKENS)
        except Exception:  # a table of positions that ends before
            log.debug("keys at %d are not measured", offset, exc_info=True)
            given = {}
        if given.keys() == near.keys() and all(one.is_finite for one in given.values()):
            seen[offset] = given
    told = f"keys measured from position {_listed([first, *seen])} on"
    if not is_turning:
        return seen, f"{told}, for no layer has a rope module"
    failed = [offset for offset in far if offset not in seen]
    return seen, f"{told}, not from {_listed(failed)}, where they are no numbers" if failed else told


def _given_at(
    model: Any, tokens: Sequence[int], near: Recordings, rotaries: Mapping[int, Rotary], offset: int, seen: Recordings
) -> Recordings:
    """What the layers are given far from the beginning: computed for those that turn so, read for the others.

    Layers whose keys are the same there as near are measured once, near.
    """
    given: dict[int, key_guard.Recorded] = {}
    others = []
    for i, one in near.items():
        has_same_queries = _same_queries(one, seen[i], rotaries.get(i))
        if has_same_queries and i in rotaries:
            given[i] = one.moved(rotaries[i], offset)
        elif not has_same_queries or not _same_keys(one.keys, seen[i].keys):
            others.append(i)
    return given | (key_guard.record(model, tokens, others, offset) if others else {})


def _same_queries(near: key_guard.Recorded, far: key_guard.Recorded, rotary: Rotary | None) -> bool:
    """Whether queries of the same tokens are the same, turned back where they turn: some grow with their position."""
    starts = [one.keys.shape[1] - one.queries.shape[1] for one in (near, far)]
    start, end = max(starts), min(near.keys.shape[1], far.keys.shape[1])
    back = []
    for one, first in zip((near, far), starts, strict=True):
        queries = one.queries[:, start - first : end - first]
        positions = one.offset + np.arange(start, end)
        back.append(queries if rotary is None else rotary.turned_back(queries, positions))
    return start < end and _same_keys(*back)


def _listed(offsets: Sequence[int]) -> str:
    return " and ".join(filter(None, (", ".join(map(str, offsets[:-1])), str(offsets[-1]))))


def _can_be_stored(head_dim: int) -> bool:
    try:
        return stored_dim(head_dim) >= head_dim
    except UnsupportedFormatError:
        return False


def _turns_so(recorded: Sequence[Recordings], layer: int, rotary: Rotary) -> bool:
    """Whether a layer's keys of the same text, near and far, are the same once turned back.

    They are not in layers that have a rope module and do not use it, or that turn keys in another way as well.
    """
    back = []
    for at_offset in recorded:
        if layer not in at_offset:
            return False
        given = at_offset[layer]
        back.append(rotary.turned_back(given.keys, given.offset + np.arange(given.keys.shape[1])))
    return len(back) > 1 and all(_same_keys(back[0], other) for other in back[1:])


def _same_keys(keys: NDArray[np.floating[Any]], others: NDArray[np.floating[Any]]) -> bool:
    """Whether keys (H, T, D) are those of the same tokens, as many as there are of both."""
    count = min(keys.shape[1], others.shape[1])
    difference = np.linalg.norm(others[:, :count] - keys[:, :count])
    return float(difference) <= _SAME_KEYS * float(np.linalg.norm(keys[:, :count]))


def _means_of(cache: Any, rotary: Rotary | None) -> Means:
    k, v = cache.keys_and_values()
    mean_k, mean_v = (np.array(x[0, :, SKIPPED_TOKENS:].astype(mx.float32).mean(axis=1)) for x in (k, v))
    if rotary is not None:
        keys = np.array(k[0, :, SKIPPED_TOKENS:].astype(mx.float32))
        positions = np.arange(SKIPPED_TOKENS, SKIPPED_TOKENS + keys.shape[1])
        mean_k = rotary.turned_back(keys, positions).mean(axis=1).astype(np.float32)
    return Means(mean_k, mean_v, rotary)


def _balanced(means: Means, rotary: Rotary, given: key_guard.Recorded) -> Means:
    """The means with factors of the layer's keys, if they gain something, and then of keys so multiplied."""
    first = SKIPPED_TOKENS
    residuals = given.keys[:, first:] - key_guard.mean_rows(means, given, first)
    weights = key_balance.attention_weights(given.logits, given.query_positions, given.hidden, first)
    factors = key_balance.find_factors(residuals, given.grouped_queries, weights, rotary)
    return means if factors is None else replace(means, k=means.k * factors, key_factors=factors)


def path_for(cache_dir: Path, weights_fingerprint: str) -> Path:
    """Where the calibration of these weights is kept."""
    return cache_dir / "calibration" / f"{weights_fingerprint}.safetensors"


def calibration_for(model: Any, tokenizer: Any, cache_dir: Path, weights_fingerprint: str) -> Calibration:
    """The stored calibration of these weights, or a new one, which is then stored.

    A damaged file is measured again and replaced; a folder that cannot be written only costs the
    measurement at the next start.
    """
    path = path_for(cache_dir, weights_fingerprint)
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
    for i, by_codec in calibration.divergences.items():
        arrays[f"{i}.divergence"] = np.array([by_codec[codec] for codec in key_guard.KEY_CODECS], np.float32)
    for i, means in calibration.layers.items():
        if means.rotary is not None:
            told = json.dumps(means.rotary.to_dict()).encode()
            arrays[f"{i}.rotary"] = np.frombuffer(told, np.uint8)
        if means.key_factors is not None:
            arrays[f"{i}.factors"] = np.ascontiguousarray(means.key_factors)
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
        _write(name, arrays, metadata)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _write(name: str, arrays: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str]) -> None:
    """Raises OSError, which MLX does not: its RuntimeError does not say why either."""
    try:
        mx.save_safetensors(name, {key: mx.array(a) for key, a in arrays.items()}, metadata)
    except RuntimeError as exc:
        is_full = shutil.disk_usage(os.path.dirname(name)).free < sum(a.nbytes for a in arrays.values())
        number = errno.ENOSPC if is_full else errno.EIO
        raise OSError(number, os.strerror(number), name) from exc


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
    try:
        return _from_arrays(values, metadata["origin"])
    except (ValueError, KeyError) as error:
        raise CalibrationFileError(f"{path}: written by another version ({error})") from error


def _from_arrays(values: Mapping[str, np.ndarray[Any, Any]], origin: str) -> Calibration:
    """What `save` made arrays of. Raises ValueError or KeyError for arrays of another version."""
    layers = sorted({int(name.split(".")[0]) for name in values})
    rotaries: dict[bytes, Rotary] = {}  # one object for all layers that turn in the same way
    means = {}
    for i in layers:
        told = values[f"{i}.rotary"].tobytes() if f"{i}.rotary" in values else None
        if told is not None and told not in rotaries:
            rotaries[told] = Rotary.from_dict(json.loads(told))
        rotary = None if told is None else rotaries[told]
        means[i] = Means(values[f"{i}.k"], values[f"{i}.v"], rotary, values.get(f"{i}.factors"))
    measured = {i: values[f"{i}.divergence"].tolist() for i in layers if f"{i}.divergence" in values}
    divergences = {i: dict(zip(key_guard.KEY_CODECS, row, strict=True)) for i, row in measured.items()}
    return Calibration(means, origin, divergences)


def _checksum(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
