"""Drafts from a smaller model of the same vocabulary, which reads what the served one reads and guesses on.

It draws its guesses as the served model will: by the row's own sampling, seed and place. So a guess comes true wherever
the two models' probabilities are alike, also at a temperature above 0.

Its caches are uncompressed and hold at most `cache_bytes` in all; whoever finds no room is not drafted for. A row's
prompt is read in chunks, one row's a step, once drafts are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from turboquant_kv.cache.protocol import BatchRows
from turboquant_kv.cache.runtime import KVRuntime
from turboserve.engine.draws import add_row, read, sample
from turboserve.engine.generation import Drawn, Generation
from turboserve.engine.sampling import BatchSampler
from turboserve.engine.speculation_pace import Acceptance, Offer
from turboserve.errors import StartupError

LEAST_RATE = 0.15  # of guesses that come true, below which one row at a time is read for, to see whether it stays so
MOST_PENDING = 16  # tokens of a row that are read together with its next draft; more are read as a prompt is


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A loaded draft model. cache_bytes: what its caches may hold in all, taken off the served model's budget."""

    model: Any
    model_id: str
    weights_bytes: int
    cache_bytes: int


class ModelDrafter:
    """Drafting by a model, for all rows of a batch."""

    name = "draft"

    def __init__(self, draft: DraftModel, vocab_len: int, chunk_tokens: int) -> None:
        """vocab_len: of the served model's logits. chunk_tokens: of a prompt that are read in one step.

        Raises StartupError when the draft model's caches cannot be cut back or batched.
        """
        self._model, self._vocab_len, self._chunk_tokens = draft.model, vocab_len, chunk_tokens
        self._runtime = KVRuntime(draft.model, None)
        self._cache_bytes = draft.cache_bytes
        single = self._runtime.make_cache()
        batch = self._runtime.merge_rows([single])
        if not all(isinstance(cache, BatchRows) for cache in batch):
            raise StartupError(
                f"The draft model {draft.model_id} keeps caches that cannot be cut back by a token: choose another."
            )
        self._rows: list[Generation] = []  # as in the batch
        self._batch: list[Any] | None = None
        self._fed: dict[Generation, list[int]] = {}  # what each row's caches hold
        self._reading: Generation | None = None  # whose prompt is being read, in caches of its own
        self._single: list[Any] = []

    def offers(self, rows: Sequence[Generation], most: Sequence[int], known: Sequence[Acceptance]) -> list[Offer]:
        """Rows whose text has been read could have all; reading goes on by a chunk."""
        self._keep([row for row in self._rows if row in rows])
        if self._reading not in rows:
            self._stop_reading()
        waiting = [
            row
            for row, limit, acceptance in zip(rows, most, known, strict=True)
            if limit > 0 and self._num_pending(row) > 0 and (acceptance.rate(0) >= LEAST_RATE or not self._rows)
        ]
        if waiting:
            self._read_on(self._reading or waiting[0])
        return [
            Offer(limit, 0, acceptance.rate(0)) if limit > 0 and row in self._rows else Offer()
            for row, limit, acceptance in zip(rows, most, known, strict=True)
        ]

    def _num_pending(self, row: Generation) -> int:
        """Tokens that are to be read before it can be drafted for."""
        if row not in self._rows:
            return row.num_tokens
        pending = row.num_tokens - len(self._fed[row])
        return pending if pending > MOST_PENDING else 0

    def _read_on(self, row: Generation) -> None:
        if row in self._rows:  # it went on without drafts for a while
            self._keep([other for other in self._rows if other is not row])
        if row is not self._reading:
            self._stop_reading()
            taken = [self._runtime.bytes_for(one.num_tokens + one.num_answer_left) for one in (*self._fed, row)]
            if sum(taken) > self._cache_bytes:
                return
            self._reading, self._single = row, self._runtime.make_cache()
            self._fed[row] = []
        fed = self._fed[row]
        new = row.tokens(len(fed), min(row.num_tokens - 1, len(fed) + self._chunk_tokens))
        if new:
            self._model(mx.array([new]), cache=self._single)
            self._runtime.evaluate(self._single)
            fed += new
        if row.num_tokens - len(fed) <= MOST_PENDING:
            joined = self._runtime.merge_rows([self._single])
            self._batch = joined if self._batch is None else self._runtime.extend_rows(self._batch, joined)
            self._rows.append(row)
            self._reading, self._single = None, []

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._fed.pop(self._reading, None)
        self._reading, self._single = None, []

    def _keep(self, rows: list[Generation]) -> None:
        """Only these rows of the batch stay."""
        if len(rows) == len(self._rows):
            return
        for row in self._rows:
            if row not in rows:
                self._fed.pop(row, None)
        indices = [self._rows.index(row) for row in rows]
        self._rows = rows
        for cache in self._batch or []:
            cache.filter(indices)
        if not rows:
            self._batch = None

    def draft(self, rows: Sequence[Generation], counts: Sequence[int]) -> list[list[int]]:
        """Guesses of those that have been read; of rows without room none."""
        wanted = {row: n for row, n in zip(rows, counts, strict=True) if n > 0 and row in self._rows}
        drafts: dict[Generation, list[int]] = {row: [] for row in rows}
        if wanted:
            self._forget_what_was_wrong()
            news = [row.tokens(len(self._fed[row]), row.num_tokens) if row in wanted else [] for row in self._rows]
            while wanted:
                guesses = self._guess(news, wanted, drafts)
                for row, token in guesses.items():
                    drafts[row].append(token)
                wanted = {row: n for row, n in wanted.items() if len(drafts[row]) < n and row in guesses}
                news = [[drafts[row][-1]] if row in wanted else [] for row in self._rows]
        return [drafts[row] for row in rows]

    def _forget_what_was_wrong(self) -> None:
        """Cut each row back to what it has in common with its text."""
        surplus = []
        for row in self._rows:
            fed = self._fed[row]
            common = min(len(fed), row.num_tokens - 1)
            first = max(0, common - 2 * MOST_PENDING)  # only guesses can be wrong
            for i, (mine, its) in enumerate(zip(fed[first:common], row.tokens(first, common), strict=True)):
                if mine != its:
                    common = first + i
                    break
            surplus.append(len(fed) - common)
            del fed[common:]
        for cache in self._batch or []:
            cache.trim_rows(surplus)

    def _guess(
        self, news: Sequence[list[int]], wanted: dict[Generation, int], drafts: dict[Generation, list[int]]
    ) -> dict[Generation, int]:
        """Feed each row's new tokens; what each wanted row's draft goes on with, unless its logits are broken."""
        assert self._batch is not None
        lens = [len(new) for new in news]
        longest = max(lens)
        for cache in self._batch:
            cache.prepare(lengths=lens, right_padding=[longest - n for n in lens])
        logits: mx.array = self._model(mx.array([new + [0] * (longest - len(new)) for new in news]), cache=self._batch)
        places = [i for i, row in enumerate(self._rows) if row in wanted]
        last = logits[mx.array(places), mx.array([lens[i] - 1 for i in places])]
        chosen = [self._rows[i] for i in places]
        sampler = BatchSampler()
        for row in chosen:
            add_row(sampler, row, drafts[row])
        drawn = read(sample(sampler, self._fitted(last), None))
        self._runtime.evaluate(self._batch)
        for cache in self._batch:
            cache.finalize()
        for row, new in zip(self._rows, news, strict=True):
            self._fed[row] += new
        return {row: one.token for row, one in zip(chosen, drawn, strict=True) if isinstance(one, Drawn)}

    def _fitted(self, logits: mx.array) -> mx.array:
        """(B, V) of the served model: models of one vocabulary may pad it to different lengths."""
        missing = self._vocab_len - logits.shape[-1]
        if missing > 0:
            return mx.pad(logits, [(0, 0), (0, missing)], constant_values=-float("inf"))
        return logits[:, : self._vocab_len]

    def release(self) -> None:
        """Give all memory back."""
        self._stop_reading()
        self._rows, self._fed = [], {}
        if self._batch is not None:
            self._runtime.release(self._batch)
        self._batch = None
