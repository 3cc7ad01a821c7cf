"""The router's own questions to models' processes, whose answers it puts together: small, and with a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from turboserve.fleet.fleet import introduction
from turboserve.fleet.model import Model

TIMEOUT_S = 10.0  # a process that is busy for longer is left out


async def ask(
    model: Model,
    path: str,
    *,
    tenant: str = "",
    request_id: str = "req-router",
    params: Mapping[str, Any] | None = None,
) -> httpx.Response | None:
    """The reply of a loaded model's process; None when it is gone, or does not answer in time or well."""
    process = model.process
    if process is None or model.state != "loaded":
        return None
    headers = introduction(process, tenant, request_id)
    try:
        reply = await process.http.get(path, headers=headers, params=params, timeout=TIMEOUT_S)
    except (httpx.HTTPError, RuntimeError):  # RuntimeError: its client has been closed meanwhile
        return None
    return reply if reply.status_code == 200 else None


async def ask_all(models: Sequence[Model], path: str, **options: Any) -> list[tuple[Model, httpx.Response]]:
    """Those that answered, all asked at once."""
    replies = await asyncio.gather(*(ask(model, path, **options) for model in models))
    return [(model, reply) for model, reply in zip(models, replies, strict=True) if reply is not None]
