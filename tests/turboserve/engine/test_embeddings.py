"""Embeddings: right whatever the lengths and pieces, beside running streams, and ended in order."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboserve.engine.fakes import MAX_CONTEXT, VOCAB, add, make_loop, make_parts, request, text_of

from turboserve.engine import embeddings
from turboserve.engine.embeddings import EmbeddingJobs, unit_vector
from turboserve.engine.inbox import Call
from turboserve.engine.step_loop import StepLoop
from turboserve.engine.template_process import Patience
from turboserve.errors import (
    ContextLengthError,
    EngineFailureError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    TurboServeError,
    UnsupportedParameterError,
)
from turboserve.messages import Embed, Embeddings

Tokens = tuple[int, ...]


def reference(model: Any, tokens: Tokens) -> np.ndarray[Any, Any]:
    """One input alone, in one piece, without any cache."""
    states = np.array(model.model(mx.array([list(tokens)])).astype(mx.float32))[0]
    mean = states.mean(axis=0, dtype=np.float64)
    return np.asarray(mean / np.linalg.norm(mean))


def random_tokens(rng: np.random.Generator, length: int) -> Tokens:
    return tuple(int(token) for token in rng.integers(0, VOCAB, length))


def ask(loop: StepLoop, *inputs: str | Tokens) -> Future[Embeddings]:
    asked = Embed(inputs)
    call = Call(asked, Future())
    try:
        tokens = loop.read_inputs(asked, Patience(10.0))  # as the engine's prompt thread does
    except TurboServeError as exc:
        call.refuse(exc)
    else:
        loop.embeddings.add(call, tokens)
    return call.future


def finish(loop: StepLoop, max_steps: int = 500) -> None:
    for _ in range(max_steps):
        if not loop.has_work:
            return
        loop.step()
    raise AssertionError("still working")


def test_lengths_and_pieces_do_not_matter(model: Any, rng: np.random.Generator) -> None:
    """Pieces have 16 tokens: some inputs fill one together, some need several."""
    lengths = [1, 2, 15, 16, 17, 31, 33, int(rng.integers(34, 200)), *(int(n) for n in rng.integers(1, 12, 9))]
    rng.shuffle(lengths)
    inputs = [random_tokens(rng, length) for length in lengths]
    loop = make_loop(make_parts(model))
    future = ask(loop, *inputs)
    finish(loop)
    answer = future.result(timeout=0)
    assert answer.num_tokens == sum(lengths) and len(answer.vectors) == len(inputs)
    for tokens, vector in zip(inputs, answer.vectors, strict=True):
        np.testing.assert_allclose(np.array(vector), reference(model, tokens), atol=2e-5)
        assert np.linalg.norm(np.array(vector)) == pytest.approx(1, abs=1e-5)


def test_a_text_is_its_tokens(model: Any, rng: np.random.Generator) -> None:
    tokens = random_tokens(rng, 20)
    loop = make_loop(make_parts(model))
    future = ask(loop, text_of(tokens), tokens)
    finish(loop)
    first, second = future.result(timeout=0).vectors
    assert np.abs(np.array(first) - np.array(second)).max() < 1e-5


def test_streams_go_on_between_the_pieces(model: Any, rng: np.random.Generator) -> None:
    parts = make_parts(model)
    alone = make_loop(parts)
    (expected,) = add(alone, request("alone", "some prompt", max_tokens=60))
    finish(alone)
    loop = make_loop(make_parts(model))
    (sink,) = add(loop, request("beside", "some prompt", max_tokens=60))
    while not sink.tokens:
        loop.step()
    long = random_tokens(rng, 300)
    future = ask(loop, long)
    seen = []
    while not future.done():
        before = len(sink.tokens)
        loop.step()
        seen.append(len(sink.tokens) - before)
    assert len(seen) >= 300 // 16, "a piece has 16 tokens at most"
    assert min(seen) >= 1, "every step gave the stream a token"
    finish(loop)
    assert sink.tokens == expected.tokens
    np.testing.assert_allclose(np.array(future.result().vectors[0]), reference(model, long), atol=2e-5)
    loop.check_integrity()


def test_the_cache_of_a_long_input_is_scratch_and_given_back(model: Any, rng: np.random.Generator) -> None:
    loop = make_loop(make_parts(model))
    idle_bytes = loop.scratch_bytes
    future = ask(loop, random_tokens(rng, 100))
    loop.step()
    assert loop.scratch_bytes - idle_bytes == 16 * loop._parts.runtime.token_raw_bytes
    finish(loop)
    assert future.done() and loop.scratch_bytes == idle_bytes


@pytest.mark.parametrize(
    ("inputs", "error", "param"),
    [
        (((1,), ()), InvalidRequestError, "input[1]"),
        (("",), InvalidRequestError, "input[0]"),
        (((1, VOCAB),), InvalidRequestError, "input[0]"),
        (((-1, 1),), InvalidRequestError, "input[0]"),
        (((1,), (1,) * (MAX_CONTEXT + 1)), ContextLengthError, "input[1]"),
    ],
)
def test_what_cannot_be_embedded_is_named(model: Any, inputs: Any, error: type[Exception], param: str) -> None:
    loop = make_loop(make_parts(model))
    refused, fine = ask(loop, *inputs), ask(loop, (1, 2))
    finish(loop)
    caught = refused.exception(timeout=0)
    assert isinstance(caught, error) and isinstance(caught, InvalidRequestError) and caught.param == param
    assert len(fine.result(timeout=0).vectors) == 1, "the next one is answered"


def test_too_many_tokens_in_all_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MAX_TOTAL_TOKENS", 10)
    loop = make_loop(make_parts(model))
    futures = ask(loop, (1,) * 5, (1,) * 6), ask(loop, (1,) * 5, (1,) * 5)
    finish(loop)
    assert isinstance(futures[0].exception(timeout=0), InvalidRequestError) and futures[1].result(timeout=0)


class Headless:
    """A model without anything inside."""


class Pair:
    """A model whose inside gives two things."""

    def model(self, tokens: mx.array, cache: Any = None) -> tuple[mx.array, None]:
        return mx.zeros((*tokens.shape, 4)), None


class Broken:
    """A model whose states are not finite, or that raises."""

    def __init__(self, value: float | None) -> None:
        self._value = value

    def model(self, tokens: mx.array, cache: Any = None) -> mx.array:
        if self._value is None:
            raise ValueError("a bug")
        return mx.full((*tokens.shape, 4), self._value)


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (Headless(), UnsupportedParameterError),
        (Pair(), UnsupportedParameterError),
        (Broken(None), EngineFailureError),
        *((Broken(value), EngineFailureError) for value in (0.0, float("nan"), float("inf"))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_that_give_no_states_say_so(model: Any, other: Any, error: type[Exception]) -> None:
    loaded = make_parts(model).loaded
    jobs = EmbeddingJobs(type(loaded)(other, loaded.tokenizer, "other", "float32", 64, 1, "", frozenset()), VOCAB)
    asked = Embed(((1, 2),))
    call = Call(asked, Future())
    try:
        jobs.add(call, jobs.read(asked, Patience(10.0)))
    except TurboServeError as exc:
        call.refuse(exc)
    while jobs.has_work:
        jobs.step(16)
    assert isinstance(call.future.exception(timeout=0), error)


def test_who_leaves_costs_no_more_work(model: Any, rng: np.random.Generator) -> None:
    loop = make_loop(make_parts(model))
    leaving, staying = ask(loop, random_tokens(rng, 400)), ask(loop, (1, 2))
    loop.step()
    loop.step()
    assert leaving.cancel()
    for _ in range(4):
        loop.step()
    assert staying.done() and not loop.has_work


def test_the_end_of_the_engine_is_told_and_the_queue_is_bounded(model: Any) -> None:
    loop = make_loop(make_parts(model))
    futures = [ask(loop, (1, 2)) for _ in range(embeddings.MAX_JOBS + 1)]
    assert isinstance(futures[-1].exception(timeout=0), OverloadedError)
    loop.fail_all(EngineUnavailableError("over"))
    assert all(isinstance(f.exception(timeout=0), EngineUnavailableError) for f in futures[:-1]) and not loop.has_work


def test_a_unit_vector_keeps_its_direction(rng: np.random.Generator) -> None:
    total = rng.normal(size=50).astype(np.float32) * 1e4
    np.testing.assert_allclose(np.array(unit_vector(total)) * np.linalg.norm(total), total, rtol=1e-5)
