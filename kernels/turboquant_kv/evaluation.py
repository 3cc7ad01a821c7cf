"""What a KV format costs in quality: the same model over the same tokens, with compressed caches and without.

Teacher-forced through the path that serves: the prompt in chunks, or token by token as decoding does it. Everything is
compared position by position with the uncompressed run, so a figure needs no labels and few tokens. Owns the
comparison; texts, formats and how results are shown are the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One format over one text, position by position; the first position has no figures.

    kl (T,): nats from the uncompressed next-token distribution to the compressed one; nll, base_nll (T,): negative
    log-likelihood of the text's next token, compressed and not; flips (T,): whether the likeliest token differs.
    """

    kl: Floats
    nll: Floats
    base_nll: Floats
    flips: npt.NDArray[np.bool_]

    @property
    def perplexity_ratio(self) -> float:
        """Compressed over uncompressed."""
        return float(np.exp(self.nll.mean() - self.base_nll.mean()))

    @classmethod
    def joined(cls, parts: Sequence[Comparison]) -> Comparison:
        """Several texts as one."""
        return cls(
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.nll for part in parts]),
            np.concatenate([part.base_nll for part in parts]),
            np.concatenate([part.flips for part in parts]),
        )


def compare(
    model: Any, tokens: Sequence[int], base: list[Any], candidates: Mapping[str, list[Any]], chunk_tokens: int = 256
) -> dict[str, Comparison]:
    """Run `tokens` through the model with each set of empty caches; base: the uncompressed ones.

    chunk_tokens: fed at once; 1 is decoding. Memory for two chunks of logits is needed.
    """
    parts: dict[str, list[Comparison]] = {name: [] for name in candidates}
    for start in range(0, len(tokens) - 1, chunk_tokens):
        chunk = list(tokens[start : start + chunk_tokens])
        following = np.array(tokens[start + 1 : start + 1 + len(chunk)])
        expected = _log_probabilities(model, chunk, base)[: len(following)]
        for name, caches in candidates.items():
            got = _log_probabilities(model, chunk, caches)[: len(following)]
            parts[name].append(_compared(expected, got, mx.array(following)))
    return {name: Comparison.joined(of_name) for name, of_name in parts.items()}


def _log_probabilities(model: Any, tokens: list[int], caches: list[Any]) -> mx.array:
    """(T, V) float32."""
    logits = model(mx.array([tokens]), cache=caches)[0].astype(mx.float32)
    out: mx.array = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(out, [cache.state for cache in caches if not hasattr(cache, "attend")])
    return out


def _compared(expected: mx.array, got: mx.array, following: mx.array) -> Comparison:
    kl = (mx.exp(expected) * (expected - got)).sum(axis=-1)
    nll, base_nll = (-mx.take_along_axis(x, following[:, None], axis=-1)[:, 0] for x in (got, expected))
    flips = mx.argmax(expected, axis=-1) != mx.argmax(got, axis=-1)
    likelihoods = np.array(nll, np.float64), np.array(base_nll, np.float64)
    return Comparison(np.array(kl, np.float64), *likelihoods, np.array(flips))
