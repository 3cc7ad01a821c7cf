"""/v1/completions: prompts of all kinds, choices, echo, logprobs, suffix, streams; and the official client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from tests.turboserve.api import scripted
from tests.turboserve.api.conftest import Service, error_of, running
from tests.turboserve.api.scripted import MODEL_ID, USAGE, WAIT_S, Script

from turboserve.api.sampling_request import choices_of
from turboserve.messages import (
    Constraint,
    Detokenize,
    FillInMiddle,
    Finished,
    Request,
    SamplingParams,
    TextDelta,
    TokenLogprob,
)

Complete = Callable[..., httpx.Response]


@pytest.fixture
def complete(client: httpx.Client) -> Complete:
    def post(prompt: object = "hi", **parameters: object) -> httpx.Response:
        return client.post("/v1/completions", json={"prompt": prompt, **parameters})

    return post


@pytest.fixture
def official(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0)


def events(reply: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_whole_completion(complete: Complete, service: Service) -> None:
    reply = complete("Once", model=MODEL_ID, max_tokens=7, stop="\n")
    body = reply.json()
    assert body["id"] == reply.headers["x-request-id"] and body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", MODEL_ID)
    choice = {"index": 0, "text": "Hello, world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert body["choices"] == [choice]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (12, 3)
    request = service.engine.received[-1]
    assert (request.prompt, request.messages, request.max_tokens, request.stop) == ("Once", (), 7, ("\n",))


def test_prompts_times_choices_are_in_order(complete: Complete, service: Service) -> None:
    reply = complete(["echo a", "echo b"], n=3, seed=5)
    body = reply.json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (index, f"echo {'ab'[index // 3]} ") for index in range(6)
    ]
    requests = service.engine.received[-6:]
    identity = body["id"]
    assert [r.request_id for r in requests] == [identity, *(f"{identity}-{i}" for i in range(1, 6))]
    assert [r.sampling.seed for r in requests] == [5, 6, 7, 5, 6, 7]
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (24, 18, 42)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "read"),
    [([3, 4], [(3, 4)]), ([[3, 4], [5]], [(3, 4), (5,)]), (["a", "b"], ["a", "b"]), ([0], [(0,)]), ("", [""])],
)
def test_prompts_of_every_kind(complete: Complete, service: Service, prompt: object, read: list[object]) -> None:
    before = len(service.engine.received)
    assert complete(prompt).status_code == 200
    assert [request.prompt for request in service.engine.received[before:]] == read


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [[1]] * 129}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [[1], "a"]}, "prompt[1]"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": ["a", "b"], "n": 65}, "n"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "n": 2, "best_of": 3}, "best_of"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 0, "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b", "echo": True}, "echo"),
        ({"prompt": [1], "suffix": "b"}, "suffix"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"prompt": "a", "guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
    ],
)
def test_what_is_refused_is_named(client: httpx.Client, body: dict[str, object], param: str) -> None:
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 400
    assert str(error_of(reply)["param"]).startswith(param.partition("[")[0])


def test_another_model_is_not_served_unless_any_is(complete: Complete) -> None:
    reply = complete(model="other")
    assert (reply.status_code, error_of(reply)["code"]) == (404, "model_not_found")
    with running(any_model_name=True) as service, httpx.Client(base_url=service.url, timeout=WAIT_S) as client:
        for path, body in (
            ("/v1/completions", {"prompt": "hi"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/tokenize", {"prompt": "hi"}),
        ):
            assert client.post(path, json={**body, "model": "other"}).status_code == 200
        assert client.get("/v1/models/other").json()["id"] == MODEL_ID


def test_everything_about_drawing_and_ending_is_passed_on(complete: Complete, service: Service) -> None:
    service.engine.sampling_defaults = SamplingParams(temperature=0.7, top_k=20)
    try:
        complete(
            top_k=-1, top_p=0.5, min_p=0.1, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, seed=-3,
            logit_bias={"5": -100}, stop=["a", "b"], stop_token_ids=[7], ignore_eos=True, min_tokens=2,
            include_stop_str_in_output=True, skip_special_tokens=False, guided_choice=["x", "y"], logprobs=2,
            session_id="s1", kv_format="4/4", prompt_cache_key="k",
        )  # fmt: skip
    finally:
        service.engine.sampling_defaults = SamplingParams()
    assert service.engine.received[-1] == Request(
        service.engine.received[-1].request_id,
        prompt="hi",
        sampling=SamplingParams(0.7, 0.5, 0, 0.1, 1.0, -1.0, 1.5, ((5, -100.0),), -3),
        min_tokens=2,
        stop=("a", "b"),
        stop_token_ids=(7,),
        ignore_eos=True,
        include_stop=True,
        skip_special_tokens=False,
        num_top_logprobs=2,
        constraint=Constraint("choice", '["x","y"]', "guided_choice"),
        session_id="s1",
        kv_format="4/4",
        cache_key="k",
    )


def test_seeds_of_further_choices_stay_in_64_bits(rng: np.random.Generator) -> None:
    top = (1 << 63) - 1
    for seed in (top, int(rng.integers(0, 1 << 62))):
        seeds = [r.sampling.seed for r in choices_of(Request("r", sampling=SamplingParams(seed=seed)), 3)]
        assert len(set(seeds)) == 3 and all(one is not None and -top - 1 <= one <= top for one in seeds)
    assert [r.sampling.seed for r in choices_of(Request("r"), 2)] == [None, None]


def test_echo_puts_the_prompt_before_every_answer(complete: Complete, service: Service) -> None:
    body = complete(["say ", "tell "], n=2, echo=True).json()
    assert [choice["text"] for choice in body["choices"]] == [
        p + "Hello, world" for p in ("say ", "say ", "tell ", "tell ")
    ]
    assert complete([2, 3], echo=True).json()["choices"][0]["text"] == "xx xxxHello, world"
    assert service.engine.asked[-1] == Detokenize((2, 3))
    streamed = events(complete("say ", echo=True, stream=True))
    assert [event["choices"][0]["text"] for event in streamed] == ["say ", "Hello", ", ", "world", ""]


def scored() -> Script:
    """An answer of which the second character comes in two tokens."""
    tokens = [
        ("a", b"a", -0.5),
        ("�", "é".encode()[:1], -1.0),
        ("�", "é".encode()[1:], -2.0),
        ("z", b"z", -float("inf")),
    ]
    for piece, part in (("a", tokens[:1]), ("éz", tokens[1:])):
        others = (TokenLogprob("q", b"q", -3.0),)
        yield TextDelta(piece, tuple(TokenLogprob(text, raw, value, top=others) for text, raw, value in part))
    yield Finished("length", USAGE, stopped_by=9)


LEGACY = {
    "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", "z"],
    "token_logprobs": [-0.5, -1.0, -2.0, -9999.0],
    "top_logprobs": [
        {"q": -3.0, "a": -0.5},
        {"q": -3.0, "bytes:\\xc3": -1.0},
        {"q": -3.0, "bytes:\\xa9": -2.0},
        {"q": -3.0, "z": -9999.0},
    ],
    "text_offset": [0, 1, 1, 2],
}


def test_logprobs_have_the_first_design(complete: Complete, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scripted.SCRIPTS, "scored", scored)
    choice = complete("scored", logprobs=1).json()["choices"][0]
    assert choice["logprobs"] == LEGACY and (choice["finish_reason"], choice["stop_reason"]) == ("length", 9)
    pieces = [event["choices"][0]["logprobs"] for event in events(complete("scored", logprobs=1, stream=True))]
    assert {name: [one for piece in pieces if piece for one in piece[name]] for name in LEGACY} == LEGACY


def test_suffix_becomes_a_prompt_with_ends_of_its_own(complete: Complete, service: Service) -> None:
    assert complete(["abc", "d"], suffix="ef", stop_token_ids=[4]).status_code == 200
    assert service.engine.asked[-2:] == [FillInMiddle("abc", "ef"), FillInMiddle("d", "ef")]
    requests = service.engine.received[-2:]
    assert [r.prompt for r in requests] == [(1, 3, 2, 2, 3), (1, 1, 2, 2, 3)]
    assert requests[0].stop_token_ids == (4, 9)
    complete("abc", suffix="")
    assert service.engine.received[-1].prompt == "abc"


def test_streams_of_several_answers(complete: Complete) -> None:
    reply = complete(["echo a b", "echo c"], n=2, stream=True, stream_options={"include_usage": True})
    *chunks, last = events(reply)
    texts = ["".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) for i in range(4)]
    assert texts == ["echo a b ", "echo a b ", "echo c ", "echo c "]
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons.count("stop") == 4 and all(c["usage"] is None for c in chunks)
    assert last["choices"] == [] and (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (24, 12)
    assert len({c["id"] for c in (*chunks, last)}) == 1


def test_one_failing_answer_ends_all(complete: Complete, service: Service) -> None:
    reply = complete(["forever", "fail_first"])
    assert (reply.status_code, error_of(reply)["code"]) == (400, "context_length_exceeded")
    service.wait_quiet()


def test_the_official_client(official: openai.OpenAI) -> None:
    whole = official.completions.create(model=MODEL_ID, prompt=["a", "b"], n=2, logprobs=0, max_tokens=5)
    assert [choice.text for choice in whole.choices] == ["Hello, world"] * 4 and whole.usage
    assert whole.choices[0].logprobs is not None
    stream = official.completions.create(model=MODEL_ID, prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello, world"
    with pytest.raises(openai.BadRequestError) as refused:
        official.completions.create(model=MODEL_ID, prompt="a", best_of=3)
    assert refused.value.param == "best_of"


def test_what_is_not_known_is_ignored_and_named(complete: Complete, client: httpx.Client) -> None:
    reply = complete(temprature=0.1, user="me", use_beam_search=False)
    assert reply.status_code == 200 and reply.headers["x-turboserve-ignored"] == "temprature"
    reply = complete(use_beam_search=True)
    assert reply.status_code == 400 and error_of(reply)["param"] == "use_beam_search"
    reply = client.post("/v1/embeddings", json={"input": "hi", "task": "search"})
    assert reply.status_code == 200 and reply.headers["x-turboserve-ignored"] == "task"
    assert "x-turboserve-ignored" not in complete().headers
    with running(strict_parameters=True) as service, httpx.Client(base_url=service.url, timeout=WAIT_S) as strict:
        reply = strict.post("/v1/completions", json={"prompt": "hi", "temprature": 0.1})
        assert reply.status_code == 400 and error_of(reply)["param"] == "temprature"


def test_numbers_are_read_as_chat_completions_read_them(complete: Complete, service: Service) -> None:
    assert complete(max_tokens=-1, seed=-1, top_k=-1, min_tokens=1.0, repeat_penalty=1.5).status_code == 200
    request = service.engine.received[-1]
    assert (request.max_tokens, request.min_tokens, request.sampling.seed, request.sampling.top_k) == (None, 1, None, 0)
    assert request.sampling.repetition_penalty == 1.5
    assert complete(n_predict=7).status_code == 200 and service.engine.received[-1].max_tokens == 7


def test_a_session_continues_with_one_answer(complete: Complete) -> None:
    for body, blamed in (({"n": 2}, "n"), ({"prompt": ["a", "b"]}, "prompt"), ({"prompt": ["a"], "n": 2}, "n")):
        reply = complete(session_id="s", **body)
        assert reply.status_code == 400 and error_of(reply)["param"] == blamed
        assert str(error_of(reply)["message"]).startswith(f"{blamed}: ")


def test_too_many_answers_are_told_with_both_numbers(complete: Complete) -> None:
    reply = complete(prompt=["a"] * 20, n=7)
    assert error_of(reply)["param"] == "n" and "7 answers to each of 20 prompts" in str(error_of(reply)["message"])
