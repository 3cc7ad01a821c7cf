"""When Python looks through all objects for cyclic garbage: at rest, and not between two tokens.

By itself it does so whenever objects have grown by a quarter, with every thread standing still. A server with hundreds
of idle conversations has millions of objects, and each such look took a third of a second out of all streams. Objects
that live as long as the process are set aside here; what became garbage since is looked for when nothing is to be done,
or now and then if there always is. Young objects are looked through as ever, which takes no time.

Of a server's process alone: settings of the collector are of all that runs in it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from turboserve.machine_memory import give_back_heap

YOUNG_OBJECTS = 20_000  # new ones between two looks at them: a step of 64 streams makes some hundreds
YOUNG_LOOKS = 10  # of these, until those that survived are looked through together
NEVER = 1 << 30
WORTH_IT = 5  # looks at survivors since the last one at all objects
BUSY_INTERVAL_S = 30.0  # the least time between two looks at all objects while there is work
SHARE = 0.002  # of the time, at most, while there is work


def look_through_all() -> None:
    """Free all garbage, and give what that and others left of the heap back to the system."""
    gc.collect()
    give_back_heap()


class GarbageTimes:
    """One thread only, which has the most to lose."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        collect: Callable[[], object] = look_through_all,
        looks: Callable[[], int] = lambda: gc.get_count()[2],
    ) -> None:
        """collect: looks through all objects; looks: how often survivors were looked through since."""
        self._clock, self._collect, self._looks = clock, collect, looks
        self._last_s, self._cost_s = clock(), 0.0
        self._thresholds = gc.get_threshold()

    def settle(self) -> None:
        """What there is lives as long as the process; from now on all objects are looked through when told."""
        self._look()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, YOUNG_LOOKS, NEVER)

    def release(self) -> None:
        """As Python has it by itself: caches and weights that were set aside would be left at the process's end."""
        gc.unfreeze()
        gc.set_threshold(*self._thresholds)

    def after_step(self, *, has_work: bool) -> None:
        """To be called between steps, and at rest every second or so."""
        if self._looks() < WORTH_IT:
            return
        interval_s = max(BUSY_INTERVAL_S, self._cost_s / SHARE) if has_work else 0.0
        if self._clock() - self._last_s >= interval_s:
            self._look()

    def _look(self) -> None:
        began_s = self._clock()
        self._collect()
        self._last_s = self._clock()
        self._cost_s = self._last_s - began_s
