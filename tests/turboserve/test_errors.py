"""What callers are told of an error: its message and, where they may ask again, when."""

from __future__ import annotations

import httpx
import orjson
import pytest

from turboserve.api.replies import error_headers
from turboserve.cli.client import ServerClient
from turboserve.errors import (
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    QuotaExceededError,
    TurboServeError,
    without_advice,
)
from turboserve.fleet.upstream import error_in

NOT_READY = "The engine is not ready"


@pytest.mark.parametrize(
    ("error", "seconds", "told"),
    [
        (OverloadedError("Full."), "5", "Full. Try again in 5 seconds."),
        (OverloadedError("Full"), "5", "Full. Try again in 5 seconds."),
        (OverloadedError("Full.", retry_after_s=30), "30", "Full. Try again in 30 seconds."),
        (EngineUnavailableError("Gone.", retry_after_s=1), "1", "Gone. Try again in 1 second."),
        (
            EngineUnavailableError.not_ready("it loads"),
            "5",
            f"{NOT_READY}: it loads. Try again in 5 seconds.",
        ),
        (QuotaExceededError("Unpin a session.", retry_after_s=60), "60", "Unpin a session."),  # waiting is no cure
        (InvalidRequestError("Wrong."), None, "Wrong."),
    ],
    ids=str,
)
def test_a_message_says_when_to_come_back_with_the_number_of_the_header(
    error: TurboServeError, seconds: str | None, told: str
) -> None:
    assert error_headers(error).get("Retry-After") == seconds
    assert error.told == told and error.envelope()["error"]["message"] == told  # type: ignore[index]


@pytest.mark.parametrize(
    ("told", "parts"),
    [
        ("Full. Try again in 30 seconds.", ("Full.", 30)),
        ("Gone. Try again in 1 second.", ("Gone.", 1)),
        ("Try again in 3 seconds. No.", ("Try again in 3 seconds. No.", None)),
    ],
)
def test_advice_is_told_apart(told: str, parts: tuple[str, int | None]) -> None:
    assert without_advice(told) == parts


def test_an_error_that_a_router_passes_on_says_it_once() -> None:
    error = OverloadedError("Full.", retry_after_s=7)
    assert error_in(503, orjson.dumps(error.envelope())).told == error.told
    assert error_in(503, orjson.dumps({"error": error.told})).told == error.told  # Ollama's shape


def test_who_waits_for_a_server_reads_why_and_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    error = EngineUnavailableError.not_ready("the model is still being loaded")

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(503, json=error.envelope())

    with ServerClient("http://127.0.0.1:9") as client:
        monkeypatch.setattr(client, "_http", httpx.Client(base_url=client.url, transport=httpx.MockTransport(answer)))
        assert client.unready_reason() == error.message
