"""Rank 0 and a follower in one process, with two sets of caches of one whole model and messages in between.

What is tested is who does what in which order: there is nothing to sum, for each has the whole model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from tests.turboserve.cache.fakes import GuardedMemory
from tests.turboserve.engine.fakes import make_parts

from turboquant_kv.codec.format import KVFormat
from turboserve.cache.interfaces import SessionDisk
from turboserve.cache.memory import MemoryLimits
from turboserve.engine.distributed.following import Follower
from turboserve.engine.distributed.leading import Lead, LeadingDisk, LeadingFormats
from turboserve.engine.distributed.leading_passes import LeadingPasses
from turboserve.engine.distributed.ranks import FirstRank, OtherRank, RanksEndedError
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.served_formats import ServedFormats


class Second(OtherRank):
    """What the follower says."""

    rank, size = 1, 2

    def __init__(self) -> None:
        self.said: list[Any] = []

    def exchange(self, what: str, value: Any) -> list[Any]:
        self.said.append(value)
        return [value, value]


@dataclass
class First(FirstRank):
    """Whatever is sent is done at once; `changed` may alter it on the way."""

    second: Second
    follower: Follower | None = None
    messages: list[Any] = field(default_factory=list)
    lost: str | None = None
    size = 2

    def changed(self, message: list[Any]) -> list[Any] | None:
        return message

    def send(self, message: list[Any]) -> None:
        self.messages.append(message)
        arrived = self.changed(json.loads(json.dumps(message)))
        assert self.follower is not None
        if arrived is not None:
            self.follower.take(arrived)

    def exchange(self, what: str, value: Any) -> list[Any]:
        return [value, self.second.said.pop()]

    def explain(self) -> None:
        """Nobody is lost here."""

    def end_because(self, why: str) -> NoReturn:
        raise RanksEndedError(why)

    def close(self) -> None:
        self.send(["close"])


@dataclass
class Pair:
    parts: EngineParts
    first: First
    follower: Follower
    formats: ServedFormats  # of the follower


def make_pair(
    model: Any,
    fmt: KVFormat | None,
    *,
    first: type[First] = First,
    budget_bytes: int = 1 << 28,
    limits: MemoryLimits | None = None,
    disks: tuple[SessionDisk, SessionDisk] | None = None,
) -> Pair:
    """Parts for a step loop, whose every change to caches a follower repeats."""
    own, other = ServedFormats(model, fmt), ServedFormats(model, fmt)
    second = Second()
    follower = Follower(second, model, other, disks[1] if disks else None)
    leader = first(second, follower)
    lead = Lead(leader, own)
    family = LeadingFormats(lead, model)
    disk = LeadingDisk(lead, disks[0]) if disks else None
    memory = GuardedMemory(family, budget_bytes, limits or MemoryLimits(), disk)
    parts = make_parts(model, fmt=fmt)
    loaded = replace(parts.loaded, model=None)
    parts = replace(
        parts,
        loaded=loaded,
        runtime=family.default_runtime,
        memory=memory,
        passes=LeadingPasses(lead, model),
        divided=lead,
    )
    return Pair(parts, leader, follower, other)
