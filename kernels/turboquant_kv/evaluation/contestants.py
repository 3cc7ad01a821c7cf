"""What takes part in an evaluation: the uncompressed caches, formats in their shipping caches, and rivals.

Owns how each one's caches are made at an offset, batched, released and counted in bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.probe import ModelLayers
from turboquant_kv.cache.runtime import KVRuntime, UnsupportedModelError
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError
from turboquant_kv.evaluation.rivals import Rival
from turboquant_kv.evaluation.shifted import shifted


class Contestant(ABC):
    """One row of the table."""

    name: str
    kind: str  # "uncompressed", "format" or "rival"
    description: str
    backend: str  # who computes attention
    batches: bool  # whether its conversations can be rows of one batch

    @abstractmethod
    def new_caches(self, shift: int) -> list[Any]:
        """One empty cache per layer, for a text whose first token stands at `shift`."""

    @abstractmethod
    def merge(self, conversations: Sequence[list[Any]]) -> list[Any]:
        """A batch over them; they stay as they are."""

    @abstractmethod
    def release(self, caches: Sequence[Any]) -> None:
        """Give memory back now."""

    @abstractmethod
    def bytes_for(self, num_tokens: int) -> int:
        """What a conversation of so many tokens allocates in all layers, exact tokens included."""


class FormatContestant(Contestant):
    """A format as it ships, or fmt None: mlx-lm's own caches."""

    def __init__(
        self, model: Any, fmt: KVFormat | None, layers: ModelLayers, calibration: Calibration | None, backend: str
    ) -> None:
        """Where the backend has no kernel for the format, the portable one computes it, and `is_elsewhere` says so.

        Raises UnsupportedFormatError and UnsupportedModelError as KVRuntime does.
        """
        self._model, self._fmt, self._layers, self._calibration = model, fmt, layers, calibration
        self._backend, self.is_elsewhere = backend, False
        try:
            runtime = self._new_runtime(0, backend)
        except UnsupportedFormatError:
            self._backend, self.is_elsewhere = portable_backend(), True
            runtime = self._new_runtime(0, self._backend)
        self._runtimes = {0: runtime}
        self.name, self.description = runtime.fmt_name, runtime.description
        self.kind = "uncompressed" if fmt is None else "format"
        self.backend = runtime.backend_name
        self.batches = runtime.try_batches().decode is None

    def _new_runtime(self, shift: int, backend: str) -> KVRuntime:
        calibration = self._calibration if self._fmt is not None and self._fmt.centred else None
        if calibration is not None and shift:
            moved = [shape is not None for shape in self._layers.shapes]
            calibration = shifted(calibration, shift, moved)
        return KVRuntime(self._model, self._fmt, calibration=calibration, backend=backend, layers=self._layers)

    def _runtime(self, shift: int) -> KVRuntime:
        if shift not in self._runtimes:
            self._runtimes[shift] = self._new_runtime(shift, self._backend)
        return self._runtimes[shift]

    def new_caches(self, shift: int) -> list[Any]:
        return self._runtime(shift).make_cache()

    def merge(self, conversations: Sequence[list[Any]]) -> list[Any]:
        return self._runtimes[0].merge_rows(conversations)

    def release(self, caches: Sequence[Any]) -> None:
        self._runtimes[0].release(caches)

    def bytes_for(self, num_tokens: int) -> int:
        return self._runtimes[0].bytes_for(num_tokens)


class RivalContestant(Contestant):
    """A rival's caches in the layers that a format would compress, mlx-lm's own in all others."""

    batches = False
    kind, backend = "rival", "mlx-lm"

    def __init__(self, model: Any, rival: Rival, layers: ModelLayers) -> None:
        """Raises UnsupportedFormatError for a layer that the rival cannot store."""
        for shape in layers.shapes:
            if shape is not None:
                rival.check(shape)
        self._model, self._rival, self._layers = model, rival, layers
        self.name, self.description = rival.name, rival.description

    def new_caches(self, shift: int) -> list[Any]:
        own = make_prompt_cache(self._model)
        pairs = zip(leaves(own), self._layers.shapes, strict=True)
        return with_leaves(own, [c if shape is None else self._rival.new_cache(shape) for c, shape in pairs])

    def merge(self, conversations: Sequence[list[Any]]) -> list[Any]:
        raise NotImplementedError(f"{self.name} has no batched form")

    def release(self, caches: Sequence[Any]) -> None:
        """Their arrays go with the last reference."""

    def bytes_for(self, num_tokens: int) -> int:
        total = sum(state.bytes_for(num_tokens) for state in self._layers.states)
        return total + sum(self._rival.bytes_for(s, num_tokens) for s in self._layers.shapes if s is not None)


def portable_backend() -> str:
    """The backend that has a kernel for every codec on this device."""
    return "cpu-numpy" if mx.default_device() == mx.Device(mx.cpu) else "mlx-ops"


def check_compressible(layers: ModelLayers) -> None:
    """Raises UnsupportedModelError for a model without a layer that could be compressed."""
    if layers.unsupported is not None:
        raise UnsupportedModelError(layers.unsupported)
    if not any(layers.shapes):
        raise UnsupportedModelError("this model has no ordinary attention layer, so there is nothing to compress")
