"""Tokens, templates, models, and cancelling by id."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest
from tests.turboserve.api.conftest import Service, connect_client, error_of, running
from tests.turboserve.api.scripted import MODEL_ID, WAIT_S

from turboserve.messages import Detokenize, RenderTemplate, Tokenize

CONVERSATION = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize("name", ["prompt", "content"])
def test_tokenize_a_bare_prompt(client: httpx.Client, service: Service, name: str) -> None:
    reply = client.post("/tokenize", json={name: "one three", "model": MODEL_ID, "add_special_tokens": True})
    assert reply.json() == {"tokens": [3, 5], "count": 2, "max_model_len": 4096}
    asked = service.engine.asked[-1]
    assert isinstance(asked, Tokenize) and asked.request.prompt == "one three" and not asked.request.messages


def test_tokenize_and_render_a_conversation(client: httpx.Client, service: Service) -> None:
    assert client.post("/tokenize", json={"messages": CONVERSATION}).json()["count"] > 2
    asked = service.engine.asked[-1]
    assert isinstance(asked, Tokenize) and asked.request.prompt is None
    assert [m["role"] for m in asked.request.messages] == ["system", "user"]
    reply = client.post("/apply-template", json={"messages": CONVERSATION})
    assert reply.json() == {"prompt": "<system>be brief<user>hi"}
    asked = service.engine.asked[-1]
    assert isinstance(asked, RenderTemplate) and [m["content"] for m in asked.request.messages] == ["be brief", "hi"]


def test_detokenize(client: httpx.Client, service: Service) -> None:
    assert client.post("/detokenize", json={"tokens": [1, 2]}).json() == {"prompt": "x xx", "content": "x xx"}
    assert service.engine.asked[-1] == Detokenize((1, 2))
    assert client.post("/detokenize", json={"tokens": []}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": False}, "add_special_tokens"),
        ("/tokenize", {"content": "a", "with_pieces": True}, "with_pieces"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/apply-template", {}, "messages"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1 << 31]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_is_refused_is_named(client: httpx.Client, path: str, body: dict[str, object], param: str) -> None:
    reply = client.post(path, json=body)
    assert (reply.status_code, error_of(reply)["param"]) == (400, param)


def test_models_say_how_long_and_how_stored(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["max_model_len"], model["context_length"], model["kv_format"]) == (4096, 4096, "4/3")


# --- cancelling

KEYS = ("one", "two")


@pytest.fixture(scope="module")
def two_callers() -> Iterator[Service]:
    with running(api_keys=KEYS) as service:
        yield service


@pytest.mark.parametrize("count", [1, 3])
def test_a_request_is_cancelled_by_its_own_caller_alone(two_callers: Service, count: int) -> None:
    ours, theirs = ({"authorization": f"Bearer {key}"} for key in KEYS)
    replies: list[httpx.Response] = []

    def ask() -> None:
        with connect_client(two_callers) as client:
            body = {"prompt": ["forever"] * count}
            replies.append(client.post("/v1/completions", json=body, headers=ours))

    with connect_client(two_callers) as client:
        asking = threading.Thread(target=ask)
        asking.start()
        two_callers.engine.wait_live(count)
        identity = "-".join(two_callers.engine.received[-1].request_id.split("-")[:2])
        path = f"/v1/requests/{identity}/cancel"
        json = {"content-type": "application/json"}
        reply = client.post(path, headers={**theirs, **json})
        assert (reply.status_code, error_of(reply)["code"]) == (404, "request_not_found")
        assert two_callers.engine.num_live == count
        assert client.post(path, headers=ours).status_code == 415, "a form of a web page cannot"
        reply = client.post(path, headers={**ours, **json})
        assert reply.json() == {"id": identity, "cancelled": True}
        asking.join(timeout=WAIT_S)
        assert (replies[0].status_code, error_of(replies[0])["code"]) == (499, "request_cancelled")
        two_callers.wait_quiet()
        assert client.post(path, headers={**ours, **json}).status_code == 404, "it has ended"


def test_a_cancelled_stream_ends_with_the_error(client: httpx.Client, service: Service) -> None:
    body = {"messages": [{"role": "user", "content": "chatter"}], "stream": True}
    # Not through `client`, which reads every reply to its end before the test sees it.
    with httpx.stream("POST", service.url + "/v1/chat/completions", json=body, timeout=WAIT_S) as reply:
        identity = reply.headers["x-request-id"]
        assert client.post(f"/v1/requests/{identity}/cancel", json={}).status_code == 200
        text = reply.read().decode()
    assert '"code":"request_cancelled"' in text and "[DONE]" not in text


@pytest.mark.parametrize("identity", ["none", "chatcmpl-", "cmpl-0", "%2e%2e", "x" * 300])
def test_unknown_requests_are_not_found(client: httpx.Client, identity: str) -> None:
    reply = client.post(f"/v1/requests/{identity}/cancel", json={})
    assert (reply.status_code, error_of(reply)["code"]) == (404, "request_not_found")
