"""Parameters beyond OpenAI's: what clients send passes, is named, or is refused; and what the operator decides."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.turboserve.api.conftest import Ask, Service, connect_client, error_of, running

from turboserve.api import parameters
from turboserve.api.chat_body import ChatBody
from turboserve.api.chat_request import parse_chat
from turboserve.api.model_names import ServedNames
from turboserve.api.parameters import HONOURED, IGNORED_HEADER, MAX_LOGGED, PARAMETERS, ignored_header, parameter_table
from turboserve.messages import SamplingParams

DOCS = Path(__file__).parents[3] / "docs" / "api.md"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}

# What clients send without meaning anything by it.
LM_STUDIO: dict[str, Any] = {"temperature": 0.7, "max_tokens": -1, "stream": False, "top_k": -1, "repeat_penalty": 1.1}
LLAMA_CPP: dict[str, Any] = {
    "cache_prompt": True,
    "samplers": None,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "xtc_probability": 0,
    "xtc_threshold": 0.1,
    "typical_p": 1,
    "typ_p": 1.0,
    "repeat_last_n": 64,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "mirostat": 0,
    "mirostat_tau": 5,
    "n_predict": -1,
    "n_probs": 0,
    "min_keep": 0,
    "grammar": "",
    "seed": -1,
    "reasoning_format": "auto",
    "timings_per_token": False,
}
VLLM: dict[str, Any] = {
    "best_of": 1,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "ignore_eos": False,
    "min_tokens": 0,
    "stop_token_ids": [],
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "prompt_logprobs": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "echo": False,
    "documents": None,
    "chat_template": None,
    "chat_template_kwargs": {},
    "mm_processor_kwargs": None,
    "priority": 0,
    "request_id": "r",
    "return_token_ids": False,
    "logits_processors": None,
    "kv_transfer_params": None,
    "structured_outputs": None,
    "top_logprobs": 0,
    "guided_json": None,
}
OPENAI: dict[str, Any] = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "safety_identifier": "s",
    "modalities": ["text"],
    "audio": None,
    "prediction": {"type": "content", "content": "x"},
    "verbosity": "medium",
    "prompt_cache_retention": "24h",
    "parallel_tool_calls": True,
    "reasoning_effort": "none",
    "function_call": "none",
    "logprobs": False,
}


@pytest.mark.parametrize("body", [LM_STUDIO, LLAMA_CPP, VLLM, OPENAI], ids=["lm-studio", "llama.cpp", "vllm", "openai"])
def test_what_asks_for_nothing_passes_unmentioned(ask: Ask, service: Service, body: dict[str, Any]) -> None:
    reply = ask(**body)
    assert reply.status_code == 200, reply.text
    assert IGNORED_HEADER not in reply.headers
    got = service.engine.received[-1]
    assert (got.max_tokens, got.sampling.top_k, got.sampling.seed) == (None, 0, None)
    if body is LM_STUDIO:
        assert got.sampling.repetition_penalty == 1.1


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_parameters_are_named(ask: Ask, stream: bool) -> None:
    reply = ask(stream=stream, temprature=1, num_ctx=4096, verbosity="low", user="u", **{"no\r\nx: y": 1, "ä" * 100: 2})
    assert reply.status_code == 200
    named = reply.headers[IGNORED_HEADER].split(", ")
    assert named == ["temprature", "num_ctx", "verbosity", "no??x??y", "?" * 40]
    assert IGNORED_HEADER not in ask(stream=stream).headers


def test_a_name_is_logged_once_and_names_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parameters, "_logged", set())
    monkeypatch.setattr(parameters.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "turboserve.api"):
        for _ in range(2):
            ignored_header(["alien"])
        assert [record.getMessage().count("alien") for record in caplog.records] == [1]
        header = ignored_header([f"n{index}" for index in range(2 * MAX_LOGGED)])
    assert len(caplog.records) == MAX_LOGGED and len(header.split(", ")) == parameters.MAX_NAMED


def test_whole_floats_are_integers(ask: Ask, service: Service) -> None:
    assert ask(max_tokens=100.0, seed=3.0, n=1.0, top_k=40.0).status_code == 200
    got = service.engine.received[-1]
    assert (got.max_tokens, got.sampling.seed, got.sampling.top_k) == (100, 3, 40)
    assert type(got.max_tokens) is int and type(got.sampling.seed) is int


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 5, "n_predict": 6},
        {"repetition_penalty": 1.1, "repeat_penalty": 1.2},
        {"thinking_budget": 1, "max_thinking_tokens": 2},
    ],
    ids=str,
)
def test_two_names_of_one_thing_must_agree(ask: Ask, body: dict[str, Any]) -> None:
    reply = ask(**body)
    assert (reply.status_code, error_of(reply)["param"]) == (400, list(body)[-1])
    assert ask(**dict.fromkeys(body, 2)).status_code == 200


def test_what_ends_an_answer_reaches_the_engine(ask: Ask, service: Service) -> None:
    body = {"stop_token_ids": [5, 7], "ignore_eos": True, "min_tokens": 4, "include_stop_str_in_output": True}
    body["num_draft_tokens"] = 0
    assert ask(**body, skip_special_tokens=False, max_tokens=4).status_code == 200
    got = service.engine.received[-1]
    assert (got.stop_token_ids, got.ignore_eos, got.min_tokens, got.include_stop) == ((5, 7), True, 4, True)
    assert got.num_draft_tokens == 0
    assert got.skip_special_tokens is False
    assert error_of(ask(min_tokens=5, max_tokens=4))["param"] == "min_tokens"
    assert ask().status_code == 200
    usual = service.engine.received[-1]
    assert (usual.stop_token_ids, usual.ignore_eos, usual.min_tokens, usual.include_stop) == ((), False, 0, False)
    assert usual.num_draft_tokens is None
    assert error_of(ask(num_draft_tokens=-1))["param"] == "num_draft_tokens"
    assert usual.skip_special_tokens and usual.add_generation_prompt and usual.template_kwargs == {}


def test_the_models_own_sampling_applies_where_the_body_is_silent() -> None:
    defaults = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05)

    def sampling(**body: object) -> SamplingParams:
        asked = {**HI, **body}
        return (
            parse_chat(asked, request_id="r", tenant="", names=ServedNames("m"), defaults=defaults).requests[0].sampling
        )

    assert sampling() == sampling(temperature=None) == defaults
    assert sampling(temperature=0, top_k=-1) == SamplingParams(0, 0.95, 0, repetition_penalty=1.05)


ASSISTANT = {"role": "assistant", "content": "Sure, "}


@pytest.mark.parametrize(
    ("body", "opens", "continues"),
    [
        ({}, False, True),
        ({"continue_final_message": True}, False, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, False, True),
        ({"continue_final_message": False}, True, False),
        ({"add_generation_prompt": True}, True, False),
        ({"add_generation_prompt": False}, False, False),
    ],
    ids=str,
)
def test_an_answers_beginning_is_continued(body: dict[str, Any], opens: bool, continues: bool) -> None:
    messages = [*HI["messages"], ASSISTANT]
    (request,), *_ = parse_chat({"messages": messages, **body}, request_id="r", tenant="", names=ServedNames("m"))
    assert (request.add_generation_prompt, request.continue_final_message) == (opens, continues)


def test_a_contradictory_prefill_is_400(client: httpx.Client) -> None:
    body = {"messages": [*HI["messages"], ASSISTANT], "continue_final_message": True, "add_generation_prompt": True}
    reply = client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, error_of(reply)["param"]) == (400, "add_generation_prompt")


ON, OFF = ({"enable_thinking": value, "thinking": value} for value in (True, False))


@pytest.mark.parametrize(
    ("body", "kwargs", "budget"),
    [
        ({"reasoning_effort": "none"}, OFF, None),
        ({"reasoning_effort": "high"}, {**ON, "reasoning_effort": "high"}, None),
        ({"reasoning_effort": "low", "enable_thinking": False}, {**OFF, "reasoning_effort": "low"}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}, None),
        (
            {"chat_template_kwargs": {"reasoning_effort": "max"}, "reasoning_effort": "low"},
            {**ON, "reasoning_effort": "max"},
            None,
        ),
        ({"thinking": {"type": "disabled"}}, OFF, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, ON, 0),
        ({"thinking": {"type": "auto"}}, {}, None),
        ({"thinking": True, "thinking_token_budget": 64}, ON, 64),
        ({"think": False}, OFF, None),
        ({"think": "low"}, {**ON, "reasoning_effort": "low"}, None),
        ({"reasoning": {"effort": "high", "max_tokens": 32}}, {**ON, "reasoning_effort": "high"}, 32),
        ({"reasoning": {"enabled": False, "max_tokens": -1}}, OFF, None),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, ON, None),
        ({"thinking_budget_tokens": -1}, {}, None),
        ({"max_thinking_tokens": 0}, {}, 0),
    ],
    ids=str,
)
def test_thinking_reaches_the_engine(
    ask: Ask, service: Service, body: dict[str, Any], kwargs: dict[str, object], budget: int | None
) -> None:
    assert ask(**body).status_code == 200
    got = service.engine.received[-1]
    assert (got.template_kwargs, got.thinking_tokens) == (kwargs, budget)


def test_an_unknown_kind_of_thinking_is_400(ask: Ask) -> None:
    error = error_of(ask(thinking={"type": "deep"}))
    assert error["param"] == "thinking.type" and "function" not in str(error["message"])


def test_template_names_are_the_operators(ask: Ask) -> None:
    reply = ask(chat_template_kwargs={"tools": "x"})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "chat_template_kwargs.tools")
    with running(template_kwargs=["date_string"]) as service, connect_client(service) as client:
        for name, status in (("date_string", 200), ("enable_thinking", 400)):
            sent = client.post("/v1/chat/completions", json={**HI, "chat_template_kwargs": {name: "1 May 2030"}})
            assert sent.status_code == status


@pytest.fixture(scope="module")
def strict_client() -> Iterator[httpx.Client]:
    with running(strict_parameters=True) as service, connect_client(service) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"num_ctx": 4096}, "unsupported_parameter", "num_ctx"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"seed": 1.0}, "invalid_request", "seed"),
        ({"stream": True, "stream_options": {"usage": True}}, "unknown_parameter", "stream_options.usage"),
        ({"messages": [{"role": "user", "content": "x", "alien": 1}]}, "unknown_parameter", "messages[0].alien"),
    ],
    ids=str,
)
def test_strict_parameters(strict_client: httpx.Client, body: dict[str, Any], code: str, param: str) -> None:
    error = error_of(strict_client.post("/v1/chat/completions", json={**HI, **body}))
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize(
    "body", [{}, VLLM, OPENAI, {"verbosity": "medium"}], ids=["none", "vllm", "openai", "verbosity"]
)
def test_strict_parameters_let_pass_what_asks_for_nothing(strict_client: httpx.Client, body: dict[str, Any]) -> None:
    assert strict_client.post("/v1/chat/completions", json={**HI, **body}).status_code == 200


def test_the_table_has_every_field_once() -> None:
    names = [name for parameter in PARAMETERS for name in parameter.names]
    assert len(names) == len(set(names))
    assert set(ChatBody.model_fields) == HONOURED


def test_the_docs_have_the_table() -> None:
    """Print `parameter_table()` and put it there."""
    assert f"\n{parameter_table()}\n" in DOCS.read_text(encoding="utf-8")
