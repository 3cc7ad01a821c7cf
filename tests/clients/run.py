"""All foreign clients against one real server with the embedded model: `make clients`.

    python -m tests.clients.run [--only NAME ...] [--fresh] [--url URL --model NAME --key KEY]

Owns the server and the environments, one for each client, which are kept under build/clients until their packages
change; needs a Python package index, and npm for Node's client. What is tried is in each client's check.py or
check.mjs. Exits with 1 if a step of any client failed. Where npm is missing, Node's client is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.clients.steps import Target

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "clients"
KEY = "key-of-the-checks"  # so that a wrong one can be tried

# Bounded to the major versions that they were tried with: a new one is met on purpose.
PYTHON_CLIENTS = {
    "openai_python": ["openai>=3,<4"],
    "anthropic_python": ["anthropic>=2,<3"],
    "langchain": ["langchain-openai>=1,<2"],
    "litellm": ["litellm>=1.100,<2"],
    "llm": ["llm>=0.30,<1"],
    "aider": ["aider-chat>=0.86,<1"],
    "open_webui": ["open-webui>=0.12,<1"],
}
LARGE = ("open_webui",)  # gigabytes: tried where they are named
NODE_CLIENT = "openai_node"
NODE_PACKAGES = ["openai@^6", "zod@^4", "ajv@^8", "typescript@^5", "ts-json-schema-generator@^2"]
# Types of Node's client that replies are checked against, and the declarations they are in.
NODE_TYPES = {
    "Model": "models",
    "ChatCompletion": "chat/completions/completions",
    "ChatCompletionChunk": "chat/completions/completions",
    "CreateEmbeddingResponse": "embeddings",
    "Response": "responses/responses",
    "ResponseStreamEvent": "responses/responses",
}


class ClientError(Exception):
    """An environment that could not be made, with the end of what its tools printed."""


@dataclass(frozen=True)
class Outcome:
    """What became of one client: its version, the number of steps, the failures' lines, and how long it took."""

    name: str
    version: str
    num_steps: int
    failures: list[str]
    took_s: float


def check_client(name: str, target: Target, fresh: bool) -> Outcome:
    """Make its environment where that is missing, and run its check, whose lines are printed as they come."""
    folder = BUILD / name
    try:
        if name == NODE_CLIENT:
            command = _node_command(folder, fresh)
            version = json.loads((folder / "node_modules" / "openai" / "package.json").read_text())["version"]
        else:
            command, version = _python_command(name, folder, fresh)
    except ClientError as exc:
        return Outcome(name, "", 0, [str(exc)], 0.0)
    print(f"\n{name} {version}", flush=True)
    started = time.monotonic()
    lines = []
    extra = [str(folder / "schemas")] if name == NODE_CLIENT else []
    with subprocess.Popen(
        [*command, target.url, target.model, target.key, *extra],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder if name == NODE_CLIENT else ROOT,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print("   ", line.rstrip(), flush=True)
            lines.append(line.rstrip())
    failures = [line for line in lines if line.startswith("FAILED")]
    if process.returncode and not failures:
        failures = [f"ended with status {process.returncode}"]
    num_steps = sum(line.startswith(("ok ", "FAILED ")) for line in lines)
    if not num_steps and not failures:
        failures = ["tried nothing"]
    return Outcome(name, version, num_steps, failures, time.monotonic() - started)


def _python_command(name: str, folder: Path, fresh: bool) -> tuple[list[str], str]:
    """What runs the check in its own virtual environment, and the client's version."""
    packages = PYTHON_CLIENTS[name]
    python = folder / "bin" / "python"
    if fresh or not _is_made(folder, packages):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], ROOT)
        _remember(folder, packages)
    package = packages[0].partition(">")[0]
    script = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    version = _run([str(python), "-c", script, package], ROOT).strip()
    return [str(python), "-m", f"tests.clients.{name}.check"], version


def _node_command(folder: Path, fresh: bool) -> list[str]:
    """What runs Node's check in its own folder, where the client's types lie as JSON schemas."""
    packages = [*NODE_PACKAGES, *NODE_TYPES]
    if fresh or not _is_made(folder, packages):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "schemas").mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true}\n')
        _run(["npm", "install", "--no-fund", "--no-audit", *NODE_PACKAGES], folder)
        generator = str(folder / "node_modules" / ".bin" / "ts-json-schema-generator")
        for name, module in NODE_TYPES.items():
            source = f"node_modules/openai/resources/{module}.d.ts"
            options = ["--no-type-check", "--additional-properties", "--out", f"schemas/{name}.json"]
            _run([generator, "--path", source, "--type", name, *options], folder)
        _remember(folder, packages)
    return ["node", str(Path(__file__).parent / NODE_CLIENT / "check.mjs")]


def _is_made(folder: Path, packages: Sequence[str]) -> bool:
    stamp = folder / ".made"
    return stamp.is_file() and stamp.read_text() == "\n".join(packages)


def _remember(folder: Path, packages: Sequence[str]) -> None:
    (folder / ".made").write_text("\n".join(packages))


def _run(command: list[str], folder: Path) -> str:
    """What it printed. Raises ClientError if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ClientError(f"{Path(command[0]).name} {' '.join(command[1:4])}: {(done.stdout + done.stderr)[-600:]}")
    return done.stdout


@contextmanager
def server() -> Iterator[Target]:
    """A server with the embedded model, which asks for a key."""
    from tests.e2e.server import running_server  # needs the test tools, which --url does not

    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), "--api-key", KEY) as running:
        yield Target(running.url, "turboserve-tiny", KEY)


def print_table(outcomes: Sequence[Outcome]) -> None:
    print(f"\n{'client':18s} {'version':10s} {'steps':>5s} {'failed':>6s} {'s':>6s}")
    for outcome in outcomes:
        print(
            f"{outcome.name:18s} {outcome.version:10s} {outcome.num_steps:5d} {len(outcome.failures):6d} "
            f"{outcome.took_s:6.1f}"
        )
        for failure in outcome.failures:
            print(f"    {failure}")


def main() -> None:
    names = [*PYTHON_CLIENTS, NODE_CLIENT]
    usual = [name for name in names if name not in LARGE]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=usual, metavar="NAME", help=", ".join(names))
    parser.add_argument("--fresh", action="store_true", help="make the environments anew, with the newest versions")
    parser.add_argument("--url", help="a running server's address instead of one of its own; it must ask for the key")
    parser.add_argument("--model", default="turboserve-tiny")
    parser.add_argument("--key", default=KEY)
    args = parser.parse_args()
    if NODE_CLIENT in args.only and not (shutil.which("npm") and shutil.which("node")):
        print("npm is not installed: Node's client is left out", file=sys.stderr)
        args.only = [name for name in args.only if name != NODE_CLIENT]
    if args.url:
        outcomes = [check_client(name, Target(args.url, args.model, args.key), args.fresh) for name in args.only]
    else:
        with server() as target:
            outcomes = [check_client(name, target, args.fresh) for name in args.only]
    print_table(outcomes)
    sys.exit(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    main()
