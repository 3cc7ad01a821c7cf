"""Conversations to and from the disk store: what is written, and when a file still is the truth.

A file holds one conversation's caches bit by bit, its tokens, and what its session needs after a
restart. Times in files are Unix seconds. A file that cannot be used is dropped and counted; the
conversation is then computed again from its tokens.
"""

from __future__ import annotations

import base64
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.interfaces import CacheFamily, Meta, SessionDisk, StoredEntry
from turboserve.cache.radix import Tokens
from turboserve.cache.sessions import Conversation, Session, new_id
from turboserve.cache.tally import Tally
from turboserve.errors import KVFormatError

log = logging.getLogger(__name__)

# What waits for the disk may be too much now; asked again at once, conversation after conversation would be
# copied for it in vain.
SPILL_RETRY_S = 1.0

_KV_FIELDS = ("tokens", "compressed", "exact", "slack", "uncompressed", "raw_equivalent")


@dataclass(slots=True)
class Persistence:
    """The disk side of the memory; with `disk` None it does nothing and says so.

    wall_offset: Unix seconds less the engine's, as they are now: computers learn the time while they run.
    """

    family: CacheFamily
    disk: SessionDisk | None
    tally: Tally
    wall_offset: Callable[[], float] = lambda: 0.0
    refused_s: float | None = None  # when the disk last did not take a conversation, and of what size
    refused_bytes: int = 0

    @property
    def is_writable(self) -> bool:
        """Whether the disk takes anything now."""
        return self.disk is not None and self.disk.status().is_writable

    def may_take(self, conversation: Conversation, now_s: float) -> bool:
        """Whether a writable disk is worth being asked: it refused nothing this small a moment ago."""
        is_recent = self.refused_s is not None and now_s - self.refused_s < SPILL_RETRY_S
        return not is_recent or conversation.kv.total < self.refused_bytes

    def note_refusal(self, conversation: Conversation, now_s: float) -> None:
        """`save` did not work although the disk is writable."""
        num_bytes = conversation.kv.total
        self.refused_bytes = num_bytes if self.may_take(conversation, now_s) else min(num_bytes, self.refused_bytes)
        self.refused_s = now_s

    def save(self, conversation: Conversation) -> bool:
        """Whether its file is written or queued. Reads the caches, changes nothing in them."""
        if self.disk is None or conversation.caches is None:
            return False
        if conversation.disk_key is not None:
            return True
        if not self.is_writable:
            return False
        header, arrays = self.family.export_caches(conversation.caches)
        # Of its earlier state, which thus stays until this one is durable; others must find a named one by its name.
        shared_key = self._shared_key(conversation.session) if conversation.session.is_explicit else None
        key = shared_key or conversation.earlier_key or new_id()
        if not self.disk.put(key, _meta(conversation, self.wall_offset()), header, arrays):
            return False
        if conversation.earlier_key not in (None, key):
            self.disk.delete(conversation.earlier_key)  # of a nameless one that it went on from
        conversation.disk_key, conversation.earlier_key = key, None
        conversation.disk_bytes = sum(a.nbytes for a in arrays)
        return True

    def _shared_key(self, session: Session) -> str | None:
        """Where all servers of a shared folder look for it; None: the folder is this server's own."""
        return None if self.disk is None else self.disk.key_for(session.salt, session.session_id)

    def look_up(self, salt: str, session_id: str) -> Conversation | None:
        """What another server has stored under this name since it was last looked at, on disk only."""
        key = None if self.disk is None else self.disk.key_for(salt, session_id)
        entry = self.disk.refresh(key) if self.disk is not None and key is not None else None
        return None if entry is None else self._from_entry(entry)

    @contextmanager
    def claimed(self, salt: str, session_id: str) -> Iterator[bool]:
        """Whether a session may be made under a name that no other server makes one under meanwhile.

        Where the name is this server's, it stays so until what is saved in the context was written.
        """
        key = None if self.disk is None else self.disk.key_for(salt, session_id)
        if self.disk is None or key is None:
            yield True
            return
        is_mine = self.disk.claim(key)
        try:
            yield is_mine
        finally:
            if is_mine:
                self.disk.settle(key)

    def changes(self) -> tuple[list[Conversation], set[str]]:
        """What other servers have stored since the last call, and keys of files that are gone."""
        found = [] if self.disk is None else self.disk.changes()
        stored = [self._from_entry(one) for one in found if isinstance(one, StoredEntry)]
        return [one for one in stored if one is not None], {one for one in found if isinstance(one, str)}

    def load(self, conversation: Conversation) -> bool:
        """Bring its caches back into memory; False when that is not possible, and its file is of no use then.

        Unless that holds an earlier state, because a later one could not be written. Who holds memory is for the
        caller to book.
        """
        assert conversation.caches is None
        stored = self.disk.get(conversation.disk_key) if self.disk and conversation.disk_key else None
        try:
            if stored is not None and not _is_of(stored[0], conversation):
                self.outdate(conversation)
                self.tally.restores["failed"] += 1
                return False
            if stored is not None:
                _, header, arrays = stored
                caches = self.family.import_caches(conversation.kv_format, header, list(arrays))
                conversation.caches = caches
                conversation.kv = self.family.runtime(conversation.kv_format).measure(caches)
                self.tally.restores["request"] += 1
                return True
        except ValueError as exc:
            log.warning("a stored conversation cannot be used: %s", exc)
        self.tally.restores["failed"] += 1
        self.forget(conversation)
        return False

    def forget(self, conversation: Conversation) -> None:
        """Delete its file, whichever state that holds."""
        self.outdate(conversation)
        if self.disk is not None and conversation.earlier_key is not None:
            self.disk.delete(conversation.earlier_key)
        conversation.earlier_key = None

    def outdate(self, conversation: Conversation) -> None:
        """Its file, if there is one, is not of exactly these caches any more: it stays until another replaces it."""
        conversation.earlier_key = conversation.disk_key or conversation.earlier_key
        conversation.disk_key, conversation.disk_bytes = None, 0

    def hand_over(self, old: Conversation, new: Conversation) -> None:
        """What is on disk of `old` stays until `new`, which takes its place, is written over it."""
        self.outdate(old)
        if new.disk_key is None and new.earlier_key is None:
            new.earlier_key, old.earlier_key = old.earlier_key, None

    def earlier_state(self, conversation: Conversation) -> Conversation | None:
        """The same session as its file has it, on disk only; None: there is no such file."""
        if self.disk is None or conversation.earlier_key is None:
            return None
        entry = self.disk.entry(conversation.earlier_key)
        earlier = self._from_entry(entry) if entry is not None else None
        if earlier is None or earlier.session.session_id != conversation.session.session_id:
            return None  # of a nameless conversation that this one had taken the place of
        earlier.session = conversation.session
        return earlier

    def rewrite(self, conversation: Conversation) -> None:
        """Its session changed: let its file, if there is one, say so."""
        key = conversation.disk_key
        if self.disk is None or key is None:
            return
        if conversation.caches is not None:
            self.outdate(conversation)
            self.save(conversation)
            return
        stored = self.disk.get(key)
        if stored is not None and _is_of(stored[0], conversation):
            self.disk.put(key, _meta(conversation, self.wall_offset()), stored[1], list(stored[2]))

    def is_lost(self, conversation: Conversation) -> bool:
        """Whether it was on disk only, and the store dropped its file."""
        if conversation.caches is not None or self.disk is None or conversation.disk_key is None:
            return False
        return self.disk.entry_bytes(conversation.disk_key) is None

    def stored_conversations(self) -> list[Conversation]:
        """What an earlier process left behind; files that make no sense are deleted."""
        if self.disk is None:
            return []
        found = []
        for entry in list(self.disk.entries()):
            conversation = self._from_entry(entry)
            if conversation is None:
                if not self.disk.is_shared:  # a later version on another server may know what it is
                    self.disk.delete(entry.key)
            else:
                found.append(conversation)
        return found

    def _from_entry(self, entry: StoredEntry) -> Conversation | None:
        try:
            conversation = conversation_of(entry, self.wall_offset())
            self.family.runtime(conversation.kv_format)
            return conversation
        except (ValueError, KVFormatError) as exc:
            log.warning("a file of the session store is of no use (%s)", exc)
            return None


def _meta(conversation: Conversation, wall_offset_s: float) -> Meta:
    session = conversation.session
    return {
        "session_id": session.session_id,
        "public_id": session.public_id,
        "salt": session.salt,
        "created_unix_s": session.created_s + wall_offset_s,
        "last_used_unix_s": session.last_used_s + wall_offset_s,
        "is_explicit": session.is_explicit,
        "is_pinned": session.is_pinned,
        "ttl_s": session.ttl_s,
        "hits": session.hits,
        "num_requests": session.num_requests,
        "cache_key": session.cache_key,
        "kv_format": conversation.kv_format,
        "wanted_format": conversation.wanted_format,
        "adapter": conversation.adapter,
        "kv": {name: int(getattr(conversation.kv, name)) for name in _KV_FIELDS},
        "tokens": base64.b85encode(zlib.compress(conversation.tokens.astype("<i4").tobytes(), 1)).decode(),
        "version": conversation.version,
    }


def _is_of(meta: Meta, conversation: Conversation) -> bool:
    """Whether a file holds these caches and not those of an earlier turn or format."""
    return _version(meta) == conversation.version


def _version(meta: Meta) -> str:
    """Empty in files of older servers, which wrote each under a key of its own."""
    return str(meta.get("version", ""))


def conversation_of(entry: StoredEntry, wall_offset_s: float) -> Conversation:
    """What an entry says of its conversation, whose caches stay on disk. Raises ValueError."""
    try:
        return _conversation(entry, wall_offset_s)
    except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as exc:
        raise ValueError(f"what it says of its conversation cannot be understood: {exc!r}") from exc


def _conversation(entry: StoredEntry, wall_offset_s: float) -> Conversation:
    meta = entry.meta
    tokens: Tokens = np.frombuffer(zlib.decompress(base64.b85decode(meta["tokens"])), "<i4").astype(np.int32)
    session = Session(
        session_id=str(meta["session_id"]),
        salt=str(meta["salt"]),
        created_s=float(meta["created_unix_s"]) - wall_offset_s,
        last_used_s=float(meta["last_used_unix_s"]) - wall_offset_s,
        is_explicit=bool(meta["is_explicit"]),
        is_pinned=bool(meta["is_pinned"]),
        ttl_s=None if meta["ttl_s"] is None else float(meta["ttl_s"]),
        hits=int(meta["hits"]),
        num_requests=int(meta["num_requests"]),
        cache_key=meta["cache_key"],
        public_id=str(meta["public_id"]),
    )
    return Conversation(
        session=session,
        tokens=tokens,
        kv_format=str(meta["kv_format"]),
        wanted_format=str(meta["wanted_format"]),
        caches=None,
        kv=KVBytes(**{name: int(meta["kv"][name]) for name in _KV_FIELDS}),
        disk_key=entry.key,
        disk_bytes=entry.num_bytes,
        version=_version(meta),
        adapter=str(meta.get("adapter", "")),  # files from before there were any have none
    )
