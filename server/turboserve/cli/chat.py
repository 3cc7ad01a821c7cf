"""`turboserve chat`: a conversation with a running server, at a prompt or as one command of a pipe.

Owns turns and what is printed of them; commands that begin with a slash are chat_commands.py's, the line editor is
line_reader.py's. Ctrl-C stops an answer and keeps what there is of it.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TextIO

from turboserve.cli.client import Piece, ServerClient, ServerError
from turboserve.cli.config import UsageError
from turboserve.cli.conversations import Conversation, Conversations
from turboserve.errors import StartupError

READY_INTERVAL_S = 0.5
BUSY_S = 2.0  # for a stopped answer to leave its session
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Sampling:
    """What was asked for; None: as the server has it."""

    temperature: float | None = None
    max_tokens: int | None = None

    def fields(self) -> dict[str, Any]:
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {key: value for key, value in given.items() if value is not None}


class Screen:
    """Where a chat is printed: colours and remarks for people, bare text for files and pipes."""

    def __init__(self, stream: TextIO | None = None, remarks: TextIO | None = None) -> None:
        self._stream, self._remarks = stream or sys.stdout, remarks or sys.stderr
        self.is_terminal = self._stream.isatty()
        self._is_dim = False

    def piece(self, piece: Piece) -> None:
        """A part of an answer. Reasoning is for people."""
        if piece.reasoning and self.is_terminal:
            self._write(piece.reasoning, dim=True)
        if piece.text:
            self._write(piece.text)

    def end(self, text: str) -> None:
        """The end of an answer, on a line of its own."""
        if self._is_dim:
            self._stream.write(PLAIN)
            self._is_dim = False
        if not text.endswith("\n"):
            self._stream.write("\n")
        self._stream.flush()

    def line(self, text: str) -> None:
        """What was asked for by a command."""
        self._stream.write(text + "\n")
        self._stream.flush()

    def remark(self, text: str) -> None:
        """What nobody asked for; never among an answer's text."""
        self._remarks.write(f"turboserve: {' '.join(text.split())}\n")
        self._remarks.flush()

    def _write(self, text: str, dim: bool = False) -> None:
        if self.is_terminal:
            # A model's text must not move the cursor or set the terminal's title.
            text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
            if dim and not self._is_dim:
                text = DIM + text
            elif self._is_dim and not dim:
                text = PLAIN + "\n\n" + text.lstrip("\n")  # the answer begins below the reasoning
            self._is_dim = dim
        self._stream.write(text)
        self._stream.flush()


@dataclass
class Turn:
    """What is known of an answer, complete or not."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    first_s: float = 0.0
    elapsed_s: float = 0.0


@dataclass
class Chat:
    """A conversation with one model of one server."""

    client: ServerClient
    model: str
    conversation: Conversation
    kept: Conversations
    screen: Screen
    sampling: Sampling = field(default_factory=Sampling)
    is_named: bool = True  # to the server, as a session; what ends with its first answer need not be
    last: Turn | None = None
    unanswered: str = ""  # the last question, where nothing at all was said to it
    _used: set[str] = field(default_factory=set)  # names that end with the chat, and that the server knows

    def ask(self, text: str) -> bool:
        """A turn. False when it was stopped by Ctrl-C. Raises ServerError when it broke off, or never began.

        Whatever there is of an answer is kept; where there is nothing, the conversation is as before.
        """
        messages = self.conversation.messages
        messages.append({"role": "user", "content": text})
        turn, is_whole, self.unanswered = Turn(), True, ""
        try:
            self._stream(turn)
        except KeyboardInterrupt:
            is_whole = False
        finally:
            if turn.text:
                messages.append({"role": "assistant", "content": turn.text})
                self.last = turn
            else:
                messages.pop()
                self.last, self.unanswered = None, text
            if turn.text or not is_whole:
                self.screen.end(turn.text)
            self._keep()
        return is_whole

    def _stream(self, turn: Turn) -> None:
        asked_s = time.perf_counter()
        body = {"model": self.model, "messages": self.conversation.to_send(), **self.sampling.fields()}
        if self.conversation.kv_format:
            body["kv_format"] = self.conversation.kv_format
        if self.is_named or self.conversation.is_kept:
            body["session_id"] = self.conversation.name
            self._used |= set() if self.conversation.is_kept else {self.conversation.name}
        try:
            with closing(self.client.answer(body)) as pieces:
                for piece in pieces:
                    if not turn.first_s and (piece.text or piece.reasoning):
                        turn.first_s = time.perf_counter() - asked_s
                    self.screen.piece(piece)
                    turn.text += piece.text
                    turn.finish_reason = piece.finish_reason or turn.finish_reason
                    turn.usage = piece.usage or turn.usage
        finally:
            turn.elapsed_s = time.perf_counter() - asked_s

    def retry(self) -> bool:
        """Ask the last question again, in place of its answer. Raises UsageError when there is none."""
        if self.unanswered:
            return self.ask(self.unanswered)
        messages = self.conversation.messages
        if len(messages) < 2:
            raise UsageError("there is no answer yet that could be tried again")
        answer, question = messages.pop(), messages.pop()
        try:
            return self.ask(question["content"])
        finally:
            if self.unanswered:  # the old answer is better than none
                messages += [question, answer]
                self.unanswered = ""
                self._keep()

    def take(self, conversation: Conversation) -> None:
        """Go on with another one."""
        self.conversation, self.last, self.unanswered = conversation, None, ""

    def _keep(self) -> None:
        if self.conversation.is_kept:
            try:
                self.kept.save(self.conversation)
            except StartupError as exc:
                self.screen.remark(str(exc))

    def close(self) -> None:
        """Give back what the server holds of conversations that nobody named."""
        deadline = time.monotonic() + BUSY_S
        for name in self._used:
            while True:
                try:
                    self.client.delete(name)
                except ServerError as exc:
                    if exc.status == 409 and time.monotonic() < deadline:  # an answer that was stopped ends by and by
                        time.sleep(0.1)
                        continue
                break  # else it is gone already, or the server is


def wait_until_ready(client: ServerClient, screen: Screen) -> None:
    """Until the server has loaded its model. Raises ServerError where none answers."""
    is_told = False
    while (reason := client.unready_reason()) is not None:
        if not is_told:
            screen.remark(f"waiting for {client.url}: {reason}")
            is_told = True
        time.sleep(READY_INTERVAL_S)


def choose_model(client: ServerClient, wanted: str) -> dict[str, Any]:
    """The model to ask for: the wanted one, else the first that is loaded. Raises UsageError."""
    models = client.models()
    if wanted:
        found = [m for m in models if m["id"] == wanted or m["id"].rpartition(":")[2] == wanted]
        if not found:
            names = ", ".join(m["id"] for m in models)
            raise UsageError(f"--model {wanted}: the server has {names}")
        return found[0]
    if not models:
        raise ServerError(f"{client.url} serves no model")
    return next((m for m in models if m.get("status", "loaded") == "loaded"), models[0])


def answer_once(chat: Chat, text: str) -> int:
    """One question, one answer; the exit status. The server keeps what it read for the next such question."""
    chat.is_named = False
    if not chat.ask(text):
        return 130
    if chat.last is None:
        raise ServerError("the model answered nothing: ask in other words")
    if chat.last.finish_reason == "length":
        chat.screen.remark("the answer reached its limit of tokens; --max-tokens sets another")
    return 0


def read_question(argument: str | None, stdin: TextIO | None) -> str:
    """The argument with what is piped in behind it; empty where there is neither. Raises UsageError."""
    piped = ""
    if stdin is not None and not stdin.isatty():
        try:
            piped = stdin.buffer.read().decode("utf-8").strip("\n") if hasattr(stdin, "buffer") else stdin.read()
        except UnicodeDecodeError as exc:
            raise UsageError("standard input: expected text in UTF-8") from exc
        except OSError as exc:
            raise UsageError(f"standard input: {exc.strerror or exc}") from exc
    return "\n\n".join(part for part in ((argument or "").strip(), piped) if part.strip())
