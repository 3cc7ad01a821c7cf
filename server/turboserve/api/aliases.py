"""Other spellings of our paths that clients use: without `/v1`, and with a slash at the end.

Declared nowhere: a path is brought to its one spelling before a route is chosen, so that routes, metrics and
`/openapi.json` know each route once.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

VERSION = "/v1"


class PathAliases:
    """Knows the first segments of all served paths."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        paths = [route.path_format for route in routes if isinstance(route, APIRoute)]
        own = {_first_segment(path) for path in paths}
        versioned = {_first_segment(path.removeprefix(VERSION)) for path in paths if path.startswith(VERSION + "/")}
        self._versioned = versioned - own

    def canonical(self, path: str) -> str:
        """`/chat/completions/` -> `/v1/chat/completions`; a path that is none of ours comes back as it is."""
        path = path.rstrip("/") or "/"
        return VERSION + path if _first_segment(path) in self._versioned else path


def _first_segment(path: str) -> str:
    return path.removeprefix("/").partition("/")[0]
