"""Speculative decoding: tokens are guessed ahead and checked in one pass; those that are right are as good as computed.

Whoever guesses (a drafter: speculation_lookup.py, speculation_model.py), a draft only changes how fast tokens come,
never which (speculation_step.py). Caches are cut back by what was wrong. No draft closes a compressed page, for
what a page has encoded could only be cut off with a loss: drafts end with the page of the newest token.

Left alone are rows with a token rule (their masks depend on all tokens before) and rows that were recovered from a
failure; and all rows while drafts are not worth their time (speculation_pace.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from turboserve.engine.generation import Generation
from turboserve.engine.speculation_pace import Acceptance, Offer, StepTimes, most_worth

log = logging.getLogger(__name__)

MOST_DRAFTS = 7  # with the newest token 8 rows, which the decode kernels of CPUs serve by themselves
MAX_FAILURES = 3  # of the drafter, after which it is left alone
SHARED_STEP = 0.02  # what one draft weighs in the acceptance that new rows start with


class Drafter(Protocol):
    """Guesses tokens. What it raises costs drafts, never an answer."""

    @property
    def name(self) -> str: ...

    def offers(self, rows: Sequence[Generation], most: Sequence[int], known: Sequence[Acceptance]) -> list[Offer]:
        """What each of all rows that run could have, up to `most` tokens; called before each step, cheap."""
        ...

    def draft(self, rows: Sequence[Generation], counts: Sequence[int]) -> list[list[int]]:
        """At most so many tokens for each of the rows that `offers` was asked for last."""
        ...

    def release(self) -> None:
        """Give all memory back; rows are met anew afterwards."""
        ...


@dataclass(slots=True)
class _Asked:
    """What was decided for one step."""

    rows: list[Generation]
    offers: list[Offer]
    counts: list[int]


class Speculation:
    """Decides how many drafts each row gets, and learns from what became of them."""

    def __init__(self, drafter: Drafter, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """most: drafts of a row in a step, at most."""
        self._drafter, self._most, self._clock = drafter, min(most, MOST_DRAFTS), clock
        self._times = StepTimes()
        self._rows: dict[Generation, Acceptance] = {}
        self._shared = Acceptance()  # of all rows, for new ones
        self._asked: _Asked | None = None
        self._failures = 0
        self._began_s = 0.0
        self.num_drafted = self.num_accepted = 0
        self._told = (0, 0)

    def __str__(self) -> str:
        if self._has_failed:
            return f"{self._drafter.name}: it failed {self._failures} times, and is left alone"
        counts = f"{self.num_drafted} drafted, {self.num_accepted} accepted" if self.num_drafted else "none drafted yet"
        return f"{self._drafter.name}, up to {self._most} tokens a step: {counts}"

    @property
    def _has_failed(self) -> bool:
        return self._failures >= MAX_FAILURES

    def is_worth_it(self, rows: Sequence[Generation], batch: Sequence[Any]) -> bool:
        """Whether the next step of these rows, whose caches `batch` holds, is to have drafts; `drafts` makes them."""
        self._asked = None
        self._rows = {row: self._rows.get(row) or self._shared.copy() for row in rows}
        if self._has_failed:
            return False
        limits = [self._limit(row, i, batch) for i, row in enumerate(rows)]
        if not any(limits):
            return False
        try:
            offers = self._drafter.offers(rows, limits, list(self._rows.values()))
        except Exception:
            self._fail()
            return False
        if not any(offer.most for offer in offers):
            return False
        most = most_worth(offers, self._times)
        if most == 0:
            self._times.fade(len(rows))
            for row, offer in zip(rows, offers, strict=True):
                if offer.most:
                    self._rows[row].fade(offer.kind)
            return False
        self._asked = _Asked(list(rows), offers, [min(offer.most, most) for offer in offers])
        return True

    def _limit(self, row: Generation, index: int, batch: Sequence[Any]) -> int:
        """Drafts that a row may have: each may become part of its answer, in its page and in what it has reserved."""
        wanted = row.request.num_draft_tokens
        if row.rule is not None or row.num_recoveries or row.lease is None or wanted == 0:
            return 0
        most = min(self._most, row.num_answer_left - 1, row.lease.reserved_tokens - row.num_tokens)
        if wanted is not None:
            most = min(most, wanted)
        return max(0, min([most, *(cache.exact_room(index) - 1 for cache in batch)])) if most > 0 else 0

    def drafts(self, rows: Sequence[Generation]) -> list[list[int]] | None:
        """Of each row, what `is_worth_it` has asked for; None: there are none."""
        asked, self._asked = self._asked, None
        self.begin()
        if asked is None or asked.rows != list(rows):
            return None
        try:
            drafts = self._drafter.draft(rows, asked.counts)
        except Exception:
            self._fail()
            return None
        if not any(drafts):
            return None
        self._asked = asked
        return drafts

    def begin(self) -> None:
        """A step begins, whose time `learn` takes."""
        self._began_s = self._clock()

    def learn(self, drafts: Sequence[list[int]] | None, num_kept: Sequence[int], num_rows: int) -> None:
        """The step is done. num_kept: of each row's drafts, those that were accepted."""
        seconds = self._clock() - self._began_s
        self._times.learn(num_rows, max(map(len, drafts)) if drafts else 0, seconds)
        asked, self._asked = self._asked, None
        if drafts is None or asked is None:
            return
        for row, offer, draft, kept in zip(asked.rows, asked.offers, drafts, num_kept, strict=True):
            if draft:
                row.num_drafted += len(draft)
                self.num_drafted += len(draft)
                self.num_accepted += kept
                self._rows[row].learn(offer.kind, len(draft), kept)
                self._shared.learn(offer.kind, len(draft), kept, SHARED_STEP)

    def take_counts(self) -> tuple[int, int]:
        """Tokens that were drafted and that were accepted since the last time."""
        before, self._told = self._told, (self.num_drafted, self.num_accepted)
        return self._told[0] - before[0], self._told[1] - before[1]

    def _fail(self) -> None:
        self._failures += 1
        log.exception("drafting failed (%s); answers go on without", self._drafter.name)
        try:
            self._drafter.release()
        except Exception:
            log.exception("the drafter's memory could not be given back")
