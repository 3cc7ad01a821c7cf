"""What rank 0 of a divided model does beside serving: finding the others, and ending when one of them is gone."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from turboserve.engine.distributed.place import Place
from turboserve.settings import Settings

if TYPE_CHECKING:
    from turboserve.api.drain import Drain
    from turboserve.engine.engine import TurboEngine
    from turboserve.engine.loaded_model import EngineParts
    from turboserve.engine.progress import Progress

NOTICE_S = 0.5  # for the engine thread to see by itself that a rank is gone
WATCH_S = 0.5
LINGER_S = 1.0  # in which errors reach their readers, and whoever asks /ready is told
END_S = 8.0  # since a rank was lost; by then the process is gone, whatever it waits for


class Guard:
    """Rank 0's: how its engine is built, and what happens when the ranks do not go on together."""

    def __init__(self, place: Place) -> None:
        self._place, self._lock, self._is_over = place, threading.Lock(), threading.Event()
        self._watching = threading.Thread(target=self._watch_steps, name="steps", daemon=True)
        self._watched: tuple[TurboEngine, Drain]
        self.why: str | None = None  # the run is over

    def watch(self, engine: TurboEngine, drain: Drain) -> None:
        """Whom to tell. Before the engine is started."""
        self._watched = engine, drain
        self._watching.start()

    def unwatch(self) -> None:
        """Serving is over. Nothing of the engine is held any more, which the process's end would complain about."""
        self._is_over.set()
        self._watching.join()

    def _watch_steps(self) -> None:
        """A rank that lives and does not come to an end of its step leaves the others in a collective for ever."""
        while not self._is_over.wait(WATCH_S):
            if self._watched[0].is_stuck:
                self.on_lost("a step takes longer than stuck_step_s, so some rank does not take part in it")
                return

    def build(self, settings: Settings, progress: Progress) -> EngineParts:
        """As `engine.loading.build_parts`, with the other ranks; on the engine thread."""
        from turboserve.engine.distributed.ranks import FirstRank, join
        from turboserve.engine.loading import build_parts

        progress(f"distributed  rank 0 waits for the others, on {self._place.first_host}")
        ranks = join(self._place)
        assert isinstance(ranks, FirstRank)
        ranks.on_lost, ranks.on_leaving = self.on_lost, self._watched[1].begin
        progress(f"distributed  {ranks.size} ranks")
        return build_parts(settings, progress, ranks)

    def on_lost(self, why: str) -> None:
        """A rank is gone; not on the engine thread."""
        if self._begins(why):
            self._watched[0].give_up(why, NOTICE_S)
            self._leave()

    def on_death(self) -> None:
        """The engine thread died, and has told all requests."""
        if self._begins("the engine of rank 0 died"):
            threading.Thread(target=self._leave, name="leaving", daemon=True).start()

    def _begins(self, why: str) -> bool:
        with self._lock:
            if self.why is not None:
                return False
            self.why = why
        timer = threading.Timer(END_S, end_now, (why,))
        timer.daemon = True
        timer.start()
        return True

    def _leave(self) -> None:
        time.sleep(LINGER_S)
        self._watched[1].begin()


def end_now(why: str) -> NoReturn:
    """Exit status 1, at once: a thread may wait in a collective, which nothing ends but the process."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.write(f"turboserve: --distributed: {why}\n")
    sys.stderr.flush()
    os._exit(1)
