"""Measuring one server, or two in turn: probe, warm-up, rounds. Prints progress; returns everything that was seen."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import httpx

from turboserve.bench_client.asking import Clock, Outcome, Target, ask
from turboserve.bench_client.figures import Counts, count, figures, medians
from turboserve.bench_client.kv_watch import KVSample, KVWatch
from turboserve.bench_client.load import Round, run_round
from turboserve.bench_client.mix import WARM_UP_ROUND, Ask, Mix, Pace
from turboserve.bench_client.probe import Probe, probe
from turboserve.bench_client.progress import Progress


@dataclass(frozen=True, slots=True)
class Plan:
    """One measurement: the same mix and pace for every server, `rounds` times."""

    mix: Mix
    pace: Pace
    rounds: int = 1
    warm_up: int = 0
    timeout_s: float = 900.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One round of one server."""

    outcomes: list[Outcome]
    figures: dict[str, float]
    kv_start: KVSample | None
    kv_peak: KVSample | None
    kv_missed: int = 0  # samples that the server did not answer, after one that it did


@dataclass(slots=True)
class Server:
    """One server and what was seen of it."""

    probe: Probe
    number: int = 0
    warm_up: list[Outcome] = field(default_factory=list)
    rounds: list[Measured] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.probe.target.url

    @property
    def outcomes(self) -> list[Outcome]:
        """Of all measured rounds."""
        return [outcome for one in self.rounds for outcome in one.outcomes]

    @property
    def counts(self) -> Counts:
        return count(self.outcomes)

    @property
    def medians(self) -> dict[str, float]:
        """Of each figure, over the rounds."""
        return medians([one.figures for one in self.rounds])

    @property
    def has_failed(self) -> bool:
        """Whether any request failed, in the warm-up too, or none succeeded."""
        return any(outcome.error for outcome in self.warm_up + self.outcomes) or not self.outcomes


def measure(plan: Plan, targets: Sequence[Target], progress: Progress | None = None) -> list[Server]:
    """Measure the servers in turn, every second round in reverse order, so that a drift hits both alike.

    Raises StartupError when one of them does not answer a first short request.
    """
    return asyncio.run(_measure(plan, targets, progress or Progress(plan.pace)))


async def _measure(plan: Plan, targets: Sequence[Target], progress: Progress) -> list[Server]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=httpx.Timeout(plan.timeout_s, connect=30.0), limits=limits) as client:
        servers = [
            Server(await probe(client, target, plan.mix, plan.timeout_s), number)
            for number, target in enumerate(targets)
        ]
        for server in servers:
            await _warm_up(client, plan, server, progress)
        for number in range(plan.rounds):
            for server in servers if number % 2 == 0 else servers[::-1]:
                server.rounds.append(await _round(client, plan, server, number, progress))
    return servers


async def _warm_up(client: httpx.AsyncClient, plan: Plan, server: Server, progress: Progress) -> None:
    if plan.warm_up:
        streams = min(plan.warm_up, plan.pace.streams)
        once = replace(plan, pace=Pace(streams=streams, num_requests=plan.warm_up))
        measured = await _round(client, once, server, WARM_UP_ROUND, Progress(once.pace, progress.stream))
        server.warm_up = measured.outcomes


async def _round(client: httpx.AsyncClient, plan: Plan, server: Server, number: int, progress: Progress) -> Measured:
    found, current = server.probe, Round()

    def drawn(index: int) -> Ask:
        return plan.mix.ask(number, index, found.scale, server.number)

    # Made beforehand where their number is known: drawing 16,000 words takes milliseconds of every stream's time.
    asks = [drawn(index) for index in range(plan.pace.num_requests or 0)]

    async def send(outcome: Outcome, clock: Clock) -> None:
        asked = asks[outcome.index] if asks else drawn(outcome.index)
        outcome.asked_prompt_tokens, outcome.asked_answer_tokens = asked.prompt_tokens, asked.answer_tokens
        body = plan.mix.body(asked, found.target.model)
        kept = {key: value for key, value in body.items() if key not in found.left_out}
        await ask(client, found.target, kept, outcome, clock, plan.timeout_s)

    name = "warm-up" if number == WARM_UP_ROUND else f"round {number + 1}/{plan.rounds}"
    async with KVWatch(client, found.target) as watch:
        current.clock = Clock()
        shown = asyncio.create_task(progress.show(f"{server.name} {name}", current))
        try:
            await run_round(current, send, plan.pace, plan.mix.seed, number)
        finally:
            shown.cancel()
            await asyncio.gather(shown, return_exceptions=True)
    own = figures(current.outcomes, plan.pace.rate is None, watch.peak)
    return Measured(current.outcomes, own, watch.start, watch.peak, watch.num_missed)
