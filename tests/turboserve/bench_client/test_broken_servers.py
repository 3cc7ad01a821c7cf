"""Nothing that goes wrong is hidden: each failure is counted by its kind, and no figure is made of it."""

from __future__ import annotations

import pytest
from tests.turboserve.bench_client import scripted
from tests.turboserve.bench_client.scripted import Act, Script, scripted_server

from turboserve.bench_client import report
from turboserve.bench_client.asking import Target
from turboserve.bench_client.mix import Mix, Pace, Span
from turboserve.bench_client.session import Plan, Server, measure
from turboserve.errors import StartupError

MIX = Mix(Span(60, 60), Span(5, 5), seed=1)


def measured(script: Script, pace: Pace, mix: Mix = MIX, warm_up: int = 0, timeout_s: float = 60.0) -> Server:
    """One round; the probe's own streamed request is answered well."""
    script.acts.insert(0, scripted.good)
    with scripted_server(script):
        (server,) = measure(Plan(mix, pace, 1, warm_up, timeout_s), [Target(script.url, "")])
    return server


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (scripted.overloaded, "HTTP 503", "queue is full"),
        (scripted.drops, "connection dropped", "RemoteProtocolError"),
        (scripted.stops, "stream cut short", "after 2 pieces"),
        (scripted.errs, "error in the stream", "the engine failed"),
        (scripted.garbles, "malformed event", '{"choices": ['),
        (scripted.hangs, "timeout", "within 2 s"),
    ],
)
def test_a_failure_is_counted_by_kind(act: Act, kind: str, words: str) -> None:
    server = measured(Script([scripted.good, act, scripted.good]), Pace(streams=1, num_requests=3), timeout_s=2.0)
    counts = server.counts
    assert (counts.requests, dict(counts.errors)) == (3, {kind: 1})
    assert words in counts.examples[kind]
    assert server.has_failed
    assert counts.answer_tokens == 10, "the broken answer's tokens are not among the figures"
    text = "\n".join(report.notes(Plan(MIX, Pace()), server))
    assert "3 requests, 1 FAILED" in text and f"1 x {kind}: " in text and words in text


def test_many_failures_on_many_streams() -> None:
    acts: list[Act] = [scripted.overloaded, scripted.drops, scripted.errs, scripted.overloaded]
    server = measured(Script(acts), Pace(streams=4, num_requests=12))
    assert dict(server.counts.errors) == {"HTTP 503": 2, "connection dropped": 1, "error in the stream": 1}
    assert server.counts.answer_tokens == 8 * 5


def test_a_warm_up_failure_is_a_failure() -> None:
    server = measured(Script([scripted.overloaded]), Pace(streams=1, num_requests=1), warm_up=2)
    assert server.counts.failed == 0 and server.has_failed
    assert "warm-up: 2 requests, 1 FAILED" in "\n".join(report.notes(Plan(MIX, Pace()), server))


def test_a_server_that_only_fails_has_no_figures() -> None:
    acts: list[Act] = [scripted.overloaded] * 4
    server = measured(Script(acts), Pace(streams=2, num_requests=4))
    assert server.counts.errors == {"HTTP 503": 4} and server.medians == {}
    assert "4 requests, 4 FAILED" in "\n".join(report.table(Plan(MIX, Pace(num_requests=4)), [server]))


def test_a_server_that_goes_away_is_not_asked_without_end() -> None:
    """The failing stream pauses, so that a second's worth of failures is a handful."""
    acts: list[Act] = [scripted.overloaded] * 1000
    server = measured(Script(acts), Pace(streams=1, duration_s=1.0))
    assert 1 <= server.counts.failed <= 6


def test_an_empty_answer_succeeds_without_a_first_token() -> None:
    server = measured(Script([scripted.empty]), Pace(streams=1, num_requests=2))
    counts = server.counts
    assert (counts.failed, counts.empty, counts.ended_early, counts.answer_tokens) == (0, 1, 1, 5)
    assert not server.has_failed
    assert "1 were empty" in "\n".join(report.notes(Plan(MIX, Pace()), server))


def test_prompts_are_calibrated_by_the_servers_count() -> None:
    server = measured(Script(), Pace(streams=2, num_requests=6), Mix(Span(101, 301), Span(2, 2), seed=3))
    assert server.probe.scale.per_word == scripted.TOKENS_PER_WORD
    assert server.probe.scale.overhead == scripted.TEMPLATE_TOKENS
    for outcome in server.outcomes:
        assert outcome.prompt_tokens is not None
        assert abs(outcome.prompt_tokens - outcome.asked_prompt_tokens) <= 1


def test_a_server_that_counts_nothing() -> None:
    server = measured(Script(has_usage=False), Pace(streams=1, num_requests=2))
    assert (server.counts.answer_tokens, server.counts.without_usage) == (10, 2), "pieces are counted instead"
    text = "\n".join(report.notes(Plan(MIX, Pace()), server))
    assert "one token a word was assumed" in text and "2 came without usage" in text


@pytest.mark.parametrize("refused", [{"stream_options"}, {"logit_bias"}, {"stream_options", "logit_bias"}])
def test_fields_that_a_server_refuses_are_left_out_and_named(refused: set[str]) -> None:
    mix = Mix(Span(60, 60), Span(5, 5), end_tokens=(2,), seed=1)
    server = measured(Script(refused=frozenset(refused)), Pace(streams=1, num_requests=1), mix)
    assert set(server.probe.left_out) == refused and server.counts.failed == 0
    text = "\n".join(report.notes(Plan(mix, Pace()), server))
    assert all(f"refuses {name}" in text for name in refused)


def test_a_server_that_refuses_everything_stops_the_measurement() -> None:
    with pytest.raises(StartupError, match=r"HTTP 400: unknown: \['messages'\]"):
        measured(Script(refused=frozenset({"messages"})), Pace(streams=1, num_requests=1))


@pytest.mark.parametrize("models", ["", "[]", '{"data": []}', '{"data": [{}]}'])
def test_a_server_that_lists_no_models_must_be_told_one(models: str) -> None:
    with pytest.raises(StartupError, match="name the model yourself"):
        measured(Script(models=models), Pace(streams=1, num_requests=1))


def test_the_first_of_several_models_is_asked_and_that_is_said() -> None:
    server = measured(Script(models='{"data": [{"id": "a"}, {"id": "b"}]}'), Pace(streams=1, num_requests=1))
    assert server.probe.target.model == "a"
    assert "2 models are listed" in "\n".join(report.notes(Plan(MIX, Pace()), server))


def test_no_server() -> None:
    with pytest.raises(StartupError, match=r"no server answers at http://127\.0\.0\.1:1/v1"):
        measure(Plan(MIX, Pace(num_requests=1)), [Target("http://127.0.0.1:1/v1", "")])


def test_streams_wait_for_their_answers_and_arrivals_do_not() -> None:
    waiting = Script()
    measured(waiting, Pace(streams=3, num_requests=12))
    assert waiting.most_running <= 3 and len(waiting.bodies) == 1 + 12
    arriving = Script([scripted.crowded for _ in range(12)])
    server = measured(arriving, Pace(rate=2000.0, num_requests=12))
    assert arriving.most_running >= scripted.CROWD and not server.has_failed and len(server.outcomes) == 12
    assert [o.sent_s for o in server.outcomes] == sorted(o.sent_s for o in server.outcomes)
    assert "steady_tokens_per_s" not in server.medians


def test_the_peak_of_kv_memory_is_seen_between_the_ends() -> None:
    server = measured(
        Script(kv_bytes=[100, 900, -1, 200]), Pace(streams=1, num_requests=1), Mix(Span(9, 9), Span(400, 400))
    )
    (one,) = server.rounds
    assert one.kv_start is not None and one.kv_start.num_bytes == 100
    assert (one.figures["kv_peak_bytes"], one.figures["kv_peak_ratio"]) == (900, 4)
    assert one.kv_missed == 1 and "1 samples got no answer" in "\n".join(report.notes(Plan(MIX, Pace()), server))


def test_a_server_without_kv_figures_is_asked_once() -> None:
    server = measured(Script(), Pace(streams=1, num_requests=2))
    assert server.rounds[0].kv_peak is None and server.rounds[0].kv_missed == 0
    assert not any(key.startswith("kv_") for key in server.medians)


def test_no_prompt_is_sent_twice() -> None:
    script = Script()
    measured(script, Pace(streams=2, num_requests=8), warm_up=4)
    prompts = [body["messages"][0]["content"] for body in script.bodies]
    assert len(prompts) == 1 + 8 + 4 == len(set(prompts))
