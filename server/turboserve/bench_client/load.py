"""One round of requests at a pace, all from one event loop. Owns who asks when; what came of it is in the outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from turboserve.bench_client.asking import Clock, Outcome
from turboserve.bench_client.mix import Pace, arrivals

FAILURE_PAUSE_S = 0.2  # a stream whose request failed waits as long, or a dead server would be asked without end

# Sends request `outcome.index` and fills in the outcome.
Send = Callable[[Outcome, Clock], Awaitable[None]]


@dataclass(slots=True)
class Round:
    """Requests that were begun, in their order, on one clock."""

    clock: Clock = field(default_factory=Clock)
    outcomes: list[Outcome] = field(default_factory=list)
    num_ended: int = 0

    @property
    def num_running(self) -> int:
        return len(self.outcomes) - self.num_ended

    @property
    def num_failed(self) -> int:
        return sum(bool(outcome.error) for outcome in self.outcomes)

    @property
    def num_chunks(self) -> int:
        """Pieces of text received so far."""
        return sum(len(outcome.chunk_s) for outcome in self.outcomes)

    async def request(self, send: Send, stream: int, sent_s: float) -> Outcome:
        """The next request, to its end."""
        outcome = Outcome(len(self.outcomes), stream, sent_s)
        self.outcomes.append(outcome)
        await send(outcome, self.clock)
        self.num_ended += 1
        return outcome


async def run_round(current: Round, send: Send, pace: Pace, seed: int, round_number: int) -> None:
    """Make all requests of the round and wait for their ends."""
    if pace.rate is None:
        async with asyncio.TaskGroup() as group:
            for stream in range(pace.streams):
                group.create_task(_one_stream(current, send, pace, stream))
        return
    async with asyncio.TaskGroup() as group:
        for index, due_s in enumerate(arrivals(pace.rate, seed, round_number)):
            if not pace.has_more(index, due_s):
                break
            await asyncio.sleep(due_s - current.clock())
            group.create_task(current.request(send, index, due_s))


async def _one_stream(current: Round, send: Send, pace: Pace, stream: int) -> None:
    while pace.has_more(len(current.outcomes), current.clock()):
        outcome = await current.request(send, stream, current.clock())
        if outcome.error:
            await asyncio.sleep(FAILURE_PAUSE_S)
