"""Where a call without the model's markers may begin: a { or [ at the beginning of a line, alone, in a code fence, or
between tags that models write instead of their own.

Only where calls *may* begin is told here; whether one does is `call_stream`'s to find out. All that is ever held back
is of bounded length.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TAGS = ("<tools>", "<function_call>", "<|python_tag|>")
CLOSERS = ("```", "</tools>", "</function_call>")

_FENCE = r"```[\w+-]{0,16}[ \t]{0,8}"
_BLANKS = r"\s{0,64}"
_OPENER = rf"{_FENCE}\r?\n{_BLANKS}|(?:{'|'.join(map(re.escape, _TAGS))}){_BLANKS}"
_TAG_BEGINNINGS = "|".join(re.escape(tag[:num]) for tag in _TAGS for num in range(len(tag) - 1, 0, -1))
_START = re.compile(rf"^[ \t]{{0,64}}(?:{_OPENER})?(?=[\[{{])", re.M)
_BEGINNING = re.compile(rf"^[ \t]{{0,64}}(?:{_OPENER}|{_FENCE}\r?|`{{1,2}}|{_TAG_BEGINNINGS})\Z", re.M)


class Start(NamedTuple):
    """text[at:end] comes before the JSON; it belongs to the call if there is one."""

    at: int
    end: int


def find_start(text: str, is_line_blank: bool) -> Start | None:
    """The first place where a call may begin. is_line_blank: `text` begins at a line's beginning."""
    match = _START.search(text, 0 if is_line_blank else 1)
    return Start(match.start(), match.end()) if match else None


def held_len(text: str, is_line_blank: bool) -> int:
    """Length of the end of `text` that may come before a call's JSON."""
    match = _BEGINNING.search(text, 0 if is_line_blank else 1)
    return len(text) - match.start() if match else 0
