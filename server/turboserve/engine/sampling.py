"""From one row of logits to its next token, the same alone as in a batch.

Order of operations, as in Hugging Face and vLLM: logit bias, repetition penalty (prompt and
answer), presence and frequency penalties (answer only), temperature, top-k, top-p, min-p.

Each row owns its random key, split once per token, so a seed gives the same draws whoever else
is in the batch. Rows that just want the likeliest token share one batched argmax (runner).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from turboserve.errors import InvalidRequestError
from turboserve.messages import SamplingParams

MASKED = -float("inf")
_KEY_MASK = (1 << 64) - 1  # mx.random.key takes an unsigned 64-bit seed


class RowSampler:
    """Sampling state of one sequence: its key and the tokens that penalties look at."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_len: int) -> None:
        """Raises InvalidRequestError when logit_bias names a token the model does not have."""
        self._params = params
        self._vocab_len = vocab_len
        self._bias = _bias_arrays(params.logit_bias, vocab_len)
        self._counts: dict[int, int] = {}
        self._repeated = set(prompt) if params.repetition_penalty != 1.0 else set[int]()
        self._repeated_ids: mx.array | None = None  # built when needed, dropped when the set grows
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        self._key = mx.random.key(seed & _KEY_MASK)

    @property
    def is_plain_greedy(self) -> bool:
        """True when the next token is the largest raw logit."""
        p = self._params
        return p.temperature == 0.0 and self._bias is None and not self._has_penalties

    @property
    def _has_penalties(self) -> bool:
        p = self._params
        return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0)

    def sample(self, logits: mx.array) -> mx.array:
        """Lazily draws one token id (scalar uint32) from `logits` (V,); advances the key."""
        logits = self._adjust(logits.astype(mx.float32))
        if self._params.temperature == 0.0:
            return mx.argmax(logits)
        self._key, key = mx.random.split(self._key)
        return draw(logits / self._params.temperature, key, self._params)

    def accept(self, token: int) -> None:
        """Counts a drawn token for the penalties of the following ones."""
        if not self._has_penalties:
            return
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._params.repetition_penalty != 1.0 and token not in self._repeated:
            self._repeated.add(token)
            self._repeated_ids = None

    def _adjust(self, logits: mx.array) -> mx.array:
        if self._bias is not None:
            ids, values = self._bias
            logits = logits.at[ids].add(values)
        if self._repeated:
            logits = self._penalise_repeated(logits)
        if self._counts and (self._params.presence_penalty or self._params.frequency_penalty):
            ids = mx.array(np.fromiter(self._counts.keys(), np.uint32))
            counts = mx.array(np.fromiter(self._counts.values(), np.float32))
            logits = logits.at[ids].subtract(self._params.presence_penalty + self._params.frequency_penalty * counts)
        return logits

    def _penalise_repeated(self, logits: mx.array) -> mx.array:
        if self._repeated_ids is None:
            inside = [t for t in self._repeated if t < self._vocab_len]
            self._repeated_ids = mx.array(np.array(inside, np.uint32))
        chosen = logits[self._repeated_ids]
        penalty = self._params.repetition_penalty
        logits[self._repeated_ids] = mx.where(chosen < 0, chosen * penalty, chosen / penalty)
        return logits


def draw(logits: mx.array, key: mx.array, params: SamplingParams) -> mx.array:
    """One token id from logits (V,) already divided by the temperature, after top-k, top-p and min-p.

    The likeliest token always stays. Ties at a cut are broken by sort order.
    """
    if params.min_p > 0.0:
        floor = mx.max(logits) + float(np.log(params.min_p))
        logits = mx.where(logits < floor, MASKED, logits)
    cuts_tail = params.top_k > 0 or params.top_p < 1.0
    if not cuts_tail:
        return mx.random.categorical(logits, key=key)
    order = mx.argsort(-logits)  # (V,) token ids, likeliest first
    ranked = logits[order]
    return order[mx.random.categorical(_cut_tail(ranked, params), key=key)]


def _cut_tail(ranked: mx.array, params: SamplingParams) -> mx.array:
    """`ranked`: logits (V,) in falling order; masks what top-k and top-p leave out."""
    rank = mx.arange(ranked.shape[0])
    if params.top_k > 0:
        ranked = mx.where(rank < params.top_k, ranked, MASKED)
    if params.top_p < 1.0:
        probs = mx.softmax(ranked)
        mass_before = mx.cumsum(probs, inclusive=False)
        ranked = mx.where((mass_before < params.top_p) | (rank == 0), ranked, MASKED)
    return ranked


def _bias_arrays(bias: Sequence[tuple[int, float]], vocab_len: int) -> tuple[mx.array, mx.array] | None:
    if not bias:
        return None
    for token, _ in bias:
        if not 0 <= token < vocab_len:
            raise InvalidRequestError(
                f"logit_bias names token {token}, but this model's tokens go from 0 to {vocab_len - 1}.",
                param="logit_bias",
            )
    merged = dict(bias)
    return mx.array(np.fromiter(merged.keys(), np.uint32)), mx.array(np.fromiter(merged.values(), np.float32))
