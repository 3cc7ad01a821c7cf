"""Who may talk to the server: keys, hosts, origins, exposure at start-up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from tests.turboserve.api.conftest import Service, connect_client, error_of, running
from tests.turboserve.api.scripted import ScriptedEngine

from turboserve.api.app import create_app
from turboserve.api.http_server import bind
from turboserve.api.security import RouterGuard
from turboserve.errors import StartupError
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

KEY = "sesam-öffne-dich"  # not ASCII, on purpose
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ROUTES = [
    ("GET", "/"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/scripted/model"),
    ("GET", "/v1/kv/stats"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/sessions"),
    ("DELETE", "/v1/sessions/any"),
    ("GET", "/nothing"),
    ("OPTIONS", "/v1/chat/completions"),
    ("GET", "/models/"),
]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Service]:
    with running(api_key=KEY) as service:
        yield service


@pytest.fixture(scope="module")
def guarded_client(guarded: Service) -> Iterator[httpx.Client]:
    with connect_client(guarded) as client:
        yield client


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "authorization",
    [None, b"Bearer wrong", b"Bearer \xff\xfe", b"bearer", b"Basic " + KEY.encode(), KEY.encode()],
)
def test_every_route_that_holds_anything_wants_the_key(
    guarded_client: httpx.Client, method: str, path: str, authorization: bytes | None
) -> None:
    headers = [(b"authorization", authorization)] if authorization is not None else []
    reply = guarded_client.request(method, path, headers=headers)
    assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/docs", "/openapi.json", "/docs/"])
def test_what_holds_no_data_is_open(guarded_client: httpx.Client, path: str) -> None:
    reply = guarded_client.get(path)
    assert reply.status_code == 200 and "scripted/model" not in reply.text and KEY not in reply.text


def test_the_right_key_passes_and_names_a_tenant(guarded: Service, guarded_client: httpx.Client) -> None:
    headers = [(b"authorization", b"bearer " + KEY.encode())]
    reply = guarded_client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert reply.status_code == 200
    tenant = guarded.engine.received[-1].tenant
    assert len(tenant) == 32 and KEY not in tenant


def test_every_key_is_a_caller_of_its_own(rng: np.random.Generator) -> None:
    keys = [rng.bytes(12).hex() for _ in range(3)]
    with running(api_key=keys[0], api_keys=tuple(keys[1:])) as service, connect_client(service) as client:
        for key in (*keys, *keys):
            reply = client.post("/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {key}"})
            assert reply.status_code == 200
        tenants = [request.tenant for request in service.engine.received]
        assert tenants[:3] == tenants[3:] and len(set(tenants)) == 3
        assert client.get("/v1/models", headers={"authorization": f"Bearer {keys[0]}x"}).status_code == 401


def test_no_key_configured_ignores_authorization(client: httpx.Client, service: Service) -> None:
    reply = client.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer anything"})
    assert reply.status_code == 200 and service.engine.received[-1].tenant == ""


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil:8000", "0.0.0.0", "[::2]", ""]
)
def test_foreign_hosts_are_refused_on_loopback(client: httpx.Client, host: str) -> None:
    reply = client.get("/v1/models", headers={"host": host})
    assert (reply.status_code, error_of(reply)["code"]) == (400, "host_not_allowed")


@pytest.mark.parametrize(
    "host",
    ["[::1]evil.com", "[::1", "[::1]:80evil", "[::1].", "localhost:80evil", "localhost:80:80", "a b", "a/b", "[]"],
)
def test_what_names_no_host_is_refused_wherever_it_is_sent(client: httpx.Client, host: str) -> None:
    reply = client.get("/health", headers={"host": host})
    assert reply.status_code == 400 and "Host" in str(error_of(reply)["message"])
    with running(host="0.0.0.0", allow_anonymous=True) as service, connect_client(service) as anywhere:
        assert anywhere.get("/health", headers={"host": host}).status_code == 400
        assert anywhere.get("/health", headers={"host": "evil.example:80"}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:9", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "localhost."),
        *("host.docker.internal:8000", "host.containers.internal"),
    ],
)
def test_loopback_hosts_are_served(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_allowed_hosts_extend_the_list() -> None:
    with running(allowed_hosts=("box.local",)) as service, connect_client(service) as client:
        assert client.get("/health", headers={"host": "Box.local:80"}).status_code == 200
        assert client.get("/health", headers={"host": "other.local"}).status_code == 400


def test_foreign_origins_get_no_grant(client: httpx.Client) -> None:
    for method in ("GET", "OPTIONS"):
        headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        reply = client.request(method, "/v1/models", headers=headers)
        assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "box.local", ""])
def test_an_open_address_without_a_key_does_not_start(host: str) -> None:
    settings = Settings(host=host, port=0)
    engine = ScriptedEngine()
    try:
        with pytest.raises(StartupError, match="--api-key"):
            create_app(engine, settings, Telemetry())
    finally:
        engine.close()
    with pytest.raises(StartupError, match="--allow-anonymous"):
        bind(settings)


@pytest.mark.parametrize("changes", [{"api_key": "k"}, {"api_keys": ("k",)}, {"allow_anonymous": True}])
def test_an_open_address_with_a_key_or_consent_serves_any_host(changes: dict[str, object]) -> None:
    with running(host="0.0.0.0", **changes) as service, connect_client(service) as client:
        reply = client.get(f"http://127.0.0.1:{service.port}/health", headers={"host": "turboserve:8000"})
    assert reply.status_code == 200


def test_a_busy_port_is_one_line_with_the_fix(service: Service) -> None:
    with pytest.raises(StartupError, match=r"--port") as busy:
        bind(Settings(port=service.port))
    assert "\n" not in str(busy.value) and str(service.port) in str(busy.value)


def test_a_foreign_address_is_one_line_with_the_fix() -> None:
    with pytest.raises(StartupError, match=r"--host"):
        bind(Settings(host="192.0.2.1", port=0, api_key="k"))


ROUTER = {
    b"x-turboserve-router-key": b"shared",
    b"x-turboserve-tenant": b"abc123",
    b"x-turboserve-request-id": b"req-7",
}


def test_the_router_alone_is_let_in_and_believed() -> None:
    guard = RouterGuard("shared")
    introduced = guard.introduction(ROUTER.items())
    assert introduced is not None
    assert (introduced.tenant, introduced.request_id) == ("abc123", "req-7")
    for name, value in (
        (b"x-turboserve-router-key", b"Shared"),
        (b"x-turboserve-router-key", b"\xff"),
        (b"x-turboserve-router-key", b""),
        (b"x-turboserve-tenant", b"../x"),
        (b"x-turboserve-request-id", b"a\x1b[0m"),
        (b"x-turboserve-request-id", b""),
    ):
        assert guard.introduction({**ROUTER, name: value}.items()) is None
    assert RouterGuard("").introduction(ROUTER.items()) is None  # a server without a router believes nobody


def test_behind_a_router_requests_belong_to_the_callers_it_names() -> None:
    engine = ScriptedEngine()
    app = create_app(engine, Settings(), Telemetry(), router_key="shared")

    async def ask(path: str, **headers: str) -> httpx.Response:
        own = {name.decode(): value.decode() for name, value in ROUTER.items()} | headers
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            asked = {"messages": [{"role": "user", "content": "hi"}], "session_id": "s"}
            await client.post("/v1/chat/completions", json=asked, headers=own)
            return await client.get(path, headers=own)

    try:
        reply = asyncio.run(ask("/v1/models"))
        assert (reply.status_code, reply.headers["x-request-id"]) == (200, "req-7")
        assert engine.received[-1].tenant == "abc123"
        refused = asyncio.run(ask("/v1/models", **{"x-turboserve-router-key": "no", "authorization": "Bearer shared"}))
        assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
        assert asyncio.run(ask("/health", **{"x-turboserve-router-key": "no"})).status_code == 200
    finally:
        engine.close()
