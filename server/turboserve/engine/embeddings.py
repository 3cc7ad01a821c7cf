"""Texts to vectors: the mean of the loaded model's last hidden states, scaled to unit length.

What a chat model has seen at a token says what comes next, so these vectors are those of a language model, not of one
trained to compare texts. Work is done in pieces between steps, each bounded in tokens, so that running streams go on:
short inputs are computed together, padded at their ends, where no earlier token sees it; a long one in chunks over an
ordinary cache of its own, which is given back with its last chunk.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from turboserve.engine.adapters import Adapter
from turboserve.engine.failures import as_failure
from turboserve.engine.inbox import RETRY_AFTER_START_S, Call
from turboserve.engine.loaded_model import LoadedModel
from turboserve.engine.prepare import CHARS_PER_TOKEN, PIECE_CHARS
from turboserve.engine.template_process import Patience
from turboserve.errors import (
    ContextLengthError,
    EngineFailureError,
    InvalidRequestError,
    OverloadedError,
    TurboServeError,
    UnsupportedParameterError,
)
from turboserve.messages import Embed, Embeddings

log = logging.getLogger(__name__)

MAX_INPUT_TOKENS = 8192  # of one input: its cache is outside the KV budget; OpenAI takes as many
MAX_TOTAL_TOKENS = 300_000  # of all inputs of a request, as OpenAI has it
MAX_JOBS = 64


@dataclass(slots=True)
class _Long:
    """An input that is computed in chunks."""

    place: int
    cache: list[Any]
    num_done: int = 0
    total: mx.array | float = 0.0  # (H,) float32: the sum of the hidden states so far


@dataclass(slots=True)
class _Job:
    """One question on its way to its answer."""

    call: Call
    tokens: list[list[int]]  # of each input
    adapter: Adapter | None = None
    left: deque[int] = field(default_factory=deque)  # places of inputs to be computed, shortest first
    long: _Long | None = None
    vectors: dict[int, array[float]] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return not self.left and self.long is None


class EmbeddingJobs:
    """Questions for embeddings, the oldest first. Engine thread only."""

    def __init__(self, loaded: LoadedModel, vocab_len: int) -> None:
        self._loaded, self._vocab_len = loaded, vocab_len
        self._max_tokens = min(loaded.max_context, MAX_INPUT_TOKENS)
        self._jobs: deque[_Job] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in caches outside the budget."""
        return sum(job.long.num_done for job in self._jobs if job.long is not None)

    def add(self, call: Call, tokens: list[list[int]]) -> None:
        """Queue a call whose question is an Embed, and the tokens that `read` has made of its inputs.

        A caller that cancels its future is forgotten.
        """
        assert isinstance(call.asked, Embed)
        if len(self._jobs) >= MAX_JOBS:
            call.refuse(OverloadedError("Too many requests for embeddings are waiting.", retry_after_s=5))
            return
        try:
            adapter = self._loaded.adapters.get(call.asked.adapter)
        except TurboServeError as exc:
            call.refuse(exc)
            return
        self._jobs.append(_Job(call, tokens, adapter, deque(_shortest_first(tokens))))

    def read(self, question: Embed, patience: Patience) -> list[list[int]]:
        """Token ids of each input: any thread. Raises InvalidRequestError, of whatever kind, and as `patience`."""
        inner_of(self._loaded.model)  # before any work: whether there can be an answer
        tokens: list[list[int]] = []
        for place, text in enumerate(question.inputs):
            patience.check()
            tokens.append(self._tokens_of(text, place))
        _check_total(tokens)
        return tokens

    def fail_all(self, error: TurboServeError) -> None:
        """End every question with this error."""
        while self._jobs:
            self._jobs.popleft().call.refuse(error)

    def step(self, num_tokens: int) -> bool:
        """Some of the oldest question's work, at most so many tokens of it. Whether the model was run."""
        while self._jobs and self._jobs[0].call.future.cancelled():
            self._jobs.popleft()
        if not self._jobs:
            return False
        job, has_run = self._jobs[0], False
        try:
            if not job.is_done:
                has_run = True
                self._compute(job, num_tokens)
        except Exception as exc:
            if not isinstance(exc, TurboServeError):
                log.exception("embeddings failed")
            self._jobs.popleft()
            job.call.refuse(as_failure(exc, RETRY_AFTER_START_S))
            return has_run
        if job.is_done:
            self._jobs.popleft()
            vectors = tuple(job.vectors[place] for place in range(len(job.tokens)))
            answer = Embeddings(vectors, num_tokens=sum(map(len, job.tokens)))
            job.call.run(lambda _: answer)
        return has_run

    def _tokens_of(self, text: str | tuple[int, ...], place: int) -> list[int]:
        param = f"input[{place}]"
        if isinstance(text, str):
            self._check_chars(text, param)
            # What looks like a control token in a document is text.
            tokens: list[int] = self._loaded.tokenizer.encode(text, add_special_tokens=True, split_special_tokens=True)
        else:
            tokens = list(text)
        if not tokens:
            raise InvalidRequestError(f"{param} is empty.", param=param)
        if wrong := next((token for token in tokens if not 0 <= token < self._vocab_len), None):
            raise InvalidRequestError(
                f"{param}: {wrong} is no token of this model: ids go from 0 to {self._vocab_len - 1}.", param=param
            )
        if len(tokens) > self._max_tokens:
            raise ContextLengthError(
                f"{param} has {len(tokens):,} tokens; an input for embeddings may have {self._max_tokens:,}.",
                param=param,
            )
        return tokens

    def _check_chars(self, text: str, param: str) -> None:
        """A text far too long is told by its beginning, in pieces that take moments. Raises ContextLengthError."""
        num_tokens = 0
        for start in range(0, len(text) if len(text) > self._max_tokens * CHARS_PER_TOKEN else 0, PIECE_CHARS):
            piece = text[start : start + PIECE_CHARS]
            ids = self._loaded.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
            num_tokens += max(0, len(ids) - 1)
            if num_tokens > self._max_tokens:
                raise ContextLengthError(
                    f"{param} has over {self._max_tokens:,} tokens, which is what an input for embeddings may have.",
                    param=param,
                )

    def _compute(self, job: _Job, num_tokens: int) -> None:
        """The next chunk of a long input, or as many short ones as fit."""
        if job.long is None and len(job.tokens[job.left[0]]) > num_tokens:
            job.long = _Long(job.left.popleft(), make_prompt_cache(self._loaded.model))
        if job.long is not None:
            self._compute_chunk(job, job.long, num_tokens)
            return
        places: list[int] = []
        while job.left and (len(places) + 1) * len(job.tokens[job.left[0]]) <= num_tokens:
            places.append(job.left.popleft())
        rows = [job.tokens[place] for place in places]
        states = self._states([row + [0] * (len(rows[-1]) - len(row)) for row in rows], None, job.adapter)
        lengths = mx.array([len(row) for row in rows])[:, None]
        is_token = (mx.arange(states.shape[1])[None, :] < lengths)[:, :, None]
        totals = mx.where(is_token, states, 0.0).sum(axis=1)
        for place, total in zip(places, np.array(totals), strict=True):
            job.vectors[place] = unit_vector(total)

    def _compute_chunk(self, job: _Job, long: _Long, num_tokens: int) -> None:
        tokens = job.tokens[long.place]
        chunk = tokens[long.num_done : long.num_done + num_tokens]
        long.total = self._states([chunk], long.cache, job.adapter)[0].sum(axis=0) + long.total
        mx.eval(long.total)
        long.num_done += len(chunk)
        if long.num_done == len(tokens):
            job.vectors[long.place] = unit_vector(np.array(long.total))
            job.long = None

    def _states(self, rows: list[list[int]], cache: list[Any] | None, adapter: Adapter | None) -> mx.array:
        """Last hidden states (B, T, H), float32. Raises UnsupportedParameterError where that is not what comes out."""
        with self._loaded.adapters.applied([adapter] * len(rows)):
            states = inner_of(self._loaded.model)(mx.array(rows), cache=cache)
        shape = (len(rows), len(rows[0]))
        if not isinstance(states, mx.array) or states.ndim != 3 or states.shape[:2] != shape:
            raise _no_states()
        return states.astype(mx.float32)


def _check_total(tokens: list[list[int]]) -> None:
    if sum(map(len, tokens)) > MAX_TOTAL_TOKENS:
        raise InvalidRequestError(
            f"input: more than {MAX_TOTAL_TOKENS:,} tokens in all; ask in several requests.", param="input"
        )


def _shortest_first(tokens: list[list[int]]) -> list[int]:
    return sorted(range(len(tokens)), key=lambda place: len(tokens[place]))


def inner_of(model: Any) -> Any:
    """The part of an mlx-lm model that gives hidden states. Raises UnsupportedParameterError when there is none."""
    if model is None:  # its passes are not this process's alone
        raise UnsupportedParameterError("A model that is divided among ranks makes no embeddings.", param="model")
    for holder in (model, getattr(model, "language_model", None)):
        inner = getattr(holder, "model", None)
        if callable(inner):
            return inner
    raise _no_states()


def _no_states() -> UnsupportedParameterError:
    return UnsupportedParameterError(
        "The served model's hidden states cannot be had, so it makes no embeddings.", param="model"
    )


def unit_vector(total: np.ndarray[Any, Any]) -> array[float]:
    """A vector (H,) in the direction of `total`, float32. Raises EngineFailureError when it has none."""
    length = float(np.linalg.norm(total.astype(np.float64)))
    if not (np.isfinite(length) and length > 0):
        raise EngineFailureError("The model's hidden states are not finite.")
    return array("f", (total / length).astype(np.float32).tobytes())
