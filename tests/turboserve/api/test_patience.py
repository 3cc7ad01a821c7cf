"""A limit on each of many waits, watched by one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.turboserve.api.skipping import SkippingLoop

from turboserve.api.patience import Patience


def run(body: Callable[[SkippingLoop, list[float]], Awaitable[None]]) -> list[float]:
    """When a patience ended, by the loop's time since the beginning."""
    ends: list[float] = []
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, SkippingLoop)
        runner.run(body(loop, ends))  # type: ignore[arg-type]
    return ends


def test_many_short_waits_take_one_timer_and_never_end() -> None:
    async def body(loop: SkippingLoop, ends: list[float]) -> None:
        patience = Patience(60.0, lambda: ends.append(loop.time()))
        for _ in range(1000):
            patience.begin()
            patience.end()
        assert loop.num_timers == 1
        patience.close()

    assert run(body) == []


@pytest.mark.parametrize("earlier_waits", [0, 3])
def test_a_wait_ends_once_and_not_before_its_own_limit(earlier_waits: int) -> None:
    limit_s = 0.05

    async def body(loop: SkippingLoop, ends: list[float]) -> None:
        patience = Patience(limit_s, lambda: ends.append(loop.time()))
        for _ in range(earlier_waits):  # each keeps the limit, and all together do not
            patience.begin()
            await asyncio.sleep(limit_s * 0.4)
            patience.end()
        patience.begin()
        began_s = loop.time()
        while not ends:
            await asyncio.sleep(limit_s / 10)
        await asyncio.sleep(3 * limit_s)
        ends[:] = [at - began_s for at in ends]

    (waited_s,) = run(body)
    assert waited_s == pytest.approx(limit_s)


def test_nothing_ends_between_waits_or_after_the_close() -> None:
    async def body(loop: SkippingLoop, ends: list[float]) -> None:
        patience = Patience(0.02, lambda: ends.append(loop.time()))
        patience.begin()
        patience.end()
        await asyncio.sleep(0.06)
        patience.begin()
        patience.close()
        await asyncio.sleep(0.06)

    assert run(body) == []
