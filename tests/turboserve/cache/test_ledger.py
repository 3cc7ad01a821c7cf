"""What is committed: a sum that running requests cannot raise, whatever idle conversations share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tests.turboserve.cache.fakes import FakeBytes

from turboserve.cache.holders import Conversation, Session
from turboserve.cache.ledger import held_bytes


class Totals:
    """A family of which only the pools' totals are asked."""

    def __init__(self, totals: FakeBytes) -> None:
        self.now = totals

    def totals(self) -> FakeBytes:
        return self.now


def test_exact_rows_of_running_requests_do_not_raise_what_idle_ones_hold() -> None:
    kv = FakeBytes(tokens=40, compressed=320, exact=80)
    idle = [
        Conversation(Session(name, "caller", 0.0, 0.0), np.zeros(40, np.int32), "4/4", "4/4", [object()], kv)
        for name in ("a", "its fork")
    ]
    family: Any = Totals(FakeBytes(compressed=320, exact=80))  # the fork shares everything
    before = held_bytes(family, idle)
    family.now = replace(family.now, exact=80 + 50)  # rows of a running request, which its lease reserved
    assert held_bytes(family, idle) == before >= 320 + 80
