"""Who may talk to us: exposure at start-up, the Host header, the API key, the tenant.

Compares bytes in constant time and keeps no key in clear beyond the settings object. Which web pages may
read answers is `cors.py`'s.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from typing import NamedTuple

from turboserve.errors import AuthenticationError, ForeignHostError, InvalidRequestError, StartupError
from turboserve.settings import Settings

# How containers call the machine they run on. Nobody can register names under .internal, so no foreign page has them.
HOST_OF_CONTAINERS = frozenset({"host.docker.internal", "host.containers.internal"})

# What a router in front of us (`turboserve.fleet`) says of a request, beside the key that only the two know.
ROUTER_KEY_HEADER = b"x-turboserve-router-key"
TENANT_HEADER = b"x-turboserve-tenant"
REQUEST_ID_HEADER = b"x-turboserve-request-id"
FROM_ROUTER = (ROUTER_KEY_HEADER, TENANT_HEADER, REQUEST_ID_HEADER)
_TENANT = re.compile(rb"[0-9a-f]{0,64}")
# A name, an IPv4 or, in brackets, an IPv6 address; behind it a port, and nothing else.
_HOST = re.compile(rb"([a-z0-9._~%!$&'()*+,;=-]+|\[[0-9a-f:.]+(?:%[a-z0-9]+)?\])(?::[0-9]{0,5})?")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,80}")

RawHeaders = Iterable[tuple[bytes, bytes]]


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses; a name that needs resolving counts as outside."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(settings: Settings) -> None:
    """Raises StartupError when strangers on the network could use the server without a key."""
    if not (is_loopback(settings.host) or settings.api_key or settings.api_keys or settings.allow_anonymous):
        raise StartupError(
            f"Refusing to listen on {settings.host} without a key: "
            "set --api-key (or TURBOSERVE_API_KEY), or pass --allow-anonymous if the network is trusted."
        )


def header(headers: RawHeaders, name: bytes) -> bytes:
    """The first value of a header, b"" when absent. Header names arrive in lower case."""
    return next((value for key, value in headers if key == name), b"")


class HostGuard:
    """Refuses foreign Host headers, so that a web page cannot reach a local server by DNS rebinding.

    Active on loopback binds, and wherever `allowed_hosts` is set; `*` in it switches the check off.
    """

    def __init__(self, settings: Settings) -> None:
        self._allowed = {name.lower() for name in settings.allowed_hosts} | HOST_OF_CONTAINERS
        restricted = is_loopback(settings.host) or bool(settings.allowed_hosts)
        self._active = restricted and "*" not in self._allowed

    def check(self, headers: RawHeaders) -> None:
        """Raises ForeignHostError, and InvalidRequestError for what names no host, also where any host will do."""
        given = header(headers, b"host")
        host = _HOST.fullmatch(given.strip().lower())
        if given and host is None:
            raise InvalidRequestError("The Host header is no name or address with a port.")
        if not self._active:
            return
        name = host[1].decode() if host else ""
        if not (is_loopback(name) or name in self._allowed):
            raise ForeignHostError(
                "This Host header is not served here; use localhost, or add the name to allowed_hosts."
            )


class KeyGuard:
    """Checks `Authorization: Bearer KEY` or `X-Api-Key: KEY` and names the caller: every key is a caller of its own."""

    def __init__(self, api_keys: Iterable[str]) -> None:
        keys = [key.encode() for key in api_keys if key]
        self._tenants = {hashlib.sha256(k).digest(): hashlib.blake2b(k, digest_size=16).hexdigest() for k in keys}

    def tenant(self, headers: RawHeaders) -> str:
        """The caller's identity, "" when no key is configured. Raises AuthenticationError.

        Works on raw bytes: a key outside ASCII must fail or pass, never crash. Anthropic's clients send X-Api-Key,
        some of them beside an Authorization header; where both hold a key of ours, Authorization decides.
        """
        if not self._tenants:
            return ""
        scheme, _, key = header(headers, b"authorization").partition(b" ")
        matches = self._matches(key) if scheme.lower() == b"bearer" else []
        matches += self._matches(header(headers, b"x-api-key"))
        if not matches:
            raise AuthenticationError("Missing or wrong API key: send 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'.")
        return matches[0]

    def _matches(self, key: bytes) -> list[str]:
        given = hashlib.sha256(key.strip()).digest()
        # All are compared, and digests have one length: the time taken reveals nothing about any key.
        return [name for digest, name in self._tenants.items() if hmac.compare_digest(given, digest)]


class Introduction(NamedTuple):
    """What the router says of a request: whose it is, and the id under which both log it."""

    tenant: str
    request_id: str


class RouterGuard:
    """In a process behind a router: nobody else is let in, and the router's word on who asks is taken."""

    def __init__(self, router_key: str) -> None:
        self._key = hashlib.sha256(router_key.encode()).digest() if router_key else None

    @property
    def is_alone(self) -> bool:
        """No router is in front: callers come with keys of their own."""
        return self._key is None

    def introduction(self, headers: RawHeaders) -> Introduction | None:
        """None for whoever cannot show the router's key, or says what no router of ours would."""
        if self._key is None:
            return None
        given = hashlib.sha256(header(headers, ROUTER_KEY_HEADER)).digest()
        tenant, request_id = header(headers, TENANT_HEADER), header(headers, REQUEST_ID_HEADER)
        is_ours = hmac.compare_digest(given, self._key)
        if not (is_ours and _TENANT.fullmatch(tenant) and _REQUEST_ID.fullmatch(request_id)):
            return None
        return Introduction(tenant.decode(), request_id.decode())
