"""Schemathesis over /openapi.json of a real server: no 5xx, and every reply as the document says.

    python -m tests.stress.schema [--requests 10000] [--seed N] [-- further flags of schemathesis]

Schemathesis is installed into build/schemathesis (it wants other versions of what the server uses). Exits with its
status: 0 when nothing was found.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import tempfile
import venv
from pathlib import Path

import httpx
from tests.e2e.server import running_server

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "build" / "schemathesis"
PACKAGE = "schemathesis>=4.32,<5"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
# A key, so that refusals without one are tried as well; answers of a few tokens, or most time goes into decoding.
KEY = "key-of-the-checks"
FLAGS = ("--default-max-tokens", "4", "--max-context-tokens", "256", "--log-level", "warning")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/turboserve").expanduser())
    parser.add_argument("more", nargs="*")
    args = parser.parse_args()
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    program = installed()
    with tempfile.TemporaryDirectory() as folder, running_server(args.cache_dir, *FLAGS, "--api-key", KEY) as server:
        document = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        num_operations = sum(len(methods) for methods in document.raise_for_status().json()["paths"].values())
        command: list[str | Path] = [program, "run", f"{server.url}/openapi.json", "--checks", ",".join(CHECKS)]
        command += ["--max-examples", str(-(-args.requests // num_operations)), "--seed", str(seed)]
        command += ["--header", f"Authorization: Bearer {KEY}", "--continue-on-failure", "--no-shrink", *args.more]
        print(f"seed {seed}, {num_operations} operations", flush=True)
        status = subprocess.run(command, cwd=folder, check=False).returncode
        httpx.get(f"{server.url}/health", timeout=30).raise_for_status()
    return status


def installed() -> Path:
    """Schemathesis's program, in an environment of its own that is made when it is missing."""
    named = os.environ.get("SCHEMATHESIS")
    if named:
        return Path(named)
    program = ENVIRONMENT / "bin" / "schemathesis"
    if not program.exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([ENVIRONMENT / "bin" / "pip", "install", "--quiet", PACKAGE], check=True)
    return program


if __name__ == "__main__":
    raise SystemExit(main())
