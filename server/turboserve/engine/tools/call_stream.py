"""Calls written as JSON, read while their text arrives: {"name": ..., "arguments": {...}}, or a list of such objects.

Arguments are passed on as they grow, once the name is known. Knows no markers: who reads between markers or beside
code fences is `answer_reader`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from turboserve.engine.tools.json_stream import JsonReader

_BLANK = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")  # the second is Llama's
_KNOWN_KEYS = ("name", "type", "id", *_ARGUMENTS)
_MAX_NAME_LEN = 512  # of keys and names, which are held back until they are whole


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of this function begins."""

    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPiece:
    """More text of the arguments' JSON object."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call is whole, and its arguments are one JSON object."""


CallPiece = CallBegun | ArgumentsPiece | CallEnded


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """What counts as a call.

    is_strict  only the keys of calls may stand in one before it has begun: what describes a function is no call
    """

    knows: Callable[[str], bool] = lambda name: True
    can_omit_arguments: Callable[[str], bool] = lambda name: True
    is_strict: bool = False


class _Next(Enum):
    OPEN = "{"
    KEY_OR_END = "a key or }"
    KEY = "a key"
    COLON = ":"
    VALUE = "a value"
    COMMA_OR_END = ", or }"


class _CallObject:
    """One object. Feed until `is_done` or `is_bad`; once `has_begun`, a CallBegun has been returned."""

    def __init__(self, policy: CallPolicy) -> None:
        self.is_done = False
        self.is_bad = False
        self.has_begun = False
        self.unread = ""
        self._policy = policy
        self._next = _Next.OPEN
        self._key = ""
        self._name: str | None = None
        self._has_arguments = False
        self._early: list[str] = []  # arguments that stand before the name
        self._value: JsonReader | None = None
        self._captured: list[str] | None = None  # of a value that is needed as a whole

    def feed(self, text: str, at: int, out: list[CallPiece]) -> int:
        while at < len(text) and not self.is_done and not self.is_bad:
            at = self._read_value(text, at, out) if self._value is not None else self._structure(text, at, out)
        return at

    def _structure(self, text: str, at: int, out: list[CallPiece]) -> int:
        char, expected = text[at], self._next
        if char in _BLANK:
            return at + 1
        if expected is _Next.OPEN and char == "{":
            self._next = _Next.KEY_OR_END
        elif expected in (_Next.KEY, _Next.KEY_OR_END) and char == '"':
            self._value, self._captured = JsonReader(), []
            return at
        elif expected is _Next.COLON and char == ":":
            self._next = _Next.VALUE
        elif expected is _Next.VALUE:
            self._begin_value(char, out)
            return at
        elif expected is _Next.COMMA_OR_END and char == ",":
            self._next = _Next.KEY
        elif expected is _Next.COMMA_OR_END and char == "}":
            self._close(out)
        else:
            self.is_bad = True
            return at
        return at + 1

    def _begin_value(self, first: str, out: list[CallPiece]) -> None:
        self._value, self._captured = JsonReader(), None
        if self._key == "name":
            self._captured = []
            self.is_bad = first != '"' or self._name is not None
        elif self._key in _ARGUMENTS:
            self.is_bad = first not in '{"n' or self._has_arguments
            self._has_arguments = True
            if first != "{":
                self._captured = []
            elif self._name is not None:
                self._begin(out)
        elif self._policy.is_strict and not self.has_begun and self._key not in _KNOWN_KEYS:
            self.is_bad = True

    def _begin(self, out: list[CallPiece]) -> None:
        assert self._name is not None
        if not self._policy.knows(self._name):
            self.is_bad = True
            return
        self.has_begun = True
        out.append(CallBegun(self._name))

    def _read_value(self, text: str, at: int, out: list[CallPiece]) -> int:
        value = self._value
        assert value is not None
        at, piece = value.feed(text, at)
        is_whole_needed = self._captured is not None
        if self._captured is not None:
            self._captured.append(piece)
            is_label = self._next is not _Next.VALUE or self._key == "name"
            self.is_bad |= is_label and sum(map(len, self._captured)) > _MAX_NAME_LEN
        elif piece and self._key in _ARGUMENTS:
            self._pass_on(piece, out)
        self.is_bad |= value.is_bad
        self.unread = value.unread
        if not value.is_done or self.is_bad:
            return at
        self._value = None
        whole = "".join(self._captured) if self._captured is not None else ""
        self._captured = None
        if self._next is not _Next.VALUE:
            self._key, self._next = json.loads(whole), _Next.COLON
            return at
        self._next = _Next.COMMA_OR_END
        if is_whole_needed:
            self._take_whole(whole, out)
        return at

    def _pass_on(self, piece: str, out: list[CallPiece]) -> None:
        if self.has_begun:
            out.append(ArgumentsPiece(piece))
        else:
            self._early.append(piece)

    def _take_whole(self, whole: str, out: list[CallPiece]) -> None:
        """A name; or arguments that are null, or an object's JSON inside a string."""
        if self._key == "name":
            self._name = json.loads(whole)
            if not self._name or not self._policy.knows(self._name):
                self.is_bad = True
            elif self._early:
                self._begin(out)
                out.append(ArgumentsPiece("".join(self._early)))
            return
        arguments = "{}" if whole == "null" else json.loads(whole).strip() or "{}"
        inner = JsonReader()
        end, text = inner.feed(arguments)
        if not arguments.startswith("{") or not inner.is_done or end < len(arguments):
            self.is_bad = True
        elif self._name is None:
            self._early.append(text)
        else:
            self._begin(out)
            self._pass_on(text, out)

    def _close(self, out: list[CallPiece]) -> None:
        if not self.has_begun:
            if self._name is None or self._has_arguments or not self._policy.can_omit_arguments(self._name):
                self.is_bad = True
                return
            self._begin(out)
            out.append(ArgumentsPiece("{}"))
        self.is_done = True
        out.append(CallEnded())


class CallStream:
    """One object or one list of objects. Feed until `is_done` or `is_bad`.

    has_begun  a call has: what was fed is then no text any more, whatever follows
    unread     once `is_bad`: text that was taken, and not passed on
    """

    def __init__(self, policy: CallPolicy) -> None:
        self.is_done = False
        self.is_bad = False
        self.has_begun = False
        self._policy = policy
        self._is_list = False
        self._needs = "object or list"
        self._object = _CallObject(policy)

    @property
    def unread(self) -> str:
        return self._object.unread

    def feed(self, text: str, out: list[CallPiece]) -> int:
        """Reads on, appends what it found to `out`, and returns how much of `text` it took."""
        at = 0
        while at < len(text) and not self.is_done and not self.is_bad:
            char = text[at]
            if self._needs == "rest":
                at = self._read_object(text, at, out)
            elif char in _BLANK:
                at += 1
            elif char == "{" and self._needs in ("object or list", "object"):
                self._needs = "rest"
            elif char == "[" and self._needs == "object or list":
                self._is_list, self._needs, at = True, "object", at + 1
            elif char == "," and self._needs == "comma":
                self._needs, at = "object", at + 1
            elif char == "]" and self._needs == "comma":
                self.is_done, at = True, at + 1
            else:
                self.is_bad = True
        return at

    def _read_object(self, text: str, at: int, out: list[CallPiece]) -> int:
        at = self._object.feed(text, at, out)
        self.has_begun |= self._object.has_begun
        self.is_bad = self._object.is_bad
        if self._object.is_done:
            self.is_done = not self._is_list
            self._object, self._needs = _CallObject(self._policy), "comma"
        return at
