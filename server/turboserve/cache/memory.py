"""The memory's door: who may use how many KV bytes, and what was kept for whom.

Memory is decided before it is used. A request gets a lease for prompt and answer, starting from the
longest prefix that its caller already has, be it idle, running or on disk; when it ends, its caches
become an idle conversation. Committed bytes never exceed the budget.

The memory decides and never calls back. The engine asks for a verdict, preempts whom it names, hands
their caches back by `keep`, and lets `carry_out` do the rest:

    verdict(question)  ->  Start: preempt, then carry_out  ->  a lease, or None: ask again
                           Wait: ask again when `generation` is another, and now and then
                           Refuse: the request ends with this error

Used by the engine thread only; clocks are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from turboserve.cache import integrity, statistics
from turboserve.cache.idle import IdleConversations
from turboserve.cache.integrity import CacheIntegrityError
from turboserve.cache.interfaces import CacheFamily, Caches, RunningCaches, ServedModel, SessionDisk
from turboserve.cache.leases import Leases
from turboserve.cache.ledger import Ledger
from turboserve.cache.persistence import Persistence
from turboserve.cache.prefix_index import Match, PrefixIndex
from turboserve.cache.quota import Quotas
from turboserve.cache.room import Need, Room
from turboserve.cache.session_commands import SessionAnswer, SessionCommands
from turboserve.cache.sessions import Conversation, Lease
from turboserve.cache.sizes import largest_fitting, peak_bytes
from turboserve.cache.statistics import Holdings
from turboserve.cache.tally import Tally
from turboserve.cache.transfers import Transfers
from turboserve.cache.verdicts import Ask, Growth, Question, Refuse, Restart, Start, Verdict, Wait
from turboserve.errors import ContextLengthError, TurboServeError
from turboserve.messages import (
    AdmissionStats,
    CacheEvents,
    DiskStatus,
    SessionCommand,
)

__all__ = [
    "Ask",
    "CacheIntegrityError",
    "Growth",
    "Lease",
    "Memory",
    "MemoryLimits",
    "Question",
    "Refuse",
    "Restart",
    "Start",
    "Verdict",
    "Wait",
]

_MAX_SHOWN = 1 << 20  # longest prompt `check_can_fit` searches for in messages

_ANY_MODEL = ServedModel()

EXPIRY_INTERVAL_S = 1.0  # finer than anybody sets a time to live


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """What an operator allows. Zero means no limit."""

    session_ttl_s: float = 0.0
    max_sessions_per_caller: int = 0
    max_session_bytes_per_caller: int = 0
    allow_requantise: bool = False
    has_one_caller: bool = False  # there is one API key: its pins take nothing from anybody


class Memory:
    """Admission, prefix reuse, sessions and pressure within a budget of bytes."""

    def __init__(
        self,
        family: CacheFamily,
        budget_bytes: int,
        limits: MemoryLimits | None = None,
        disk: SessionDisk | None = None,
        wall_offset: Callable[[], float] = lambda: 0.0,
        model: ServedModel = _ANY_MODEL,
    ) -> None:
        """Takes over what an earlier process left on `disk`. wall_offset: Unix seconds less the engine's, now.

        model: what sessions from other servers must have been computed by.
        """
        self.family, self._disk = family, disk
        self._limits = limits = limits if limits is not None else MemoryLimits()
        self._tally = Tally()
        self._ledger = Ledger(family, budget_bytes)
        self._index = PrefixIndex(family)
        self._persistence = persistence = Persistence(family, disk, self._tally, wall_offset)
        self._idle = IdleConversations(self._ledger, self._index, persistence, self._tally)
        self._leases = Leases(self._ledger, self._index, self._idle, self._tally)
        self._room = Room(self._ledger, self._idle, persistence, self._tally, may_requantise=limits.allow_requantise)
        self._quotas = Quotas(
            self._ledger,
            self._idle,
            self._tally,
            max_sessions=limits.max_sessions_per_caller,
            max_session_bytes=limits.max_session_bytes_per_caller,
            has_one_caller=limits.has_one_caller,
        )
        self._commands = SessionCommands(
            *(self._ledger, self._index, self._idle, self._room, self._quotas, persistence, self._tally),
            Transfers(family, model, disk),
        )
        self._expired_s = 0.0
        self._is_shared = disk is not None and disk.is_shared

    # --- figures

    @property
    def budget_bytes(self) -> int:
        return self._ledger.budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, num_bytes: int) -> None:
        self._ledger.budget_bytes = num_bytes

    def give_back_slack(self) -> None:
        """Keep what is allocated within the budget where a step has left free pages and rows behind."""
        self._ledger.give_back_slack()

    @property
    def committed_bytes(self) -> int:
        """What is promised or held, counted so that it bounds what is allocated from above."""
        return self._ledger.committed_bytes

    @property
    def generation(self) -> int:
        """Grows whenever room may have been freed."""
        return self._ledger.generation

    @property
    def leases(self) -> Sequence[Lease]:
        """Of all running requests."""
        return tuple(self._ledger.leases)

    @property
    def idle(self) -> IdleConversations:
        """What no request works on, for reading."""
        return self._idle

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk store at all, working or not."""
        return self._disk is not None

    def events(self) -> CacheEvents:
        """What happened since start."""
        return self._tally.events()

    def admission(self) -> AdmissionStats:
        """Bytes reserved beside those that ended requests really took."""
        return self._tally.admission

    def disk_status(self) -> DiskStatus:
        return statistics.disk_status(self._disk)

    def holdings(self, now_s: float) -> Holdings:
        """What is held now, and by whom."""
        return statistics.holdings(self._ledger, self._idle, now_s)

    # --- what could ever fit

    def largest_sequence(self, most: int = _MAX_SHOWN, kv_format: str | None = None) -> int:
        """The longest sequence, at most `most` tokens, that fits the whole budget."""
        runtime = self.family.runtime(kv_format or self.family.default)
        return largest_fitting(lambda n: peak_bytes(runtime, n), self.budget_bytes, most)

    def check_can_fit(self, num_tokens: int, kv_format: str | None = None) -> None:
        """Raises ContextLengthError when that many tokens exceed the whole budget."""
        name = kv_format or self.family.default
        needed = peak_bytes(self.family.runtime(name), num_tokens)
        if needed > self.budget_bytes:
            self._tally.refusals["never_fits"] += 1
            raise ContextLengthError(
                f"This request needs {needed:,} bytes of KV cache for {num_tokens:,} tokens (prompt and answer) in "
                f"{name}, but the server's budget is {self.budget_bytes:,} bytes, which holds "
                f"{self.largest_sequence(num_tokens, name):,} tokens. Shorten the prompt or lower max_tokens.",
                param="messages",
            )

    def format_for(self, salt: str, session_id: str | None, kv_format: str | None) -> str:
        """The format a request's cache is to have. Raises KVFormatError."""
        if kv_format is not None:
            return self.family.normalise(kv_format)
        held = self._idle.get(salt, session_id) if session_id is not None else None
        return self.family.default if held is None else held.wanted_format

    # --- verdicts

    def verdict(self, question: Question, now_s: float) -> Verdict:
        """Whether and how there could be room. Changes nothing but the count of refusals."""
        try:
            if isinstance(question, Ask):
                return self._on_ask(question, now_s)
            if isinstance(question, Growth):
                return self._on_growth(question, now_s)
            match = self._leases.longer_start(question.lease)
            return Wait(None) if match is None else Start(question, match=match)
        except TurboServeError as exc:
            return Refuse(exc)

    def _on_ask(self, ask: Ask, now_s: float) -> Verdict:
        if ask.request.session_id is not None and self._is_shared:
            self._idle.look_up(ask.request.tenant, ask.request.session_id)
        kv_format = self._format_of(ask)
        self.check_can_fit(ask.num_tokens, kv_format)
        pushed_out = self._quotas.check_admission(ask, kv_format)
        tokens = np.asarray(ask.prompt, np.int32)
        find = partial(self._index.find, ask.request, tokens, kv_format, adapter=ask.adapter, without=pushed_out)
        match = find()
        if match is not None and match.is_on_disk:
            extra = self._leases.bytes_to_open(ask, kv_format, match)
            relief = self._room.plan(Need(extra, over_quota=pushed_out), now_s)
            if relief is not None:
                return Start(ask, relief, match)
            match = find(in_memory_only=True)
        extra = self._leases.bytes_to_open(ask, kv_format, match)
        need = Need(extra, order=ask.order, source=match, over_quota=pushed_out)
        relief = self._room.plan(need, now_s)
        if relief is not None:
            return Start(ask, relief, match)
        if self._ledger.leases:
            return Wait(self.generation)
        return self._no_room(ask, kv_format, match, extra)  # only what is pinned stands in the way

    def _on_growth(self, growth: Growth, now_s: float) -> Verdict:
        lease = growth.lease
        extra = peak_bytes(lease.runtime, growth.num_tokens) - lease.reserved_bytes
        relief = self._room.plan(Need(max(0, extra), lease=lease, order=lease.order), now_s)
        return Wait(self.generation) if relief is None else Start(growth, relief)

    def _no_room(self, ask: Ask, kv_format: str, match: Match | None, extra_bytes: int) -> Refuse:
        self._tally.refusals["no_room"] += 1
        name = match.holder.kv_format if match is not None else kv_format
        needed = peak_bytes(self.family.runtime(name), ask.num_tokens)
        return Refuse(self._ledger.no_room(needed, needed - self._ledger.missing_bytes(extra_bytes)))

    def refuse_waiting(self, ask: Ask) -> Refuse:
        """The refusal of a request that has waited for room long enough, with the figures."""
        self._tally.refusals["no_room"] += 1
        needed = peak_bytes(self.family.runtime(self._format_of(ask)), ask.num_tokens)
        return Refuse(self._ledger.no_room(needed, -self._ledger.missing_bytes()))

    def _format_of(self, ask: Ask) -> str:
        request = ask.request
        return self.format_for(request.tenant, request.session_id, request.kv_format)

    # --- carrying out

    def carry_out(self, start: Start, now_s: float) -> Lease | None:
        """Do what a verdict said, after those it names were preempted. None: it turned out differently, ask again.

        Of an Ask, the new lease, with caches to begin with; of a Growth, the lease, with more room; of a
        Restart, the lease with other caches in `caches`, and the ones that it had are the caller's to release.
        """
        question, match = start.question, start.match
        if match is not None and not self._leases.is_there(match):
            return None
        if isinstance(question, Ask):
            if match is not None and match.is_on_disk:
                self._read(start, match, now_s)
                return None
            return self._open(start, now_s)
        if isinstance(question, Restart):
            assert match is not None
            self._leases.restart(question.lease, match)
            return question.lease
        self._room.carry_out(start.relief, now_s)
        extra = peak_bytes(question.lease.runtime, question.num_tokens) - question.lease.reserved_bytes
        if self._ledger.missing_bytes(max(0, extra)) > 0:
            return None
        self._leases.grow(question.lease, question.num_tokens)
        self._ledger.give_back_slack()
        return question.lease

    def _read(self, start: Start, match: Match, now_s: float) -> None:
        """Read what was found, if there is room; asked again, its exact ends can be used too."""
        assert isinstance(match.holder, Conversation)
        self._room.carry_out(start.relief, now_s)
        num_bytes = match.holder.kv.total
        if match.holder in self._idle and self._ledger.missing_bytes(num_bytes) <= 0:
            self._ledger.give_back_slack(num_bytes)
            self._idle.load(match.holder)

    def _open(self, start: Start, now_s: float) -> Lease | None:
        """What is shared is held before anything goes: then even the cache that it comes from may go."""
        ask, match = start.question, start.match
        assert isinstance(ask, Ask)
        wanted_format = self._format_of(ask)
        extra = self._leases.bytes_to_open(ask, wanted_format, match)
        start_from = self._leases.begin(wanted_format, match)
        has_room = False
        try:
            self._room.carry_out(start.relief, now_s)
            has_room = self._ledger.missing_bytes(extra) <= 0
        finally:
            if not has_room:
                start_from.runtime.release(start_from.caches)
        if not has_room:
            return None
        lease = self._leases.open(ask, wanted_format, start_from, now_s)
        self._ledger.give_back_slack()
        return lease

    # --- running requests

    def attach(self, lease: Lease, running: RunningCaches) -> None:
        """From now on the lease's caches are told about, and may be forked, through `running`."""
        lease.running = running

    def keep(
        self, lease: Lease, tokens: Sequence[int], caches: Caches, now_s: float, *, has_ended: bool = True
    ) -> Conversation | None:
        """End a lease; its caches, holding exactly `tokens`, become an idle conversation, which is returned.

        Or it is another one that holds as much already, and the caches were released; None: one of another
        name does. has_ended: else its request was preempted, and comes back.
        """
        kv = lease.runtime.measure(caches)
        session = lease.session
        if has_ended:
            self._tally.admission = self._tally.admission.plus(lease.reserved_bytes, kv.total)
            session.num_requests += 1
        else:
            self._tally.preemptions["growth"] += 1
        self._leases.close(lease)
        session.last_used_s = now_s
        kept = Conversation(
            session,
            np.asarray(tokens, np.int32),
            lease.kv_format,
            lease.wanted_format,
            caches,
            kv,
            adapter=lease.adapter,
        )
        found = self._idle.keep(kept)
        if found is kept:
            self._quotas.unpin_if_too_large(kept)
            self._quotas.shrink(kept)
            self._idle.write_ahead_if_worthwhile(kept)
            self._room.make(Need(), now_s)
        return found

    def drop(self, lease: Lease, caches: Caches | None) -> None:
        """End a lease and give its pages back."""
        self._leases.close(lease)
        if caches is not None:
            lease.runtime.release(caches)

    # --- sessions and time

    def answer(self, command: SessionCommand, now_s: float) -> SessionAnswer:
        """A caller's command on a session of theirs. Raises the TurboServeErrors that HTTP shows."""
        self.expire(now_s)
        if self._is_shared and (session_id := getattr(command, "session_id", None)) is not None:
            self._idle.look_up(command.tenant, session_id)
        return self._commands.answer(command, now_s)

    def expire(self, now_s: float) -> None:
        """Forget sessions past their time to live. May be called at any time, and does something now and then."""
        if now_s - self._expired_s < EXPIRY_INTERVAL_S:
            return
        self._expired_s = now_s
        if self._is_shared:
            self._idle.follow_others()
        busy = {lease.key for lease in self._ledger.leases}
        self._idle.expire(now_s, self._limits.session_ttl_s, busy)

    def drop_idle(self) -> None:
        """Give all idle memory back, as memory ran out; what is on disk stays there."""
        self._idle.drop_all()

    def write_all(self) -> None:
        """A file for every idle conversation that has none, as far as the disk takes them."""
        self._idle.write_all()

    def close(self) -> None:
        """The process ends: write what has no file yet, and give the disk back."""
        self.write_all()
        if self._disk is not None:
            self._disk.close()

    def check_integrity(self, running: Sequence[Caches] = ()) -> None:
        """Raises CacheIntegrityError unless all figures agree; `running`: the caches of all leases."""
        try:
            integrity.check(self._ledger, self._index, self._idle, running)
        except AssertionError:
            self._tally.integrity_failures += 1
            raise
