"""Token ids to text that may be sent at once: whole characters, never a piece of a stop string.

Owns incremental decoding and the search for stop strings. Knows no model and no request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, with control tokens left out; broken bytes become U+FFFD."""

REPLACEMENT = "\ufffd"


class IncrementalDecoder:
    """Decodes a growing list of tokens, holding back a character whose last bytes are not there yet.

    Only a short window of tokens is decoded again for each new one:

        ids    ....... | window, already given out | new
                       ^ _window_start             ^ _given_end

    The window starts at a character boundary and gives tokenizers that treat a word's first
    token differently (leading spaces) the same surroundings before and after the new tokens.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window_start = 0
        self._given_end = 0
        self._window_text = ""

    def add(self, token: int) -> str:
        """The text that became complete with this token; often empty."""
        self._ids.append(token)
        text = self._decode(self._ids[self._window_start :])
        if text.endswith(REPLACEMENT) or len(text) <= len(self._window_text):
            return ""
        new = text[len(self._window_text) :]
        self._window_start, self._given_end = self._given_end, len(self._ids)
        self._window_text = self._decode(self._ids[self._window_start :])
        return new

    def flush(self) -> str:
        """What was held back; an unfinished character comes out as one U+FFFD."""
        text = self._decode(self._ids[self._window_start :])
        rest = text[len(self._window_text) :]
        self._window_start = self._given_end = len(self._ids)
        self._window_text = ""
        whole = rest.rstrip(REPLACEMENT)
        return whole + REPLACEMENT if whole != rest else whole


class StopResult(NamedTuple):
    """Text that may be sent, and whether a stop string followed it."""

    text: str
    stopped: bool


class StopMatcher:
    """Lets text through up to the first stop string, holding back only what could begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(s for s in stops if s)
        self._held = ""

    def add(self, text: str) -> StopResult:
        """Text that may be sent now. Once `stopped`, nothing more may be added."""
        if not self._stops:
            return StopResult(text, False)
        held = self._held + text
        cut = _first_occurrence(held, self._stops)
        if cut is not None:
            self._held = ""
            return StopResult(held[:cut], True)
        keep = _possible_stop_len(held, self._stops)
        self._held = held[len(held) - keep :]
        return StopResult(held[: len(held) - keep], False)

    def flush(self) -> str:
        """The held-back text, when no more can follow."""
        held, self._held = self._held, ""
        return held


def _first_occurrence(text: str, stops: Sequence[str]) -> int | None:
    found = [at for at in (text.find(s) for s in stops) if at >= 0]
    return min(found, default=None)


def _possible_stop_len(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of a stop string."""
    longest = min(len(text), max(len(s) for s in stops) - 1)
    for num in range(longest, 0, -1):
        end = text[len(text) - num :]
        if any(s.startswith(end) and len(s) > num for s in stops):
            return num
    return 0


class TextStream:
    """One answer's text: decoding and stop strings together."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._decoder = IncrementalDecoder(decode)
        self._matcher = StopMatcher(stops)

    def add(self, token: int) -> StopResult:
        """Text that may be sent once this token is known. Once `stopped`, nothing more may be added."""
        return self._matcher.add(self._decoder.add(token))

    def flush(self) -> StopResult:
        """The rest of the answer; a stop string may still complete in it."""
        result = self._matcher.add(self._decoder.flush())
        return result if result.stopped else StopResult(result.text + self._matcher.flush(), False)
