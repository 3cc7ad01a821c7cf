"""What becomes of a conversation when its answers are whole, stopped, or break off; and what commands do to it."""

from __future__ import annotations

import io
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from turboserve.cli.chat import Chat, Screen
from turboserve.cli.chat_commands import handle, talk
from turboserve.cli.client import Piece, ServerClient, ServerError
from turboserve.cli.config import UsageError
from turboserve.cli.conversations import Conversation, Conversations


class Scripted(ServerClient):
    """A server whose next answers are told: pieces of text, and what ends them early."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9")
        self.script: list[list[str | BaseException]] = []
        self.asked: list[dict[str, Any]] = []
        self.deleted: list[str] = []

    def answer(self, body: dict[str, Any]) -> Generator[Piece, None, None]:
        self.asked.append({**body, "messages": [dict(m) for m in body["messages"]]})
        for step in self.script.pop(0):
            if isinstance(step, BaseException):
                raise step
            yield Piece(text=step)
        yield Piece(finish_reason="stop")

    def fork(self, name: str, new_name: str | None) -> dict[str, Any]:
        return {"id": new_name}

    def delete(self, name: str) -> None:
        self.deleted.append(name)
        raise ServerError("there is none", 404)


BROKEN = ServerError("the server hung up")


@pytest.fixture
def client() -> Scripted:
    return Scripted()


@pytest.fixture
def chat(client: Scripted, tmp_path: Path) -> Chat:
    screen = Screen(io.StringIO(), io.StringIO())
    return Chat(client, "m", Conversation.new("be kind"), Conversations(tmp_path), screen)


def said(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.conversation.messages]


def test_an_answer_is_kept_as_far_as_it_came(chat: Chat, client: Scripted) -> None:
    client.script = [["a", "b"], ["c", KeyboardInterrupt()], ["d", BROKEN], [KeyboardInterrupt()], [BROKEN]]
    assert chat.ask("1") and not chat.ask("2")
    with pytest.raises(ServerError):
        chat.ask("3")
    assert said(chat) == ["1", "ab", "2", "c", "3", "d"]
    assert not chat.ask("4") and chat.unanswered == "4"
    with pytest.raises(ServerError):
        chat.ask("5")
    assert said(chat) == ["1", "ab", "2", "c", "3", "d"] and chat.unanswered == "5"
    assert client.asked[-1]["messages"][0] == {"role": "system", "content": "be kind"}
    client.script = [["e"]]
    assert chat.retry(), "what had no answer at all"
    assert said(chat)[-2:] == ["5", "e"] and len({asked["session_id"] for asked in client.asked}) == 1


@pytest.mark.parametrize("end", [KeyboardInterrupt(), BROKEN])
def test_a_retry_that_brings_nothing_leaves_the_old_answer(chat: Chat, client: Scripted, end: BaseException) -> None:
    chat.take(Conversation("kept", True))
    client.script = [["old"], [end], ["new ", end], ["newest"]]
    chat.ask("q")
    for expected in ("old", "new ", "newest"):
        try:
            chat.retry()
        except ServerError:
            assert end is BROKEN
        assert said(chat) == ["q", expected]
        kept = chat.kept.try_load("kept")
        assert kept is not None and kept.messages == chat.conversation.messages
    assert [asked["messages"] for asked in client.asked] == [[{"role": "user", "content": "q"}]] * 4


def test_there_is_nothing_to_retry_at_first(chat: Chat) -> None:
    with pytest.raises(UsageError, match="no answer yet"):
        chat.retry()


def test_commands_change_what_is_asked_next(chat: Chat, client: Scripted) -> None:
    client.script = [["1"], ["2"], ["3"], ["4"]]
    lines = iter(["one", "/format compact", "/fork trip", "two", "/new", "three", "/session trip", "/system -", "four"])

    def read(prompt: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    talk(chat, read)
    first, second, third, fourth = client.asked
    assert "kv_format" not in first and second["kv_format"] == third["kv_format"] == fourth["kv_format"] == "3t/2t"
    assert second["session_id"] == fourth["session_id"] == "trip"
    assert len({first["session_id"], third["session_id"], "trip"}) == 3
    assert [m["content"] for m in second["messages"]] == ["be kind", "one", "1", "two"]
    assert [m["content"] for m in third["messages"]] == ["be kind", "three"]
    assert [m["content"] for m in fourth["messages"]] == ["one", "1", "two", "2", "four"]
    chat.close()
    assert sorted(client.deleted) == sorted([first["session_id"], third["session_id"]]), "not what was named"


@pytest.mark.parametrize("line", ["/nothing", "/fork", "/fork a/b", "/session ../x", "/format 9/9"])
def test_a_mistake_at_the_prompt_is_told_and_changes_nothing(chat: Chat, line: str) -> None:
    before = chat.conversation
    with pytest.raises(UsageError):
        handle(chat, line)
    assert chat.conversation is before and not chat.conversation.messages


def test_a_pipes_question_names_no_session(chat: Chat, client: Scripted) -> None:
    from turboserve.cli.chat import answer_once

    client.script = [["yes"], [KeyboardInterrupt()]]
    assert answer_once(chat, "q") == 0 and "session_id" not in client.asked[0]
    assert answer_once(chat, "q") == 130
    chat.close()
    assert not client.deleted
