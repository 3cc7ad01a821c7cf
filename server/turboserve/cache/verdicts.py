"""What the engine asks the memory, and what it is told. Plain data.

    Ask       may this request begin?
    Growth    may this lease have room for more tokens?
    Restart   is there a longer beginning for this lease than the one that it has?

A verdict changes nothing: the engine preempts whom a Start names, then lets the memory carry it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turboserve.cache.prefix_index import Match
from turboserve.cache.pressure import NOTHING, Relief
from turboserve.cache.sessions import Lease
from turboserve.errors import TurboServeError
from turboserve.messages import Request


@dataclass(frozen=True, slots=True)
class Ask:
    """A lease for `request`, whose prompt has these tokens; `num_tokens`: room for prompt and answer.

    adapter: the fingerprint of what its keys and values are computed with beside the model; "": nothing.
    """

    request: Request
    prompt: Sequence[int]
    num_tokens: int
    order: int | None = None  # of its first admission, when it was preempted since
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Growth:
    """Room for `num_tokens` in all, at the cost of younger leases if need be."""

    lease: Lease
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Restart:
    """Of requests with a common beginning that came together, one computes it and the others follow."""

    lease: Lease


Question = Ask | Growth | Restart


@dataclass(frozen=True, slots=True)
class Start:
    """Yes, once `relief` has happened. `match`: where the cache begins, None: with nothing.

    A match on disk is read when this is carried out, and the question is then to be asked again.
    """

    question: Question
    relief: Relief = NOTHING
    match: Match | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now. Nothing is freed before the memory's `generation` is another than `since`.

    None: the answer may be another at any time.
    """

    since: int | None


@dataclass(frozen=True, slots=True)
class Refuse:
    """Never, or not while waiting would free nothing."""

    error: TurboServeError


Verdict = Start | Wait | Refuse
