"""What passes between callers and models' processes, and what must not."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from tests.turboserve.api.conftest import raw_request
from tests.turboserve.fleet.conftest import WAIT_S, Router, Start, wait_until

from turboserve.api.transfers import SESSION_TYPE


def stream(router: Router, path: str = "/v1/chat/completions", **body: Any) -> str:
    asked = {"model": "a", "stream": True, "do": "stream", **body}
    return httpx.post(f"{router.url}{path}", json=asked, timeout=WAIT_S).text


def stream_from_a_start(router: Router, **body: Any) -> str:
    """A stream whose model may start once the caller has seen a sign of life."""
    asked = {"model": "a", "stream": True, "do": "stream", **body}
    with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=asked, timeout=WAIT_S) as answer:
        chunks = answer.iter_raw()
        first = next(chunks)
        router.go()
        return b"".join((first, *chunks)).decode()


def test_the_body_goes_on_as_it_came(start: Start) -> None:
    router = start({"a": {"aliases": ["gpt-4o"]}, "b": {}})
    reply = router.ask("gpt-4o", path="/v1/embeddings", input="ä", encoding=1.0)
    assert reply.json()["body"] == {"model": "gpt-4o", "input": "ä", "encoding": 1.0}
    assert reply.json()["path"] == "/v1/embeddings"
    assert reply.headers["x-request-id"] == reply.json()["headers"]["x-turboserve-request-id"]


@pytest.mark.parametrize("name", ["%F0%9F%98%80%0d%0a", "a%3Fb=%23", "a%20b", "100%25"])
def test_paths_go_on_as_they_came(start: Start, name: str) -> None:
    router = start({"a": {}})
    router.ask("a")  # what is stored is stored while the model is loaded
    heard = urlsplit(router.get(f"/v1/responses/{name}?model=a&after=b").json()["path"])
    assert (unquote(heard.path), heard.query) == (unquote(f"/v1/responses/{name}"), "after=b")


def test_a_body_of_another_kind_loads_nothing(start: Start) -> None:
    """A web page can send such a body unasked."""
    router = start({"a": {}})
    for path in ("/v1/chat/completions", "/api/chat"):
        reply = httpx.post(
            f"{router.url}{path}", content=b'{"model": "a"}', headers={"Content-Type": "text/plain"}, timeout=WAIT_S
        )
        assert reply.status_code == 415
    assert router.starts("a") == 0


def test_callers_stay_apart_and_keys_stay_here(start: Start) -> None:
    router = start({"a": {}}, api_key="one", api_keys=("two",))
    forged = {"x-turboserve-tenant": "0" * 32, "x-turboserve-router-key": "x", "cookie": "c", "X-Session-Id": "s"}
    heard = {}
    for key in ("one", "two"):
        headers = {"Authorization": f"Bearer {key}", **forged}
        reply = httpx.post(f"{router.url}/v1/chat/completions", json={"model": "a"}, headers=headers, timeout=WAIT_S)
        heard[key] = reply.json()["headers"]
    for key, headers in heard.items():
        assert headers["x-turboserve-tenant"] == hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        assert headers["x-session-id"] == "s"
        assert not {"authorization", "cookie", "x-api-key"} & set(headers)
    assert router.ask("a").status_code == 401
    assert router.get("/v1/models").status_code == 401
    assert router.get("/health").status_code == 200


def test_errors_of_the_process_come_back_as_they_are(start: Start) -> None:
    router = start({"a": {}})
    reply = router.ask("a", do="refuse")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [({"model": "nope"}, 404, "model"), ({}, 400, "model"), ({"model": 7}, 400, "model")],
)
def test_an_unknown_model_loads_nothing(start: Start, body: dict[str, Any], status: int, param: str) -> None:
    router = start({"a": {}, "b": {}})
    reply = httpx.post(f"{router.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    assert router.starts("a") + router.starts("b") == 0


def test_any_name_is_the_first_models_where_that_is_set(start: Start) -> None:
    router = start({"a": {}, "b": {}}, any_model_name=True)
    assert [router.ask(name).json()["by"] for name in ("whatever", "b")] == ["a", "b"]


def test_a_stream_shows_signs_of_life_while_its_model_is_loaded(start: Start) -> None:
    router = start({"a": {}}, {"a": {"waits": True}})
    text = stream_from_a_start(router)
    assert text.startswith(": keep-alive\n\n")
    assert text.endswith('data: {"n": 4, "pad": ""}\n\ndata: [DONE]\n\n')


def test_a_stream_whose_model_cannot_be_loaded_ends_with_the_reason(start: Start) -> None:
    router = start({"a": {}}, {"a": {"waits": True, "complaint": "no such folder"}})
    last = stream_from_a_start(router).strip().split("\n\n")[-1]
    assert "no such folder" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_an_error_after_signs_of_life_is_the_last_event(start: Start) -> None:
    router = start({"a": {}}, {"a": {"waits": True}})
    last = stream_from_a_start(router, do="refuse").strip().split("\n\n")[-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["message"], error["code"], error["type"]) == ("no", "bad", "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "begins"),
    [
        ("/v1/chat/completions", 'data: {"error":{"message":"The process of the model'),
        ("/v1/messages", 'event: error\ndata: {"type":"error","error":{"type":"api_error"'),
        ("/v1/responses", 'event: error\ndata: {"type":"error","code":"model_unavailable"'),
    ],
)
def test_a_process_that_dies_ends_its_stream_with_an_error(start: Start, path: str, begins: str) -> None:
    router = start({"a": {}})
    router.ask("a")  # loaded before, so that the stream begins with its first token
    *events, last = stream(router, path, die_after=2).strip().split("\n\n")
    assert [json.loads(event.removeprefix("data: "))["n"] for event in events] == [0, 1, 2]  # and nothing torn
    assert last.startswith(begins)


def test_a_caller_who_leaves_takes_the_request_along(start: Start) -> None:
    router = start({"a": {}})
    router.ask("a")  # loaded before, so that the stream begins with its first token
    asked = {"model": "a", "stream": True, "do": "stream", "tokens": 6000, "token_s": 0.02}
    with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=asked, timeout=WAIT_S) as answer:
        events = answer.iter_raw()  # kept: httpx closes the connection with the iterator
        next(events)
        assert router.fleet["a"].num_running == 1
    wait_until(lambda: router.fleet["a"].num_running == 0)  # the stream goes on for two minutes
    wait_until(lambda: bool(router.ask("a").json()["cut"]))


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_while_the_model_is_loaded_does_not_wait_any_more(start: Start, stream: bool) -> None:
    router = start({"a": {}}, {"a": {"waits": True}})
    body = json.dumps({"model": "a", "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", urlsplit(router.url).port or 0)) as sock:
        sock.sendall(raw_request(body))
        wait_until(lambda: router.fleet["a"].num_waiting == 1)
    wait_until(lambda: router.fleet["a"].num_waiting == 0)
    assert router.status("a") == "loading"
    router.go()
    router.wait_for("a", "loaded")


def test_a_slow_reader_slows_the_process_down(start: Start) -> None:
    """Nothing is piled up in the router: the process cannot write far ahead of the reader."""
    router = start({"a": {}}, send_timeout_s=1.0)
    router.ask("a")  # loaded before, so that the stream begins with its first token
    asked = {"model": "a", "stream": True, "do": "stream", "tokens": 3000, "pad": "x" * 65536}
    with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=asked, timeout=WAIT_S) as answer:
        events = answer.iter_raw()  # kept: httpx closes the connection with the iterator
        next(events)
        assert router.fleet["a"].num_running == 1
        wait_until(lambda: router.fleet["a"].num_running == 0)  # 200 MB for a reader that stalls: cut off
        with pytest.raises(httpx.TransportError):
            for _ in events:
                pass
    wait_until(lambda: bool(router.ask("a").json()["cut"]))


def test_a_session_is_found_by_memory_by_name_or_by_asking(start: Start) -> None:
    router = start({"a": {}, "b": {}})
    router.ask("a", session_id="s1"), router.ask("b", session_id="s2")
    assert router.get("/v1/sessions/s1").json() == {"model": "a"}
    assert router.get("/v1/sessions/s2").json() == {"model": "b"}
    router.ask("b", path="/tokenize", session_id="s3")  # a route that the router does not learn sessions from
    assert router.get("/v1/sessions/s3").json() == {"model": "b"}
    assert router.get("/v1/sessions/s1?model=b").status_code == 404
    assert router.get("/v1/sessions/s1", **{"X-TurboServe-Model": "a"}).json() == {"model": "a"}
    missing = router.get("/v1/sessions/s4")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "session_not_found")


def test_exported_sessions_pass_through_in_both_directions(start: Start) -> None:
    router = start({"a": {}, "b": {}})
    router.ask("a"), router.ask("b", session_id="s")
    router.ask("a", path="/tokenize", session_id="t")  # a route that the router does not learn sessions from
    for path, first in (("s/export", b"b"), ("s/export?model=b", b"b"), ("t/export", b"a")):
        reply = router.get(f"/v1/sessions/{path}")
        assert reply.content == first * 1_000_000 and reply.headers["content-type"] == SESSION_TYPE
    assert router.get("/v1/sessions/unknown/export").status_code == 404
    num_bytes = 20 << 20  # more than any other body may have
    for query, model in (("?model=a&id=x", "a"), ("?model=b", "b")):
        url = f"{router.url}/v1/sessions/import{query}"
        reply = httpx.post(url, content=bytes(num_bytes), headers={"Content-Type": SESSION_TYPE}, timeout=WAIT_S)
        said = reply.json()
        assert (said["by"], said["num_bytes"]) == (model, num_bytes)
        assert urlsplit(said["path"]).query == ("id=x" if model == "a" else "")
        exported = router.get("/v1/sessions/imported/export")
        assert exported.content[:1] == model.encode(), "who took it in last has it"


def test_metrics_of_all_models_have_their_label(start: Start) -> None:
    router = start({"a": {}, "b": {}, "c": {}})
    router.ask("a"), router.ask("b")
    lines = router.get("/metrics").text.splitlines()
    assert {'turboserve_x_total{model="a"} 3.0', 'turboserve_x_total{model="b"} 3.0'} < set(lines)
    assert sum(line.startswith("# TYPE turboserve_x_total ") for line in lines) == 1
    assert 'turboserve_fleet_starts_total{model="c"} 0.0' in lines
    assert 'turboserve_http_requests_total{route="/v1/chat/completions",status="200"} 2.0' in lines


def test_the_router_is_ready_whatever_its_models_do(start: Start) -> None:
    router = start({"a": {}, "bad": {}}, {"bad": {"complaint": "no"}})
    router.ask("bad")
    ready = router.get("/ready")
    assert (ready.status_code, ready.json()["models"]) == (200, {"a": "unloaded", "bad": "failed"})
    assert router.get("/").status_code == 200
    page = httpx.get(f"{router.url}/", headers={"Accept": "text/html"}, timeout=WAIT_S)
    assert page.text.startswith("<!doctype html>")
    assert httpx.get(f"{router.url}/dashboard/app.js", timeout=WAIT_S).status_code == 200
    assert "/v1/chat/completions" in router.get("/openapi.json").json()["paths"]


def test_what_comes_after_the_shutdown_began_is_refused(start: Start) -> None:
    router = start({"a": {}}, shutdown_grace_s=2.0)
    router.ask("a")
    asked = {"model": "a", "stream": True, "do": "stream", "tokens": 6000, "token_s": 0.02}
    with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=asked, timeout=WAIT_S) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        router.drain.begin()
        assert router.get("/ready").status_code == 503
        assert router.ask("a").status_code == 503
        began = time.monotonic()
        last = b"".join(chunks).strip().split(b"\n\n")[-1]
    assert b"grace period is over" in last
    assert time.monotonic() - began < WAIT_S  # the stream goes on for two minutes
