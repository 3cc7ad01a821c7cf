"""Callers' commands on their sessions, in the protocol's words. Runs on the engine thread, between two steps."""

from __future__ import annotations

from collections.abc import Callable

from turboserve.cache.desk import SessionDesk, SessionView
from turboserve.cache.manager import CacheManager
from turboserve.engine.snapshot import session_info
from turboserve.messages import SessionInfo, SessionPage


class SessionCommands:
    """protocol.Engine's session methods, without their futures. Errors are raised as they are to be shown."""

    def __init__(self, manager: CacheManager, clock: Callable[[], float]) -> None:
        self._manager, self._clock = manager, clock
        self._desk = SessionDesk(manager)

    def list_page(self, tenant: str, limit: int, after: str | None) -> SessionPage:
        views, has_more = self._desk.list_page(tenant, limit, after, self._clock())
        return SessionPage(tuple(self._info(view) for view in views), has_more)

    def get(self, tenant: str, session_id: str) -> SessionInfo:
        return self._info(self._desk.get(tenant, session_id, self._clock()))

    def fork(self, tenant: str, session_id: str, new_id: str | None) -> SessionInfo:
        return self._info(self._desk.fork(tenant, session_id, new_id, self._clock()))

    def update(self, tenant: str, session_id: str, *, is_pinned: bool | None, ttl_s: float | None) -> SessionInfo:
        now_s = self._clock()
        return self._info(self._desk.update(tenant, session_id, now_s, is_pinned=is_pinned, ttl_s=ttl_s))

    def delete(self, tenant: str, session_id: str) -> None:
        self._desk.delete(tenant, session_id)

    def _info(self, view: SessionView) -> SessionInfo:
        return session_info(view, self._manager.wall_offset_s)
