"""The model's forward passes, as the runner asks for them: some only fill caches, of others the logits are read.

A model divided among ranks has passes of its own (distributed/leading_passes.py), which every rank takes part in.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from turboquant_kv.cache.rows_apart import Around, forward
from turboserve.engine.graph_choice import GraphChoice, try_graphs

Model = Any  # an mlx-lm model: model(tokens (B, T), cache=[...]) -> logits (B, T, V)


class Passes(Protocol):
    """Lazy: whoever asks evaluates caches or logits."""

    def fill(self, tokens: list[list[int]], caches: list[Any]) -> None:
        """Append tokens (B, T) to caches; nobody reads the logits."""
        ...

    def logits(self, tokens: list[list[int]], batch: list[Any], around: Around) -> mx.array:
        """(B, T, V) after each of tokens (B, T). around: as `rows_apart.forward` has it."""
        ...

    def token_logits(self, tokens: list[list[int]], batch: list[Any], around: Around) -> mx.array:
        """(B, V) after one token of each row, tokens (B, 1)."""
        ...

    def logits_of_drawn(self, tokens: mx.array, batch: list[Any], around: Around) -> mx.array:
        """(B, 1, V) after tokens (B, 1) that were drawn on the device and are not read yet."""
        ...

    def try_graphs(self, batch: list[Any], num_rows: int, wanted: str) -> GraphChoice:
        """Whether decode steps keep graphs, as graph_choice.try_graphs has it: those of the choice, or their own."""
        ...

    @property
    def graphs_failure(self) -> Exception | None:
        """What ended the use of kept graphs that had been chosen; this process's own."""
        ...

    def note_device_failure(self) -> None:
        """Evaluation failed, and caches are about to be computed again. Raises where that cannot be."""
        ...


class OwnPasses:
    """Of a model that this process has all of."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def fill(self, tokens: list[list[int]], caches: list[Any]) -> None:
        fill_caches = getattr(self.model, "fill_caches", None)  # of a model whose head would compute at once
        (fill_caches or self.model)(mx.array(tokens), cache=caches)

    def logits(self, tokens: list[list[int]], batch: list[Any], around: Around) -> mx.array:
        return forward(self.model, mx.array(tokens), batch, around)

    def token_logits(self, tokens: list[list[int]], batch: list[Any], around: Around) -> mx.array:
        of_kernels = getattr(self.model, "token_logits", None)  # of a model whose steps are one call
        if of_kernels is not None:
            with around(range(len(tokens))):
                found: mx.array | None = of_kernels([row[0] for row in tokens], batch)
            if found is not None:
                return found
        return self.logits(tokens, batch, around)[:, -1, :]

    def logits_of_drawn(self, tokens: mx.array, batch: list[Any], around: Around) -> mx.array:
        return forward(self.model, tokens, batch, around)

    def try_graphs(self, batch: list[Any], num_rows: int, wanted: str) -> GraphChoice:
        return try_graphs(self.model, batch, num_rows, wanted)

    @property
    def graphs_failure(self) -> Exception | None:
        return None  # a graph that raises fails its step, as the model would

    def note_device_failure(self) -> None:
        """Caches are computed again."""
