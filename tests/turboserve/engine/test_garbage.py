"""All objects are looked through for garbage at rest, seldom under load, and never those that were there at start."""

from __future__ import annotations

import subprocess
import sys

from turboserve.engine.garbage import BUSY_INTERVAL_S, SHARE, WORTH_IT, GarbageTimes


class Collector:
    """Python's, with a clock that moves when told."""

    def __init__(self, cost_s: float) -> None:
        self.now_s, self.cost_s, self.num_looks, self.looks = 100.0, cost_s, 0, WORTH_IT
        self.times = GarbageTimes(lambda: self.now_s, self._collect, lambda: self.looks)

    def _collect(self) -> None:
        self.num_looks += 1
        self.now_s += self.cost_s


def test_nothing_is_looked_for_where_little_is_new() -> None:
    collector = Collector(0.1)
    collector.looks = WORTH_IT - 1
    collector.now_s += 1e6
    collector.times.after_step(has_work=False)
    collector.times.after_step(has_work=True)
    assert collector.num_looks == 0


def test_at_rest_it_is_done_at_once() -> None:
    collector = Collector(0.1)
    collector.times.after_step(has_work=False)
    assert collector.num_looks == 1


def test_under_load_it_takes_a_bounded_share_of_the_time() -> None:
    for cost_s in (0.01, 0.3):
        collector, steps = Collector(cost_s), 0
        for _ in range(20_000):
            collector.now_s += 0.05
            steps += 1
            collector.times.after_step(has_work=True)
        assert collector.num_looks > 2
        assert collector.num_looks * cost_s <= steps * 0.05 * SHARE + cost_s
        assert collector.num_looks <= steps * 0.05 / BUSY_INTERVAL_S + 1


def test_what_is_there_is_set_aside_and_later_garbage_is_found() -> None:
    """In a process of its own, whose collector it changes."""
    program = """
import gc, weakref
from turboserve.engine.garbage import GarbageTimes
class Node: pass
times = GarbageTimes()
times.settle()
assert gc.get_freeze_count() > 1_000 and gc.get_threshold()[2] > 1 << 20
def cycle():
    node = Node(); node.me = node
    return weakref.ref(node)
left = cycle()
kept = [[i] for i in range(2_000_000)]  # the young are looked through, and survive
assert left() is None
node = Node(); node.me = node; old = weakref.ref(node)
gc.collect(1); del node
kept += [[i] for i in range(2_000_000)]
assert old() is not None, "it is among those that survived"
times.after_step(has_work=True)
assert old() is not None, "not between two tokens"
times.after_step(has_work=False)
assert old() is None
times.release()
assert gc.get_freeze_count() == 0 and gc.get_threshold()[2] < 1000
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
