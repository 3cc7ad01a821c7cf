"""/v1/embeddings: inputs, encodings, dimensions, usage, refusals, and callers that leave."""

from __future__ import annotations

import base64
import struct
import threading
import time
from concurrent.futures import Future
from typing import Any

import httpx
import openai
import pytest
from tests.turboserve.api.conftest import Service, error_of, raw_request
from tests.turboserve.api.scripted import MODEL_ID, WAIT_S

from turboserve.errors import ContextLengthError, UnsupportedParameterError
from turboserve.messages import Embed

VECTOR = pytest.approx([0.48, 0.64, 0.6])


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("one", ("one",)),
        (["one", "two"], ("one", "two")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_inputs_of_every_kind(client: httpx.Client, service: Service, given: object, inputs: object) -> None:
    body = client.post("/v1/embeddings", json={"input": given, "model": MODEL_ID}).json()
    assert service.engine.asked[-1] == Embed(inputs)  # type: ignore[arg-type]
    assert [one["index"] for one in body["data"]] == list(range(len(body["data"])))
    assert all(one["embedding"] == VECTOR for one in body["data"]) and body["model"] == MODEL_ID
    assert body["usage"] == {"prompt_tokens": len(body["data"]), "total_tokens": len(body["data"])}
    assert "hidden states" in body["turboserve"]["pooling"]


def test_base64_is_little_endian_float32(client: httpx.Client) -> None:
    body = client.post("/v1/embeddings", json={"input": "a", "encoding_format": "base64"}).json()
    assert list(struct.unpack("<3f", base64.b64decode(body["data"][0]["embedding"]))) == VECTOR


def test_fewer_dimensions_have_unit_length_again(client: httpx.Client) -> None:
    body = client.post("/v1/embeddings", json={"input": "a", "dimensions": 2}).json()
    assert body["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    reply = client.post("/v1/embeddings", json={"input": "a", "dimensions": 4})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "dimensions")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
    ],
)
def test_what_is_refused_is_named(client: httpx.Client, body: dict[str, object], param: str) -> None:
    reply = client.post("/v1/embeddings", json=body)
    assert reply.status_code == 400 and str(error_of(reply)["param"]).startswith(param.partition("[")[0])


@pytest.mark.parametrize(
    "error", [ContextLengthError("long", param="input[0]"), UnsupportedParameterError("no states")]
)
def test_what_the_engine_says_is_passed_on(
    client: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failed: Future[Any] = Future()
    failed.set_exception(error)
    monkeypatch.setattr(service.engine, "ask", lambda question: failed)
    reply = client.post("/v1/embeddings", json={"input": "a"})
    assert (reply.status_code, error_of(reply)["message"]) == (400, str(error))


def test_a_caller_that_leaves_ends_the_work(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    pending: Future[Any] = Future()
    has_begun = threading.Event()

    def ask(question: object) -> Future[Any]:
        has_begun.set()
        return pending

    monkeypatch.setattr(service.engine, "ask", ask)
    with service.connect() as sock:
        sock.sendall(raw_request(b'{"input": "a"}').replace(b"/v1/chat/completions", b"/v1/embeddings", 1))
        assert has_begun.wait(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while not pending.cancelled():
        assert time.monotonic() < deadline, "nobody waits for it, and it goes on"
        time.sleep(0.01)


def test_the_official_client(service: Service) -> None:
    official = openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0)
    # It asks for base64 by itself and unpacks it.
    reply = official.embeddings.create(model=MODEL_ID, input=["a", "b"])
    assert [one.embedding for one in reply.data] == [VECTOR, VECTOR]
