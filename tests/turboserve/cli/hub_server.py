"""A hub on this machine that speaks as much of the hub's protocol as a download needs: the tests have no internet."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "5" * 40


@contextmanager
def hub_of(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[str]:
    """Serve files by repository; yields the hub's URL, for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *args: object) -> None:
            """Nothing."""

        def _answer(self) -> None:
            path = self.path.partition("?")[0].strip("/").removeprefix("api/models/").split("/")
            files = repos.get("/".join(path[:2]))
            if files is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "Content-Type": "application/json"})
            if path[2] == "revision":
                siblings = [{"rfilename": name} for name in files]
                return self._send_json({"id": "/".join(path[:2]), "sha": COMMIT, "siblings": siblings})
            if path[2] == "tree":
                return self._send_json(
                    [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()]
                )
            content = files["/".join(path[4:])]
            self._send(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT})

        def _send_json(self, found: object) -> None:
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
