"""Models on a CPU whose decode steps the native kernels compute in one call, from tokens to logits.

Where all decoder layers are the kernels' (native_blocks.py), what stands around them is an embedding, a norm and a
head; a model is believed to be no more than that only when it gives what these give. A step of one token a row over one
pool of compressed caches is then one call; everything else goes layer by layer. Steps of one token a row end in the
kernels' norm and head either way, so that a row has the same bits beside rows of any format.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import KVCache

from turboquant_kv.backends.native.backend import NativeStore
from turboquant_kv.backends.native.decoder import LayerToken, NativeDecoder
from turboquant_kv.cache.token_step import begin_token
from turboserve.engine.native_blocks import Floats, LayerCall, Turns
from turboserve.engine.native_linears import NativeEmbedding, NativeLinear

nn: Any = mlx.nn  # whose stubs say too little
Module = Any  # one of its modules
log = logging.getLogger(__name__)

_PARTS = {"embed_tokens", "layers", "norm"}
_NUM_TRIED = 3  # steps of two rows that are compared
_MOST_ERROR = 1e-3  # of the logits' size


class ModelCall:
    """What a model computes decode steps with."""

    def __init__(self, decoder: NativeDecoder, layers: Sequence[LayerCall], body: Module) -> None:
        """body: of the model, whose norm can be left out (`_LastNorm`)."""
        self._decoder, self._layers, self._body = decoder, list(layers), body

    def step(self, ids: npt.NDArray[np.int64], caches: Sequence[Any]) -> Floats | None:
        """Logits (B, N) after tokens (B,); None, and nothing is done, where it is no single call."""
        if len(caches) != len(self._layers):
            return None
        step = begin_token(caches, len(ids))
        if step is None:
            return None
        try:
            turned: dict[Turns, Floats] = {}
            layers = []
            for call, store, balance in zip(self._layers, step.stores, step.balances, strict=True):
                assert isinstance(store, NativeStore)
                if call.turns not in turned:
                    turned[call.turns] = call.turns.rows(step.positions)
                factors = None if balance is None else balance.factors_of(call.block.shape.num_heads)
                layers.append(LayerToken(store, turned[call.turns], call.scale, factors))
            logits = self._decoder.step(ids, step.plan, layers)
        except BaseException:
            step.undo()
            raise
        step.done()
        return logits

    def layer_by_layer(self, tokens: mx.array, caches: Sequence[Any]) -> Floats:
        """The same (B, N) after tokens (B, 1), over caches of any kind."""
        self._body.norm.is_left_out = True
        try:
            rows = self._body(tokens, caches)
        finally:
            self._body.norm.is_left_out = False
        return self._decoder.logits(np.ascontiguousarray(np.asarray(rows)[:, 0]))


class _LastNorm(nn.RMSNorm):  # type: ignore[misc]
    """A model's norm before the head, for a step in which the kernels compute both. One thread only."""

    is_left_out = False

    def __call__(self, x: mx.array) -> mx.array:
        return x if self.is_left_out else cast(mx.array, super().__call__(x))


def install_native_model(model: Any) -> bool:
    """Let the kernels compute decode steps of a model in one call; whether they do.

    Its decoder layers are the kernels' already. Compared with the model's own call over a few steps first.
    """
    body: Any = getattr(model, "model", None)
    natives = [getattr(layer, "_native", None) for layer in _layers(model)]
    layers = [native for native in natives if isinstance(native, LayerCall)]
    if not layers or len(layers) < len(natives) or not _has_structure(model, body):
        return False
    head = model.lm_head if "lm_head" in model else body.embed_tokens
    norm = body.norm.weight, float(body.norm.eps)
    try:
        decoder = NativeDecoder(body.embed_tokens.weights, [call.block for call in layers], norm, head.weights)
    except ValueError as exc:
        log.info("native decode steps: %s", exc)
        return False
    if not _is_right(model, decoder):
        log.warning("native decode steps: %s differs from its layers with a norm and a head", type(model).__name__)
        return False
    body.norm.__class__ = _LastNorm
    model._native = ModelCall(decoder, layers, body)
    cls: Any = type(model)
    model.__class__ = _native_class(cls)
    return True


@lru_cache(maxsize=32)
def _native_class(cls: type[Any]) -> type[Any]:
    """A model's class whose decode steps go to the kernels where they can take them."""

    def call(self: Any, inputs: mx.array, cache: Any = None, **more: Any) -> mx.array:
        if cache is not None and not more and inputs.ndim == 2 and inputs.shape[1] == 1:
            logits = self._native.step(np.asarray(inputs).astype(np.int64).reshape(-1), cache)
            if logits is None:
                logits = self._native.layer_by_layer(inputs, cache)
            return mx.array(logits[:, None])
        return cast(mx.array, cls.__call__(self, inputs, cache, **more))

    def fill_caches(self: Any, inputs: mx.array, cache: Any) -> None:
        """Append tokens (B, T) to caches; of a head that computes at once, nobody wants the logits."""
        self.model(inputs, cache)

    def token_logits(self: Any, ids: Sequence[int], cache: Any) -> mx.array | None:
        """(B, N) after one token of each row, computed already: MLX's thread is not woken. None as `ModelCall.step`."""
        logits = self._native.step(np.array(ids, np.int64), cache)
        return None if logits is None else mx.array(logits)

    own: dict[str, Any] = {"__call__": call, "fill_caches": fill_caches, "token_logits": token_logits}
    own |= {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), own)


def _layers(model: Module) -> list[Any]:
    return list(getattr(model, "layers", None) or ())


def _has_structure(model: Module, body: Any) -> bool:
    """Whether the modules are those of a plain model; what it does with them, `_is_right` finds out."""
    if not isinstance(body, nn.Module) or not set(body.children()) >= _PARTS:
        return False
    others = [value for name, value in body.children().items() if name not in _PARTS]
    if not all(_has_no_modules(value) for value in others):  # else words, such as which layers have windows
        return False
    if not set(model.children()) <= {"model", "lm_head"} or type(body.norm) is not nn.RMSNorm:
        return False
    has_head = "lm_head" not in model or type(model.lm_head) is NativeLinear
    return has_head and type(body.embed_tokens) is NativeEmbedding


def _has_no_modules(children: Any) -> bool:
    """Of what `Module.children` gives for an attribute."""
    if not isinstance(children, (dict, list)) or isinstance(children, nn.Module):
        return False
    return all(_has_no_modules(child) for child in (children.values() if isinstance(children, dict) else children))


def _is_right(model: Module, decoder: NativeDecoder) -> bool:
    """Whether the model's logits are those of its layers between its embedding and the decoder's norm and head."""
    layers = _layers(model)
    own, ours = [[KVCache() for _ in layers] for _ in range(2)]
    num_ids = model.model.embed_tokens.weights.num_out
    for i in range(_NUM_TRIED):
        tokens = mx.random.randint(0, num_ids, (2, 1), key=mx.random.key(i))
        wanted = model(tokens, cache=own)[:, 0]
        x = model.model.embed_tokens(tokens)
        for layer, cache in zip(layers, ours, strict=True):
            x = layer(x, None, cache)
        got = mx.array(decoder.logits(np.ascontiguousarray(np.asarray(x)[:, 0])))
        if got.shape != wanted.shape or not bool(mx.linalg.norm(got - wanted) <= _MOST_ERROR * mx.linalg.norm(wanted)):
            return False
    return True
