"""One request's state while the engine works on it. Plain data, and each field has its writer.

whoever makes it                 read and rule, before it is prepared
prepare.py                       adapter, prompt, max_answer_len, sampling, text, reader and eos_ids, once
runner.py                        caches and cache_len, as it computes and as rows join and leave the batch; with
                                 speculation.py num_drafted and num_accepted
step_loop.py, open_requests.py   all others; they alone move `stage`, and take caches away when it changes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from turboserve.cache.memory import Ask, Lease
from turboserve.engine.adapters import Adapter
from turboserve.engine.protocol import EventSink
from turboserve.engine.readers import AnswerReader, PlainReader
from turboserve.engine.sampling import RowSampling
from turboserve.engine.template import Prompt
from turboserve.engine.text import TextStream
from turboserve.engine.token_rules import TokenRule
from turboserve.messages import Request


class Stage(Enum):
    """Where a request stands; it moves down, but for a lost cache (to PREFILL) and preemption (to WAITING)."""

    WAITING = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Generation:
    """A request, its tokens and its cache.

    tokens    prompt + answer
              [0, cache_len)          keys and values are in `caches` (PREFILL) or in the batch (DECODE)
              [cache_len, len)        still to be fed; in DECODE exactly one, the newest
    """

    request: Request
    sink: EventSink
    submitted_s: float
    stage: Stage = Stage.WAITING
    adapter: Adapter | None = None  # whose caches its are
    prompt: list[int] = field(default_factory=list)  # empty until prepared
    answer: list[int] = field(default_factory=list)
    max_answer_len: int = 0
    sampling: RowSampling | None = None
    read: Prompt | None = None  # what the model reads, where it was made before
    rule: TokenRule | None = None  # what its answer must look like
    text: TextStream | None = None
    reader: AnswerReader = field(default_factory=PlainReader)
    eos_ids: frozenset[int] = frozenset()  # the model's own end tokens
    lease: Lease | None = None
    caches: list[Any] | None = None
    cache_len: int = 0
    num_drafted: int = 0  # tokens that were guessed for its answer...
    num_accepted: int = 0  # ...and those of them that it has
    num_recoveries: int = 0  # times its cache was lost and computed again
    order: int | None = None  # of its first admission; the youngest is preempted first
    cached_len: int = 0  # prompt tokens that were not computed for it, at its first admission
    roomless_since_s: float | None = None  # when it first was the queue's head and found no room
    told_to_wait_at: int | None = None  # the memory's generation then
    asked_s: float = 0.0  # when that was
    last_prefill_step: int = 0
    last_token_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def num_to_prefill(self) -> int:
        """Tokens to feed before the newest one, whose logits give the next token."""
        return self.num_tokens - 1 - self.cache_len

    @property
    def num_answer_left(self) -> int:
        """Tokens that its answer may still get."""
        return self.max_answer_len - len(self.answer)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end its answer. What must have a certain form ends where it is complete, whatever is ignored."""
        request = self.request
        own = frozenset[int]() if request.ignore_eos and self.rule is None else self.eos_ids
        return own.union(request.stop_token_ids) if request.stop_token_ids else own

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of prompt and answer."""
        num_prompt = len(self.prompt)
        if end <= num_prompt:
            return self.prompt[start:end]
        return self.prompt[start:] + self.answer[max(0, start - num_prompt) : end - num_prompt]

    def newest_token(self) -> int:
        return self.answer[-1] if self.answer else self.prompt[-1]

    def ask(self, num_tokens: int) -> Ask:
        """For a lease with room for that many tokens; of a preempted one, its answer so far is to be read as well."""
        assert self.stage is Stage.WAITING
        adapter = "" if self.adapter is None else self.adapter.fingerprint
        return Ask(self.request, self.tokens(0, self.num_tokens), num_tokens, self.order, adapter)


class DrawnLogprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities: of the drawn token, and of the likeliest, falling."""

    drawn: float
    top: list[tuple[int, float]]  # token, logprob


class Drawn(NamedTuple):
    """A row's next token, with logprobs where it asks for them."""

    token: int
    logprobs: DrawnLogprobs | None = None


Outcomes = Mapping[Generation, "Drawn | Exception | list[Drawn | Exception] | None"]
"""Per row of a decode step: its next token, what failed, or None when its cache was lost.

A list: its next tokens, several of them guessed right, of which the last may be what failed. The row has the first;
`Runner.take` gives it each further one.
"""
