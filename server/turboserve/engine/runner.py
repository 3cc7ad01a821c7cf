"""Runs the model: prefill chunks of one request, decode steps of all running rows.

Owns the batched caches. Deciding who runs is the step loop's business.

Failure isolation. Logits that are not finite cost their own row only. When sampling the batch raises, each row is drawn
alone, which gives the same token, and rows that raise alone are reported. When the batched forward pass raises, every
row is cut back to its length before the step and tried alone: rows that work keep their token, rows that raise are
reported. Rows whose cache cannot be trusted any more (work was already submitted to the device, or the cache cannot be
cut) are reported as lost, and the loop computes their caches again from their tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.interfaces import CacheRuntime, Caches
from turboserve.engine.generation import Generation, Outcomes
from turboserve.engine.sampling import BatchSampler, Draws
from turboserve.errors import StartupError

log = logging.getLogger(__name__)

Model = Any  # an mlx-lm model: model(tokens (B, T), cache=[...]) -> logits (B, T, V)


class EvaluatingRuntime(CacheRuntime, Protocol):
    """A runtime that can also finish pending work on caches, batch them and look at one row."""

    def evaluate(self, caches: list[Any]) -> None: ...

    def merge_rows(self, singles: list[list[Any]]) -> list[Any]:
        """A batch over sequences of whatever formats; their own caches stay as they are."""
        ...

    def extend_rows(self, batch: list[Any], other: list[Any]) -> list[Any]:
        """The rows of both; only the returned caches are valid afterwards."""
        ...

    def measure_row(self, batch: list[Any], index: int) -> KVBytes: ...

    def usable_prefix_row(self, batch: list[Any], index: int, length: int) -> int: ...

    def fork_row(self, batch: list[Any], index: int, length: int) -> list[Any]: ...


class NonFiniteLogitsError(RuntimeError):
    """The model's logits hold NaN or are infinite; any token drawn from them would be noise."""


class _DeviceError(Exception):
    """Evaluation failed, so arrays written in this step are in an unknown state."""


class Runner:
    """The model, and the rows being decoded together. One thread only."""

    def __init__(self, model: Model, runtime: EvaluatingRuntime) -> None:
        self._model = model
        self._runtime = runtime
        self._rows: list[Generation] = []
        self._caches: list[Any] | None = None  # batched, one per layer, rows as in _rows
        self._sampler: BatchSampler | None = None  # rows as in _rows; None: to be made of them by the next draw

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def has(self, generation: Generation) -> bool:
        """Whether a request is decoding in the batch."""
        return any(row is generation for row in self._rows)

    def warm_up(self) -> int:
        """One real batched forward pass; returns the vocabulary's length as the logits have it.

        Raises StartupError when the model's caches cannot be batched.
        """
        caches = self._runtime.make_cache()
        unbatched = {type(c).__name__ for c in caches if not callable(getattr(c, "merge", None))}
        if unbatched:
            raise StartupError(
                f"This model uses {', '.join(sorted(unbatched))}, which mlx-lm cannot batch: choose another."
            )
        batch = self._merge([caches])
        logits = self._forward([[0]], batch)
        self._runtime.release(batch)
        return int(logits.shape[-1])

    def prefill(self, generation: Generation, num_tokens: int) -> None:
        """Feed the next `num_tokens` of a request into its own caches. Raises whatever the model does."""
        caches = generation.caches
        assert caches is not None and num_tokens <= generation.num_to_prefill
        end = generation.cache_len + num_tokens
        self._model(mx.array([generation.tokens(generation.cache_len, end)]), cache=caches)  # logits stay unevaluated
        self._runtime.evaluate(caches)
        generation.cache_len = end

    def join(self, generation: Generation) -> None:
        """Let a prefilled request decode with the others; its caches move into the batch."""
        assert generation.caches is not None and generation.num_to_prefill <= 0
        joined = self._merge([generation.caches])
        self._runtime.release(generation.caches)
        generation.caches = None
        if self._caches is None:
            self._caches = joined
        else:
            self._caches = self._runtime.extend_rows(self._caches, joined)
        self._rows.append(generation)
        if self._sampler is not None:
            try:
                _add_row(self._sampler, generation)
            except Exception:  # met again when the row is drawn alone
                log.exception("the sampler cannot take request %s", generation.request_id)
                self._sampler = None

    def leave(self, leaving: Sequence[Generation]) -> None:
        """Take rows out of the batch; each gets its caches back as a single sequence's."""
        if not leaving:
            return
        for generation in leaving:
            generation.caches = self._extract(self._rows.index(generation))
        keep = [i for i, row in enumerate(self._rows) if row not in leaving]
        self._rows = [self._rows[i] for i in keep]
        if self._sampler is not None:
            self._sampler.keep(keep)
        if keep:
            for cache in self._batch():
                cache.filter(mx.array(keep))
        else:
            self._forget_batch()

    def measure(self, generation: Generation) -> KVBytes:
        """Bytes of a request's caches, wherever they are now."""
        if generation.caches is not None:
            return self._runtime.measure(generation.caches)
        return self._runtime.measure_row(self._batch(), self._rows.index(generation))

    def usable_prefix(self, generation: Generation, length: int) -> int:
        """Longest n <= length of which `fork` can make caches without loss."""
        if generation.caches is not None:
            return self._runtime.usable_prefix(generation.caches, length)
        if not self.has(generation):
            return 0
        return self._runtime.usable_prefix_row(self._batch(), self._rows.index(generation), length)

    def fork(self, generation: Generation, length: int) -> list[Any]:
        """Caches of a request's first `length` tokens, sharing pages; it goes on undisturbed."""
        if generation.caches is not None:
            return self._runtime.fork(generation.caches, length)
        return self._runtime.fork_row(self._batch(), self._rows.index(generation), length)

    def views(self) -> list[list[Any]]:
        """Every row's caches by themselves, sharing pages, to be released by the caller."""
        return [self._extract(i) for i in range(len(self._rows))]

    def step(self) -> Outcomes:
        """Feed every row's newest token and draw the next one for each."""
        if not self._rows:
            return {}
        rows = list(self._rows)
        try:
            logits = self._forward([[row.newest_token()] for row in rows], self._batch())
        except _DeviceError:
            log.exception("a decode step of %d rows failed on the device; their caches are computed again", len(rows))
            return self._lose_all(rows)
        except Exception:
            log.exception("a decode step of %d rows failed; each row is tried alone", len(rows))
            return self._step_alone(rows)
        for row in rows:
            row.cache_len += 1
        return dict(zip(rows, self._draw(logits), strict=True))

    def _forward(self, tokens: list[list[int]], caches: list[Any]) -> mx.array:
        """Logits (B, V) after the last of `tokens` (B, T). Raises _DeviceError when evaluation fails."""
        logits: mx.array = self._model(mx.array(tokens), cache=caches)[:, -1, :]
        try:
            mx.eval(logits)
            self._runtime.evaluate(caches)
        except Exception as exc:
            raise _DeviceError from exc
        return logits

    def _step_alone(self, rows: list[Generation]) -> Outcomes:
        """After a failed batched step: one row at a time, from their state before it."""
        singles = [self._roll_back(i, row) for i, row in enumerate(rows)]
        self._forget_rows()
        self._forget_batch()
        outcomes: dict[Generation, int | Exception | None] = {}
        for row, caches in zip(rows, singles, strict=True):
            outcomes[row] = None if caches is None else self._try_row(row, caches)
        return outcomes

    def _try_row(self, row: Generation, caches: list[Any]) -> int | Exception | None:
        """One decode step of one row, which joins the new batch when it works."""
        batch = self._merge([caches])
        try:
            logits = self._forward([[row.newest_token()]], batch)
            row.caches = [cache.extract(0) for cache in batch]
        except _DeviceError:
            self._runtime.release(caches)
            return None
        except Exception as exc:
            log.warning("request %s fails alone as well", row.request_id, exc_info=True)
            row.caches = caches
            return exc.with_traceback(None)  # its frames would keep caches alive
        finally:
            self._runtime.release(batch)
        self._runtime.release(caches)
        row.cache_len += 1
        token = _draw_one(logits, row)
        self.join(row)
        return token

    def _lose_all(self, rows: list[Generation]) -> Outcomes:
        self._forget_rows()
        self._forget_batch()
        return dict.fromkeys(rows)

    def _roll_back(self, index: int, row: Generation) -> list[Any] | None:
        """A row's caches as they were before the failed step, or None when that cannot be had."""
        try:
            caches = self._extract(index)
            for cache in caches:
                surplus = cache.size() - row.cache_len
                if surplus > 0 and cache.is_trimmable():
                    cache.trim(surplus)
            return caches if all(cache.size() == row.cache_len for cache in caches) else None
        except Exception:
            log.exception("the cache of request %s cannot be cut back", row.request_id)
            return None

    def _draw(self, logits: mx.array) -> list[int | Exception]:
        """Each row's next token from logits (B, V), or what went wrong with it."""
        try:
            if self._sampler is None:
                self._sampler = _sampler_of(self._rows)
            return _read(self._sampler.sample(logits))
        except Exception:
            log.exception("sampling failed for a batch of %d rows; each row is drawn alone", len(self._rows))
            self._sampler = None
        return [_draw_one(logits[i : i + 1], row) for i, row in enumerate(self._rows)]

    def _forget_rows(self) -> None:
        self._rows = []
        self._sampler = None

    def _merge(self, singles: list[list[Any]]) -> list[Any]:
        return self._runtime.merge_rows(singles)

    def _extract(self, index: int) -> list[Any]:
        return [cache.extract(index) for cache in self._batch()]

    def _batch(self) -> list[Any]:
        assert self._caches is not None, "no rows are running"
        return self._caches

    def _forget_batch(self) -> None:
        if self._caches is not None:
            self._runtime.release(self._caches)
        self._caches = None


@dataclass(frozen=True, slots=True)
class RunningRow:
    """Implements cache.interfaces.RunningCaches for one request, wherever the runner keeps its caches now."""

    generation: Generation
    runner: Runner

    def held_len(self) -> int:
        return self.generation.cache_len

    def held_tokens(self) -> list[int]:
        return self.generation.tokens(0, self.generation.cache_len)

    def usable_prefix(self, length: int) -> int:
        return self.runner.usable_prefix(self.generation, length)

    def fork(self, length: int) -> Caches:
        return self.runner.fork(self.generation, length)

    def measure(self) -> KVBytes:
        return self.runner.measure(self.generation)


def _sampler_of(rows: Sequence[Generation]) -> BatchSampler:
    """A sampler at the tokens that these rows' answers have now."""
    sampler = BatchSampler()
    for row in rows:
        _add_row(sampler, row)
    return sampler


def _add_row(sampler: BatchSampler, row: Generation) -> None:
    assert row.sampling is not None
    sampler.join(row.sampling, row.prompt, row.answer)


def _read(draws: Draws) -> list[int | Exception]:
    """Each row's token, waiting once for all of them."""
    mx.eval(draws.tokens, draws.is_broken)
    tokens, is_broken = np.array(draws.tokens).tolist(), np.array(draws.is_broken).tolist()
    return [
        NonFiniteLogitsError("the model's logits are not finite") if broken else token
        for token, broken in zip(tokens, is_broken, strict=True)
    ]


def _draw_one(logits: mx.array, row: Generation) -> int | Exception:
    """One row's token from its logits (1, V), the same as in a batch, or what its sampling raised."""
    try:
        return _read(_sampler_of([row]).sample(logits))[0]
    except Exception as exc:
        log.exception("sampling failed for request %s", row.request_id)
        return exc
