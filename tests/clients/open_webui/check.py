"""Open WebUI, its server as its page asks it: `python -m tests.clients.open_webui.check URL MODEL KEY`.

Some gigabytes of packages, so that `make clients` tries it only where it is named. Without a network and without users.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.clients.steps import Step, Target, run_steps

START_TIMEOUT_S = 300.0
SETTINGS = {
    **{"WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "of-this-check", "OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1"},
    **{"ENABLE_OLLAMA_API": "False", "RAG_EMBEDDING_ENGINE": "openai", "BYPASS_EMBEDDING_AND_RETRIEVAL": "True"},
}


class Page:
    """Asks Open WebUI as its page does."""

    def __init__(self, url: str) -> None:
        self._url, self._token = url, ""
        self._token = json.loads(self.ask("/api/v1/auths/signin", {"email": "admin@localhost", "password": "admin"}))[
            "token"
        ]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self._url + path, data, headers), timeout=120) as reply:
            text: str = reply.read().decode()
            return text

    def chat(self, model: str, *, stream: bool) -> str:
        messages = [{"role": "user", "content": "Who are you?"}]
        return self.ask("/api/chat/completions", {"model": model, "messages": messages, "stream": stream})


@contextmanager
def open_webui(target: Target) -> Iterator[Page]:
    """A server of Open WebUI with one connection, to the target."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="open-webui-check-") as folder, open(os.devnull, "w") as nowhere:
        access = {
            "OPENAI_API_BASE_URL": f"{target.url}/v1",
            "OPENAI_API_KEY": target.key,
            "DATA_DIR": folder,
            "HOME": folder,
        }
        program = str(Path(sys.executable).with_name("open-webui"))
        server = subprocess.Popen(
            [program, "serve", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**os.environ, **SETTINGS, **access},
            stdout=nowhere,
            stderr=nowhere,
        )
        try:
            yield _page(f"http://127.0.0.1:{port}", server)
        finally:
            server.terminate()
            server.wait()


def _page(url: str, server: subprocess.Popen[bytes]) -> Page:
    deadline = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            return Page(url)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise RuntimeError("Open WebUI has not started")


def models_and_answers_reach_the_page(target: Target) -> None:
    with open_webui(target) as page:
        listed = [model["id"] for model in json.loads(page.ask("/api/models"))["data"]]
        assert target.model in listed, listed
        whole = json.loads(page.chat(target.model, stream=False))["choices"][0]["message"]["content"]
        lines = [line[6:] for line in page.chat(target.model, stream=True).splitlines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        streamed = "".join(choice["delta"].get("content") or "" for choice in choices)
        assert "demonstration model" in whole and streamed == whole and len(choices) > 3, (whole, streamed)


STEPS: list[Step] = [models_and_answers_reach_the_page]

if __name__ == "__main__":
    run_steps(STEPS)
