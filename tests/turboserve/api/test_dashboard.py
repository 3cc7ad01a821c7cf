"""The dashboard's files as HTTP sends them; what the page does with them is tests/dashboard's."""

from __future__ import annotations

import gzip
import re
from dataclasses import replace
from importlib.resources import files

import httpx
import pytest
from tests.turboserve.api.conftest import Service, connect_client, running
from tests.turboserve.api.scripted import WAIT_S

from turboserve.messages import FormatQuality

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
FOLDER = files("turboserve").joinpath("dashboard")


def get(service: Service, path: str, **headers: str) -> httpx.Response:
    """Without the contract: files are no part of the API."""
    return httpx.get(service.url + path, headers=headers, timeout=WAIT_S)


def test_a_browser_gets_the_page_and_a_client_what_it_always_got(client: httpx.Client) -> None:
    page = client.get("/", headers={"accept": BROWSER})
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "<!doctype html>" in page.text
    for accept in ("*/*", "application/json", ""):
        reply = client.get("/", headers={"accept": accept})
        assert reply.headers["content-type"] == "application/json" and reply.json()["name"] == "turboserve"
        assert reply.headers["vary"] == "Accept"
    assert page.headers["vary"] == "Accept, Accept-Encoding"


def test_all_that_the_page_names_is_there_and_nothing_else(service: Service) -> None:
    names, seen = {"dashboard/index.html"}, set[str]()
    while names - seen:
        name = min(names - seen)
        seen.add(name)
        reply = get(service, f"/{name}")
        assert reply.status_code == 200, name
        folder = name.rpartition("/")[0]
        if name.endswith(".html"):
            names |= set(re.findall(r'(?:href|src)="(dashboard/[^"]+)"', reply.text))
        elif name.endswith(".js"):
            names |= {f"{folder}/{found}" for found in re.findall(r'from "\./([^"]+)"', reply.text)}
    unused = {
        f"dashboard/{entry.name}"
        for entry in FOLDER.iterdir()
        if entry.is_file() and f"dashboard/{entry.name}" not in seen
    }
    assert unused == set()
    for name in ("vendor/LICENSE.marked", "vendor/README.md", "../routes.py", "%2e%2e/errors.py", "", "nothing.js"):
        reply = get(service, f"/dashboard/{name}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found"), name


def test_headers_forbid_what_the_page_does_not_do(service: Service) -> None:
    for path in ("/", "/dashboard/app.js", "/dashboard/vendor/uplot.css", "/dashboard/icon.svg", "/dashboard/key.json"):
        headers = get(service, path, accept=BROWSER).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert (
            policy["default-src"]
            == policy["frame-ancestors"]
            == policy["base-uri"]
            == policy["form-action"]
            == "'none'"
        )
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("encoding", ["gzip, br", "identity"])
def test_a_known_file_is_not_sent_again(service: Service, encoding: str) -> None:
    first = get(service, "/dashboard/chat.js", **{"accept-encoding": encoding})
    assert first.text == FOLDER.joinpath("chat.js").read_text()
    assert first.headers.get("content-encoding") == ("gzip" if "gzip" in encoding else None)
    assert int(first.headers["content-length"]) == len(first.content) or "gzip" in encoding
    assert first.headers["cache-control"] == "no-cache" and "Accept-Encoding" in first.headers["vary"]
    known = {"accept-encoding": encoding, "if-none-match": first.headers["etag"]}
    again = get(service, "/dashboard/chat.js", **known)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert get(service, "/dashboard/chats.js", **known).status_code == 200


def test_compressed_and_plain_are_told_apart(service: Service) -> None:
    tags = {
        get(service, "/dashboard/base.css", **{"accept-encoding": name}).headers["etag"]
        for name in ("gzip", "identity")
    }
    assert len(tags) == 2
    assert len(gzip.compress(FOLDER.joinpath("vendor/uplot.js").read_bytes())) < 30_000


def test_files_need_no_key_and_what_they_ask_for_does() -> None:
    with running(api_key="key") as service, connect_client(service) as client:
        assert client.get("/", headers={"accept": BROWSER}).status_code == 200
        assert get(service, "/dashboard/app.js").status_code == 200
        assert get(service, "/dashboard/key.json").json() == {"is_needed": True}
        assert client.get("/").status_code == 401
        for path in ("/v1/kv/stats", "/v1/kv/tree", "/metrics", "/v1/models", "/v1/sessions"):
            assert client.get(path, headers={"accept": BROWSER}).status_code == 401
        assert client.post("/", headers={"accept": BROWSER}).status_code == 401
        assert get(service, "/dashboard/app.js", host="evil.example").status_code == 400


def test_no_key_is_asked_for_where_there_is_none(service: Service) -> None:
    assert get(service, "/dashboard/key.json").json() == {"is_needed": False}
    assert 'route="/dashboard/{name:path}",status="200"' in get(service, "/metrics").text


def test_the_tree_of_sessions(client: httpx.Client, service: Service) -> None:
    service.engine.clear()
    assert client.get("/v1/kv/tree").json() == {"object": "kv.tree", "sessions": [], "nodes": [], "has_more": False}
    for name in ("a", "busy"):
        service.engine.add("", name)
    tree = client.get("/v1/kv/tree").json()
    pages = {session["id"]: session["pages"] for session in tree["sessions"]}
    assert pages == {"a": {"compressed": 5, "shared": 2, "exact_tokens": 36}, "busy": None}
    assert [(node["parent"], node["tokens"], node["sessions"]) for node in tree["nodes"]] == [
        (None, 40, []),
        (0, 100, ["busy"]),
        (0, 100, ["a"]),
    ]
    service.engine.clear()


def test_measured_quality_is_shown(client: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/v1/kv/stats").json()["quality"] == []
    measured = FormatQuality("4/3", 0.0023, 0.0105, 1.0057, 768, 1_790_000_000.9)
    stats = service.engine.stats()
    with monkeypatch.context() as patched:
        patched.setattr(service.engine, "stats", lambda: replace(stats, quality=(measured,)))
        (shown,) = client.get("/v1/kv/stats").json()["quality"]
    assert shown == {
        "kv_format": "4/3",
        "kl_mean": 0.0023,
        "flips": 0.0105,
        "perplexity_ratio": 1.0057,
        "tokens": 768,
        "measured_at": 1_790_000_000,
    }
