"""Two real models behind one port: the embedded one under two names, in two formats and two processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.e2e.server import Server, running_server

TABLES = """
idle_unload_s = 0
[models.exact]
kv_format = "f16"
kv_budget = "64MiB"
aliases = ["gpt-4o"]
pinned = true
[models.small]
kv_format = "4/3"
kv_budget = "64MiB"
idle_unload_s = 6
[models.broken]
model = "/no/such/folder"
memory = "64MiB"
"""


@pytest.fixture(scope="module")
def fleet(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("fleet") / "models.toml"
    file.write_text(TABLES)
    with running_server(cache_dir, "--config", str(file)) as running:
        yield running


def ask(fleet: Server, model: str, text: str = "Hello!", **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return fleet.client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=30, **options)


def listed(fleet: Server) -> dict[str, Any]:
    """Through the official client, by name."""
    return {model.id: model for model in fleet.client.models.list()}


def wait_until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


def process_of(fleet: Server, name: str) -> int:
    """The process id, from the command line: it names the model for whoever looks for it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == fleet.process.pid and name in words:
            return int(folder.name)
    raise AssertionError(f"no process serves {name}")


def test_both_answer_each_in_its_format(fleet: Server) -> None:
    assert list(listed(fleet)) == ["exact", "small", "broken"]
    for name, model_id, kv_format in (("gpt-4o", "exact", "f16"), ("small", "small", "4/3")):
        reply = ask(fleet, name)
        assert reply.choices[0].message.content == "Hello! How can I help you today?"
        assert (reply.model, reply.usage.model_extra["turboserve"]["kv_format"]) == (model_id, kv_format)
    shown = listed(fleet)
    assert (shown["exact"].status, shown["small"].status) == ("loaded", "loaded")
    assert shown["small"].max_model_len > 1000
    assert fleet.get("/v1/models/gpt-4o").json()["id"] == "exact"


def test_a_stream_is_the_whole_answer(fleet: Server) -> None:
    whole = ask(fleet, "small", "What does textwrap.shorten do?").choices[0].message.content
    chunks = list(ask(fleet, "small", "What does textwrap.shorten do?", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert len(chunks) > 5


def test_a_broken_model_says_why_and_harms_nobody(fleet: Server) -> None:
    with pytest.raises(openai.InternalServerError, match="There is no folder /no/such/folder") as caught:
        ask(fleet, "broken")
    assert caught.value.status_code == 503
    assert ask(fleet, "exact").choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="use one of exact, small, broken"):
        ask(fleet, "unheard-of")


def test_sessions_metrics_and_statistics_know_their_model(fleet: Server) -> None:
    ask(fleet, "small", extra_body={"session_id": "of-small"})
    ask(fleet, "exact", extra_body={"session_id": "of-exact"})
    assert fleet.get("/v1/sessions/of-small").json()["kv_format"] == "4/3"
    assert fleet.get("/v1/sessions/of-exact").json()["kv_format"] == "f16"
    ids = [session["id"] for session in fleet.get("/v1/sessions").json()["data"]]
    assert ids.index("of-exact") < ids.index("of-small")
    assert "of-small" not in [one["id"] for one in fleet.get("/v1/sessions?model=exact").json()["data"]]
    page = fleet.get("/metrics").text
    assert 'turboserve_generation_tokens_total{model="exact"}' in page
    assert 'turboserve_fleet_model_state{model="small",state="loaded"} 1.0' in page
    by_model = {one["model"]: one["statistics"] for one in fleet.stats()["data"]}
    assert (by_model["small"]["kv_format"], by_model["broken"]) == ("4/3", None)


def test_a_killed_process_is_started_again(fleet: Server) -> None:
    ask(fleet, "small")
    stream = ask(
        fleet, "small", "Count to one hundred.", stream=True, extra_body={"ignore_eos": True, "max_tokens": 900}
    )
    next(stream)
    os.kill(process_of(fleet, "small"), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="ended while it worked"):
        list(stream)
    assert ask(fleet, "exact").choices[0].message.content
    assert ask(fleet, "small").choices[0].message.content == "Hello! How can I help you today?"


def test_an_idle_model_is_unloaded_and_comes_back(fleet: Server) -> None:
    ask(fleet, "small")
    pid = process_of(fleet, "small")
    wait_until(lambda: listed(fleet)["small"].status == "unloaded")
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert listed(fleet)["exact"].status == "loaded"  # pinned
    assert ask(fleet, "small").choices[0].message.content


def test_no_process_outlives_its_router(cache_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[models.exact]\nkv_format = "f16"\nkv_budget = "64MiB"\n')
    with running_server(cache_dir, "--config", str(file)) as fleet:
        ask(fleet, "exact")
        pid = process_of(fleet, "exact")
        fleet.process.kill()
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
