"""What a reply holds beside text: several answers, logprobs, reasoning, usage, fingerprint; all of OpenAI's types."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tests.turboserve.api.conftest import Ask, Service, error_of, running
from tests.turboserve.api.scripted import LIKELY, SCRIPTS, USAGE, WAIT_S
from tests.turboserve.api.test_chat import events_of

from turboserve.api.chat_request import Delivery
from turboserve.api.completion_replies import summed_usage as summed_completions
from turboserve.api.replies import ChatReplies, completion_usage, summed_usage, system_fingerprint
from turboserve.messages import TextDelta, TokenLogprob

ENDING = [name for name, script in SCRIPTS.items() if name in ("calls", "one_call", "thoughts", "likely", "burst")]


def chunks_of(reply: httpx.Response) -> list[ChatCompletionChunk]:
    *events, done = events_of(reply)
    assert done == "[DONE]"
    return [ChatCompletionChunk.model_validate(json.loads(event), strict=True) for event in events]


@pytest.mark.parametrize("script", ENDING)
@pytest.mark.parametrize("extra", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 1}], ids=str)
def test_every_reply_fits_openais_types(ask: Ask, script: str, extra: dict[str, Any]) -> None:
    """The contract behind `ask` holds the same replies to /openapi.json."""
    whole = ChatCompletion.model_validate(ask(script, **extra).json(), strict=True)
    assert whole.usage is not None and len(whole.choices) == extra.get("n", 1)
    streamed = chunks_of(ask(script, stream=True, stream_options={"include_usage": True}, **extra))
    for choice in whole.choices:
        own = [one for chunk in streamed for one in chunk.choices if one.index == choice.index]
        assert "".join(one.delta.content or "" for one in own) == (choice.message.content or "")
        assert own[0].delta.role == "assistant"
        assert [one.finish_reason for one in own if one.finish_reason] == [choice.finish_reason]
    assert streamed[-1].usage == whole.usage
    assert len({chunk.system_fingerprint for chunk in streamed} | {whole.system_fingerprint}) == 1


def test_several_answers(ask: Ask, service: Service) -> None:
    reply = ask("seed", n=3, seed=2**63 - 2, logit_bias={"3": 1})
    requests = service.engine.received[-3:]
    first = reply.headers["x-request-id"]
    assert [request.request_id for request in requests] == [first, f"{first}-1", f"{first}-2"]
    assert [request.sampling.seed for request in requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert len({(request.messages[0]["content"], request.sampling.logit_bias) for request in requests}) == 1
    texts = [choice["message"]["content"] for choice in reply.json()["choices"]]
    assert texts == [f"{request.sampling.seed} " for request in requests]
    usage = reply.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (12, 9)
    assert usage["total_tokens"] == 21 and usage["prompt_tokens_details"]["cached_tokens"] == 8
    streamed = chunks_of(ask("seed", n=3, seed=5, stream=True))
    for index in range(3):
        own = [one for chunk in streamed for one in chunk.choices if one.index == index]
        assert "".join(one.delta.content or "" for one in own) == f"{5 + index} "
        assert own[-1].finish_reason == "stop"


def test_without_a_seed_choices_are_drawn_freely(ask: Ask, service: Service) -> None:
    assert ask(n=2).status_code == 200
    assert [request.sampling.seed for request in service.engine.received[-2:]] == [None, None]


def test_one_answer_that_fails_ends_all(ask: Ask, service: Service) -> None:
    reply = ask("fail_midway", n=3)
    assert (reply.status_code, error_of(reply)["code"]) == (500, "engine_failure")
    assert json.loads(events_of(ask("fail_midway", n=3, stream=True))[-1])["error"]["code"] == "engine_failure"
    service.wait_quiet()


def test_choices_are_limited(ask: Ask) -> None:
    for body in ({"n": 33}, {"n": 2, "session_id": "s"}):
        reply = ask(**body)
        assert (reply.status_code, error_of(reply)["param"]) == (400, "n")
    assert ask(n=1, session_id="s").status_code == 200


def test_choices_are_limited_by_what_runs_together() -> None:
    with running(max_running=2) as service:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
        url = f"{service.url}/v1/chat/completions"
        with httpx.Client(timeout=WAIT_S, verify=False) as client:
            assert client.post(url, json={**body, "n": 2}).status_code == 200
            assert client.post(url, json={**body, "n": 3}).json()["error"]["param"] == "n"


def test_logprobs_are_openais(ask: Ask, service: Service) -> None:
    reply = ask("likely", logprobs=True, top_logprobs=1)
    assert service.engine.received[-1].num_top_logprobs == 1
    logprobs = reply.json()["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [one["bytes"] for one in logprobs["content"]] == [list(token.raw) for token in LIKELY]
    assert [one["logprob"] for one in logprobs["content"]] == [-0.25, -1.5, -9999.0]
    assert [len(one["top_logprobs"]) for one in logprobs["content"]] == [1, 1, 1]
    assert b"".join(bytes(one["bytes"]) for one in logprobs["content"]).decode() == "Hé🙂"
    streamed = chunks_of(ask("likely", logprobs=True, stream=True))
    assert service.engine.received[-1].num_top_logprobs == 0
    pieces = [one.choices[0].logprobs.content for one in streamed if one.choices[0].logprobs]
    assert [token.logprob for piece in pieces for token in piece or ()] == [-0.25, -1.5, -9999.0]
    silent = ask("hi", logprobs=True).json()["choices"][0]["logprobs"]
    assert silent == {"content": [], "refusal": None} and ask().json()["choices"][0]["logprobs"] is None
    assert service.engine.received[-1].num_top_logprobs is None


def test_guessed_tokens_are_counted_over_all_answers() -> None:
    one, other = replace(USAGE, draft_tokens=9, accepted_draft_tokens=4), replace(USAGE, draft_tokens=2)
    for usage in (summed_usage([one, other]), summed_completions([one, other], 2)):
        details = completion_usage(usage).completion_tokens_details
        assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (4, 7)


def test_reasoning_has_both_names_and_is_counted(ask: Ask) -> None:
    reply = ask("thoughts").json()
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"]) == ("Well, hm.", "Well, hm.")
    assert message["content"] == "Yes"
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events_of(ask("thoughts", stream=True))[:-1]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Well, hm."
    assert all(delta.get("reasoning_content") == delta.get("reasoning") for delta in deltas)
    hidden = ask("thoughts", include_reasoning=False)
    assert "reasoning_content" not in hidden.text and "hm." not in hidden.text
    assert "hm." not in ask("thoughts", include_reasoning=False, stream=True).text
    assert "hm." not in ask("thoughts", reasoning={"exclude": True}).text


def test_the_fingerprint_follows_what_a_seed_depends_on(ask: Ask, service: Service) -> None:
    stats = service.engine.stats()
    ours = ask().json()["system_fingerprint"]
    assert ours == system_fingerprint(stats, None) == ask(kv_format="4/3").json()["system_fingerprint"]
    assert ours.startswith("fp_") and ask(kv_format="f16").json()["system_fingerprint"] != ours
    assert system_fingerprint(replace(stats, choices=("4-bit 64x64 by OpenBLAS",)), None) != ours


def test_a_chunk_of_plain_text_has_nothing_to_spare() -> None:
    """There is one per token: what is in it is paid for each time."""
    replies = ChatReplies("chatcmpl-1", "m", Delivery(True, False), "fp_1", created=7)
    chunk = json.loads(replies.delta(0, TextDelta("a")).removeprefix(b"data: "))
    assert chunk == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "m",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}],
    }
    assert USAGE.completion_tokens == 3  # the fixture's, which the sums above rely on


@pytest.mark.parametrize("include_usage", [False, True])
@given(text=st.text(st.characters(exclude_categories=["Cs"])), name=st.text(st.characters(exclude_categories=["Cs"])))
def test_chunks_of_text_alone_are_what_a_chunk_with_logprobs_is_beside_them(
    include_usage: bool, text: str, name: str
) -> None:
    """These are put together from parts that were written once, the others written as a whole."""
    replies = ChatReplies("r", name, Delivery(True, include_usage), name, num_choices=2)
    for choice in range(2):
        alone, beside = (
            json.loads(replies.delta(choice, delta).removeprefix(b"data: "))
            for delta in (TextDelta(text), TextDelta(text, (TokenLogprob("t", b"t", -1.0),)))
        )
        assert beside["choices"][0].pop("logprobs") and alone["choices"][0].pop("logprobs") is None
        assert alone == beside and alone["choices"][0]["delta"] == {"content": text}
