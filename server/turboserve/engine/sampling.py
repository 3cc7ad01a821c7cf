"""From a batch of logits to its next tokens, in one lazy computation; a row draws the same alone and in any batch.

Order of operations: logit bias, repetition penalty (prompt and answer), presence and frequency penalties (answer only),
tokens that would come too early, mask, temperature, min-p, top-k, top-p. The likeliest token always stays; of equally
likely ones the lowest id is first.

A draw depends on the row's logits, its seed and the token's place in the answer, and on nothing else:
one number of 32 bits is hashed from seed and place on the host, and finds the token in the running sum of the row's
weights. Weights are whole numbers, softmax in units of about 2^-31, so their sums are exact in whatever order a device
adds them. One number for each row is also much cheaper than one for each token (Gumbel noise, `mx.random.categorical`):
on a CPU noise for 150K tokens takes 1.5 ms, the running sum 0.1 ms.

Top-k sorts only the k blocks of ids with the largest maxima, in which the k likeliest tokens lie; top-p after it cuts
in that order. Top-p alone sorts nothing: it searches its threshold in steps of 1/256 octave of probability, with 13
sums over the vocabulary. Tokens up to one step (0.27%) below the last one that it needs count as tied with that and are
kept; 16-bit logits are coarser than that.

Rows that do not need a part of this do not pay for it: greedy rows take an argmax, penalties have counts only for rows
that have penalties. What bias, penalties and masks leave, the native kernels draw on a CPU (native_draw.py), and one
kernel on a GPU, but for rows with top-k (fused_draw.py).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboserve.engine.fused_draw import FusedDraw, fused_draw
from turboserve.engine.native_draw import NativeDraw
from turboserve.engine.weighted_draw import (
    MASKED,
    draw_weighted,
    find,
    likeliest,
    needed_for,
    random_numbers,
    softmax_weights,
)
from turboserve.errors import InvalidRequestError
from turboserve.messages import SamplingParams

MIN_TEMPERATURE = 1e-6  # below it the inverse could overflow; only exact ties are left to chance there
CPU_CHUNK = 1 << 16  # logits that a CPU works on at once: passes over more of them leave its cache
_SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class RowSampling:
    """What one sequence asks for, checked, and its seed, which is drawn once when the request has none."""

    params: SamplingParams
    seed: int  # 64 bits, unsigned
    vocab_len: int
    bias: tuple[tuple[int, float], ...]  # at most one value a token
    num_top: int | None = None  # logprobs: None: none; n: of the drawn token and of the n likeliest
    barred: tuple[int, ...] = ()  # tokens that are not drawn...
    barred_until: int = 0  # ...before this place in the answer

    @property
    def has_penalties(self) -> bool:
        p = self.params
        return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0)


def row_sampling(
    params: SamplingParams,
    vocab_len: int,
    *,
    num_top: int | None = None,
    barred: Sequence[int] = (),
    barred_until: int = 0,
) -> RowSampling:
    """See RowSampling. Raises InvalidRequestError when logit_bias names a token the model does not have."""
    for token, _ in params.logit_bias:
        if not 0 <= token < vocab_len:
            raise InvalidRequestError(
                f"logit_bias names token {token}, but this model's tokens go from 0 to {vocab_len - 1}.",
                param="logit_bias",
            )
    seed = params.seed if params.seed is not None else secrets.randbits(64)
    bias = tuple(dict(params.logit_bias).items())
    return RowSampling(params, seed & _SEED_MASK, vocab_len, bias, num_top, tuple(barred), barred_until)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of R rows that ask for them: natural logarithms of the model's own probabilities, softmax of the logits as the
    model gave them, before bias, penalties, mask and temperature, so they do not depend on how a token was drawn."""

    places: Sequence[int]  # (R,) of the batch's rows
    num_top: Sequence[int]  # (R,): how many each of them asks for, of the n that are here
    drawn: mx.array  # (R,) float32, of the drawn tokens
    top_ids: mx.array  # (R, n) uint32, likeliest first
    top: mx.array  # (R, n) float32


@dataclass(frozen=True, slots=True)
class Draws:
    """Results of one step: unevaluated arrays, or NumPy's where they were drawn at once."""

    tokens: mx.array | npt.NDArray[np.uint32]  # (B,) uint32
    # (B,) bool: the token means nothing, for NaN or +inf among the logits, or none was possible
    is_broken: mx.array | npt.NDArray[np.bool_]
    logprobs: Logprobs | None  # None where no row asks for them

    def arrays(self) -> list[mx.array]:
        """All that is to be evaluated; it may be nothing."""
        more = [] if self.logprobs is None else [self.logprobs.drawn, self.logprobs.top_ids, self.logprobs.top]
        return [x for x in (self.tokens, self.is_broken, *more) if isinstance(x, mx.array)]


class BatchSampler:
    """Parameters and penalty counts of the rows that are decoded together, in the batch's order."""

    def __init__(self) -> None:
        self._rows: list[RowSampling] = []
        self._places = np.zeros(0, np.uint64)  # (B,) place in the answer of each row's next token
        self._counts: mx.array | None = None  # (P, V) float32: of rows with penalties, how often the answer has a token
        self._in_prompt: mx.array | None = None  # (P, V) bool
        self._plan: _Plan | None = None  # of the present rows

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def join(self, row: RowSampling, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Add a row behind the others, at its answer's next token."""
        if row.has_penalties:
            counts, in_prompt = _occurrences(answer, row.vocab_len), _occurrences(prompt, row.vocab_len) > 0
            self._counts = _stacked(self._counts, mx.array(counts[None]))
            self._in_prompt = _stacked(self._in_prompt, mx.array(in_prompt[None]))
        self._rows.append(row)
        self._places = np.append(self._places, np.uint64(len(answer)))
        self._plan = None

    def keep(self, indices: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        if self._counts is not None and self._in_prompt is not None:
            penalised = {row: i for i, row in enumerate(_where(self._rows, lambda row: row.has_penalties))}
            left = mx.array([penalised[i] for i in indices if i in penalised], dtype=mx.uint32)
            self._counts = self._counts[left] if left.size else None
            self._in_prompt = self._in_prompt[left] if left.size else None
        self._rows = [self._rows[i] for i in indices]
        self._places = self._places[list(indices)]
        self._plan = None

    def sample(self, logits: mx.array, *, mask: mx.array | None = None, masked: Sequence[int] | None = None) -> Draws:
        """The next token of every row, not evaluated: the next step can be built on it at once.

        logits   (B, V) of any floating dtype; left alone
        mask     (B, ceil(V / 32)) uint32: bit i of word w allows token 32 w + i; or (B, V) float32 that is added to the
                 logits: 0 allows a token, minus infinity does not
        masked   when given, the mask is of these R rows alone, in rising order

        The drawn tokens are counted for the penalties of the following step.
        """
        assert logits.shape[0] == len(self._rows), (logits.shape, len(self._rows))
        if self._plan is None:
            self._plan = _Plan(self._rows)
        plan = self._plan
        raw = logits.astype(mx.float32)
        adjusted = self._adjusted(raw, plan)
        early = plan.early(self._places)
        if early is not None:
            adjusted = adjusted.at[early].add(MASKED)
        if mask is not None and mask.size:
            adjusted = _masked(adjusted, mask, masked)
        numbers = random_numbers(plan.seeds, self._places)
        draws = self._draws(logits, raw, adjusted, numbers, plan)
        self._places = self._places + np.uint64(1)
        if self._counts is None and not plan.asking:
            return draws
        tokens = draws.tokens if isinstance(draws.tokens, mx.array) else mx.array(draws.tokens)
        if self._counts is not None:
            drawn = tokens[plan.penalised]
            self._counts = self._counts.at[mx.arange(drawn.size), drawn].add(1.0)
        return replace(draws, logprobs=self._logprobs(raw, tokens, plan)) if plan.asking else draws

    def _draws(
        self, logits: mx.array, raw: mx.array, adjusted: mx.array, numbers: npt.NDArray[np.uint32], plan: _Plan
    ) -> Draws:
        """From logits as the model gave them, the same (B, V) in float32, and what bias, penalties and masks left."""
        if plan.native is not None:
            drawn, means_nothing = plan.native.draw(adjusted, numbers)
            if adjusted is not raw:  # a mask may hide a NaN
                means_nothing |= np.isnan(np.asarray(raw)).any(axis=-1)
            return Draws(drawn, means_nothing, None)
        tokens, is_broken = plan.draw(logits if adjusted is raw else adjusted, numbers)
        return Draws(tokens, is_broken if adjusted is raw else is_broken | _has_nan(raw), None)

    def _logprobs(self, raw: mx.array, tokens: mx.array, plan: _Plan) -> Logprobs:
        """Of the rows that ask for them, from all rows' logits (B, V) and drawn tokens (B,)."""
        if len(plan.asking) < len(self._rows):
            asking = mx.array(plan.asking, dtype=mx.uint32)
            raw, tokens = raw[asking], tokens[asking]
        norm = mx.logsumexp(raw, axis=-1, keepdims=True)
        drawn = mx.take_along_axis(raw, tokens[:, None], axis=-1) - norm
        most = min(max(plan.num_top), raw.shape[-1])
        ids, values = likeliest(raw, most) if most else (mx.zeros((tokens.size, 0), mx.uint32), norm[:, :0])
        return Logprobs(plan.asking, plan.num_top, drawn[:, 0], ids, values - norm)

    def _adjusted(self, logits: mx.array, plan: _Plan) -> mx.array:
        """Logits (B, V) after bias and penalties."""
        if plan.bias is not None:
            rows, ids, values = plan.bias
            logits = logits.at[rows, ids].add(values)
        if self._counts is None or self._in_prompt is None:
            return logits
        all_penalised = len(self._rows) == plan.penalised.size
        x, counts = logits if all_penalised else logits[plan.penalised], self._counts
        if plan.has_repetition:
            is_repeated = self._in_prompt | (counts > 0)
            x = mx.where(is_repeated, mx.where(x < 0, x * plan.repetition, x / plan.repetition), x)
        if plan.has_subtraction:
            x = x - (mx.minimum(counts, 1.0) * plan.presence + counts * plan.frequency)
        if all_penalised:
            return x
        adjusted = mx.array(logits)  # a new array: assigning to rows leaves the caller's alone
        adjusted[plan.penalised] = x
        return adjusted


class _Plan:
    """Parameters of a batch's rows as device arrays, and which rows go which way. Changes when rows join or leave."""

    def __init__(self, rows: Sequence[RowSampling]) -> None:
        self.seeds = np.array([row.seed for row in rows], np.uint64)
        self.native = NativeDraw.of([row.params for row in rows], rows[0].vocab_len, MIN_TEMPERATURE)
        self.bias = _bias_arrays(rows)
        self.asking = _where(rows, lambda row: row.num_top is not None)
        self.num_top = [rows[i].num_top or 0 for i in self.asking]
        self._barred = _barred_arrays(rows)
        penalised = _where(rows, lambda row: row.has_penalties)
        self.penalised = mx.array(penalised, dtype=mx.uint32)
        params = [rows[i].params for i in penalised]
        self.has_repetition = any(p.repetition_penalty != 1.0 for p in params)
        self.has_subtraction = any(p.presence_penalty or p.frequency_penalty for p in params)
        self.repetition = _column([p.repetition_penalty for p in params])
        self.presence = _column([p.presence_penalty for p in params])
        self.frequency = _column([p.frequency_penalty for p in params])
        self._greedy = _where(rows, lambda row: row.params.temperature == 0.0)
        sampled = [
            _where(rows, lambda row: row.params.temperature > 0 and row.params.top_k > 0),
            _where(rows, lambda row: row.params.temperature > 0 and row.params.top_k <= 0 and row.params.top_p < 1),
            _where(rows, lambda row: row.params.temperature > 0 and row.params.top_k <= 0 and row.params.top_p >= 1),
        ]
        self._parts = [part for group in sampled for part in _chunks(group, rows)]
        order = self._greedy + [i for part in self._parts for i in part.rows]
        self._back = mx.array(np.argsort(order), dtype=mx.uint32)  # from the parts' order to the batch's
        self._params = [row.params for row in rows]
        self._fused: FusedDraw | None = None  # made for the type of logits that come
        self._fused_dtype: mx.Dtype | None = None

    def early(self, places: npt.NDArray[np.uint64]) -> tuple[mx.array, mx.array] | None:
        """Rows and ids of what may not be drawn yet, at these places (B,) of the rows' answers."""
        if self._barred is None:
            return None
        rows, ids, until = self._barred
        is_early = places[rows] < until
        if not is_early.any():
            self._barred = None  # places only grow while rows stay
            return None
        return mx.array(rows[is_early], dtype=mx.uint32), mx.array(ids[is_early], dtype=mx.uint32)

    def draw(self, logits: mx.array, numbers: npt.NDArray[np.uint32]) -> tuple[mx.array, mx.array]:
        """Tokens (B,) from adjusted logits (B, V) and random numbers (B,), and which (B,) mean nothing.

        A row's way of being drawn depends on its own parameters alone: it draws the same in any batch.
        """
        if self._fused_dtype is None or logits.dtype != self._fused_dtype:
            self._fused, self._fused_dtype = fused_draw(self._params, logits, MIN_TEMPERATURE), logits.dtype
        if self._fused is None:
            return self._by_operations(logits.astype(mx.float32), numbers)
        tokens, is_broken = self._fused.draw(logits, numbers)
        ranked = [part for part in self._parts if part.most_ranked]
        if ranked:
            floats = logits.astype(mx.float32)
            drawn = self._drawn(ranked, floats, mx.max(floats, axis=-1, keepdims=True), numbers)
            tokens[mx.array([i for part in ranked for i in part.rows], dtype=mx.uint32)] = mx.concatenate(drawn)[:, 0]
        return tokens, is_broken

    def _by_operations(self, logits: mx.array, numbers: npt.NDArray[np.uint32]) -> tuple[mx.array, mx.array]:
        """The same from float32 logits, without a kernel."""
        best = mx.argmax(logits, axis=-1, keepdims=True).astype(mx.uint32)  # (B, 1)
        best_logit = mx.take_along_axis(logits, best, axis=-1)
        is_broken = _has_nan(logits) | ~(mx.abs(best_logit[:, 0]) < float("inf"))
        if not self._parts:
            return best[:, 0], is_broken
        drawn = [best[mx.array(self._greedy, dtype=mx.uint32)]] if self._greedy else []
        drawn += self._drawn(self._parts, logits, best_logit, numbers)
        if len(drawn) == 1 and not self._greedy:
            return drawn[0][:, 0], is_broken
        return mx.concatenate(drawn)[:, 0][self._back], is_broken

    @staticmethod
    def _drawn(
        parts: Sequence[_Part], logits: mx.array, best_logit: mx.array, numbers: npt.NDArray[np.uint32]
    ) -> list[mx.array]:
        """Tokens (R, 1) of each part, from all rows' logits (B, V), the largest of each (B, 1) and numbers (B,)."""
        drawn: list[mx.array] = []
        for part in parts:
            rows = part.of(logits)
            if drawn:  # MLX would work on parts side by side, and all of them leave the cache
                rows = mx.depends([rows], [drawn[-1]])[0]
            drawn.append(part.draw(rows, part.of(best_logit), mx.array(numbers[part.rows][:, None])))
        return drawn


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of the batch that are drawn together, in the same way. Parameters are (R, 1)."""

    rows: list[int]
    is_batch: bool  # these are all rows, in order
    most_ranked: int  # the largest top-k; 0: none of these rows has one
    has_min_p: bool
    octaves: mx.array  # float32, log2(e) / temperature
    top_k: mx.array  # int32
    top_p: mx.array | None  # float32; None where all are 1
    log2_min_p: mx.array  # float32
    indices: mx.array = field(repr=False)  # (R,) uint32

    def of(self, batch: mx.array) -> mx.array:
        """This part's rows of (B, ...)."""
        return batch if self.is_batch else batch[self.indices]

    def draw(self, logits: mx.array, best_logit: mx.array, number: mx.array) -> mx.array:
        """Tokens (R, 1) uint32 from logits (R, V), the largest of each (R, 1) and random numbers (R, 1) uint32."""
        log2_min_p = self.log2_min_p if self.has_min_p else None
        if not self.most_ranked:
            return draw_weighted(logits, best_logit, number, self.octaves, log2_min_p, self.top_p)
        ids, values = likeliest(logits, min(self.most_ranked, logits.shape[-1]))
        rank = mx.arange(ids.shape[-1])
        values = mx.where(rank < self.top_k, values, MASKED)
        weights = softmax_weights(values, best_logit, self.octaves, log2_min_p)
        if self.top_p is not None:
            before = mx.cumsum(weights, axis=-1) - weights
            weights = weights * (before < needed_for(weights, self.top_p))
        return mx.take_along_axis(ids, find(weights, number), axis=-1)


def _has_nan(logits: mx.array) -> mx.array:
    """(B,) bool of (B, V)."""
    return mx.sum(logits != logits, axis=-1) > 0


def _masked(logits: mx.array, mask: mx.array, masked: Sequence[int] | None) -> mx.array:
    """Logits (B, V) of what the mask allows; see `BatchSampler.sample`."""
    if masked is None or len(masked) == logits.shape[0]:
        return _within(logits, mask)
    rows = mx.array(list(masked), dtype=mx.uint32)
    out = mx.array(logits)  # a new array: assigning to rows leaves the caller's alone
    out[rows] = _within(logits[rows], mask)
    return out


def _within(logits: mx.array, mask: mx.array) -> mx.array:
    if mask.dtype == mx.float32:
        return logits + mask
    return mx.where(_unpacked(mask, logits.shape[-1]), logits, MASKED)


def _unpacked(mask: mx.array, vocab_len: int) -> mx.array:
    """(B, ceil(V / 32)) uint32 to (B, V) bool."""
    bits = (mask[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return bits.reshape(mask.shape[0], -1)[:, :vocab_len].astype(mx.bool_)


def _chunks(group: list[int], rows: Sequence[RowSampling]) -> Iterator[_Part]:
    """Parts of a group of rows as large as the device likes them."""
    if not group:
        return
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    size = max(1, CPU_CHUNK // rows[0].vocab_len) if on_cpu else len(group)
    for start in range(0, len(group), size):
        yield _part(group[start : start + size], rows)


def _part(chosen: list[int], rows: Sequence[RowSampling]) -> _Part:
    params = [rows[i].params for i in chosen]
    with np.errstate(divide="ignore"):
        log2_min_p = np.log2(np.array([p.min_p for p in params], np.float32))
    return _Part(
        rows=chosen,
        is_batch=chosen == list(range(len(rows))),
        most_ranked=max(p.top_k for p in params),
        has_min_p=any(p.min_p > 0 for p in params),
        octaves=_column([math.log2(math.e) / max(p.temperature, MIN_TEMPERATURE) for p in params]),
        top_k=mx.array([[min(p.top_k, rows[0].vocab_len)] for p in params], dtype=mx.int32),
        top_p=_column([p.top_p for p in params]) if any(p.top_p < 1 for p in params) else None,
        log2_min_p=_column(log2_min_p.tolist()),
        indices=mx.array(chosen, dtype=mx.uint32),
    )


def _bias_arrays(rows: Sequence[RowSampling]) -> tuple[mx.array, mx.array, mx.array] | None:
    """Row, id and value of every biased token."""
    entries = [(i, token, value) for i, row in enumerate(rows) for token, value in row.bias]
    if not entries:
        return None
    places, ids, values = zip(*entries, strict=True)
    return mx.array(places, dtype=mx.uint32), mx.array(ids, dtype=mx.uint32), mx.array(values, dtype=mx.float32)


_Barred = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint64]]


def _barred_arrays(rows: Sequence[RowSampling]) -> _Barred | None:
    """Row, id and first allowed place of every token that is not drawn at first."""
    entries = [(i, token, row.barred_until) for i, row in enumerate(rows) if row.barred_until for token in row.barred]
    if not entries:
        return None
    places, ids, until = zip(*entries, strict=True)
    return np.array(places, np.int64), np.array(ids, np.int64), np.array(until, np.uint64)


def _occurrences(tokens: Sequence[int], vocab_len: int) -> npt.NDArray[np.float32]:
    """(V,) float32: how often each token occurs. Ids beyond the model's logits are no one's to penalise."""
    inside = [t for t in tokens if t < vocab_len]
    return np.bincount(np.array(inside, np.int64), minlength=vocab_len).astype(np.float32)


def _where(rows: Sequence[RowSampling], condition: Callable[[RowSampling], bool]) -> list[int]:
    return [i for i, row in enumerate(rows) if condition(row)]


def _stacked(rows: mx.array | None, one: mx.array) -> mx.array:
    return one if rows is None else mx.concatenate([rows, one])


def _column(values: Sequence[float]) -> mx.array:
    """(R, 1) float32."""
    return mx.array(np.array(values, np.float32)[:, None])
