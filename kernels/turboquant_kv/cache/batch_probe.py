"""Whether a model's conversations may be computed together: tried once, before anybody relies on it.

Rows of different lengths are decoded together and alone, with the very caches that a server batches, and their logits
compared; then their prompts. mlx-lm's models are written for one conversation, or for several of one length, and some
give wrong numbers for others without a sign: a mask that is laid over the wrong axis, a padded length taken for a
position. What is found here costs such a model its batches, never an answer.

Not seen: what goes wrong beyond LENGTHS and a few steps, such as where sliding windows of more than about a dozen
tokens begin to hide some.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.cache.protocol import BatchRows

log = logging.getLogger(__name__)

LENGTHS = (3, 12, 6)  # of the prompts: a short row beside a long one, and one between
MOST_ROWS = 16  # that are tried: a number of rows that equals the number of KV heads may meet a mask's wrong axis

# Logits' distance from those of the row alone, over their spread. Batched products round otherwise than single ones do,
# and as much as that costs a model is measured: the same tokens alone, one by one and in one chunk.
_FLOORS = {mx.float32: 0.005}
_HALF_FLOOR = 0.05  # of half precision, where a router of experts may choose otherwise
_OVER_ROUNDING = 4.0
_CEILING = 0.25  # what is further away than that is wrong, whatever the rounding
_SEEDS = (0, 1)  # of tokens

Logits = npt.NDArray[np.float32]


class BatchingRuntime(Protocol):
    """What is used of a runtime.KVRuntime."""

    def make_cache(self) -> list[Any]: ...

    def merge_rows(self, singles: list[list[Any]]) -> list[Any]: ...

    def extend_rows(self, batch: list[Any], other: list[Any]) -> list[Any]: ...

    def copy(self, caches: list[Any]) -> list[Any]: ...

    def prepare_rows(self, batch: list[Any], lengths: Sequence[int], right_padding: Sequence[int]) -> None: ...

    def finalize_rows(self, batch: list[Any]) -> None: ...

    def filter_rows(self, batch: list[Any], indices: Sequence[int]) -> None: ...

    def extract_row(self, batch: list[Any], index: int) -> list[Any]: ...

    def evaluate(self, caches: list[Any]) -> None: ...

    def release(self, caches: list[Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Batching:
    """What a trial found; None where rows get together what they get alone, else why not, in a few words."""

    decode: str | None = None
    prefill: str | None = None


class _WrongError(Exception):
    """Rows together get something else than alone. The message is a reason as `Batching` has it."""


def try_batches(model: Any, runtime: BatchingRuntime, kv_heads: Iterable[int] = ()) -> Batching:
    """Decode and read prompts with rows of this runtime, together and alone.

    kv_heads: numbers of KV heads in the model's layers; as many rows are tried as well. What is wrong has to be so, in
    decode steps or in prompts, with both sets of tokens. Raises what the model raises for a single row.
    """
    counts = sorted(count for count in set(kv_heads) if 3 < count <= MOST_ROWS)
    decode: str | None = ""
    prefill: str | None = ""  # both None once that was right with one set of tokens
    for seed in _SEEDS:
        with _Trial(model, runtime, seed) as trial:
            decode = None if decode is None else _reason(partial(trial.decode, counts))
            prefill = None if prefill is None else _reason(trial.prefill)
        if decode is None and prefill is None:
            break
    return Batching(decode, decode or prefill)


def _reason(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except _WrongError as exc:
        return str(exc)
    return None


@contextmanager
def _raising_wrong() -> Iterator[None]:
    """Raises _WrongError for whatever is raised: batches are what is on trial."""
    try:
        yield
    except _WrongError:
        raise
    except Exception as exc:
        log.debug("a trial of batches raised", exc_info=True)
        raise _WrongError(f"several rows together cannot be computed ({type(exc).__name__})") from exc


class _Trial:
    """Three conversations: their logits alone, computed as they are asked for, and copies for batches."""

    def __init__(self, model: Any, runtime: BatchingRuntime, seed: int) -> None:
        self._model, self._runtime = model, runtime
        self._held: list[list[Any]] = []  # caches to be given back
        self._vocab_len = self._run([[0]], self._new()).shape[-1]
        self._seed = seed
        self._prefilled = [self._new() for _ in LENGTHS]
        for row, num_tokens in enumerate(LENGTHS):
            self._run([self._tokens(row, 0, num_tokens)], self._prefilled[row])
        self._alone = [self._to_give_back(runtime.copy(caches)) for caches in self._prefilled]
        self._expected: list[list[Logits]] = [[] for _ in LENGTHS]  # of each row, after each of its decode steps
        self._limit = self._rounding_limit()

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *failure: object) -> None:
        for caches in self._held:
            self._runtime.release(caches)

    def decode(self, counts: Sequence[int]) -> None:
        """Rows join, decode and leave; then as many as `counts` say. Raises _WrongError."""
        with _raising_wrong():
            batch = self._runtime.extend_rows(self._merged([0]), self._merged([1]))
            self._compare(batch, [0, 1], [0, 0])
            batch = self._runtime.extend_rows(batch, self._merged([2]))
            self._compare(batch, [0, 1, 2], [1, 1, 0])
            self._runtime.filter_rows(batch, [1, 2])
            self._compare(batch, [1, 2], [2, 1])
            for count in counts:
                rows = [i % len(LENGTHS) for i in range(count)]
                self._compare(self._merged(rows), rows, [0] * count)

    def prefill(self) -> None:
        """Two prompts in one pass, padded on the right, if such caches store no padding. Raises _WrongError."""
        rows = [0, 1]
        with _raising_wrong():
            batch = self._to_give_back(self._runtime.merge_rows([self._new() for _ in rows]))
            if not all(isinstance(cache, BatchRows) for cache in batch):
                return
            self._prefill_together(batch)
            for row in rows:
                caches = self._to_give_back(self._runtime.extract_row(batch, row))
                got = self._run([self._tokens(row, LENGTHS[row], 1)], caches)
                self._check(got[0], row, 0, f"{len(rows)} prompts")

    def _prefill_together(self, batch: list[Any]) -> None:
        lengths = list(LENGTHS[:2])
        padding = [max(lengths) - n for n in lengths]
        self._runtime.prepare_rows(batch, lengths, padding)
        self._run([self._tokens(row, 0, n) + padding[row] * [0] for row, n in enumerate(lengths)], batch)
        self._runtime.finalize_rows(batch)

    def _compare(self, batch: list[Any], rows: Sequence[int], steps: Sequence[int]) -> None:
        """One decode step of `rows`, of which each has taken so many before."""
        tokens = [self._tokens(row, LENGTHS[row] + step, 1) for row, step in zip(rows, steps, strict=True)]
        got = self._run(tokens, batch)
        for i, (row, step) in enumerate(zip(rows, steps, strict=True)):
            self._check(got[i], row, step, f"{len(rows)} rows")

    def _check(self, got: Logits, row: int, step: int, what: str) -> None:
        error = _distance(got, self._expected_at(row, step))
        if not error <= self._limit:
            raise _WrongError(f"{what} together get other logits than alone, by {min(error, 9.99):.0%} of their spread")

    def _expected_at(self, row: int, step: int) -> Logits:
        known = self._expected[row]
        while len(known) <= step:
            known.append(self._run([self._tokens(row, LENGTHS[row] + len(known), 1)], self._alone[row])[0])
        return known[step]

    def _rounding_limit(self) -> float:
        """From the last row: its decode steps, and the same tokens in one chunk."""
        row, num_steps = len(LENGTHS) - 1, 2
        chunk = self._tokens(row, 0, LENGTHS[row] + num_steps)
        logits = self._model(mx.array([chunk]), cache=self._new())[0, -num_steps:]
        floor = _FLOORS.get(logits.dtype, _HALF_FLOOR)
        as_chunk = np.array(logits.astype(mx.float32))
        rounding = max(_distance(as_chunk[step], self._expected_at(row, step)) for step in range(num_steps))
        return min(max(floor, _OVER_ROUNDING * rounding), _CEILING)

    def _tokens(self, row: int, first: int, num_tokens: int) -> list[int]:
        """Of a conversation, from position `first` on; no two conversations begin alike."""
        positions = range(first, first + num_tokens)
        return [(7 * i + 11 * row + 13 * self._seed + 1) % self._vocab_len for i in positions]

    def _new(self) -> list[Any]:
        return self._to_give_back(self._runtime.make_cache())

    def _merged(self, rows: Sequence[int]) -> list[Any]:
        return self._to_give_back(self._runtime.merge_rows([self._prefilled[row] for row in rows]))

    def _to_give_back(self, caches: list[Any]) -> list[Any]:
        """The same, to be given back at the end."""
        self._held.append(caches)
        return caches

    def _run(self, tokens: list[list[int]], caches: list[Any]) -> Logits:
        """Logits (B, V) after the last of tokens (B, T)."""
        logits = self._model(mx.array(tokens), cache=caches)[:, -1]
        mx.eval(logits)
        self._runtime.evaluate(caches)
        return np.array(logits.astype(mx.float32))


def _distance(got: Logits, expected: Logits) -> float:
    """Of logits (V,), over the spread of the expected ones; infinite where one is no number and the other is."""
    if not np.array_equal(np.isfinite(got), np.isfinite(expected)):
        return float("inf")
    a, b = (np.where(np.isfinite(x), x, 0).astype(np.float64) for x in (got, expected))
    a, b = a - a.mean(), b - b.mean()
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
