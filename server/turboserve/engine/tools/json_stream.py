"""One JSON value, checked while its text arrives.

Each character is looked at once, and nesting takes no Python stack, so that neither long nor deep
values are a danger. Knows nothing of calls.
"""

from __future__ import annotations

import re
from enum import Enum

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_BLANK = re.compile(r"[ \t\r\n]*")
_WORD = re.compile(r"[-+.\w]*", re.ASCII)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII)
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGINNING = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_ESCAPE_LEN = 6  # \u0000
_WORD_LEN = 512  # no double needs more digits; what is longer is no number that anybody can read


class _Next(Enum):
    VALUE = "a value"
    VALUE_OR_END = "a value or ]"
    KEY = "a key"
    KEY_OR_END = "a key or }"
    COLON = ":"
    COMMA_OR_END = ", or the end"


class JsonReader:
    """Follows one value. Feed until `is_done` or `is_bad`.

    A number at the outermost level is done by the character after it, which is left unread.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.is_bad = False
        self._stack: list[str] = []  # the closing bracket of each open container
        self._next = _Next.VALUE
        self._in_string = False
        self._is_key = False
        self._held = ""  # an unfinished escape, number or word
        self.unread = ""  # of a bad value: what was taken and not passed on

    def feed(self, text: str, at: int = 0) -> tuple[int, str]:
        """Reads on at `text[at]`. Returns where it stopped and what may be passed on.

        All pieces joined are the value's text, with raw control characters in strings escaped. Of a bad value
        they are the text before the mistake.
        """
        out: list[str] = []
        while at < len(text) and not self.is_done and not self.is_bad:
            if self._in_string:
                at = self._string(text, at, out)
            elif self._held:
                at = self._word(text, at, out)
            else:
                at = self._structure(text, at, out)
        return at, "".join(out)

    def _structure(self, text: str, at: int, out: list[str]) -> int:
        match = _BLANK.match(text, at)
        assert match is not None
        if match.end() > at:
            out.append(match.group())
            return match.end()
        char, expected = text[at], self._next
        if char == '"' and expected is not _Next.COLON and expected is not _Next.COMMA_OR_END:
            self._in_string, self._is_key = True, expected in (_Next.KEY, _Next.KEY_OR_END)
        elif char in "{[" and expected in (_Next.VALUE, _Next.VALUE_OR_END):
            self._stack.append("}" if char == "{" else "]")
            self._next = _Next.KEY_OR_END if char == "{" else _Next.VALUE_OR_END
        elif char in "}]" and self._can_end(char):
            self._stack.pop()
            self._value_ended()
        elif char == ":" and expected is _Next.COLON:
            self._next = _Next.VALUE
        elif char == "," and expected is _Next.COMMA_OR_END:
            self._next = _Next.KEY if self._stack[-1] == "}" else _Next.VALUE
        elif expected in (_Next.VALUE, _Next.VALUE_OR_END) and (char.isalnum() or char == "-"):
            return self._word(text, at, out)
        else:
            self.is_bad = True
            return at
        out.append(char)
        return at + 1

    def _can_end(self, char: str) -> bool:
        ends = (_Next.VALUE_OR_END, _Next.KEY_OR_END, _Next.COMMA_OR_END)
        return bool(self._stack) and self._stack[-1] == char and self._next in ends

    def _value_ended(self) -> None:
        self._next = _Next.COMMA_OR_END
        self.is_done = not self._stack

    def _word(self, text: str, at: int, out: list[str]) -> int:
        """A number, true, false or null: passed on when it is complete, and so known to be one."""
        match = _WORD.match(text, at)
        assert match is not None
        self._held += match.group()
        if len(self._held) > _WORD_LEN:
            self.is_bad, self.unread = True, self._held
        elif match.end() < len(text):
            if self._held in ("true", "false", "null") or _NUMBER.fullmatch(self._held):
                out.append(self._held)
                self._held = ""
                self._value_ended()
            else:
                self.is_bad, self.unread = True, self._held
        return match.end()

    def _string(self, text: str, at: int, out: list[str]) -> int:
        if self._held:  # an escape that the last text ended in
            return self._escape(self._held + text[at : at + _ESCAPE_LEN], at - len(self._held), out)
        match = _PLAIN.match(text, at)
        assert match is not None
        out.append(match.group())
        at = match.end()
        if at == len(text):
            return at
        char = text[at]
        if char == "\\":
            return self._escape(text[at : at + _ESCAPE_LEN], at, out)
        if char == '"':
            out.append(char)
            self._in_string = False
            if self._is_key:
                self._next = _Next.COLON
            else:
                self._value_ended()
        else:  # models write line breaks into strings; JSON wants them escaped
            out.append(f"\\u{ord(char):04x}" if char not in "\n\t\r" else {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[char])
        return at + 1

    def _escape(self, text: str, at: int, out: list[str]) -> int:
        """`text` begins with a backslash that stands at `at`."""
        self._held = ""
        if match := _ESCAPE.match(text):
            out.append(match.group())
            return at + match.end()
        if _ESCAPE_BEGINNING.fullmatch(text):
            self._held = text
            return at + len(text)
        self.is_bad = True
        if at < 0:
            self.unread = text[:-at]
        return max(at, 0)
