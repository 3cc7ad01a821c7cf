"""`turboserve serve --distributed`: this process as one rank of a model that several have together.

Rank 0 is the server that clients see; the others have no port and do what it says. When one of them is gone, rank 0
ends all requests with an error, says so at `/ready` for a moment, and exits with status 1, as every rank then does: a
supervisor starts all of them again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import MutableMapping
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from turboserve import logs
from turboserve.cli.backend import keep_compiled_kernels, load_backend
from turboserve.cli.rank_guard import Guard, end_now
from turboserve.engine.distributed.place import Place, place_in
from turboserve.errors import StartupError
from turboserve.settings import AUTO_FORMAT, Settings

if TYPE_CHECKING:
    from turboserve.engine.distributed.ranks import OtherRank

log = logging.getLogger(__name__)

PREFIX = "--distributed:"  # of what is told of divided models; rank 0 puts it before what it hears


def run(settings: Settings) -> None:
    """Serve as the rank that the launcher made this process. Raises StartupError."""
    check_supported(settings)
    launch_directly(os.environ)
    place = place_in(os.environ)
    if place.is_first:
        from turboserve.cli import serve  # late: brings in the HTTP stack, which other ranks need not

        serve.run(settings, Guard(place))
    else:
        follow(settings, place)


def launch_directly(environment: MutableMapping[str, str]) -> None:
    """Have MLX launch CUDA kernels one by one, if nobody has said otherwise; before its first operation.

    By default it captures operations into CUDA graphs and updates the graph that it has of the same structure. One that
    holds a collective cannot be updated and is made anew in every layer of every step (docs/distributed.md, Measuring).
    """
    environment.setdefault("MLX_USE_CUDA_GRAPHS", "0")


def check_supported(settings: Settings) -> None:
    """Raises StartupError for what a divided model cannot do."""
    if settings.models:
        raise StartupError("--distributed serves one model: take the tables [models.NAME] out of the configuration.")
    if settings.adapters:
        raise StartupError("--distributed: LoRA adapters cannot be divided: merge the adapter into the model first.")
    if settings.kv_store_shared:
        raise StartupError(
            "--distributed: a folder of stored conversations is this run's own: leave kv_store_shared off."
        )
    if settings.kv_format == AUTO_FORMAT:
        raise StartupError("--distributed: name a --kv-format: auto measures formats on models that are not divided.")


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
        ranks.close(str(exc).removeprefix(f"{PREFIX} "))
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
