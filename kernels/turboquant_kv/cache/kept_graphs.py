"""Decode steps whose graph is kept and run again, instead of being built anew by the model's Python in every step.

A small model's step on a GPU is bound by the host, half of whose time is Python that builds the same graph each time:
what changes from step to step are arrays. Here the model is traced once by `mx.compile` for a number of rows and a way
in which the work is split, over caches that attend through those arrays; later steps hand over the present ones.

Owns which steps can be run so and the graphs that are kept. What a step does to its conversations is decided as ever
(step.py), and whatever cannot be run so is left to the model as it is.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx

from turboquant_kv.backends.base import AttentionInput, StepInputs
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache
from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.protocol import AttendingCache, LayerInput, UnsupportedModelError
from turboquant_kv.cache.step import BatchStep

log = logging.getLogger(__name__)

GRAPHS_KEPT = 32
STEPS_BEFORE = 2  # of the same kind one after the other: tracing costs as much as two or three steps

Model = Any  # an mlx-lm model: model(tokens (B, T), cache=[...]) -> logits (B, T, V)
Traced = Callable[..., tuple[mx.array, list[mx.array]]]
Compiler = Callable[[Traced], Traced]


class KeptGraphs:
    """The graphs of one model's decode steps. One thread only."""

    def __init__(
        self,
        model: Model,
        compiler: Compiler = mx.compile,
        *,
        or_model: bool = False,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """compiler: what makes a traced function fast; tests hand in one that leaves it as it is.

        around: entered while the model is traced, and not where it runs a step itself.
        or_model: whether a step whose graph raises is run by the model after all, and with it all later ones. What it
        has taken it keeps, so books are those of a step without a graph.
        """
        self._model, self._compiler, self._or_model, self._around = model, compiler, or_model, around
        self.failure: Exception | None = None  # of a graph, with or_model
        self._graphs: OrderedDict[Hashable, Traced] = OrderedDict()
        self._batch: Sequence[Any] = ()  # the latest, and its caches if all steps of them can be described
        self._layers: list[BatchTurboQuantKVCache] | None = None
        self._latest_key: Hashable = None
        self._num_alike = 0  # steps of that key one after the other
        self.num_built = self.num_run = 0  # graphs, and steps that were run by them

    def forward(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        """Logits (B, T, V) of tokens (B, T) over a batch with one cache per layer, by a kept graph or by the model.

        Raises what the model raises; the conversations are as they were before the step then.
        """
        layers = self._layers_of(batch) if self.failure is None else None
        if layers is None or tokens.shape[1] != 1 or not layers[0].is_between_steps:
            return self._called(tokens, batch)
        pool = layers[0].source.pool
        assert pool is not None
        step = layers[0].begin(pool, pool.shapes[0], 1)
        try:
            key = self._key_of(step, pool, tokens)
            launched = None if key is None else self._try_launch(key, pool, tokens, batch, step)
            if launched is None:
                return self._called(tokens, batch)  # whose layers go on with the step that has begun
            self._note(launched[1], pool, layers, step)
            return launched[0]
        except BaseException:
            step.undo()
            raise

    def _called(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        logits: mx.array = self._model(tokens, cache=batch)
        return logits

    def _layers_of(self, batch: Sequence[Any]) -> list[BatchTurboQuantKVCache] | None:
        """Its caches, if they are layers of one pool and all of it."""
        if batch is not self._batch:
            self._batch, found = batch, leaves(batch)
            layers = [cache for cache in found if isinstance(cache, BatchTurboQuantKVCache)]
            pool = layers[0].source.pool if layers else None
            is_whole = pool is not None and len(layers) == len(found) and _are_layers_of(pool, layers)
            self._layers = layers if is_whole else None
        return self._layers

    def _key_of(self, step: BatchStep, pool: PagePool, tokens: mx.array) -> Hashable | None:
        """What the step's graph is kept by, if there is one or it is time to build it."""
        known = pool.backend.step_key(pool.stores, step.plan) if step.is_uniform else None
        if known is None:
            return None
        key = id(pool), tokens.shape[0], tokens.dtype, known  # whose graph keeps the pool alive
        self._num_alike = self._num_alike + 1 if key == self._latest_key else 0
        self._latest_key = key
        return key if key in self._graphs or self._num_alike >= STEPS_BEFORE else None

    def _try_launch(
        self, key: Hashable, pool: PagePool, tokens: mx.array, batch: Sequence[Any], step: BatchStep
    ) -> tuple[mx.array, list[mx.array]] | None:
        """Logits, and what the step leaves of each layer's launch; None where the model is to run the step instead."""
        try:
            return self._launch(key, pool, tokens, batch, step)
        except Exception as exc:
            if not self._or_model:
                raise
            log.warning("steps are built anew from now on: the graph of one cannot be run", exc_info=True)
            self.failure = exc.with_traceback(None)  # its frames would keep caches alive
            self._graphs.clear()
            return None

    def _launch(
        self, key: Hashable, pool: PagePool, tokens: mx.array, batch: Sequence[Any], step: BatchStep
    ) -> tuple[mx.array, list[mx.array]]:
        inputs = pool.backend.step_inputs(pool.stores, step.plan)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._compiler(self._traced(inputs.key, pool, batch))
        launched = graph(tokens, step.before.array, inputs.shared, inputs.layers)
        self._keep(key, graph)
        self.num_run += 1
        return launched

    def _note(
        self, launched: list[mx.array], pool: PagePool, layers: Sequence[BatchTurboQuantKVCache], step: BatchStep
    ) -> None:
        """All layers have written."""
        for store, one in zip(pool.stores, launched, strict=True):
            store.wrote(one)
        for cache in layers:
            cache.stepped(step)
        for cache in layers:
            step.done(cache.source.layer)

    def _keep(self, key: Hashable, graph: Traced) -> None:
        if key not in self._graphs:
            self.num_built += 1
            self._graphs[key] = graph
            if len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)

    def _traced(self, key: Hashable, pool: PagePool, batch: Sequence[Any]) -> Traced:
        """The model's step as a function of arrays alone."""
        num_layers = len(pool.stores)

        def forward(
            tokens: mx.array, offset: mx.array, shared: list[mx.array], layers: list[list[mx.array]]
        ) -> tuple[mx.array, list[mx.array]]:
            inputs = StepInputs(key, shared, layers)
            caches = [_LayerOver(inputs, pool, layer, offset) for layer in range(num_layers)]
            with self._around():
                logits: mx.array = self._model(tokens, cache=with_leaves(batch, caches))
            return logits, [cache.launched() for cache in caches]

        return forward


def _are_layers_of(pool: PagePool, caches: Sequence[BatchTurboQuantKVCache]) -> bool:
    """Whether these are all layers of a pool without a window, in order."""
    in_order = [cache.source.layer for cache in caches] == list(range(len(pool.stores)))
    return in_order and not pool.window and all(cache.source.pool is pool for cache in caches)


class _LayerOver(AttendingCache):
    """A layer of a batch while its step is traced: it attends over arrays that are the graph's inputs."""

    def __init__(self, inputs: StepInputs, pool: PagePool, layer: int, offset: mx.array) -> None:
        """offset: each row's next position, (B,) int32."""
        self._inputs, self._pool, self._layer, self.offset = inputs, pool, layer, offset
        self._launched: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As a batch's."""
        self._hold(keys, values)
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> None:
        """None for one token a row. Raises UnsupportedModelError for more, and for arrays, which depend on lengths."""
        if N != 1 or return_array or window_size is not None:
            raise UnsupportedModelError("this model asks for a mask in a decode step")

    def _attend(self, step: LayerInput) -> mx.array:
        store, shape = self._pool.stores[self._layer], self._pool.shapes[self._layer]
        if self._launched is not None or step.array_mask is not None or not shape.fits(step.keys, step.values):
            raise UnsupportedModelError("a layer of this model attends twice, with a mask, or in a geometry of its own")
        call = AttentionInput(step.queries, step.keys, step.values, step.scale, step.sinks, step.cap)
        out, self._launched = store.attend_over(self._inputs, self._layer, call)
        return out

    def launched(self) -> mx.array:
        """What the step left of the layer's launch. Raises UnsupportedModelError when there was none."""
        if self._launched is None:
            raise UnsupportedModelError("this model leaves out a layer")
        return self._launched

    def pending_arrays(self) -> list[Any]:
        return []

    def release(self) -> None:
        """Nothing is held."""
