"""Two real servers on one folder: one is killed, the other goes on from the last stored turn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.server import Server, running_server

FILLER = "The harbour near house 12 was painted in the year 1950. " * 40
SESSION = "trip"


def turn(server: Server, messages: list[Any], session_id: str = SESSION) -> tuple[int, int]:
    """Answer the last question; cached tokens, and tokens held afterwards."""
    reply: Any = server.client.chat.completions.create(
        model="turboserve-tiny",
        messages=messages,
        max_tokens=12,
        temperature=0,
        extra_headers={"X-Session-Id": session_id},
    )
    messages.append({"role": "assistant", "content": reply.choices[0].message.content})
    return reply.usage.prompt_tokens_details.cached_tokens, reply.usage.model_extra["turboserve"]["tokens"]


def wait_until_stored(server: Server) -> None:
    while server.stats()["disk"]["pending_bytes"]:
        time.sleep(0.02)


def test_a_killed_servers_conversations_go_on_at_the_other(cache_dir: Path, tmp_path: Path) -> None:
    flags = ("--kv-store-dir", str(tmp_path / "store"), "--kv-store-shared")
    messages: list[Any] = [{"role": "user", "content": FILLER + "My name is Paula."}]
    with running_server(cache_dir, *flags) as first, running_server(cache_dir, *flags) as second:
        _, held = turn(first, messages)
        wait_until_stored(first)
        first.process.kill()
        first.process.wait()
        assert second.get(f"/v1/sessions/{SESSION}").json()["tier"] == "disk"
        messages.append({"role": "user", "content": "What is my name?"})
        cached, held_now = turn(second, messages)
        assert cached >= held - 1 > 500 and held_now > held
        wait_until_stored(second)
        with running_server(cache_dir, *flags) as third:  # one that is started again finds the later turn
            messages.append({"role": "user", "content": "Where is the harbour?"})
            assert turn(third, messages)[0] >= held_now - 1
            wait_until_stored(third)
        messages.append({"role": "user", "content": "And the market?"})
        assert turn(second, messages)[0] > held_now, "its own copy is older than the stored one"


def test_a_folder_is_not_shared_unless_all_say_so(cache_dir: Path, tmp_path: Path) -> None:
    with (
        running_server(cache_dir, "--kv-store-dir", str(tmp_path), "--kv-store-shared"),
        pytest.raises(AssertionError, match="kv_store_shared"),
        running_server(cache_dir, "--kv-store-dir", str(tmp_path)),
    ):
        pass
