"""Web pages that may call the API (CORS), and the spellings of paths that clients use."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from pydantic import ValidationError
from tests.turboserve.api.conftest import Service, connect_client, error_of, running

from turboserve.settings import Settings

PAGE = "http://localhost:3000"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BEARER = {"authorization": "Bearer key"}


@pytest.fixture(scope="module")
def open_to_pages() -> Iterator[Service]:
    with running(api_key="key", cors_allowed_origins=("HTTP://localhost:3000/", "null")) as service:
        yield service


@pytest.fixture(scope="module")
def pages(open_to_pages: Service) -> Iterator[httpx.Client]:
    with connect_client(open_to_pages) as client:
        yield client


def grants(reply: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name.startswith("access-control")}


def preflight(client: httpx.Client, origin: str, **more: str) -> httpx.Response:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    return client.options("/v1/chat/completions", headers={"origin": origin, **asked, **more})


def test_a_preflight_needs_no_key_and_grants_what_was_asked_for(pages: httpx.Client) -> None:
    reply = preflight(pages, PAGE)
    assert reply.status_code == 204 and reply.content == b"" and reply.headers["vary"] == "Origin"
    granted = grants(reply)
    assert granted["access-control-allow-origin"] == PAGE
    assert granted["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert "POST" in granted["access-control-allow-methods"]
    assert "access-control-allow-private-network" not in granted and "credentials" not in str(granted)
    granted = grants(preflight(pages, PAGE, **{"access-control-request-private-network": "true"}))
    assert granted["access-control-allow-private-network"] == "true"


def test_what_is_no_list_of_headers_is_not_repeated(pages: httpx.Client) -> None:
    for wrong in ("a\tb", "a" * 1001, "(x)"):
        reply = preflight(pages, PAGE, **{"access-control-request-headers": wrong})
        assert reply.status_code == 204 and "access-control-allow-headers" not in reply.headers


def test_replies_are_shown_to_allowed_pages_errors_included(pages: httpx.Client) -> None:
    for origin in (PAGE, "null"):
        reply = pages.post("/v1/chat/completions", json=CHAT, headers={"origin": origin, **BEARER})
        assert reply.status_code == 200 and grants(reply)["access-control-allow-origin"] == origin
        assert "x-request-id" in grants(reply)["access-control-expose-headers"]
        assert reply.headers["x-request-id"]
    reply = pages.post("/v1/chat/completions", json=CHAT, headers={"origin": PAGE})
    assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key"), "a page is no key"
    assert grants(reply)["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize(
    "origin", ["http://localhost:3001", "https://localhost:3000", "http://localhost:3000.evil", ""]
)
def test_other_pages_get_nothing(pages: httpx.Client, origin: str) -> None:
    reply = preflight(pages, origin)
    assert reply.status_code == 401 and not grants(reply)
    reply = pages.get("/v1/models", headers={"origin": origin, **BEARER})
    assert reply.status_code == 200 and not grants(reply) and reply.headers["vary"] == "Origin"


def test_a_star_lets_every_page_in() -> None:
    with running(cors_allowed_origins=("*",)) as service, connect_client(service) as client:
        reply = client.get("/v1/models", headers={"origin": "https://any.example"})
        assert grants(reply)["access-control-allow-origin"] == "https://any.example"


@pytest.mark.parametrize("origin", ["localhost:3000", "http://", "http://a/path", ""])
def test_what_is_no_origin_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ValidationError, match=r"https://chat\.example"):
        Settings(cors_allowed_origins=(origin,))


@pytest.mark.parametrize(
    "path",
    [
        *("/models", "/v1/models/", "/models/", "/models/scripted/model", "/v1/models/scripted/model/"),
        *("/health/", "/sessions", "/kv/stats/", "/ready/", "/docs/"),
    ],
)
def test_paths_answer_without_version_and_with_a_slash(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200


def test_completions_do_so_too_and_count_as_one_route(client: httpx.Client, service: Service) -> None:
    for path in ("/chat/completions", "/v1/chat/completions/", "/chat/completions/"):
        reply = client.post(path, json=CHAT)
        assert reply.status_code == 200 and reply.json()["id"].startswith("chatcmpl-")
    assert 'route="/chat/completions' not in client.get("/metrics").text


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/v1/models", "/chat", "/v1/health", "/v2/models", "/modelsx"])
def test_other_paths_stay_unknown(client: httpx.Client, path: str) -> None:
    reply = client.get(path)
    assert (reply.status_code, error_of(reply)["code"]) == (404, "not_found")


def test_the_document_has_one_spelling(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert "/v1/models" in paths and "/models" not in paths and not [p for p in paths if p != "/" and p.endswith("/")]
