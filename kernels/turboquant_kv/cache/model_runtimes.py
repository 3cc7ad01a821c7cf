"""KVFamily: one loaded model whose conversations are kept in several formats at once.

Owns one KVRuntime per format, made when it is first asked for; the model is probed once, and its means
are measured once. Everything counted here is counted over all formats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy.typing as npt

from turboquant_kv.cache import convert as converting
from turboquant_kv.cache import serialise as exporting
from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.leaves import leaves
from turboquant_kv.cache.probe import probe_layers
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.format_name import PLAIN_FORMAT, parse_format_name
from turboquant_kv.codec.registry import scalar_tables
from turboquant_kv.kv_bytes import KVBytes

# Changes whenever stored pages mean something else although no field of KVFormat does.
CODEC_VERSION = 2
# A pool is copied to give an eighth back: each page then moves at most seven times as often as one is freed.
WORTHWHILE_SLACK = 1 / 8

CalibrationSource = Calibration | Callable[[], Calibration] | None


class KVFamily:
    """The runtimes of one model. They differ in bits only: pages, sink and rotation are `base`'s."""

    def __init__(
        self,
        model: Any,
        *,
        calibration: CalibrationSource = None,
        backend: str = "auto",
        base: KVFormat | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """calibration: the means, or a function that measures them when the first format needs them.

        cache_dir: where verdicts on a GPU's kernels are remembered.
        """
        self._model, self._backend, self._cache_dir = model, backend, cache_dir
        self._calibration: CalibrationSource = calibration
        self._base = base if base is not None else KVFormat()
        self._runtimes: dict[str, KVRuntime] = {}
        self.layers = probe_layers(model)

    @staticmethod
    def normalise(name: str) -> str:
        """The one spelling of a format's name: `4` is `4/4`. Raises UnsupportedFormatError."""
        return parse_format_name(name)

    def runtime(self, name: str) -> KVRuntime:
        """The runtime of a format such as `4/3` or `f16`.

        Raises UnsupportedFormatError for a name that is none, UnsupportedModelError when this model
        cannot be compressed.
        """
        name = self.normalise(name)
        if name not in self._runtimes:
            self._runtimes[name] = self._new_runtime(name)
        return self._runtimes[name]

    def _new_runtime(self, name: str) -> KVRuntime:
        if name == PLAIN_FORMAT:
            return KVRuntime(self._model, None, layers=self.layers)
        fmt = self._base.with_usual_pages(name)
        is_wanted = fmt.centred and self.layers.unsupported is None  # else the runtime says why there is none
        calibration = self.calibration if is_wanted else None
        return KVRuntime(
            *(self._model, fmt),
            calibration=calibration,
            backend=self._backend,
            layers=self.layers,
            cache_dir=self._cache_dir,
        )

    @property
    def calibration(self) -> Calibration | None:
        """The means; measured now if they have not been."""
        if callable(self._calibration):
            self._calibration = self._calibration()
        return self._calibration

    @property
    def runtimes(self) -> Mapping[str, KVRuntime]:
        """Those made so far, by name."""
        return MappingProxyType(self._runtimes)

    def runtime_of(self, caches: Sequence[Any]) -> KVRuntime:
        """The runtime that one conversation's caches belong to."""
        for cache in leaves(caches):
            if isinstance(cache, TurboQuantKVCache):
                return self._runtimes[cache.source.fmt.name]
        return self.runtime(PLAIN_FORMAT)

    def convert(self, caches: Sequence[Any], source: str, target: str) -> list[Any]:
        """The same tokens in another format; `caches`, of format `source`, stay as they are.

        Pages are decoded and encoded again, in bounded pieces; exact ends are kept, and so are the codes
        of a side whose bits do not change. Lossy whenever the target has fewer bits.
        """
        formats = {c.source.fmt.name for c in leaves(caches) if isinstance(c, TurboQuantKVCache)}
        if formats - {self.normalise(source)}:
            raise ValueError(f"these caches are {formats}, not {source}")
        return converting.convert(caches, self.runtime(target).make_cache())

    def export_caches(self, caches: Sequence[Any]) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
        """One conversation as a JSON-able header and NumPy arrays (serialise.py)."""
        return exporting.export_caches(caches)

    def import_caches(self, header: Mapping[str, Any], arrays: Sequence[npt.NDArray[Any]]) -> list[Any]:
        """Inverse of export_caches, in the format that the header names.

        Raises ValueError for anything inconsistent.
        """
        return self.runtime(self.saved_format(header)).import_caches(header, arrays)

    @staticmethod
    def saved_format(header: Mapping[str, Any]) -> str:
        """Name of the format in which a header's caches were saved. Raises ValueError."""
        fmt = header.get("format")
        if fmt is None:
            return PLAIN_FORMAT
        return KVFormat.from_dict(fmt).name

    def totals(self) -> KVBytes:
        """Of all compressed layers, formats and conversations together, shared pages and rows once."""
        return sum((runtime.totals() for runtime in self._runtimes.values()), KVBytes())

    def allocated_bytes(self) -> int:
        """Everything that the pools of all formats hold."""
        return sum(runtime.allocated_bytes() for runtime in self._runtimes.values())

    def unique_bytes(self) -> int:
        """Pages and exact rows in use, shared ones once."""
        return sum(runtime.unique_bytes() for runtime in self._runtimes.values())

    def slack_bytes(self) -> int:
        """Held for pages and exact rows that nobody uses."""
        return sum(runtime.slack_bytes() for runtime in self._runtimes.values())

    def trim(self, wanted_bytes: int | None = None) -> int:
        """Give memory of unused pages and exact rows back, at least `wanted_bytes` if there is so much; tells how much.

        Formats that nobody uses any more cost nothing to empty and go first; others are copied, those with
        most slack for the copy first. Without a number, only those whose slack is worth a copy, and only
        where something else could want it.
        """
        given = 0
        for runtime in sorted(self._runtimes.values(), key=lambda r: r.unique_bytes() / max(1, r.slack_bytes())):
            is_wanted = self._is_worth_a_copy(runtime) if wanted_bytes is None else given < wanted_bytes
            if is_wanted and runtime.slack_bytes():
                given += runtime.trim()
        return given

    def _is_worth_a_copy(self, runtime: KVRuntime) -> bool:
        totals = runtime.totals()
        is_alone = len(self._runtimes) == 1 and runtime.is_compressed_throughout  # then slack serves its own sequences
        used = totals.compressed + totals.exact
        return not used or (not is_alone and totals.slack >= WORTHWHILE_SLACK * (totals.slack + used))

    def check_integrity(self) -> None:
        """Raises PageAccountingError when a pool's books do not agree."""
        for runtime in self._runtimes.values():
            runtime.check_integrity()

    @property
    def fingerprint(self) -> str:
        """Stable hash of all that gives stored caches their meaning, the weights excepted.

        Codec tables, rotation, pages, means, and what each layer keeps. A cache saved under another
        fingerprint must not be loaded.
        """
        digest = hashlib.sha256()
        self._add_layout(digest, self._common)
        self._add_calibration(digest)
        return digest.hexdigest()[:32]

    def layout_fingerprint(self, name: str) -> str:
        """The part of `fingerprint` that is no measurement: the same for a model and format wherever it runs.

        Raises UnsupportedFormatError for a name that is none.
        """
        name = self.normalise(name)
        digest = hashlib.sha256()
        self._add_layout(digest, self._common if name == PLAIN_FORMAT else self._base.with_usual_pages(name))
        return digest.hexdigest()[:32]

    @property
    def _common(self) -> KVFormat:
        """What all formats here have in common, whichever of them is the default: pages of some are longer."""
        return self._base.with_usual_pages("8/8")

    @property
    def calibration_fingerprint(self) -> str:
        """The part of `fingerprint` that was measured, and may differ between two machines."""
        digest = hashlib.sha256()
        self._add_calibration(digest)
        return digest.hexdigest()[:32]

    def _add_layout(self, digest: hashlib._Hash, fmt: KVFormat) -> None:
        without_codecs = fmt.with_codecs("8/8").to_dict()  # every cache names its own
        digest.update(json.dumps([CODEC_VERSION, without_codecs], sort_keys=True).encode())
        digest.update(scalar_tables())
        for kind, shape in zip(self.layers.kinds, self.layers.shapes, strict=True):
            digest.update(f"{kind.__name__}:{shape};".encode())
        if any(self.layers.windows):
            digest.update(repr(self.layers.windows).encode())

    def _add_calibration(self, digest: hashlib._Hash) -> None:
        calibration = self.calibration if self._base.centred and self.layers.unsupported is None else None
        for i, means in sorted(calibration.layers.items()) if calibration is not None else ():
            turn = "" if means.rotary is None else means.rotary.fingerprint()
            digest.update(f"{i}:{turn}:".encode() + means.k.tobytes() + means.v.tobytes())
            if means.key_factors is not None:
                digest.update(b"factors:" + means.key_factors.tobytes())
        if calibration is not None and calibration.divergences:  # they decide which layers get more bits
            digest.update(repr(sorted((i, sorted(d.items())) for i, d in calibration.divergences.items())).encode())
