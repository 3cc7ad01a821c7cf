"""Conversations of other routes than chat completions, read as a chat completion's body is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from turboserve.api.chat_request import parse_chat
from turboserve.api.context import ApiContext
from turboserve.messages import Request


def conversation_of(
    body: Mapping[str, object],
    context: ApiContext,
    *,
    request_id: str,
    tenant: str,
    session_headers: Iterable[str] = (),
) -> Request:
    """The request that this chat completion's body asks for. Raises what `parse_chat` raises."""
    (request, *_), *_ = parse_chat(
        body,
        request_id=request_id,
        tenant=tenant,
        names=context.names,
        session_headers=session_headers,
        defaults=context.engine.sampling_defaults,
        rules=context.chat_rules,
    )
    return request
