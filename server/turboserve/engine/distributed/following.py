"""The side of all ranks but rank 0: they do to their part of every cache what rank 0 says, in its order.

Nothing is decided here. A verb that raises is remembered until rank 0's next word, which must be that it raised there
as well; whatever differs ends this process, and with it the run. So does silence after a verb that raised: rank 0 waits
in a collective then, for this rank's part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from turboserve.cache.interfaces import SessionDisk
from turboserve.engine.distributed.digest import digest_of
from turboserve.engine.distributed.leading_passes import shared_tokens
from turboserve.engine.distributed.ranks import OtherRank, RanksEndedError
from turboserve.engine.distributed.step_graphs import RankSteps
from turboserve.engine.served_formats import ServedFormats

log = logging.getLogger(__name__)

Caches = list[Any]

# For rank 0 to say that a verb raised there too. It raises where this rank did, or works on until it needs this rank.
RAISED_ALONE_S = 30.0


class Follower:
    """One rank's model, caches by their numbers, and its store."""

    def __init__(self, ranks: OtherRank, model: Any, formats: ServedFormats, disk: SessionDisk | None) -> None:
        self._ranks, self._model, self._formats, self._disk = ranks, model, formats, disk
        self._steps = RankSteps(model)
        self._caches: dict[int, Caches] = {}
        self._raised: Exception | None = None  # by the latest verb
        self._latest: mx.array | None = None  # logits, behind which a later step's tokens come
        self._stored: tuple[Any, Any] | None = None  # header and arrays: exported or read last
        self._verbs: dict[str, Callable[..., None]] = {
            "runtime": self._runtime,
            "make_cache": self._make_cache,
            "fill": self._fill,
            "logits": self._logits,
            "logits_of_drawn": self._logits_of_drawn,
            "keep_graphs": self._steps.keep,
            "can_keep_graphs": self._can_keep_graphs,
            "forget_graphs": self._steps.forget,
            "convert": self._convert,
            "trim": self._trim,
            "export": self._export,
            "import": self._import,
            "put": self._put,
            "get": self._get,
            "delete": self._delete,
            "keep": self._keep,
            **{verb: self._of_one(verb) for verb in CHANGING},
            **{verb: self._made_of_one(verb) for verb in MAKING},
            **{verb: self._made_of_several(verb) for verb in ("merge_rows", "merge_apart")},
            "extend_rows": self._extend_rows,
        }

    def run(self) -> None:
        """Until rank 0 ends the run in order. Raises RanksEndedError when it ends otherwise."""
        while self.take(self._next()):
            pass

    def _next(self) -> Sequence[Any]:
        raised = self._raised
        try:
            return self._ranks.receive(None if raised is None else RAISED_ALONE_S)
        except TimeoutError:
            told = f"{type(raised).__name__} here: {raised}"
            raise RanksEndedError(f"{told}; rank 0 has said nothing for {RAISED_ALONE_S:.0f} s") from raised

    def take(self, message: Sequence[Any]) -> bool:
        """Do what one message says; False for the last one."""
        kind, raised, self._raised = message[0], self._raised, None
        if (kind == "raised") != (raised is not None):
            self._complain(message, raised)
        if kind == "close":
            self._close()
        elif kind == "forget":
            self._caches.pop(message[1], None)
        elif kind == "compare":
            self._compare(*message[1:])
        elif kind == "do":
            self._raised = self._do(message[1], message[2])
        return bool(kind != "close")

    def _do(self, verb: str, args: Sequence[Any]) -> Exception | None:
        try:
            self._verbs[verb](*args)
        except Exception as exc:
            log.debug("%s raised", verb, exc_info=True)
            return exc.with_traceback(None)  # its frames would keep caches alive
        return None

    def _complain(self, message: Sequence[Any], raised: Exception | None) -> None:
        if raised is not None:
            raise RanksEndedError(f"{type(raised).__name__} here, and not on rank 0: {raised}")
        raise RanksEndedError(f"{message[1]} on rank 0, and not here")

    def _compare(self, number: int, touched: Sequence[int], digest: str) -> None:
        own = digest_of(self._formats.kv, [self._caches[i] for i in touched])
        if own != digest:
            raise RanksEndedError(f"after step {number} its caches are not those of rank 0 ({own}, not {digest})")

    def _close(self) -> None:
        if self._disk is not None:
            self._disk.close()

    # --- caches

    @property
    def _any_runtime(self) -> Any:
        """Verbs over caches are the same in every format."""
        return self._formats.default_runtime

    def _of_one(self, verb: str) -> Callable[..., None]:
        def do(number: int, *args: Any) -> None:
            getattr(self._any_runtime, verb)(self._caches[number], *args)

        return do

    def _made_of_one(self, verb: str) -> Callable[..., None]:
        def do(number: int, source: int, *args: Any) -> None:
            self._caches[number] = getattr(self._any_runtime, verb)(self._caches[source], *args)

        return do

    def _made_of_several(self, verb: str) -> Callable[..., None]:
        def do(number: int, sources: Sequence[int]) -> None:
            self._caches[number] = getattr(self._any_runtime, verb)([self._caches[source] for source in sources])

        return do

    def _extend_rows(self, number: int, batch: int, other: int) -> None:
        self._caches[number] = self._any_runtime.extend_rows(self._caches[batch], self._caches[other])

    def _runtime(self, name: str) -> None:
        self._formats.runtime(name)

    def _make_cache(self, number: int, name: str) -> None:
        self._caches[number] = self._formats.runtime(name).make_cache()

    def _convert(self, number: int, source: int, old: str, new: str) -> None:
        self._caches[number] = self._formats.convert(self._caches[source], old, new)

    def _trim(self, wanted_bytes: int) -> None:
        self._formats.trim(wanted_bytes)

    # --- passes

    def _fill(self, number: int, tokens: list[list[int]]) -> None:
        self._model(mx.array(tokens), cache=self._caches[number])

    def _logits(self, number: int, tokens: list[list[int]]) -> None:
        self._start(self._steps.forward(mx.array(tokens), self._caches[number]))

    def _logits_of_drawn(self, number: int, num_rows: int) -> None:
        tokens = mx.zeros((num_rows, 1), mx.int32)
        if self._latest is not None:  # that step's collectives come before this one's
            tokens = mx.depends([tokens], [self._latest])[0]
        self._start(self._steps.forward(shared_tokens(tokens, self._ranks.group), self._caches[number]))

    def _can_keep_graphs(self) -> None:
        self._ranks.all_agree("kept graphs", self._steps.can_keep)

    def _start(self, logits: mx.array) -> None:
        """Rank 0 reads them; what computes them needs this rank's part."""
        self._latest = logits
        mx.async_eval(logits)  # type: ignore[no-untyped-call]  # its stubs leave types out

    # --- the store: each rank's own part, under rank 0's keys

    def _export(self, number: int) -> None:
        self._stored = self._formats.export_caches(self._caches[number])

    def _import(self, number: int, name: str) -> None:
        assert self._stored is not None, "rank 0 has asked before whether it is there"
        header, arrays = self._stored
        self._caches[number] = self._formats.import_caches(name, header, list(arrays))

    def _put(self, key: str, meta: dict[str, Any]) -> None:
        stored, self._stored = self._stored, None
        if self._disk is not None and stored is not None and not self._disk.put(key, meta, *stored):
            log.info("a conversation is not stored by this rank, so it will be computed again")

    def _get(self, key: str, version: str) -> None:
        found = None if self._disk is None else self._disk.get(key)
        is_it = found is not None and str(found[0].get("version", "")) == version
        self._stored = (found[1], list(found[2])) if found is not None and is_it else None
        self._ranks.all_agree(f"stored {key}", is_it)

    def _delete(self, key: str) -> None:
        if self._disk is not None:
            self._disk.delete(key)

    def _keep(self, keys: Sequence[str]) -> None:
        for entry in list(self._disk.entries()) if self._disk is not None else ():
            if entry.key not in keys:
                self._delete(entry.key)


# Verbs over caches, by what they leave behind.
CHANGING = ("prepare_rows", "finalize_rows", "filter_rows", "trim_rows", "cut_back", "release", "evaluate")
MAKING = ("fork", "fork_row", "extract_row", "copy")
