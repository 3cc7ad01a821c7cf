"""Drafts looked up in what is there already: what followed the latest tokens when they last stood in prompt or answer.

Costs no model. Good where answers repeat their prompts: summaries, code that is changed, facts that are quoted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from turboserve.engine.generation import Generation
from turboserve.engine.speculation_pace import Acceptance, Offer

LEAST_MATCH = 2  # tokens in common, below which what follows is chance
MOST_MATCH = 8  # tokens; a longer match tells no more


class LookupDrafter:
    """Prompt look-up, for all rows of a batch."""

    name = "lookup"

    def __init__(self) -> None:
        self._texts: dict[Generation, _Text] = {}
        self._found: dict[Generation, list[int]] = {}

    def offers(self, rows: Sequence[Generation], most: Sequence[int], known: Sequence[Acceptance]) -> list[Offer]:
        """What each row could have, up to `most` tokens."""
        self._texts = {row: self._texts.get(row) or _Text() for row in rows}
        self._found, offers = {}, []
        for row, limit, acceptance in zip(rows, most, known, strict=True):
            found, length = self._texts[row].continuation(row, limit) if limit > 0 else ([], 0)
            self._found[row] = found
            kind = min(length, 4)
            offers.append(Offer(len(found), kind, acceptance.rate(kind)) if found else Offer())
        return offers

    def draft(self, rows: Sequence[Generation], counts: Sequence[int]) -> list[list[int]]:
        """So many tokens of what was offered."""
        return [self._found[row][:count] for row, count in zip(rows, counts, strict=True)]

    def release(self) -> None:
        """Forget all rows."""
        self._texts, self._found = {}, {}


class _Text:
    """One row's tokens as an array that grows with its answer."""

    def __init__(self) -> None:
        self._tokens = np.empty(0, np.int32)
        self._length = 0

    def _extended(self, row: Generation) -> npt.NDArray[np.int32]:
        new = row.tokens(self._length, row.num_tokens)
        if self._length + len(new) > len(self._tokens):
            grown = np.empty(2 * (self._length + len(new)), np.int32)
            grown[: self._length] = self._tokens[: self._length]
            self._tokens = grown
        self._tokens[self._length : self._length + len(new)] = new
        self._length += len(new)
        return self._tokens[: self._length]

    def continuation(self, row: Generation, limit: int) -> tuple[list[int], int]:
        """Up to `limit` tokens that followed the longest match of the text's end, the latest of those; its length."""
        text = self._extended(row)
        if len(text) <= LEAST_MATCH:
            return [], 0
        ends = np.flatnonzero(text[:-1] == text[-1])  # where a match ends
        length = 1
        while len(ends) and length < MOST_MATCH:
            longer = ends[ends >= length]
            longer = longer[text[longer - length] == text[-1 - length]]
            if not len(longer):
                break
            ends, length = longer, length + 1
        if not len(ends) or length < LEAST_MATCH:
            return [], 0
        # of repeated tokens the latest match is cut short by the end of the text: an earlier one has more to tell
        full = ends[ends + limit < len(text)]
        at = int(full[-1] if len(full) else ends[0]) + 1
        return text[at : at + limit].tolist(), length
