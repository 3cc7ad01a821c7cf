"""A model's process played by a few lines: starts quickly or slowly, or not at all; answers, streams, dies on request.

Run as a script; its first argument is a JSON object: `name`, `complaint`, `starts_file` (gets a line at each start),
`go_file` (it starts once that file exists, and ends its streams no sooner). A request has `tokens` and
`token_s` of its stream.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SESSION_TYPE = "application/vnd.turboserve.session"
HOW: dict[str, Any] = json.loads(sys.argv[1])
CANCELLED = threading.Event()
SESSIONS: dict[str, str] = {}  # id -> tenant


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/v1/models":
            self._json({"data": [{"max_model_len": 4096, "kv_format": "4/3", "created": 7}]})
        elif path.startswith("/v1/sessions/"):
            name, _, what = path.removeprefix("/v1/sessions/").partition("/")
            known = SESSIONS.get(name) == self.headers["x-turboserve-tenant"]
            if known and what == "export":
                return self._send(HOW["name"].encode() * 1_000_000, 200, SESSION_TYPE)
            self._json({"model": HOW["name"]}, 200 if known else 404)
        elif path.startswith("/v1/responses/"):
            self._json({"path": self.path})
        elif path == "/metrics":
            self._send(b"# HELP turboserve_x_total X.\n# TYPE turboserve_x_total counter\nturboserve_x_total 3\n", 200)
        else:
            self._json({"error": {"message": "no such route"}}, 404)

    def _take_in(self) -> None:
        """A body in chunks, of which the length and the first bytes are told."""
        num_bytes = 0
        while length := int(self.rfile.readline(), 16):
            num_bytes += len(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        SESSIONS["imported"] = self.headers["x-turboserve-tenant"]
        self._json({"id": "imported", "by": HOW["name"], "path": self.path, "num_bytes": num_bytes})

    def do_POST(self) -> None:
        if urlsplit(self.path).path == "/v1/sessions/import":
            return self._take_in()
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["x-turboserve-router-key"] != os.environ["TURBOSERVE_ROUTER_KEY"]:
            return self._json({"error": {"message": "who are you?"}}, 401)
        if session_id := body.get("session_id"):
            SESSIONS[session_id] = self.headers["x-turboserve-tenant"]
        match body.get("do"):
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stream":
                self._stream(body)
            case "refuse":
                self._json({"error": {"message": "no", "type": "invalid_request_error", "code": "bad"}}, 400)
            case _:
                heard = {name.lower(): value for name, value in self.headers.items()}
                self._json(
                    {"by": HOW["name"], "path": self.path, "headers": heard, "body": body, "cut": CANCELLED.is_set()}
                )

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for index in range(body.get("tokens", 5)):
                self._chunk(b"data: " + json.dumps({"n": index, "pad": body.get("pad", "")}).encode() + b"\n\n")
                if index == body.get("die_after"):
                    self._chunk(b'data: {"torn": ')
                    time.sleep(0.1)
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(body.get("token_s", 0.0))
            wait_for_go()
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except OSError:
            CANCELLED.set()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status)

    def _send(self, data: bytes, status: int, media_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", media_type)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


def wait_for_go() -> None:
    while "go_file" in HOW and not Path(HOW["go_file"]).exists():
        time.sleep(0.01)


def main() -> None:
    with Path(HOW["starts_file"]).open("a") as file:
        file.write(f"{HOW['name']}\n")
    wait_for_go()
    if complaint := HOW.get("complaint"):
        sys.stderr.write(f"a line before\nturboserve: {complaint}\n")
        raise SystemExit(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(f"Ready: {HOW['name']} at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
