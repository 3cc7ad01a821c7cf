"""One answer's text to deltas: text, reasoning and calls of functions, while it arrives.

        +----------------------------- think_start ---------------------------> THINKING
        |  <------------------------------------------------------ think_end ------+
      TEXT --- call_start ---> CALL    --- its JSON is whole, or end marker ---> AFTER ---> TEXT
        |                       | no JSON: the parser's, up to the end marker      ^
        +--- { in a line ---> CALL without markers --------------------------------+

Held back is only what may begin a marker or a call. What turns out not to be a call comes out as text, its markers
included; blanks between text and markers are not kept. Each character is looked at a bounded number of times.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from turboserve.engine.tools.bare import CLOSERS, find_start, held_len
from turboserve.engine.tools.call_stream import ArgumentsPiece, CallBegun, CallEnded, CallPiece, CallPolicy, CallStream
from turboserve.engine.tools.markup import Markup
from turboserve.engine.tools.parse import Call, parse_calls
from turboserve.messages import Delta, ReasoningDelta, TextDelta, TokenLogprob, ToolCallDelta, ToolUse

_MAX_BLANKS = 64  # so many are held back, since models write a few before a marker
_BETWEEN = re.compile(r"[\s,;}\]]*")  # separators of calls, and brackets that small models close once too often


class _State(Enum):
    TEXT = "text"
    THINKING = "thinking"
    CALL = "call"
    AFTER = "after a call"


MAX_REQUIRED_CALLS = 32  # of an answer that must be calls


class MarkupReader:
    """Implements readers.AnswerReader for one answer."""

    def __init__(
        self,
        markup: Markup,
        tools: ToolUse | None = None,
        *,
        is_thinking: bool = False,
        shows_special: bool = False,
    ) -> None:
        """tools: None unless calls may come. is_thinking: the prompt ends inside reasoning.

        shows_special: special tokens that `markup` names stay in the text where they mark nothing.
        """
        self.has_tool_calls = False
        self.num_reasoning_tokens = 0
        self.is_over = False  # all calls that were wanted are whole
        self._markup = markup
        self._tools = tools if tools is not None and tools.choice != "none" else None
        functions = self._tools.functions if self._tools is not None else ()
        self._functions = [tool for tool in functions if isinstance(tool.get("function"), Mapping)]
        self._policies = CallPolicy(), _bare_policy(self._functions)
        self._state = _State.THINKING if is_thinking else _State.TEXT
        self._held = ""
        self._logprobs: list[TokenLogprob] = []
        self._is_line_blank = True
        self._is_fresh = True  # blanks are left out until something visible comes, after markers
        self._may_think = markup.has_thinking
        self._has_reasoned = False
        self._num_calls = 0
        self._wants_calls_only = self._tools is not None and self._tools.choice == "required"
        self._name, self._arguments = "", ""  # of the newest call
        self._calls: set[tuple[str, str]] = set()
        self._call_ids: set[str] = set()
        self._passed_marker = False  # with the newest text
        # of a call
        self._opening = ""  # what comes before its JSON, given back when it is none
        self._is_bare = False
        self._stream: CallStream | None = None
        self._body: list[str] = []
        self._tail = ""  # of the body, in which an end marker may begin
        self._hidden = _alternatives(markup.visible_ids.values()) if not shows_special else None

    def add(self, text: str, logprobs: tuple[TokenLogprob, ...] = (), num_tokens: int = 1) -> list[Delta]:
        """As readers.AnswerReader says. Logprobs come with text; those of reasoning and of calls are left out."""
        if self.is_over:
            return []
        was_thinking = self._state is _State.THINKING
        out: list[Delta] = []
        self._logprobs += logprobs
        self._passed_marker = False
        self._read(text, out)
        if was_thinking or self._state is _State.THINKING:
            self.num_reasoning_tokens += num_tokens
        self._attach(out)
        return out

    def finish(self) -> list[Delta]:
        """As readers.AnswerReader says. A call that has begun and is not whole stays so: nobody shall execute it."""
        out: list[Delta] = []
        if not self.is_over:
            if self._state is _State.CALL and not self._has_begun:
                self._give_up_call(out)
            held, self._held = self._held, ""
            if self._state is _State.THINKING:
                self._reason(held, out)
            elif self._state is _State.TEXT or not _BETWEEN.fullmatch(held):
                self._say(held, out)
        self._attach(out)
        if self._logprobs:
            out.append(TextDelta("", tuple(self._logprobs)))
        return out

    # --- states: each takes the text it can, and returns the rest for the next one

    def _read(self, text: str, out: list[Delta]) -> None:
        while text and not self.is_over:
            state = (
                self._state
            )  # told by identity: there is one of these for each token, and hashing an Enum takes long
            if state is _State.TEXT:
                text = self._in_text(text, out)
            elif state is _State.THINKING:
                text = self._in_thinking(text, out)
            elif state is _State.CALL:
                text = self._in_call(text, out)
            else:
                text = self._after_call(text, out)

    def _in_thinking(self, text: str, out: list[Delta]) -> str:
        text, self._held = self._held + text, ""
        start, end = self._markup.think_start, self._markup.think_end
        if not self._has_reasoned:
            text = text.lstrip().removeprefix(start).lstrip()  # some models repeat what the template has opened
            if start.startswith(text) and not text.startswith(end):
                self._held = text
                return ""
        at = text.find(end)
        if at >= 0:
            self._reason(_without_blanks(text[:at]), out)
            self._enter_text()
            return text[at + len(end) :]
        keep = _with_blanks(text, _beginning_len(text, end))
        self._held = text[len(text) - keep :]
        self._reason(text[: len(text) - keep], out)
        return ""

    def _in_text(self, text: str, out: list[Delta]) -> str:
        text, self._held = self._held + text, ""
        if self._may_think:
            visible = text.lstrip()
            if visible.startswith(self._markup.think_start):
                self._state, self._has_reasoned = _State.THINKING, False
                return visible[len(self._markup.think_start) :]
            if self._markup.think_start.startswith(visible) and len(text) - len(visible) <= _MAX_BLANKS:
                self._held = text
                return ""
            self._may_think = not visible
        if self._tools is None:
            self._say(text, out)
            return ""
        marker = text.find(self._markup.call_start)
        bare = find_start(text, self._is_line_blank)
        if bare is not None and self._markup.call_start.startswith(text[bare.end :][: len(self._markup.call_start)]):
            if marker < 0:  # such as [TOOL_CALLS], which begins like a list
                keep = _with_blanks(text, len(text) - bare.at)
                self._held = text[len(text) - keep :]
                self._say(text[: len(text) - keep], out)
                return ""
            bare = None
        if bare is not None and (marker < 0 or bare.at < marker):
            return self._enter_call(text, bare.at, bare.end, out, is_bare=True)
        if marker >= 0:
            return self._enter_call(text, marker, marker + len(self._markup.call_start), out, is_bare=False)
        keep = max(_beginning_len(text, self._markup.call_start), held_len(text, self._is_line_blank))
        keep = _with_blanks(text, keep)
        self._held = text[len(text) - keep :]
        self._say(text[: len(text) - keep], out)
        return ""

    def _enter_call(self, text: str, at: int, end: int, out: list[Delta], *, is_bare: bool) -> str:
        shown = _without_blanks(text[:at])
        self._say(shown, out)
        self._begin_call(text[len(shown) : end], is_bare)
        return text[end:]

    def _begin_call(self, opening: str, is_bare: bool) -> None:
        self._state, self._opening, self._is_bare = _State.CALL, opening, is_bare
        self._stream, self._body, self._tail = CallStream(self._policies[is_bare]), [], ""

    def _in_call(self, text: str, out: list[Delta]) -> str:
        if self._stream is None:
            return self._in_foreign_call(text, out)
        pieces: list[CallPiece] = []
        took = self._stream.feed(text, pieces)
        if not self._stream.has_begun:
            self._body.append(text[:took])
        for piece in pieces:
            self._pass_on(piece, out)
        if self._stream.is_done:
            self._state, self._may_think = _State.AFTER, self._markup.has_thinking
        elif self._stream.is_bad:
            if self._stream.has_begun:
                unread = self._stream.unread
                self._enter_text()
                return unread + text[took:]
            if self._is_bare:
                self._give_up_call(out)
            else:
                body, self._body, self._stream = "".join(self._body), [], None
                return body + text[took:]
        return text[took:]

    @property
    def _has_begun(self) -> bool:
        return self._stream is not None and self._stream.has_begun

    def _in_foreign_call(self, text: str, out: list[Delta]) -> str:
        """Between markers, in another syntax than JSON: whole, through the parser."""
        end = self._markup.call_end or self._markup.call_start
        window = self._tail + text
        at = window.find(end)
        if at < 0:
            self._body.append(text)
            self._tail = window[max(0, len(window) - len(end) + 1) :]
            return ""
        num_before = len(self._tail)
        self._body.append(text)
        whole = "".join(self._body)
        cut = len(whole) - len(text) - num_before + at
        self._body = [whole[:cut]]
        rest = whole[cut:]
        if self._markup.call_end:
            rest = rest[len(end) :]
        self._end_foreign_call(out)
        return rest

    def _end_foreign_call(self, out: list[Delta]) -> None:
        body = "".join(self._body)
        try:
            calls = parse_calls(body, self._markup, self._functions)
        except ValueError:
            self._enter_text(is_fresh=False)
            self._say(self._opening + body + self._markup.call_end, out)
            return
        self._enter_text()
        for call in calls:
            self._call(call, out)

    def _give_up_call(self, out: list[Delta]) -> None:
        """It is text after all; only a syntax without an end marker may still be whole."""
        if not self._is_bare and not self._markup.call_end:
            self._end_foreign_call(out)
            return
        text = self._opening + "".join(self._body)
        self._enter_text(is_fresh=False)
        self._say(text, out)

    def _after_call(self, text: str, out: list[Delta]) -> str:
        """Behind a call's JSON: its end marker or fence, another call, or text."""
        text, self._held = self._held + text, ""
        match = _BETWEEN.match(text)
        assert match is not None
        gap, rest = match.group()[-_MAX_BLANKS:], text[match.end() :]
        closers = CLOSERS if self._is_bare else tuple(filter(None, (self._markup.call_end,)))
        if not rest:
            self._held = gap
            return ""
        for marker in (*closers, self._markup.call_start):
            if rest.startswith(marker):
                self._enter_text()
                return rest if marker == self._markup.call_start else rest[len(marker) :]
        if any(marker.startswith(rest) for marker in (*closers, self._markup.call_start)):
            self._held = gap + rest
            return ""
        if rest[0] in "{[":
            self._begin_call(gap, self._is_bare)
            return rest
        self._enter_text()
        return gap.lstrip(" \t\r\n}]") + rest

    def _enter_text(self, *, is_fresh: bool = True) -> None:
        self._state, self._is_fresh, self._is_line_blank = _State.TEXT, is_fresh, is_fresh
        self._passed_marker |= is_fresh
        self._stream, self._body, self._may_think = None, [], is_fresh and self._may_think

    # --- deltas

    def _say(self, text: str, out: list[Delta]) -> None:
        text = self._hidden.sub("", text) if self._hidden else text
        if self._is_fresh and (self._num_calls or self._has_reasoned):
            text = text.lstrip()
        if not text:
            return
        self._is_fresh = self._is_fresh and not text.strip()
        self._is_line_blank = text.endswith("\n")
        out.append(TextDelta(text))

    def _reason(self, text: str, out: list[Delta]) -> None:
        text = self._hidden.sub("", text) if self._hidden else text
        self._has_reasoned = True
        if text:
            out.append(ReasoningDelta(text))

    def _pass_on(self, piece: CallPiece, out: list[Delta]) -> None:
        if self.is_over:
            return
        if isinstance(piece, CallBegun):
            self._begin(piece.name, "", out)
        elif isinstance(piece, ArgumentsPiece):
            self._argue(piece.text, out)
        elif isinstance(piece, CallEnded):
            self._end()

    def _call(self, call: Call, out: list[Delta]) -> None:
        if self.is_over:
            return
        self._begin(call.name, call.call_id, out)
        self._argue(call.arguments, out)
        self._end()

    def _begin(self, name: str, call_id: str, out: list[Delta]) -> None:
        self.has_tool_calls = True
        if not call_id or call_id in self._call_ids:
            call_id = f"call_{secrets.token_hex(12)}"
        self._call_ids.add(call_id)
        out.append(ToolCallDelta(self._num_calls, call_id, name))
        self._num_calls += 1
        self._name, self._arguments = name, ""

    def _argue(self, text: str, out: list[Delta]) -> None:
        out.append(ToolCallDelta(self._num_calls - 1, arguments=text))
        if self._wants_calls_only:
            self._arguments += text

    def _end(self) -> None:
        """Small models that must call go on and on; the first call that they repeat is their last one."""
        call = self._name, self._arguments
        is_repeated, self._calls = call in self._calls, self._calls | {call}
        is_enough = is_repeated or self._num_calls >= MAX_REQUIRED_CALLS
        self.is_over = (self._wants_calls_only and is_enough) or (
            self._tools is not None and not self._tools.is_parallel
        )

    def _attach(self, out: list[Delta]) -> None:
        """Logprobs go with the last text; those of what is no text are dropped, once that is known."""
        if not self._logprobs:
            return
        for index in reversed(range(len(out))):
            delta = out[index]
            if isinstance(delta, TextDelta):
                out[index] = replace(delta, logprobs=tuple(self._logprobs))
                self._logprobs.clear()
                return
        is_markup = self._state in (_State.THINKING, _State.AFTER) or self._has_begun or self._passed_marker
        if is_markup or self.is_over:
            self._logprobs.clear()


def _bare_policy(functions: Iterable[Mapping[str, Any]]) -> CallPolicy:
    required = {
        str(tool["function"]["name"]): (tool["function"].get("parameters") or {}).get("required") for tool in functions
    }
    return CallPolicy(
        knows=required.__contains__, can_omit_arguments=lambda name: not required.get(name), is_strict=True
    )


def _without_blanks(text: str) -> str:
    """Without the blanks at its end that were held back."""
    return text[: len(text) - _with_blanks(text, 0)]


def _with_blanks(text: str, num: int) -> int:
    """`num` characters at the end of `text`, and of the blanks before them as many as are held back."""
    before = text[: len(text) - num]
    return num + min(len(before) - len(before.rstrip()), _MAX_BLANKS)


def _beginning_len(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `marker`."""
    longest = min(len(text), len(marker) - 1)
    if longest <= 0 or marker[0] not in text[-longest:]:  # nearly always
        return 0
    return next((num for num in range(longest, 0, -1) if marker.startswith(text[len(text) - num :])), 0)


def _alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    pattern = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return re.compile(pattern) if pattern else None
