"""Kept graphs of a divided model: tried once, told to every rank, and given up by one rank or all without harm.

Rank 0 and a follower in one process over kernels that only sum; with ranks of their own in test_graphs_of_two_ranks.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboquant_kv.summing_kernels import FMT, summing_backend
from tests.turboserve.distributed.pair import Pair, make_pair
from tests.turboserve.distributed.test_following import assert_equal_books
from tests.turboserve.distributed.test_ranks import joined
from tests.turboserve.engine.fakes import Sink, make_loop, request, run, text_of

from turboquant_kv.cache.backend_choice import Chosen
from turboquant_kv.cache.batch_probe import Batching
from turboserve.engine import graph_choice
from turboserve.engine.distributed import following
from turboserve.engine.distributed.following import Follower
from turboserve.engine.distributed.leading import LeadingRuntime
from turboserve.engine.distributed.ranks import RanksEndedError
from turboserve.engine.distributed.step_graphs import RankSteps
from turboserve.engine.graph_choice import GraphChoice
from turboserve.engine.step_loop import StepLoop
from turboserve.engine.warm_up import Plan, warm_up

PLAN = Plan(chunks=(100, 37), row_counts=(2,), num_tokens=2)
PROMPTS = [list(range(i, 60 + 7 * i)) for i in range(4)]


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's, without the GPU; what a row gets depends on its place, which no trial of batches would let pass."""
    monkeypatch.setattr(LeadingRuntime, "try_batches", lambda self: Batching())
    monkeypatch.setattr("turboquant_kv.cache.runtime.choose", lambda *args, **options: Chosen(summing_backend(), None))


@pytest.fixture
def model(rng: np.random.Generator) -> Any:
    return small_models.dense(int(rng.integers(1 << 30)), 3)


class Failing:
    """A model that raises while its step is traced."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, tokens: mx.array, cache: Any) -> Any:
        if type(cache[0]).__name__ == "_LayerOver":
            raise ValueError("this cannot be traced")
        return self._model(tokens, cache=cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def warmed(model: Any, **settings: Any) -> tuple[Pair, StepLoop, GraphChoice]:
    """After a server's warm-up, with graphs wanted whatever they take."""
    pair = make_pair(model, FMT)
    loop = make_loop(pair.parts, **settings)
    return pair, loop, tried(pair, loop)


def tried(pair: Pair, loop: StepLoop) -> GraphChoice:
    return warm_up(loop.runner, pair.parts, small_models.VOCAB, PLAN, "on")[1]


def steps_of(pair: Pair) -> tuple[RankSteps, RankSteps]:
    passes: Any = pair.parts.passes
    return passes._steps, pair.follower._steps


def answers(loop: StepLoop, num_tokens: int = 40) -> list[list[int]]:
    asked = [request(f"r{i}", text_of(prompt), max_tokens=num_tokens) for i, prompt in enumerate(PROMPTS)]
    sinks: Sequence[Sink] = run(loop, *asked)
    return [sink.tokens for sink in sinks]


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_all_ranks_keep_graphs_and_answers_stay(model: Any, overlap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, loop, choice = warmed(model, overlap=overlap)
    assert choice.by_ranks and str(choice).startswith("kept (a step of 2 rows takes ")
    before = [steps.num_kept for steps in steps_of(pair)]
    got = answers(loop)
    after = [steps.num_kept for steps in steps_of(pair)]
    assert after[0] - before[0] > 30 and after[0] == after[1] and before[0] == before[1]
    assert_equal_books(pair, loop)
    monkeypatch.setattr("turboserve.engine.graph_choice.TOLERANCE", -1.0)  # after the same trial
    pair, loop, choice = warmed(model, overlap=overlap)
    assert str(choice).startswith("built anew in every step (their logits differ")
    assert answers(loop) == got and [steps._graphs for steps in steps_of(pair)] == [None, None]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_trace_leaves_all_without_graphs(model: Any, failing: int) -> None:
    """Its step is run by the model, for the others wait for its sums."""
    pair = make_pair(model, FMT)
    loop = make_loop(pair.parts)
    steps_of(pair)[failing]._model = Failing(model)
    choice = tried(pair, loop)
    assert not choice.by_ranks and str(choice).startswith("built anew")
    assert [steps._graphs for steps in steps_of(pair)] == [None, None]
    assert all(len(tokens) == 40 for tokens in answers(loop))
    assert_equal_books(pair, loop)


def test_sums_without_an_order_leave_all_without_graphs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turboserve.engine.distributed.step_graphs.are_in_order", lambda lazy: False)
    _, _, choice = warmed(model)
    assert not choice.by_ranks and "sums between ranks have no order" in choice.reason


@pytest.mark.parametrize("failing", [0, 1])
def test_a_graph_that_raises_on_one_rank_costs_only_itself(
    model: Any, failing: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = answers(warmed(model)[1])
    pair, loop, choice = warmed(model)
    loop.graphs_line = str(choice)
    graphs = steps_of(pair)[failing]._graphs
    assert graphs is not None and loop.snapshot().details["step_graphs"] == str(choice)
    ran, num_runs = graphs._launch, 0

    def run_some(*args: Any) -> Any:
        nonlocal num_runs
        num_runs += 1
        if num_runs > 9:
            raise ValueError("no such graph")
        return ran(*args)

    monkeypatch.setattr(graphs, "_launch", run_some)
    with caplog.at_level(logging.WARNING):
        assert answers(loop) == wanted
    assert caplog.text.count("steps are built anew from now on") == 1 and num_runs == 10
    assert isinstance(graphs.failure, ValueError) and steps_of(pair)[1 - failing].num_kept > 40
    said = loop.snapshot().details["step_graphs"]  # of rank 0; the others' logs have theirs
    gave_up = f"built anew in every step (ValueError: no such graph); before that {choice}"
    assert said == (gave_up if failing == 0 else str(choice))
    assert_equal_books(pair, loop)


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_step_that_raises_on_all_ranks_never_happened(
    model: Any, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, loop, _ = warmed(model, overlap=overlap)
    forward, calls = RankSteps.forward, 0

    def failing(self: RankSteps, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        nonlocal calls
        calls += 1
        logits = forward(self, tokens, batch)
        if calls in (41, 42):  # one step, on both ranks, whose caches have taken it already
            raise ValueError("not this one")
        return logits

    monkeypatch.setattr(RankSteps, "forward", failing)
    assert [len(tokens) for tokens in answers(loop)] == [40] * 4 and calls > 60
    assert ["raised", "ValueError"] in pair.first.messages
    assert all(steps._graphs is not None for steps in steps_of(pair))
    assert_equal_books(pair, loop)


def test_a_device_that_fails_in_the_trial_ends_the_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(model, FMT)
    loop = make_loop(pair.parts)
    steps = graph_choice._steps

    def failing(*args: Any) -> Any:
        steps(*args)
        raise RuntimeError("the device fails")

    monkeypatch.setattr(graph_choice, "_steps", failing)
    with pytest.raises(RanksEndedError, match="the device of rank 0 failed"):
        tried(pair, loop)


def test_a_model_that_raises_in_the_trial_on_all_ranks_is_served_without(model: Any) -> None:
    """The run goes on: every rank knows that the step did not happen."""
    pair = make_pair(model, FMT)
    loop = make_loop(pair.parts)
    calls = 0

    def failing(tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        nonlocal calls
        calls += 1
        raise ValueError("not this one")

    for steps in steps_of(pair):
        keep = steps.keep

        def keep_failing(wanted: bool, steps: Any = steps, keep: Any = keep) -> None:
            keep(wanted)
            steps.forward = failing

        def forget_failing(steps: Any = steps) -> None:
            RankSteps.forget(steps)
            steps.forward = lambda tokens, batch: RankSteps.forward(steps, tokens, batch)

        steps.keep, steps.forget = keep_failing, forget_failing  # type: ignore[method-assign]
    pair.follower._verbs |= {"keep_graphs": pair.follower._steps.keep, "forget_graphs": pair.follower._steps.forget}
    assert str(tried(pair, loop)) == "built anew in every step (the trial failed: the log has details)"
    assert calls == 2 and all(len(tokens) == 40 for tokens in answers(loop))
    assert_equal_books(pair, loop)


def test_rows_apart_are_never_run_by_graphs(model: Any) -> None:
    pair, loop, choice = warmed(model)
    assert choice.by_ranks
    loop.runner.apart = "as a test wants it"
    before = [steps.num_kept for steps in steps_of(pair)]
    assert all(len(tokens) == 40 for tokens in answers(loop))
    assert [steps.num_kept for steps in steps_of(pair)] == before
    assert_equal_books(pair, loop)


def test_what_raised_on_one_rank_alone_ends_the_run_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits for that rank's part in a collective, and says nothing."""
    monkeypatch.setattr(following, "RAISED_ALONE_S", 0.2)

    class Formats:
        def runtime(self, name: str) -> None:
            raise ValueError("no such format")

    with joined(2) as (first, (other,)):
        formats: Any = Formats()
        first.send(["do", "runtime", ["4/3"]])
        with pytest.raises(RanksEndedError, match="ValueError here: no such format; rank 0 has said nothing"):
            Follower(other, None, formats, None).run()
