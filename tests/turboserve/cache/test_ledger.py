"""What is committed: a sum that running requests cannot raise, whatever idle conversations share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tests.turboserve.cache.fakes import FakeDisk, FakeFamily, converse, finish, lease_for, memory_for, span, try_lease

from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.ledger import Ledger
from turboserve.cache.sessions import Conversation, Session
from turboserve.messages import UpdateSession


class Totals:
    """A family of which only the pools' totals are asked."""

    def __init__(self, totals: KVBytes) -> None:
        self.now = totals

    def totals(self) -> KVBytes:
        return self.now


def test_exact_rows_of_running_requests_do_not_raise_what_idle_ones_hold() -> None:
    kv = KVBytes(tokens=40, compressed=320, exact=80)
    family: Any = Totals(KVBytes(compressed=320, exact=80))  # the fork shares everything
    ledger = Ledger(family, 1000)
    for name in ("a", "its fork"):
        session = Session(name, "caller", 0.0, 0.0)
        ledger.hold(Conversation(session, np.zeros(40, np.int32), "4/4", "4/4", [object()], kv))
    before = ledger.held_bytes
    family.now = replace(family.now, exact=80 + 50)  # rows of a running request, which its lease reserved
    assert ledger.held_bytes == before >= 320 + 80


def test_the_generation_moves_when_something_may_have_been_freed_and_only_then() -> None:
    memory = memory_for(FakeFamily("f16"), 1000, FakeDisk())
    seen = [memory.generation]

    def has_moved() -> bool:
        seen.append(memory.generation)
        assert seen[-1] >= seen[-2]
        return seen[-1] > seen[-2]

    lease = lease_for(memory, span(0, 20), 40)
    assert not has_moved(), "a lease takes room"
    lease.caches[0].grow(span(0, 20))
    assert not has_moved(), "a step within a lease frees nothing"
    assert try_lease(memory, span(500, 20), 90) is None
    assert not has_moved(), "a verdict changes nothing"
    finish(memory, lease, span(0, 30))
    assert has_moved(), "the rest of the reservation"
    memory.answer(UpdateSession("", next(iter(memory.idle)).conversation_id, is_pinned=True), 0.0)
    assert has_moved(), "a pin may have been taken away"
    memory.drop_idle()
    assert has_moved(), "an idle conversation left memory"
    converse(memory, span(700, 30))
    has_moved()
    other = lease_for(memory, span(900, 20), 95)  # pushes the idle one out
    assert has_moved()
    memory.drop(other, other.caches)
    assert has_moved()
