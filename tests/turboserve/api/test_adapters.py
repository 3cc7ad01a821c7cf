"""Adapters over HTTP: by which names they are asked for, what lists and replies call them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.turboserve.api.conftest import Service, connect_client, error_of, running
from tests.turboserve.api.scripted import MODEL_ID, ScriptedEngine

from turboserve.api.model_names import ServedNames, adapted, adapter_names
from turboserve.errors import ModelNotFoundError, StartupError
from turboserve.messages import Embed

HI = [{"role": "user", "content": "hi"}]
SPECS = ("law=/a/law", "tax=/a/tax", "legal=/a/x/../law")
LAW, TAX = f"{MODEL_ID}:law", f"{MODEL_ID}:tax"


@pytest.fixture(scope="module")
def adapted_service() -> Iterator[Service]:
    with running(adapters=SPECS) as service:
        yield service


@pytest.fixture(scope="module")
def client(adapted_service: Service) -> Iterator[httpx.Client]:
    with connect_client(adapted_service) as client:
        yield client


ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HI}),
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/messages", {"messages": HI, "max_tokens": 5}),
    ("/v1/responses", {"input": "hi"}),
    ("/api/chat", {"messages": HI, "stream": False}),
    ("/api/generate", {"prompt": "hi", "stream": False}),
    ("/api/generate", {"prompt": "hi", "raw": True, "stream": False}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_every_route_that_answers_knows_them(
    client: httpx.Client, adapted_service: Service, path: str, body: dict[str, Any]
) -> None:
    known = {"law": ("law", LAW), TAX: ("tax", TAX), "legal": ("law", LAW), MODEL_ID: ("", MODEL_ID)}
    for name, (adapter, shown) in known.items():
        reply = client.post(path, json={"model": name, **body})
        assert reply.json()["model"] == shown
        assert adapted_service.engine.received[-1].adapter == adapter
    for name in (f"{MODEL_ID}:nobody", "nobody", "other:law", f"{MODEL_ID}:", ":law"):
        missing = client.post(path, json={"model": name, **body})
        assert missing.status_code == 404, missing.text
    if path == "/v1/chat/completions":
        assert error_of(missing)["code"] == "model_not_found" and LAW in str(error_of(missing)["message"])


def test_a_stream_names_it(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/chat/completions", json={"model": "tax", "messages": HI, "stream": True}) as reply:
        chunks = [line for line in reply.iter_lines() if line.startswith("data: {")]
    assert chunks and all(f'"model":"{TAX}"' in chunk for chunk in chunks)


def test_fingerprints_of_systems_differ(client: httpx.Client) -> None:
    names = (MODEL_ID, "law", "legal", TAX)
    replies = [client.post("/v1/chat/completions", json={"model": name, "messages": HI}).json() for name in names]
    plain, law, legal, tax = (reply["system_fingerprint"] for reply in replies)
    assert law == legal and len({plain, law, tax}) == 3


def test_embeddings_and_questions(client: httpx.Client, adapted_service: Service) -> None:
    reply = client.post("/v1/embeddings", json={"model": "law", "input": "hi"})
    assert reply.json()["model"] == LAW and adapted_service.engine.asked[-1] == Embed(("hi",), "law")
    for path, body in (
        ("/tokenize", {"prompt": "hi"}),
        ("/tokenize", {"messages": HI}),
        ("/detokenize", {"tokens": [1]}),
        ("/apply-template", {"messages": HI}),
        ("/v1/messages/count_tokens", {"messages": HI}),
        ("/v1/responses/input_tokens", {"input": "hi"}),
    ):
        assert client.post(path, json={"model": TAX, **body}).status_code == 200, path
        assert client.post(path, json={"model": "nobody", **body}).status_code == 404, path


def test_lists(client: httpx.Client) -> None:
    """As vLLM has them: an adapter is a model whose parent is the served one."""
    listed = client.get("/v1/models").json()["data"]
    assert [(one["id"], one["root"], one["parent"]) for one in listed] == [
        (MODEL_ID, MODEL_ID, None),
        (LAW, "law", MODEL_ID),
        (TAX, "tax", MODEL_ID),
    ]
    for name in ("law", LAW, "legal"):
        assert client.get(f"/v1/models/{name}").json() == listed[1]
    assert client.get("/v1/models/nobody").status_code == 404
    assert [tag["name"] for tag in client.get("/api/tags").json()["models"]] == [MODEL_ID, LAW, TAX]
    assert [tag["name"] for tag in client.get("/api/ps").json()["models"]] == [MODEL_ID, LAW, TAX]
    shown = client.post("/api/show", json={"model": "tax:latest"}).json()
    assert shown["details"]["parent_model"] == MODEL_ID and shown["model_info"]["general.basename"] == TAX


def test_where_any_name_will_do() -> None:
    known = {"gpt-4o": "", "gpt-4o:law": "law", "legal": "law", "gpt-4o:nobody": "", None: ""}
    for model_id in ("m", "m:law", "m:nobody"):
        names = ServedNames(model_id, adapter_names(SPECS), takes_any_name=True)
        for name, adapter in (known | {model_id: "", f"{model_id}:tax": "tax"}).items():
            assert names.adapter_of(name) == adapter


@pytest.mark.parametrize("any_model_name", [True, False])
def test_an_adapter_with_the_models_own_name_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, any_model_name: bool
) -> None:
    monkeypatch.setattr(ScriptedEngine, "model_id", "law")
    with (
        pytest.raises(StartupError, match="names the model and an adapter: name the adapter otherwise"),
        running(adapters=SPECS, any_model_name=any_model_name),
    ):
        pass


def test_the_models_own_name_never_means_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a router, where any name will do: a model of a name that ends like an adapter's."""
    monkeypatch.setattr(ScriptedEngine, "model_id", "chat:law")
    with running(adapters=SPECS, any_model_name=True) as service, connect_client(service) as client:
        for path, body in ROUTES:
            assert client.post(path, json={"model": "chat:law", **body}).json()["model"] == "chat:law"
            assert service.engine.received[-1].adapter == ""


@given(st.text() | st.sampled_from(["law", "m", "m:law", "m:m", "law:law", "m:law:law"]))
def test_a_name_is_found_or_refused(name: str) -> None:
    adapters = {"law": "law", "legal": "law"}
    known = {"": "", "m": ""} | {spelling: "law" for one in adapters for spelling in (one, adapted("m", one))}
    try:
        assert ServedNames("m", adapters).adapter_of(name) == known[name]
    except ModelNotFoundError as error:
        assert name not in known and error.param == "model"
