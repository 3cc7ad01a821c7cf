"""Chats by name: what was said, kept on the asking side, because a server keeps caches and no texts.

A file each under `chats` in the cache folder, readable for its owner alone. Owns names and files; the server's session
of the same name saves computing and decides nothing about what is said.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from turboserve.cli.config import UsageError
from turboserve.errors import StartupError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}", re.ASCII)  # the server's rule for session ids
NAME_RULE = "1 to 128 of A-Z a-z 0-9 . _ : @ -, beginning with a letter or digit"
VERSION = 1
ROLES = ("user", "assistant")


@dataclass
class Conversation:
    """Messages as they are sent, and how. `is_kept`: its owner chose the name, so that it outlives the chat."""

    name: str
    is_kept: bool = False
    system: str = ""
    kv_format: str = ""  # empty: the server's
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def new(cls, system: str = "", kv_format: str = "") -> Self:
        """One that ends with the chat, under a name that nobody else has."""
        return cls(f"chat-{secrets.token_hex(6)}", False, system, kv_format)

    def to_send(self) -> list[dict[str, str]]:
        """All messages, the system's first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def forked(self, name: str) -> Conversation:
        """A copy with a name of its own, to be kept."""
        return replace(self, name=name, is_kept=True, messages=[dict(message) for message in self.messages])

    def to_dict(self) -> dict[str, Any]:
        return {
            "object": "turboserve.chat",
            "version": VERSION,
            "name": self.name,
            "system": self.system,
            "kv_format": self.kv_format,
            "messages": self.messages,
        }

    @classmethod
    def from_dict(cls, found: Any) -> Self:
        """Inverse of `to_dict`, to be kept. Raises ValueError for anything else."""
        if not isinstance(found, dict) or found.get("object") != "turboserve.chat" or found.get("version") != VERSION:
            raise ValueError(f"no chat of version {VERSION}")
        name, system, kv_format = (found.get(key) for key in ("name", "system", "kv_format"))
        if not (isinstance(name, str) and isinstance(system, str) and isinstance(kv_format, str)):
            raise ValueError("its name, system text or format is no text")
        messages = found.get("messages")
        if not (NAME.fullmatch(name) and isinstance(messages, list) and all(_is_message(m) for m in messages)):
            raise ValueError("its name or its messages are none")
        return cls(name, True, system, kv_format, [{key: m[key] for key in ("role", "content")} for m in messages])


def _is_message(found: Any) -> bool:
    return isinstance(found, dict) and found.get("role") in ROLES and isinstance(found.get("content"), str)


def check_name(name: str, option: str) -> str:
    """The name itself. Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{option} {name!r}: expected {NAME_RULE}")
    return name


class Conversations:
    """The kept chats of one cache folder."""

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir.expanduser() / "chats"

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def try_load(self, name: str) -> Conversation | None:
        """None where there is none. Raises StartupError for a file that cannot be read."""
        path = self.path(name)
        if not path.exists():
            return None
        return read_conversation(path)

    def save(self, conversation: Conversation) -> None:
        """Raises StartupError when it cannot be written; what was there stays then."""
        path = self.path(conversation.name)
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".tmp")  # 0600
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(conversation.to_dict(), file, indent=1)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as exc:
            raise StartupError(
                f"the chat cannot be kept in {path}: {exc.strerror or exc}; make room there, or set another --cache-dir"
            ) from exc

    def forget(self, name: str) -> bool:
        """Whether there was one."""
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise StartupError(f"{self.path(name)} cannot be deleted: {exc.strerror or exc}") from exc
        return True

    def names(self) -> set[str]:
        """Of all that are kept."""
        return {file.stem for file in self._folder.glob("*.json")}


def read_conversation(file: Path) -> Conversation:
    """Raises StartupError for what is no chat."""
    return parse_conversation(file.read_bytes, file)


def parse_conversation(read: Callable[[], bytes], file: Path) -> Conversation:
    """What `read` gives of `file`. Raises StartupError for what is no chat."""
    try:
        return Conversation.from_dict(json.loads(read().decode("utf-8")))
    except OSError as exc:
        raise StartupError(f"{file} cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise StartupError(f"{file} is no exported chat ({exc}): export it again") from exc
