"""Sessions of the scripted engine: a dictionary per caller behind the real signatures and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from turboquant_kv.kv_bytes import KVBytes
from turboserve.errors import (
    QuotaExceededError,
    SessionBusyError,
    SessionExistsError,
    SessionImportError,
    SessionNotFoundError,
    TurboServeError,
)
from turboserve.messages import (
    CheckImport,
    DeleteSession,
    ExportedSession,
    ExportSession,
    ForkSession,
    GetSession,
    GetSessionTree,
    ImportSession,
    ListSessions,
    PageCounts,
    PrefixNode,
    SessionCommand,
    SessionInfo,
    SessionPage,
    SessionTree,
    UpdateSession,
)

T = TypeVar("T")
KV = KVBytes(tokens=100, compressed=300, exact=40, slack=20, uncompressed=40, raw_equivalent=1600)
MAX_SESSIONS = 40  # the scripted caller's quota


class ScriptedSessions:
    """What `Engine` says about sessions. A session called `busy` runs; every caller has its own names."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], SessionInfo] = {}
        self.imported: list[ImportSession] = []

    def add(self, tenant: str, session_id: str, *, is_explicit: bool = True, kv_format: str = "4/3") -> SessionInfo:
        info = SessionInfo(
            session_id=session_id,
            is_explicit=is_explicit,
            tokens=KV.tokens,
            kv=KV,
            kv_format=kv_format,
            tier="running" if session_id == "busy" else "memory",
            hits=2,
            created_unix_s=1_700_000_000.0,
            last_used_unix_s=1_700_000_000.0 + len(self._held),
            requests=3,
        )
        self._held[tenant, session_id] = info
        return info

    def clear(self) -> None:
        self._held.clear()

    def session(self, command: SessionCommand) -> Future[Any]:
        return _answered(lambda: self._answer(command))

    def _answer(self, command: SessionCommand) -> SessionPage | SessionInfo | SessionTree | ExportedSession | None:
        match command:
            case ListSessions(tenant, limit, after):
                return self._page(tenant, limit, after)
            case GetSession(tenant, session_id):
                return self._get(tenant, session_id)
            case ForkSession(tenant, session_id, new_id):
                return self._fork(tenant, session_id, new_id)
            case UpdateSession(tenant, session_id, is_pinned, ttl_s):
                return self._update(tenant, session_id, is_pinned, ttl_s)
            case DeleteSession(tenant, session_id):
                self._delete(tenant, session_id)
                return None
            case GetSessionTree(tenant):
                return self._tree(tenant)
            case ExportSession(tenant, session_id):
                return self._export(tenant, session_id)
            case CheckImport(tenant, session_id, fields):
                self._check_import(tenant, session_id, fields)
                return None
            case ImportSession(tenant, session_id, fields):
                self._check_import(tenant, session_id, fields)
                self.imported.append(command)
                return self.add(tenant, session_id)

    def _get(self, tenant: str, session_id: str) -> SessionInfo:
        if (tenant, session_id) not in self._held:
            raise SessionNotFoundError(session_id)
        return self._held[tenant, session_id]

    def _page(self, tenant: str, limit: int, after: str | None) -> SessionPage:
        own = [info for (owner, _), info in self._held.items() if owner == tenant]
        own.sort(key=lambda info: info.last_used_unix_s, reverse=True)
        if after is not None:
            own = own[own.index(self._get(tenant, after)) + 1 :]
        return SessionPage(tuple(own[:limit]), has_more=len(own) > limit)

    def _tree(self, tenant: str) -> SessionTree:
        """All begin with the same forty tokens; a session called `busy` shows no pages."""
        own = self._page(tenant, MAX_SESSIONS, None).sessions
        pages = PageCounts(compressed=5, shared=2, exact_tokens=36)
        ends = [PrefixNode(0, info.tokens, info.kv_format, (info.session_id,)) for info in own]
        return SessionTree(
            sessions=tuple((info, None if info.tier == "running" else pages) for info in own),
            nodes=(PrefixNode(None, 40, "4/3"), *ends) if own else (),
        )

    def _export(self, tenant: str, session_id: str) -> ExportedSession:
        """A few arrays; of a session called `gone`, nothing that can be read."""
        self._get(tenant, session_id)
        header: dict[str, Any] = {"arrays": [{"dtype": "uint8", "shape": [3000, 700], "cut": [0, 1000]}]}
        arrays = [np.random.default_rng(7).integers(0, 255, (3000, 700)).astype(np.uint8)]
        fields = {"session_id": session_id, "kv_format": "4/3", "model": "m"}
        read = (lambda: None) if session_id == "gone" else (lambda: (header, arrays))
        return ExportedSession(fields, np.arange(3000, dtype=np.int32), read)

    def _check_import(self, tenant: str, session_id: str, fields: Mapping[str, Any]) -> None:
        if fields.get("model") != "m":
            raise SessionImportError("Another model.", param="model")
        if (tenant, session_id) in self._held:
            raise SessionExistsError(f"A session {session_id!r} exists already.", param="id")

    def _fork(self, tenant: str, session_id: str, new_id: str | None) -> SessionInfo:
        source = self._get(tenant, session_id)
        name = new_id or f"fork-{len(self._held)}"
        if (tenant, name) in self._held:
            raise SessionExistsError(f"A session {name!r} exists already.", param="id")
        if sum(owner == tenant for owner, _ in self._held) >= MAX_SESSIONS:
            raise QuotaExceededError("Too many sessions.", param="max_sessions_per_caller")
        return self.add(tenant, name, kv_format=source.kv_format)

    def _update(self, tenant: str, session_id: str, is_pinned: bool | None, ttl_s: float | None) -> SessionInfo:
        info = self._get(tenant, session_id)
        if is_pinned is not None:
            info = replace(info, is_pinned=is_pinned)
        if ttl_s is not None:
            info = replace(info, ttl_s=ttl_s or None)
        self._held[tenant, session_id] = info
        return info

    def _delete(self, tenant: str, session_id: str) -> None:
        if self._get(tenant, session_id).tier == "running":
            raise SessionBusyError("A request is running in this session.")
        del self._held[tenant, session_id]


def _answered(work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except TurboServeError as exc:
        future.set_exception(exc)
    return future
