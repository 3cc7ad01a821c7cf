"""/openapi.json and /docs tell the truth. That replies fit is checked on every reply of these tests: contract.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from jsonschema import ValidationError
from openapi_spec_validator import validate
from tests.turboserve.api.conftest import Ask, Service, connect_client, error_of, running
from tests.turboserve.api.contract import Contract

from turboserve import errors
from turboserve.api.frontdoor import OPEN_PATHS
from turboserve.api.routes import router

KEY = {"authorization": "Bearer key"}
SESSION_ERRORS = {
    ("GET", "/v1/kv/tree", None): (),
    ("GET", "/v1/sessions", None): (errors.SessionNotFoundError("s"),),
    ("GET", "/v1/sessions/s", None): (errors.SessionNotFoundError("s"),),
    ("DELETE", "/v1/sessions/s", None): (errors.SessionNotFoundError("s"), errors.SessionBusyError("busy")),
    ("POST", "/v1/sessions/s", "{}"): (errors.SessionNotFoundError("s"), errors.QuotaExceededError("full")),
    ("POST", "/v1/sessions/s/pin", "{}"): (errors.SessionNotFoundError("s"), errors.QuotaExceededError("full")),
    ("POST", "/v1/sessions/s/unpin", "{}"): (errors.SessionNotFoundError("s"),),
    ("POST", "/v1/sessions/s/fork", "{}"): (
        errors.SessionNotFoundError("s"),
        errors.SessionBusyError("busy"),
        errors.SessionExistsError("there"),
        errors.QuotaExceededError("full"),
    ),
}
OF_ANY_SESSION_COMMAND = (
    errors.OverloadedError("no room"),
    errors.EngineUnavailableError("dead"),
    errors.EngineFailureError("a bug"),
)


@pytest.fixture(scope="module")
def keyed() -> Iterator[dict[str, Any]]:
    """The document of a server with a key."""
    with running(api_key="key") as service, connect_client(service, **KEY) as client:
        yield client.get("/openapi.json").json()


@pytest.fixture
def document(client: httpx.Client) -> dict[str, Any]:
    reply: dict[str, Any] = client.get("/openapi.json").json()
    return reply


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, by_method in document["paths"].items():
        for method, operation in by_method.items():
            yield method.upper(), path, operation


def test_the_document_is_valid(document: dict[str, Any], keyed: dict[str, Any]) -> None:
    validate(document)
    validate(keyed)


def test_every_route_is_described_and_no_other(document: dict[str, Any]) -> None:
    served = {
        (method, route.path_format)
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert {(method, path) for method, path, _ in operations(document)} == served
    identifiers = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(identifiers) == len(set(identifiers)) >= 16
    assert all(operation["description"] for _, _, operation in operations(document))


def test_statuses_that_any_route_can_give_are_everywhere(document: dict[str, Any]) -> None:
    for _, path, operation in operations(document):
        assert {"200", "400", "408", "431", "500"} <= set(operation["responses"]), path
        assert "422" not in operation["responses"], "FastAPI's own; nothing here answers it"


@pytest.mark.parametrize(("request_", "own"), SESSION_ERRORS.items(), ids=lambda value: str(value)[:40])
def test_whatever_the_engine_says_of_sessions_is_declared(
    client: httpx.Client,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    request_: tuple[str, str, str | None],
    own: tuple[errors.TurboServeError, ...],
) -> None:
    """The contract behind `client` fails on an undeclared status."""
    method, path, body = request_
    headers = {"content-type": "application/json"} if body is not None else {}
    for error in (*own, *OF_ANY_SESSION_COMMAND):
        failed: Future[None] = Future()
        failed.set_exception(error)
        with monkeypatch.context() as patched:
            patched.setattr(service.engine, "session", lambda command, failed=failed: failed)
            reply = client.request(method, path, content=body, headers=headers)
        assert (reply.status_code, error_of(reply)["code"]) == (error.status, error.code)


@pytest.mark.parametrize(
    "error",
    [
        errors.ContextLengthError("long"),
        errors.KVFormatError("unknown"),
        errors.QuotaExceededError("full"),
        errors.OverloadedError("busy"),
        errors.EngineUnavailableError("dead"),
        errors.EngineFailureError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ends_a_completion_is_declared(
    ask: Ask, service: Service, monkeypatch: pytest.MonkeyPatch, error: errors.TurboServeError
) -> None:
    def refuse(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(service.engine, "submit", refuse)
        reply = ask()
    assert (reply.status_code, error_of(reply)["code"]) == (error.status, error.code)


def test_keys_are_asked_for_where_they_are(document: dict[str, Any], keyed: dict[str, Any]) -> None:
    assert "securitySchemes" not in document["components"]
    for _, _, operation in operations(document):
        assert "security" not in operation and "401" not in operation["responses"]
    assert keyed["components"]["securitySchemes"] == {
        "key": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    for _, path, operation in operations(keyed):
        assert (path in OPEN_PATHS) == ("security" not in operation) == ("401" not in operation["responses"])


def test_bodies_header_and_stream_are_declared(document: dict[str, Any]) -> None:
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert [p["name"] for p in chat["parameters"] if p["in"] == "header"] == ["X-Session-Id"]
    with_body = {
        path: _names(operation["requestBody"]["content"]["application/json"]["schema"])
        for method, path, operation in operations(document)
        if method == "POST" and "requestBody" in operation and path != "/v1/sessions/import"
    }
    taken_in = document["paths"]["/v1/sessions/import"]["post"]["requestBody"]["content"]
    assert list(taken_in) == list(
        document["paths"]["/v1/sessions/{session_id}/export"]["get"]["responses"]["200"]["content"]
    )
    assert with_body == {
        "/v1/chat/completions": "ChatBody",
        "/v1/messages": "MessagesBody",
        "/v1/messages/count_tokens": "CountTokensBody",
        "/v1/responses": "ResponsesBody",
        "/v1/responses/input_tokens": "ResponsesBody",
        "/v1/completions": "CompletionBody",
        "/v1/requests/{request_id}/cancel": "EmptyBody",
        "/api/chat": "OllamaChatBody",
        "/api/generate": "GenerateBody",
        "/api/show": "ShowBody",
        "/v1/embeddings": "EmbeddingBody",
        "/tokenize": "TokenizeBody ChatBody",
        "/detokenize": "DetokenizeBody",
        "/apply-template": "ChatBody",
        "/v1/sessions/{session_id}": "UpdateBody",
        "/v1/sessions/{session_id}/fork": "ForkBody",
        "/v1/sessions/{session_id}/pin": "EmptyBody",
        "/v1/sessions/{session_id}/unpin": "EmptyBody",
    }
    limit, after = document["paths"]["/v1/sessions"]["get"]["parameters"]
    assert (limit["schema"]["minimum"], limit["schema"]["maximum"], limit["schema"]["default"]) == (1, 100, 20)
    assert after["name"] == "after"


def _names(schema: dict[str, Any]) -> str:
    return " ".join(one["$ref"].rpartition("/")[2] for one in schema.get("anyOf", [schema]))


def test_the_contract_notices(document: dict[str, Any]) -> None:
    """The check behind every other test of this folder can fail."""
    contract = Contract(document)
    ready = {"$ref": "#/components/schemas/Readiness"}
    contract.validate(ready, {"status": "ready", "model": "m"})
    for wrong in ({"status": "ready"}, {"status": "no", "model": "m"}, {"status": "ready", "model": "m", "more": 1}):
        with pytest.raises(ValidationError):
            contract.validate(ready, wrong)
    request = httpx.Request("GET", "http://localhost/health")
    with pytest.raises(AssertionError, match="undeclared"):
        contract.check(httpx.Response(418, request=request))


def test_the_page_shows_everything_and_loads_nothing(client: httpx.Client, document: dict[str, Any]) -> None:
    reply = client.get("/docs")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy and "unsafe" not in policy
    page = reply.text
    assert all(f"{method} {path}</code>" in page for method, path, _ in operations(document))
    anchors = set(re.findall(r'<h3 id="(\w+)"', page))
    assert anchors == set(document["components"]["schemas"]) == anchors | set(re.findall(r'href="#(\w+)"', page))
    assert "<script" not in page and "src=" not in page and "://" not in page
    assert not re.findall(r'href="[^#]', page)
