"""A request as it goes on to a model's process, and what of the headers may pass in either direction."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from urllib.parse import quote

import httpx
import orjson

from turboserve.api.security import FROM_ROUTER, RawHeaders
from turboserve.errors import (
    EngineUnavailableError,
    InvalidRequestError,
    ModelUnavailableError,
    TurboServeError,
    without_advice,
)
from turboserve.fleet.fleet import introduction
from turboserve.fleet.plan import ModelPlan
from turboserve.fleet.process import ModelProcess

MODEL_HEADER = b"x-turboserve-model"
PATH_CHARACTERS = "/:@!$&'()*+,;="  # beside letters, digits and -._~: what a path has as it is (RFC 3986, section 3.3)
HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
# Keys are the router's to check, origins too; the body's length is known anew.
NOT_PASSED_ON = HOP_BY_HOP | {
    *FROM_ROUTER, MODEL_HEADER, b"authorization", b"x-api-key", b"host", b"content-length", b"expect", b"origin",
    b"cookie", b"accept-encoding",
}  # fmt: skip
# The front door's own: it gives the reply its id, which the process was told to use as well.
NOT_PASSED_BACK = HOP_BY_HOP | {b"date", b"server", b"x-request-id", b"request-id", b"vary"}

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Question:
    """What a caller asks, complete with its body and with who it is."""

    method: str
    path: str
    query: str
    headers: Headers
    body: bytes
    tenant: str
    request_id: str

    def to(self, process: ModelProcess, content: AsyncIterator[bytes] | None = None) -> httpx.Request:
        """The request for a model's process; `content`: its body, where that is not held here."""
        own = [(name.encode(), value.encode()) for name, value in self._introduction(process)]
        url = httpx.URL(quote(self.path, safe=PATH_CHARACTERS), query=self.query.encode("latin-1") or None)
        headers = [*self.headers, *own, (b"accept-encoding", b"identity")]
        return process.http.build_request(self.method, url, headers=headers, content=content or self.body or None)

    def _introduction(self, process: ModelProcess) -> Iterable[tuple[str, str]]:
        return introduction(process, self.tenant, self.request_id).items()


def passed_on(headers: RawHeaders) -> Headers:
    """Of a caller's headers, those for the model's process. What only a router may say is never a caller's."""
    return [(name, value) for name, value in headers if name not in NOT_PASSED_ON]


def passed_back(headers: RawHeaders) -> Headers:
    """Of a reply's headers, those for the caller."""
    lower = [(name.lower(), value) for name, value in headers]
    return [(name, value) for name, value in lower if name not in NOT_PASSED_BACK]


def lost(plan: ModelPlan) -> ModelUnavailableError:
    """What a request is told whose process ended."""
    return ModelUnavailableError(
        f"The process of the model {plan.name!r} ended while it worked on this request; it is started again when it "
        "is next asked for.",
        retry_after_s=1,
    )


def error_in(status: int, body: bytes) -> TurboServeError:
    """A process's error reply as an error again, for a stream that has begun already. Takes any API's envelope."""
    kind = InvalidRequestError if status < 500 else EngineUnavailableError
    try:
        told = orjson.loads(body)["error"]
        if isinstance(told, str):
            told = {"message": told}
        message, wait_s = without_advice(str(told["message"]))
        error = kind(message, param=told.get("param"), retry_after_s=wait_s)
        error.code = told.get("code") or error.code
        error.type = told.get("type") or error.type
        return error
    except (ValueError, LookupError, TypeError, AttributeError):
        return kind("The model's process answered with an error that could not be read.")
