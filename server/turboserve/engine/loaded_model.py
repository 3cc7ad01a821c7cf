"""A loaded model, and with it all that serving it needs: the runtime of its caches and their memory. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from turboquant_kv.cache.trial import Verdict
from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.memory import Memory
from turboserve.engine.adapters import NO_ADAPTERS, Adapters
from turboserve.engine.evaluating_runtime import EvaluatingRuntime
from turboserve.engine.passes import Passes
from turboserve.engine.progress import Progress
from turboserve.engine.speculation_model import DraftModel
from turboserve.messages import FormatQuality, SamplingParams


class CompiledAhead(Protocol):
    """What a start compiles for the device, beside loading and by itself (ahead/start.py)."""

    def finish(self, progress: Progress, warmed_s: float) -> None:
        """The server is warm: tell how much it had to compile by itself."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory with all that serving it needs."""

    model: Any
    tokenizer: Any  # mlx-lm's TokenizerWrapper
    model_id: str
    dtype: str  # of activations and of uncompressed caches, e.g. "float32"
    max_context: int  # prompt and answer together, in tokens
    weights_bytes: int  # as they are in memory, adapters included
    weights_fingerprint: str
    eos_ids: frozenset[int]
    tokenizer_fingerprint: str = ""
    sampling_defaults: SamplingParams = field(
        default_factory=SamplingParams
    )  # of the model's own generation_config.json
    details: Mapping[str, str] = field(default_factory=dict)
    adapters: Adapters = NO_ADAPTERS
    choices: tuple[str, ...] = ()  # of trials at load, whose other outcomes would round otherwise
    prompt_block: int = 1  # tokens that a prompt is read in multiples of, so that its bits depend on nothing else


class ServingRuntime(EvaluatingRuntime, Protocol):
    """What the engine uses of `turboquant_kv.cache.runtime.KVRuntime`: caches of the server's own format."""

    backend_name: str
    layers_compressed: int
    layers_uncompressed: int
    verdict: Verdict | None  # on the device's fused kernels, where they were tried

    @property
    def description(self) -> str:
        """The format, with what deviates from it in some layers."""
        ...

    def allocated_bytes(self) -> int:
        """Bytes of everything the pools hold: pages in use or not, and exact rows."""
        ...

    def slack_bytes(self) -> int:
        """Bytes that the pools hold for pages that no sequence uses."""
        ...

    @property
    def token_raw_bytes(self) -> float:
        """Bytes that one token would take in all layers, uncompressed in the model's dtype."""
        ...

    @property
    def chunk_token_bytes(self) -> float:
        """Bytes of one token of a prompt's chunk while it is being read: exact in every layer."""
        ...

    @property
    def tail_bytes(self) -> float:
        """Most bytes of one conversation's exact rows behind its pages."""
        ...

    def totals(self) -> KVBytes:
        """Bytes of all conversations in compressed layers; what they share counts once."""
        ...


class DividedRun(Protocol):
    """What the engine tells the other ranks of a model that is divided among several processes."""

    @property
    def line(self) -> str:
        """How many ranks there are, and what was compared between them."""
        ...

    def after_step(self) -> None:
        """Have every rank compare its books with this one's. Raises where the run is over."""
        ...

    def close(self) -> None:
        """The others end, in order."""
        ...


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A model ready to serve. Built by the engine's own thread, and used by it alone."""

    loaded: LoadedModel
    runtime: ServingRuntime
    memory: Memory
    details: Mapping[str, str] = field(default_factory=dict)
    draft: DraftModel | None = None  # guesses tokens for the model
    quality: tuple[FormatQuality, ...] = ()  # what was measured of formats on this model
    passes: Passes | None = None  # through a model divided among ranks; None: this process has all of it
    divided: DividedRun | None = None
    compiled: CompiledAhead | None = None  # what this start compiles; None: MLX keeps nothing compiled here
