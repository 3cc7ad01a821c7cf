"""Sessions that leave for another server, and that come from one.

A copy leaves; the session stays as it is. What comes is compared with the model, the formats and the measured means of
this memory before its contents are there, and nothing in it is believed then either: it passes the checks that the disk
store's files pass. Bytes and files are disk/session_file.py's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from turboserve.cache.interfaces import Arrays, CacheFamily, Header, ServedModel, SessionDisk
from turboserve.cache.sessions import Conversation, Holder, Lease, Session
from turboserve.errors import (
    InvalidRequestError,
    KVFormatError,
    SessionBusyError,
    SessionImportError,
    SessionNotFoundError,
)
from turboserve.messages import ExportedSession, ImportSession

_CURES = {
    "model": "Serve the same weights with the same tokenizer and dtype on both servers",
    "adapter": "Load the same adapter on both servers",
    "layout": "Serve both with one version of turboserve and one page layout",
    "calibration": "Copy `calibration` of the cache folder from the exporting server to this one",
}
_IN_OTHER_WORDS = {
    "model": "another model",
    "adapter": "an adapter that is not loaded here",
    "layout": "another layout of pages",
    "calibration": "other measured means of keys and values",
}
_PLAIN_TEXT = re.compile(r"[ -~]{0,128}")


class Transfers:
    """Over one memory's caches; who may have which session is session_commands.py's business."""

    def __init__(self, family: CacheFamily, model: ServedModel, disk: SessionDisk | None) -> None:
        self._family, self._model, self._disk = family, model, disk

    # --- leaving

    def copy_of(self, holder: Holder) -> ExportedSession:
        """Everything of a session as it is now. Raises SessionBusyError, SessionNotFoundError, InvalidRequestError."""
        self._check_whole()
        if isinstance(holder, Lease):
            return self._copy_at_work(holder)
        fields = self._fields(holder)
        if holder.caches is not None:
            header, arrays = self._family.export_caches(holder.caches)
            return ExportedSession(fields, holder.tokens, lambda: (header, arrays))
        disk, key, version = self._disk, holder.disk_key, holder.version
        if disk is None or key is None:
            raise SessionNotFoundError(holder.conversation_id)

        def read() -> tuple[Header, Arrays] | None:
            stored = disk.get(key)
            is_it = stored is not None and stored[0].get("version", "") == version
            return (stored[1], stored[2]) if stored is not None and is_it else None

        return ExportedSession(fields, holder.tokens, read)

    def _copy_at_work(self, lease: Lease) -> ExportedSession:
        """As far as it has come; the request goes on."""
        running = lease.running
        length = running.usable_prefix(running.held_len()) if running is not None else 0
        if running is None or length == 0:
            raise SessionBusyError("This session has nothing to export yet: its first request is being read.")
        caches = running.fork(length)
        try:
            header, arrays = self._family.export_caches(caches)
        finally:
            lease.runtime.release(caches)
        tokens = np.asarray(running.held_tokens()[:length], np.int32)
        return ExportedSession(self._fields(lease), tokens, lambda: (header, arrays))

    def _fields(self, holder: Holder) -> dict[str, Any]:
        return {
            "session_id": holder.conversation_id,
            "kv_format": holder.kv_format,
            "wanted_format": holder.wanted_format,
            "adapter": holder.adapter,
            "model": self._model.fingerprint,
            "model_name": self._model.name,
            **self._family.fingerprints(holder.kv_format),
        }

    def _check_whole(self) -> None:
        if self._model.is_divided:
            raise InvalidRequestError(
                "This model is divided among ranks, and each has a part of every session's cache: sessions cannot be "
                "exported or imported here."
            )

    # --- coming

    def check(self, fields: Mapping[str, Any]) -> None:
        """Raises SessionImportError or KVFormatError when caches of which this is told mean nothing here.

        And InvalidRequestError where no cache can be taken.
        """
        self._check_whole()
        said = {name: _text(fields, name) for name in ("kv_format", "wanted_format", "adapter", "model", "model_name")}
        if said["model"] != self._model.fingerprint:
            theirs = f" ({said['model_name']} there, {self._model.name} here)" if said["model_name"] else ""
            raise _differs("model", theirs)
        if said["adapter"] and said["adapter"] not in self._model.adapters:
            raise _differs("adapter")
        for name in (said["kv_format"], said["wanted_format"]):
            if self._family.normalise(name) != name:
                raise KVFormatError(f"An exported session names a KV format as {name!r:.40}, which nobody writes.")
            self._family.runtime(name)
        for kind, here in self._family.fingerprints(said["kv_format"]).items():
            if _text(fields, kind) != here:
                raise _differs(kind)

    def restore(self, command: ImportSession, now_s: float) -> Conversation:
        """The importer's session, its caches in memory. Raises SessionImportError for contents that make no sense."""
        fields, tokens = command.fields, command.tokens
        name = _text(fields, "kv_format")
        runtime = self._family.runtime(name)
        try:
            caches = self._family.import_caches(name, command.header, list(command.arrays))
        except ValueError as exc:
            raise SessionImportError.broken(str(exc)) from exc
        kv = runtime.measure(caches)
        if len(tokens) == 0 or kv.tokens != len(tokens):
            runtime.release(caches)
            raise SessionImportError.broken(f"its caches hold {kv.tokens} tokens, and it lists {len(tokens)}")
        session = Session(command.session_id, command.tenant, now_s, now_s, is_explicit=True)
        wanted, adapter = _text(fields, "wanted_format"), _text(fields, "adapter")
        return Conversation(session, np.asarray(tokens, np.int32), name, wanted, caches, kv, adapter=adapter)


def _differs(kind: str, more: str = "") -> SessionImportError:
    return SessionImportError(
        f"The session was exported under {_IN_OTHER_WORDS[kind]}{more}. Nothing was taken. {_CURES[kind]}.", param=kind
    )


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not _PLAIN_TEXT.fullmatch(value):
        raise SessionImportError(f"An exported session's {name!r} is no short text: export it again.", param="file")
    return value
