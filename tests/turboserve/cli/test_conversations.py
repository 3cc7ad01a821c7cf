"""Kept chats: written whole, private, read back as they were, and refused when they are anything else."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboserve.cli.config import UsageError
from turboserve.cli.conversations import Conversation, Conversations, check_name
from turboserve.errors import StartupError


def random_text(rng: np.random.Generator) -> str:
    return "".join(chr(c) for c in rng.integers(1, 0xD7FF, int(rng.integers(0, 40))))


def random_conversation(rng: np.random.Generator, name: str = "a.b:c@d-e_1") -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": random_text(rng)} for i in range(int(rng.integers(0, 9)))]
    return Conversation(name, True, random_text(rng), "4/3", messages)


def test_what_is_kept_is_what_was_said(tmp_path: Path, rng: np.random.Generator) -> None:
    kept, conversation = Conversations(tmp_path / "new" / "folder"), random_conversation(rng)
    assert kept.try_load(conversation.name) is None and kept.names() == set()
    kept.save(random_conversation(rng))
    kept.save(conversation)  # over the one before
    assert kept.try_load(conversation.name) == conversation
    assert kept.names() == {conversation.name}
    path = kept.path(conversation.name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    fork = conversation.forked("other")
    fork.messages.append({"role": "user", "content": "more"})
    assert kept.try_load(conversation.name) == conversation, "a fork has messages of its own"
    assert kept.forget(conversation.name) and not kept.forget(conversation.name)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, rng: np.random.Generator) -> None:
    kept, conversation = Conversations(tmp_path), random_conversation(rng)
    kept.save(conversation)
    broken = random_conversation(rng)
    broken.messages.append({"role": "user", "content": "\ud800"})  # a lone surrogate is no UTF-8, but JSON escapes it
    kept.save(broken)
    loaded = kept.try_load(conversation.name)
    assert loaded is not None and loaded.messages[-1]["content"] == "\ud800"
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"cannot be kept in .*--cache-dir"):
        Conversations(tmp_path / "file").save(conversation)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"object": "session"},
        {"name": "../up"},
        {"name": 5},
        {"system": None},
        {"messages": {}},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": ["hello"]},
    ],
)
def test_what_is_no_chat_is_refused(changes: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    kept, conversation = Conversations(tmp_path), random_conversation(rng)
    kept.save(conversation)
    kept.path(conversation.name).write_text(json.dumps({**conversation.to_dict(), **changes}))
    with pytest.raises(StartupError, match="is no exported chat"):
        kept.try_load(conversation.name)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null"])
def test_damaged_files_are_refused(text: str, tmp_path: Path, rng: np.random.Generator) -> None:
    kept, conversation = Conversations(tmp_path), random_conversation(rng)
    kept.save(conversation)
    kept.path(conversation.name).write_text(text)
    with pytest.raises(StartupError, match="is no exported chat"):
        kept.try_load(conversation.name)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", "x" * 129, "x\n", "é"])
def test_names_are_those_that_a_server_takes(name: str) -> None:
    with pytest.raises(UsageError, match="--session"):
        check_name(name, "--session")
