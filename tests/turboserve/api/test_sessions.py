"""Sessions over HTTP: what a chat request may say of them, the session routes, and that callers stay apart."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from tests.turboserve.api.conftest import Ask, Service, connect_client, error_of, running

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BAD_IDS = ["", " ", "a b", "../etc", "a/b", "é", "-a", ".", "a" * 129, "a\n", "a\x00"]


@pytest.fixture(autouse=True)
def forget(service: Service) -> Iterator[None]:
    yield
    service.engine.clear()


def jsonless(reply: httpx.Response) -> tuple[int, object, object]:
    error = error_of(reply)
    return reply.status_code, error["code"], error["param"]


def test_session_format_and_hint_reach_the_engine(ask: Ask, service: Service) -> None:
    assert ask(session_id="my-chat.1", kv_format="4", prompt_cache_key="user 7").status_code == 200
    request = service.engine.received[-1]
    assert (request.session_id, request.kv_format, request.cache_key) == ("my-chat.1", "4/4", "user 7")
    assert ask(session_id=None, kv_format=None, prompt_cache_key=None).status_code == 200
    request = service.engine.received[-1]
    assert (request.session_id, request.kv_format, request.cache_key) == (None, None, None)


def test_the_header_names_a_session_too(client: httpx.Client, service: Service) -> None:
    for body, headers in (
        (CHAT, {"X-Session-Id": "a1"}),
        ({**CHAT, "session_id": "a1"}, {"x-session-id": "a1"}),
    ):
        assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        assert service.engine.received[-1].session_id == "a1"
    for headers_list in ([("X-Session-Id", "b2")], [("X-Session-Id", "a1"), ("X-Session-Id", "b2")]):
        reply = client.post("/v1/chat/completions", json={**CHAT, "session_id": "a1"}, headers=headers_list)
        assert jsonless(reply) == (400, "invalid_request", "session_id")


@pytest.mark.parametrize("session_id", [*BAD_IDS, 7, ["a"], True])
def test_bad_session_ids_are_refused_and_not_repeated(ask: Ask, session_id: object) -> None:
    reply = ask(session_id=session_id)
    assert jsonless(reply) == (400, "invalid_request", "session_id")
    assert str(session_id) not in str(error_of(reply)["message"]) or len(str(session_id)) < 2


@pytest.mark.parametrize(
    ("given", "normal"),
    [("f16", "f16"), (" F16 ", "f16"), ("8/4", "8/4"), ("4", "4/4"), ("04/03", "4/3"), ("2/2", "2/2")],
)
def test_formats_are_normalised(ask: Ask, service: Service, given: str, normal: str) -> None:
    assert ask(kv_format=given).status_code == 200
    assert service.engine.received[-1].kv_format == normal


@pytest.mark.parametrize("given", ["", "5/4", "4/4/4", "four", "4/", "/4", "-4/4", "f8", "4/4\n4", "٤/٤"])
def test_unknown_formats_are_refused(ask: Ask, given: str) -> None:
    assert jsonless(ask(kv_format=given)) == (400, "kv_format_not_supported", "kv_format")


def test_a_session_is_shown(client: httpx.Client, service: Service) -> None:
    service.engine.add("", "mine")
    shown = client.get("/v1/sessions/mine").json()
    assert (shown["id"], shown["object"], shown["explicit"], shown["tier"]) == ("mine", "session", True, "memory")
    assert (shown["kv_format"], shown["tokens"], shown["hits"], shown["requests"]) == ("4/3", 100, 2, 3)
    assert shown["kv_bytes"]["total"] == 400 and shown["raw_equivalent_bytes"] == 1600 and shown["ratio"] == 4.0
    assert (shown["pinned"], shown["ttl_s"], shown["disk_bytes"]) == (False, None, 0)
    assert isinstance(shown["created_at"], int) and isinstance(shown["last_used_at"], int)


def test_pages_cover_everything_once(client: httpx.Client, service: Service, rng: np.random.Generator) -> None:
    names = [f"s{index}" for index in range(int(rng.integers(1, 60)))]
    for name in names:
        service.engine.add("", name)
    limit, seen, after = int(rng.integers(1, 20)), [], None
    while True:
        query = {"limit": limit, **({"after": after} if after else {})}
        page = client.get("/v1/sessions", params=query).json()
        assert page["object"] == "list" and len(page["data"]) <= limit
        seen += [entry["id"] for entry in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert seen == names[::-1], "newest first"
    empty = client.get("/v1/sessions", params={"after": names[0]}).json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limit=%201", "invalid_request", "limit"),
        ("limit=1_0", "invalid_request", "limit"),
        ("limit=", "invalid_request", "limit"),
        ("limit=0&before=x", "unknown_parameter", "before"),
        ("limit=0", "invalid_request", "limit"),
        ("limit=101", "invalid_request", "limit"),
        ("limit=ten", "invalid_request", "limit"),
        ("limit=%D9%A1", "invalid_request", "limit"),
        ("limit=99999999999", "invalid_request", "limit"),
        ("after=a%20b", "invalid_request", "after"),
        ("before=x", "unknown_parameter", "before"),
    ],
)
def test_bad_pages_are_refused(client: httpx.Client, query: str, code: str, param: str) -> None:
    assert jsonless(client.get(f"/v1/sessions?{query}")) == (400, code, param)


def test_an_unknown_cursor_is_not_found(client: httpx.Client) -> None:
    assert jsonless(client.get("/v1/sessions?after=gone"))[:2] == (404, "session_not_found")


def test_fork_pin_limit_and_delete(client: httpx.Client, service: Service) -> None:
    service.engine.add("", "root")
    fork = client.post("/v1/sessions/root/fork", json={"id": "branch"}).json()
    assert (fork["id"], fork["explicit"]) == ("branch", True)
    assert client.post("/v1/sessions/root/fork", json={}).json()["id"] not in ("root", "branch")
    empty = client.post("/v1/sessions/root/fork", headers={"content-type": "application/json"})
    assert empty.status_code == 200
    assert jsonless(client.post("/v1/sessions/root/fork", json={"id": "branch"})) == (409, "session_exists", "id")
    assert client.post("/v1/sessions/branch/pin", json={}).json()["pinned"] is True
    limited = client.post("/v1/sessions/branch", json={"ttl_s": 60}).json()
    assert (limited["ttl_s"], limited["pinned"]) == (60, True)
    assert client.post("/v1/sessions/branch/unpin", json={}).json()["pinned"] is False
    freed = client.post("/v1/sessions/branch", json={"ttl_s": 0, "pinned": None}).json()
    assert (freed["ttl_s"], freed["pinned"]) == (None, False)
    deleted = client.delete("/v1/sessions/branch").json()
    assert deleted == {"id": "branch", "object": "session.deleted", "deleted": True}
    assert jsonless(client.get("/v1/sessions/branch")) == (404, "session_not_found", "session_id")
    assert client.get("/v1/sessions/root").status_code == 200


def test_a_running_session_is_not_deleted(client: httpx.Client, service: Service) -> None:
    service.engine.add("", "busy")
    assert jsonless(client.delete("/v1/sessions/busy"))[:2] == (409, "session_busy")


def test_a_full_quota_says_which(client: httpx.Client, service: Service) -> None:
    for index in range(40):
        service.engine.add("", f"s{index}")
    reply = client.post("/v1/sessions/s0/fork", json={})
    assert jsonless(reply) == (429, "quota_exceeded", "max_sessions_per_caller")


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/v1/sessions/s", {"ttl_s": -1}, "invalid_request", "ttl_s"),
        ("/v1/sessions/s", {"ttl_s": 1e300}, "invalid_request", "ttl_s"),
        ("/v1/sessions/s", {"pinned": "yes"}, "invalid_request", "pinned"),
        ("/v1/sessions/s", {"pined": True}, "unknown_parameter", "pined"),
        ("/v1/sessions/s/pin", {"pinned": True}, "unknown_parameter", "pinned"),
        ("/v1/sessions/s/fork", {"id": "a b"}, "invalid_request", "id"),
        ("/v1/sessions/s/fork", {"id": 7}, "invalid_request", "id"),
    ],
)
def test_bad_changes_are_refused(client: httpx.Client, path: str, body: object, code: str, param: str) -> None:
    assert jsonless(client.post(path, json=body)) == (400, code, param)


@pytest.mark.parametrize("session_id", ["none", "a%20b", "%00", "x" * 500, "..%2f..", "%c3%a9"])
def test_unknown_sessions_are_not_found(client: httpx.Client, session_id: str) -> None:
    for method, path, body in (
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "", {}),
        ("POST", "/fork", {}),
        ("POST", "/pin", {}),
        ("POST", "/unpin", {}),
    ):
        reply = client.request(method, f"/v1/sessions/{session_id}{path}", json=body)
        assert reply.status_code == 404 and error_of(reply)["code"] in ("session_not_found", "not_found")


@pytest.mark.parametrize("action", ["", "/fork", "/pin", "/unpin"])
def test_a_web_form_changes_nothing(client: httpx.Client, service: Service, action: str) -> None:
    """What a page of another origin may send without asking: no JSON media type, body or not."""
    before = service.engine.add("", "mine")
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        reply = client.post(f"/v1/sessions/mine{action}", headers=headers, content=b"")
        assert jsonless(reply)[:2] == (415, "unsupported_media_type")
    assert client.get("/v1/sessions").json()["data"][0]["pinned"] is before.is_pinned
    assert len(client.get("/v1/sessions").json()["data"]) == 1


def test_oversized_bodies_are_refused(client: httpx.Client) -> None:
    assert jsonless(client.post("/v1/sessions/s/fork", json={"id": "x" * 5000}))[0] == 413


def test_callers_never_meet(rng: np.random.Generator) -> None:
    """Random sessions of three keys: each key lists and reaches exactly its own, and changes nobody else's."""
    keys = [rng.bytes(8).hex() for _ in range(3)]
    with running(api_key=keys[0], api_keys=tuple(keys[1:])) as service:
        clients = [connect_client(service, authorization=f"Bearer {key}") for key in keys]
        for client in clients:
            client.post("/v1/chat/completions", json=CHAT)
        tenants = [request.tenant for request in service.engine.received]
        names = [f"s{index}" for index in range(12)]
        owned = [{name for name in names if rng.random() < 0.5} for _ in keys]
        for tenant, own in zip(tenants, owned, strict=True):
            for name in own:
                service.engine.add(tenant, name)
        for client, own in zip(clients, owned, strict=True):
            assert {entry["id"] for entry in client.get("/v1/sessions?limit=100").json()["data"]} == own
            for name in names:
                reply = client.post(f"/v1/sessions/{name}/pin", json={})
                assert reply.status_code == (200 if name in own else 404)
        clients[0].delete(f"/v1/sessions/{names[0]}")
        owned[0].discard(names[0])
        for client, own in zip(clients, owned, strict=True):
            listed = client.get("/v1/sessions?limit=100").json()["data"]
            assert {entry["id"] for entry in listed} == own and all(entry["pinned"] for entry in listed)
            client.close()
