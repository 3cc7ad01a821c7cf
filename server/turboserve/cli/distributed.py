"""`turboserve serve --distributed`: this process as one rank of a model that several have together.

Rank 0 is the server that clients see; the others have no port and do what it says. When one of them is gone, rank 0
ends all requests with an error, says so at `/ready` for a moment, and exits with status 1, as every rank then does: a
supervisor starts all of them again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from turboserve import logs
from turboserve.cli.backend import keep_compiled_kernels, load_backend
from turboserve.engine.distributed.place import Place, place_in
from turboserve.errors import StartupError
from turboserve.settings import AUTO_FORMAT, Settings

if TYPE_CHECKING:
    from turboserve.api.drain import Drain
    from turboserve.engine.distributed.ranks import OtherRank
    from turboserve.engine.engine import TurboEngine
    from turboserve.engine.loaded_model import EngineParts
    from turboserve.engine.progress import Progress

log = logging.getLogger(__name__)

NOTICE_S = 1.0  # for the engine thread to see by itself that a rank is gone
LINGER_S = 1.0  # in which errors reach their readers, and whoever asks /ready is told
END_S = 8.0  # since a rank was lost; by then the process is gone, whatever it waits for


def run(settings: Settings) -> None:
    """Serve as the rank that the launcher made this process. Raises StartupError."""
    check_supported(settings)
    place = place_in(os.environ)
    if place.is_first:
        from turboserve.cli import serve

        serve.run(settings, Guard(place))
    else:
        follow(settings, place)


def check_supported(settings: Settings) -> None:
    """Raises StartupError for what a divided model cannot do."""
    if settings.models:
        raise StartupError("--distributed serves one model: take the tables [models.NAME] out of the configuration.")
    if settings.adapters:
        raise StartupError("--distributed: LoRA adapters cannot be divided: merge the adapter into the model first.")
    if settings.kv_format == AUTO_FORMAT:
        raise StartupError("--distributed: name a --kv-format: auto measures formats on models that are not divided.")


class Guard:
    """Rank 0's: how its engine is built, and what happens when the ranks do not go on together."""

    def __init__(self, place: Place) -> None:
        self._place, self._lock = place, threading.Lock()
        self._watched: tuple[TurboEngine, Drain]
        self.why: str | None = None  # the run is over

    def watch(self, engine: TurboEngine, drain: Drain) -> None:
        """Whom to tell. Before the engine is started."""
        self._watched = engine, drain

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


def follow(settings: Settings, place: Place) -> None:
    """Be another rank than 0, until that ends in order. Raises StartupError; a run that ends otherwise ends here."""
    logs.configure(settings.log_level, settings.log_json)
    load_backend()
    keep_compiled_kernels(settings.cache_dir)
    import mlx.core as mx

    from turboserve.engine.distributed.ranks import OtherRank, RanksEndedError, join
    from turboserve.engine.loading import build_follower

    ranks = join(place)
    assert isinstance(ranks, OtherRank)
    _leave_together(ranks)
    try:
        follower = build_follower(settings, partial(log.debug, "%s"), ranks)
        log.info("rank %d of %d follows rank 0, as process %d", ranks.rank, ranks.size, os.getpid())
        follower.run()
        ranks.close()
    except StartupError as exc:
        ranks.close(str(exc))
        raise
    except RanksEndedError as exc:
        ranks.close(str(exc))
        end_now(f"rank {place.rank}: {exc}")
    except Exception as exc:
        log.critical("rank %d died", place.rank, exc_info=True)
        ranks.close(f"it died ({type(exc).__name__})")
        end_now(f"rank {place.rank} died ({type(exc).__name__})")
    finally:
        mx.clear_streams()


def _leave_together(ranks: OtherRank) -> None:
    """A signal to this rank asks rank 0 to drain and to end all; a second one ends it at once."""
    asked = threading.Event()

    def ask() -> None:
        asked.wait()
        ranks.send(["leaving"])

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            os._exit(128 + number)
        asked.set()

    threading.Thread(target=ask, name="leaving", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
