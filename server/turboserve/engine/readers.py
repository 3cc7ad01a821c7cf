"""From an answer's text to the deltas that its reader is sent: the seam behind which reasoning and tool calls are told.

All text of an answer goes through one AnswerReader, once it is known not to belong to a stop string.
"""

from __future__ import annotations

from typing import Protocol

from turboserve.messages import Delta, TextDelta, TokenLogprob


class AnswerReader(Protocol):
    """Turns one answer's text into deltas. What it raises ends its own request."""

    @property
    def has_tool_calls(self) -> bool:
        """Whether a ToolCallDelta was returned: an answer that stops then ends by `tool_calls`."""
        ...

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the answer, of those added, whose text was reasoning."""
        ...

    def add(self, text: str, logprobs: tuple[TokenLogprob, ...], num_tokens: int = 1) -> list[Delta]:
        """What can be sent now that this text follows.

        Called once for each token, with an empty text where the token completes none; and with num_tokens 0 for text
        that was held back until the answer's end. `logprobs` are of tokens whose text has been added by now.
        """
        ...

    def finish(self) -> list[Delta]:
        """What was held back, now that the answer is over. The last call."""
        ...


class PlainReader:
    """All text is the answer's own."""

    has_tool_calls = False
    num_reasoning_tokens = 0

    def add(self, text: str, logprobs: tuple[TokenLogprob, ...], num_tokens: int = 1) -> list[Delta]:
        return [TextDelta(text, logprobs)] if text or logprobs else []

    def finish(self) -> list[Delta]:
        return []
