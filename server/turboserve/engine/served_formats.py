"""All KV formats of the loaded model as the cache memory uses them: the library's KVFamily with a default.

Adds the server's own format, errors that HTTP shows, and a look at the pages that a conversation holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray

from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.leaves import leaves
from turboquant_kv.cache.model_runtimes import CalibrationSource, KVFamily
from turboquant_kv.cache.runtime import KVRuntime, UnsupportedModelError
from turboquant_kv.cache.sequence import LayerSequence
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.format_name import PLAIN_FORMAT, UnsupportedFormatError, parse_format_name
from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.interfaces import Caches, HeldPages
from turboserve.errors import KVFormatError


class ServedFormats:
    """Implements cache.interfaces.CacheFamily for one model. Used by the engine thread only."""

    def __init__(
        self,
        model: Any,
        fmt: KVFormat | None,
        calibration: CalibrationSource = None,
        cache_dir: Path | None = None,
        backend: str = "auto",
    ) -> None:
        """`fmt` is the server's default, None for f16; other formats get its exact ends and,
        where these are not as usual, its pages.

        cache_dir: where verdicts on a GPU's kernels are remembered. backend: by its name; auto tries these kernels.
        Raises UnsupportedFormatError or UnsupportedModelError when the model cannot have it.
        """
        self.kv = KVFamily(model, calibration=calibration, base=fmt, cache_dir=cache_dir, backend=backend)
        self.default = PLAIN_FORMAT if fmt is None else fmt.name
        self.default_runtime = self.kv.runtime(self.default)
        self._calibration = self.kv.calibration if fmt is not None and fmt.centred else None

    @property
    def calibration(self) -> Calibration | None:
        """What the default format centres with; None when it does not."""
        return self._calibration

    def normalise(self, name: str) -> str:
        try:
            return parse_format_name(name)
        except UnsupportedFormatError as exc:
            raise KVFormatError(str(exc)) from exc

    def runtime(self, name: str) -> KVRuntime:
        try:
            return self.kv.runtime(name)
        except (UnsupportedFormatError, UnsupportedModelError, ValueError) as exc:
            raise KVFormatError(f"kv_format {name!r}: {exc}") from exc

    def totals(self) -> KVBytes:
        return self.kv.totals()

    def held_pages(self, caches: Caches) -> HeldPages | None:
        """Pages of the compressed layers, those of a pool under one numbering; None where nothing is compressed."""
        paged = [c.sequence for c in leaves(caches) if isinstance(c, TurboQuantKVCache) and c.sequence is not None]
        of_pools = [_pages_of(sequence) for sequence in {id(s.pool): s for s in paged}.values()]
        if not of_pools:
            return None
        return of_pools[0]._replace(others=tuple(of_pools[1:]))

    def can_cut(self, name: str) -> bool:
        return all(kind is KVCache for kind in self.kv.layers.kinds)

    def convert(self, caches: Caches, source: str, target: str) -> Caches:
        return self.kv.convert(caches, source, target)

    def fingerprints(self, name: str) -> Mapping[str, str]:
        is_plain = name == PLAIN_FORMAT  # nothing is centred, and nothing needs to be measured for it
        calibration = "" if is_plain else self.kv.calibration_fingerprint
        return {"layout": self.kv.layout_fingerprint(name), "calibration": calibration}

    def export_caches(self, caches: Caches) -> tuple[Mapping[str, Any], list[NDArray[Any]]]:
        return self.kv.export_caches(caches)

    def import_caches(self, name: str, header: Mapping[str, Any], arrays: list[NDArray[Any]]) -> Caches:
        if self.kv.saved_format(header) != name:
            raise ValueError(f"a file holds {self.kv.saved_format(header)} where {name} was saved")
        return self.kv.import_caches(header, arrays)

    def allocated_bytes(self) -> int:
        return self.kv.allocated_bytes()

    def slack_bytes(self) -> int:
        return self.kv.slack_bytes()

    def slack_by_format(self) -> dict[str, int]:
        return {name: runtime.slack_bytes() for name, runtime in self.kv.runtimes.items()}

    def trim(self, wanted_bytes: int) -> int:
        return self.kv.trim(wanted_bytes)

    def check_integrity(self) -> None:
        self.kv.check_integrity()


def _pages_of(sequence: LayerSequence) -> HeldPages:
    """Of a conversation in one pool."""
    pool, ids = sequence.pool, sequence.page_ids
    references = np.array([pool.references(int(page)) for page in ids], np.int64)
    return HeldPages(id(pool), ids, references, pool.page_bytes, sequence.first_page)
