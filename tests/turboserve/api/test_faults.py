"""Bad requests: each gets its status, code and param, and leaves nothing behind (see the `service` fixture)."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest
from tests.turboserve.api.conftest import Ask, Service, error_of
from tests.turboserve.api.scripted import WAIT_S

CHAT = "/v1/chat/completions"
JSON_TYPE = {"content-type": "application/json"}
HI = {"role": "user", "content": "hi"}
VALID = b'{"messages":[{"role":"user","content":"hi"}]}'


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"  \n", id="blank"),
        pytest.param(b"{", id="truncated"),
        pytest.param(VALID[:-1], id="truncated-late"),
        pytest.param(b"[]", id="array"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="string"),
        pytest.param(VALID + b"x", id="trailing"),
        pytest.param(b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', id="invalid-utf8"),
        pytest.param(b"\xef\xbb\xbf" + VALID, id="bom"),
        pytest.param(VALID.decode().encode("utf-16"), id="utf16"),
        pytest.param(b'{"messages":[{"role":"user","content":"\\ud800"}]}', id="lone-surrogate"),
        pytest.param(b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}', id="encoded-surrogate"),
        pytest.param(VALID[:-1] + b',"temperature":NaN}', id="nan"),
        pytest.param(VALID[:-1] + b',"temperature":Infinity}', id="infinity"),
        pytest.param(VALID[:-1] + b',"temperature":1e400}', id="1e400"),
        pytest.param(VALID[:-1] + b',"seed":' + b"9" * 5000 + b"}", id="5000-digits"),
        pytest.param(b"[" * 30_000, id="depth"),
        pytest.param(b'{"messages":' + b"[" * 2000 + b"]" * 2000 + b"}", id="depth-closed"),
    ],
)
def test_malformed_body_is_400(client: httpx.Client, body: bytes) -> None:
    start = time.perf_counter()
    reply = client.post(CHAT, content=body, headers=JSON_TYPE)
    assert reply.status_code == 400
    assert error_of(reply)["type"] == "invalid_request_error"
    assert time.perf_counter() - start < WAIT_S / 2  # a hang, not a speed, is what this guards against


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 2**31),
        ("top_k", 1.5),
        ("top_k", -2),
        ("min_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", 1_000_001),
        ("max_tokens", 10**30),
        ("max_tokens", "10"),
        ("max_tokens", False),
        ("max_tokens", 1.5),
        ("max_tokens", -2),
        ("min_tokens", -1),
        ("max_completion_tokens", 0),
        ("n", 0),
        ("n", 33),  # more than run together
        ("n", -1),
        ("n", 10**9),
        ("n", 10**25),
        ("seed", 2**63),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("repetition_penalty", 5e-324),
        ("repetition_penalty", 11),
        ("logit_bias", [1]),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {str(token): 1 for token in range(1025)}),
        ("stop", ""),
        ("stop", 5),
        ("stop", ["a"] * 17),
        ("stop", ["x" * 1001]),
        ("stream", "yes"),
        ("stream_options", []),
        ("stream_options", {"include_usage": True}),  # without stream
        ("logprobs", 0),
        ("top_logprobs", 21),
        ("top_logprobs", 5),  # without logprobs
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["5"]),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
        ("chat_template_kwargs", {"enable_thinking": "<|im_end|>"}),
        ("chat_template_kwargs", {"enable_thinking": [1]}),
        ("reasoning_effort", "<|im_end|>"),
        ("thinking_token_budget", -2),
        ("continue_final_message", True),  # a user's
        ("model", 5),
    ],
)
def test_bad_value_is_400_naming_the_parameter(ask: Ask, name: str, value: object) -> None:
    reply = ask(**{name: value})
    assert reply.status_code == 400
    error = error_of(reply)
    assert str(error["param"]).split(".")[0].split("[")[0] == name
    assert name in str(error["message"])


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        ({}, "messages"),
        ([1], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "alien", "content": "x"}], "messages[0].role"),
        ([{"role": 5, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}], "messages[0].tool_calls[0].function"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "user", "content": ""}, 7], "messages[1]"),
    ],
)
def test_bad_messages_are_400_with_their_place(client: httpx.Client, messages: object, param: str) -> None:
    reply = client.post(CHAT, json={"messages": messages} if messages is not None else {})
    assert reply.status_code == 400
    assert error_of(reply)["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (CHAT, {"messages": []}, 'messages: send at least one, such as {"role": "user", "content": "Hello"}.'),
        ("/v1/messages", {"messages": [], "max_tokens": 1}, 'send at least one, such as {"role": "user"'),
        (CHAT, {"messages": [{"role": "alien", "content": "x"}]}, "expected 'system', 'developer', 'user', "),
        (CHAT, {"messages": [{"content": "x"}]}, "Missing required parameter: messages[0].role."),
        ("/v1/messages", {"messages": [{"role": "tool", "content": "x"}], "max_tokens": 1}, "'user', 'assistant' or"),
        (CHAT, {"messages": [HI], "response_format": {"type": "xml"}}, "expected 'text', 'json_object', "),
        (CHAT, {"messages": [HI], "stop": ""}, "stop: must not be empty."),
    ],
)
def test_a_complaint_says_what_may_be_sent(client: httpx.Client, path: str, body: object, said: str) -> None:
    reply = client.post(path, json=body)
    assert reply.status_code == 400 and said in reply.json()["error"]["message"], reply.text


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages", "/v1/responses", "/api/chat", "/tokenize"])
@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"messages":[{"role":"user","content":"caf\xe9"}]}', 42),  # Latin-1
        (b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}', 39),
        (VALID[:-1] + b"\xc3", 44),  # torn within a character
    ],
)
def test_what_is_no_utf8_is_called_that(client: httpx.Client, path: str, body: bytes, place: int) -> None:
    reply = client.post(path, content=body, headers=JSON_TYPE)
    assert reply.status_code == 400
    assert f"not valid UTF-8: the byte at position {place}" in reply.text and "surrogate" not in reply.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": "x"}),
        ("modalities", ["audio"]),
        ("best_of", 4),
        ("use_beam_search", True),
        ("web_search_options", {"search_context_size": "low"}),
        ("web_search_options", {}),
        ("mirostat", 2),
        ("typical_p", 0.5),
        ("chat_template", "{{ 1 }}"),
        ("grammar", 'root ::= "a"'),
        ("echo", True),
        ("regex", ""),  # constraints, also where nothing or everything fits them
        ("ebnf", ""),
        ("structural_tag", {}),
        ("allowed_token_ids", []),
    ],
)
def test_unsupported_parameter_is_named(ask: Ask, name: str, value: object) -> None:
    reply = ask(**{name: value})
    assert reply.status_code == 400
    error = error_of(reply)
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


def test_differing_token_limits_are_400(ask: Ask) -> None:
    assert error_of(ask(max_tokens=5, max_completion_tokens=6))["param"] == "max_completion_tokens"


def test_errors_never_quote_the_prompt(ask: Ask) -> None:
    secret = "correct horse battery staple"
    in_tools = {"tools": [{"type": secret}]}
    in_format = {"response_format": {"type": secret}}
    for reply in (
        ask(secret, n=0),
        ask([{"type": "image", "text": secret}]),
        ask(**in_tools),
        ask(**in_format),
        ask(chat_template_kwargs={secret: 1}),
    ):
        assert reply.status_code == 400 and "horse" not in reply.text


@pytest.mark.parametrize("size", ["declared", "chunked"])
def test_oversized_body_is_413(client: httpx.Client, service: Service, size: str) -> None:
    big = b'{"messages":"' + b"x" * (4 * service.settings.max_body_bytes) + b'"}'

    def pieces() -> Iterator[bytes]:
        for offset in range(0, len(big), 8192):
            yield big[offset : offset + 8192]

    reply = client.post(CHAT, content=big if size == "declared" else pieces(), headers=JSON_TYPE)
    assert (reply.status_code, error_of(reply)["code"]) == (413, "request_too_large")


def test_too_many_messages_are_400(client: httpx.Client) -> None:
    body = b'{"messages":[' + b",".join([b"7"] * 30_000) + b"]}"
    reply = client.post(CHAT, content=body, headers=JSON_TYPE)
    assert (reply.status_code, str(error_of(reply)["param"])[:8]) == (400, "messages")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {},
    ],
)
def test_other_media_types_are_415(client: httpx.Client, headers: dict[str, str]) -> None:
    reply = client.post(CHAT, content=VALID, headers=headers)
    assert (reply.status_code, error_of(reply)["code"]) == (415, "unsupported_media_type")


def test_charset_utf8_is_fine(client: httpx.Client) -> None:
    headers = {"content-type": 'Application/JSON; charset="UTF-8"'}
    assert client.post(CHAT, content=VALID, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "gpt-4", "%2e%2e/%2e%2e", "scripted/model\x00", "/etc/passwd", "scripted/Model", "x" * 1000],
)
def test_unknown_model_is_404_without_a_look_at_files(
    client: httpx.Client, ask: Ask, service: Service, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def no_files(*_: object, **__: object) -> None:
        raise AssertionError("a model name reached the file system")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", no_files)
        patched.setattr("os.stat", no_files)
        posted = ask(model=name)
        fetched = client.get("/v1/models/" + name.replace("\x00", "%00"))
    for reply in (posted, fetched):
        assert reply.status_code == 404
    assert error_of(posted)["code"] == "model_not_found" and error_of(posted)["param"] == "model"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("OPTIONS", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("BREW", "/health", 405, "method_not_allowed"),
        ("GET", "/redoc", 404, "not_found"),
        ("POST", "/docs", 405, "method_not_allowed"),
    ],
)
def test_unknown_routes_and_methods(client: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    reply = client.request(method, path)
    assert (reply.status_code, error_of(reply)["code"]) == (status, code)
    assert ("allow" in reply.headers) == (status == 405)
    if path == "/health":
        assert set(reply.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_a_bug_of_ours_is_a_plain_500(ask: Ask, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    with monkeypatch.context() as patched:
        patched.setattr(service.engine, "submit", broken)
        reply = ask()
    assert (reply.status_code, error_of(reply)["code"]) == (500, "engine_failure")
    assert "secret detail" not in reply.text and reply.headers["x-request-id"] in reply.text
