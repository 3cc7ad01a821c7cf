"""Which requests are under way, and whose they are, so that their callers can cancel them by id."""

from __future__ import annotations

from turboserve.messages import Request


class RunningRequests:
    """Belongs to the event loop. An answer's further choices have its id with "-1", "-2", ... behind it."""

    def __init__(self) -> None:
        self._tenants: dict[str, str] = {}

    def enter(self, request: Request) -> None:
        """Known until `leave`."""
        self._tenants[request.request_id] = request.tenant

    def leave(self, request: Request) -> None:
        """It is over, however it ended."""
        self._tenants.pop(request.request_id, None)

    def ids(self, request_id: str, tenant: str) -> list[str]:
        """The request's and its choices' ids; empty where that caller has no such request under way."""
        return [known for known, owner in self._tenants.items() if owner == tenant and _is_of(known, request_id)]


def _is_of(known: str, request_id: str) -> bool:
    return known == request_id or (known.startswith(request_id + "-") and known[len(request_id) + 1 :].isdigit())
