"""Position by position: what a model predicts over compressed caches beside what it predicts over uncompressed ones.

Teacher-forced through the path that serves: a prompt in chunks, tokens one by one, or several conversations as rows of
one batch. A figure therefore needs no labels and few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.cache.protocol import AttendingCache

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
    for chunk in chunks(tokens, len(tokens) - 1, chunk_tokens):
        following = mx.array(list(tokens[chunk.start + 1 : chunk.stop + 1]))
        expected = log_probabilities(model, [tokens[chunk]], base)[0]
        for name, caches in candidates.items():
            got = log_probabilities(model, [tokens[chunk]], caches)[0]
            parts[name].append(compared(expected, got, following))
    return {name: Comparison.joined(of_name) for name, of_name in parts.items()}


def chunks(tokens: Sequence[int], num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """The first `num_tokens` of the tokens, in pieces."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def log_probabilities(model: Any, rows: Sequence[Sequence[int]], caches: list[Any]) -> mx.array:
    """(B, T, V) float32 of the next token after each of B rows of T tokens; the caches have nothing pending."""
    logits = model(mx.array([list(row) for row in rows]), cache=caches).astype(mx.float32)
    out: mx.array = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(out)
    settle(caches)
    return out


def settle(caches: Sequence[Any]) -> None:
    """Finish pending work on caches, so that no lazy graph outlives a step."""
    for cache in caches:
        if isinstance(cache, AttendingCache):
            cache.evaluate()
        else:
            mx.eval(cache.state)


def compared(expected: mx.array, got: mx.array, following: mx.array) -> Comparison:
    """expected, got (T, V): log-probabilities without and with compression; following (T,): the text's next tokens."""
    kl = (mx.exp(expected) * (expected - got)).sum(axis=-1)
    nll, base_nll = (-mx.take_along_axis(x, following[:, None], axis=-1)[:, 0] for x in (got, expected))
    flips = mx.argmax(expected, axis=-1) != mx.argmax(got, axis=-1)
    likelihoods = np.array(nll, np.float64), np.array(base_nll, np.float64)
    return Comparison(np.array(kl, np.float64), *likelihoods, np.array(flips))
