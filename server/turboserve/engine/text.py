"""Token ids to text that may be sent at once: whole characters, never a piece of a stop string.

Owns incremental decoding, the search for stop strings, and which tokens' logprobs go with which text. Knows no model
and no request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from turboserve.messages import TokenLogprob

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, with or without control tokens; broken bytes become U+FFFD."""

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """One answer's tokens to text, as they come."""

    @property
    def num_held(self) -> int:
        """Whole characters that are held back, before the one whose bytes are missing."""
        ...

    def add(self, token: int) -> str:
        """The text that became complete with this token; often empty."""
        ...

    def flush(self) -> str:
        """What was held back; an unfinished character comes out as one U+FFFD."""
        ...


class IncrementalDecoder:
    """Implements Decoder over any way to decode a list of tokens.

    A character whose last bytes are not there yet is held back. A short window of tokens is decoded anew for each one:

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
        self.num_held = 0  # whole characters that were held back, before the one whose bytes are missing

    def add(self, token: int) -> str:
        """The text that became complete with this token; often empty."""
        self._ids.append(token)
        text = self._decode(self._ids[self._window_start :])
        if text.endswith(REPLACEMENT) or len(text) <= len(self._window_text):
            self.num_held = max(0, len(text.rstrip(REPLACEMENT)) - len(self._window_text))
            return ""
        self.num_held = 0
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
    """Text that may be sent, the stop string that followed it, and the logprobs of tokens whose text begins in it."""

    text: str
    stop: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stop is not None


class StopMatcher:
    """Lets text through up to the first stop string, holding back only what could begin one."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """include_stop: the stop string that is found is let through as well."""
        self._stops = tuple(s for s in stops if s)
        self._include_stop = include_stop
        self._held = ""

    def add(self, text: str) -> StopResult:
        """Text that may be sent now. Once `stopped`, nothing more may be added."""
        if not self._stops:
            return StopResult(text)
        held = self._held + text
        found = _first_occurrence(held, self._stops)
        if found is not None:
            self._held = ""
            at, stop = found
            return StopResult(held[: at + len(stop)] if self._include_stop else held[:at], stop)
        keep = _possible_stop_len(held, self._stops)
        self._held = held[len(held) - keep :]
        return StopResult(held[: len(held) - keep])

    def flush(self) -> str:
        """The held-back text, when no more can follow."""
        held, self._held = self._held, ""
        return held


def _first_occurrence(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where a stop string begins, and which; of several at the same place the first in their order."""
    found = [(text.find(stop), stop) for stop in stops]
    return min(((at, stop) for at, stop in found if at >= 0), key=lambda one: one[0], default=None)


def _possible_stop_len(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of a stop string."""
    longest = min(len(text), max(len(s) for s in stops) - 1)
    for num in range(longest, 0, -1):
        end = text[len(text) - num :]
        if any(s.startswith(end) and len(s) > num for s in stops):
            return num
    return 0


class TextStream:
    """One answer's text: decoding and stop strings together, and the logprobs of its tokens.

    A token's logprobs are let through with the first character of its text; without text, with the text after it.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """decoder: a new one, of this answer alone."""
        self._decoder = decoder
        self._matcher = StopMatcher(stops, include_stop=include_stop)
        self._lets_all_through = not any(stops)  # tokens without logprobs need no counting of characters then
        self._num_decoded = 0  # characters, with those that the matcher holds back
        self._num_sent = 0
        self._held_logprobs: deque[tuple[int, TokenLogprob]] = deque()  # behind so many characters of decoded text

    def add(self, token: int, logprob: TokenLogprob | None = None) -> StopResult:
        """Text that may be sent once this token is known. Once `stopped`, nothing more may be added."""
        if logprob is None and self._lets_all_through and not self._held_logprobs:
            return StopResult(self._decoder.add(token))
        if logprob is not None:
            self._held_logprobs.append((self._num_decoded + self._decoder.num_held, logprob))
        text = self._decoder.add(token)
        self._num_decoded += len(text)
        return self._with_logprobs(self._matcher.add(text))

    def flush(self) -> StopResult:
        """The rest of the answer; a stop string may still complete in it."""
        result = self._matcher.add(self._decoder.flush())
        if result.stopped:
            return self._with_logprobs(result)
        rest = tuple(logprob for _, logprob in self._held_logprobs)
        self._held_logprobs.clear()
        return StopResult(result.text + self._matcher.flush(), None, rest)

    def _with_logprobs(self, result: StopResult) -> StopResult:
        self._num_sent += len(result.text)
        held = self._held_logprobs
        if not held:
            return result
        let_through = []
        while held and held[0][0] < self._num_sent:
            let_through.append(held.popleft()[1])
        return result._replace(logprobs=tuple(let_through))
