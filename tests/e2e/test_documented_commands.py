"""What README and docs/ tell people to type is typed here, on a real server; the rest is parsed, or has a reason."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.e2e.server import Server
from typer.main import get_command

from turboserve.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HERE = "http://127.0.0.1:8000"
PROGRAMS = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("quickstart.md", "integrations.md"))]
CLIENTS = {"openai", "anthropic", "langchain_openai", "litellm"}

# Not run by this test, by first word; make's targets and variables are checked in tests/packaging.
ELSEWHERE = {
    "make": "installs, or runs this very test suite",
    "python": "a benchmark, for a machine that is otherwise idle",
    "PYTHONPATH=.": "a benchmark, for a machine that is otherwise idle",
    "mlx_lm.server": "another server, which loads a model of its own",
    "mlx.launch": "starts ranks, on other machines too; tests/turboserve/distributed launches two here",
    "docker": "needs a container engine, and images of the network",
    "kubectl": "needs a cluster; the manifests are tried in tests/packaging",
    "pipx": "installs a wheel with what it needs from the network",
    "uv": "installs a wheel with what it needs from the network",
    "pip": "installs from the network",
    "python3": "installs from the network, for a machine's administrator",
    "install": "for a machine's administrator",
    "echo": "for a machine's administrator",
    "systemctl": "for a machine's administrator",
    "journalctl": "for a machine's administrator",
    "brew": "for a Mac",
    "launchctl": "for a Mac",
    "tail": "for a Mac",
    "mkdir": "for a Mac; the units' files are tried in tests/packaging",
    "HOMEBREW_CHECKOUT=$PWD": "for a Mac",
    "prometheus": "runs until it is stopped",
    "claude": "a program that is not installed here",
    "aider": "tried by `make clients`, in an environment of its own",
    "export": "for the command behind it",
    "cat": "for the command behind it",
    "git": "for the command behind it",
}
RUN = {"curl", "turboserve", "promtool", "sed", "cp", "printf"}


class Block(NamedTuple):
    page: Path
    language: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """Words of each command, continued lines joined and comments dropped, up to where its output goes."""
        begun = ""
        for line in self.text.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(begun + line, comments=True)
            except ValueError:  # a quotation goes on in the next line
                begun += f"{line}\n"
                continue
            begun = ""
            while words:
                end = next((at for at, word in enumerate(words) if word in ("|", ">", "&")), len(words))
                yield words[:end]
                rest = words[end:]
                words = rest[1:] if rest[:1] == ["|"] else []
        assert not begun, begun


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text("utf-8"), flags=re.S | re.M):
            if language in languages:
                found.append(Block(page, language, text))
    return found


SHELL = blocks("sh", "bash", "shell")


def test_every_command_is_run_or_has_a_reason() -> None:
    words = {command[0] for block in SHELL for command in block.commands()}
    assert words - RUN <= set(ELSEWHERE), words - RUN - set(ELSEWHERE)


def test_commands_of_ours_have_these_flags() -> None:
    """Each is parsed by the command line itself, up to the point where it would begin to work."""
    num_parsed = 0
    for block in SHELL:
        for command in block.commands():
            if command[0] != "turboserve":
                continue
            parser: Any = get_command(app)
            arguments = command[1:]
            while hasattr(parser, "commands") and not arguments[0].startswith("-"):
                parser = parser.commands[arguments.pop(0)]
            if hasattr(parser, "commands"):
                assert set(arguments) <= set(_flags(parser)), command
            else:
                parser.make_context("turboserve", arguments)
            num_parsed += 1
    assert num_parsed > 15


def test_flags_in_running_text_exist() -> None:
    known = set(re.findall(r"--[a-z][a-z-]+", " ".join(_flags(get_command(app)))))
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
        if page.name == "migration.md":  # of its tables the right half is ours
            text = "\n".join(line.rpartition(" | ")[2] if line.startswith("|") else line for line in text.splitlines())
        # Where benchmarks are written of, a bare flag may be theirs.
        codes = re.findall(r"`(turboserve [^`]+)`" if "bench/" in text else r"`(--[^`]+|turboserve [^`]+)`", text)
        flags = {flag for code in codes for flag in re.findall(r"(?<!\S)--[a-z][a-z-]+", code)}
        assert flags <= known | FOREIGN, (page.name, flags - known - FOREIGN)


# Of docker, mlx.launch, bench/throughput.py and tests.stress.replicas, and what every command has.
FOREIGN = {"--add-host", "--baseline-streams", "--env", "--help", "--litellm", "--make", "--only", "--profile"}


def _flags(command: object) -> Iterator[str]:
    for parameter in getattr(command, "params", ()):
        yield from (*parameter.opts, *parameter.secondary_opts)
    for child in getattr(command, "commands", {}).values():
        yield from _flags(child)


def test_requests_of_the_pages_are_answered(server: Server, tmp_path: Path) -> None:
    num_sent = 0
    for block in SHELL:
        for command in block.commands():
            if command[0] != "curl" or not any(word.startswith(HERE) for word in command):
                continue
            if "law" in " ".join(command):
                continue  # an adapter that this server does not have; tests/e2e has one that it has
            words = [word.replace(HERE, server.url).replace("$TURBOSERVE_API_KEY", "none") for word in command]
            done = subprocess.run(
                [*words, "--silent", "--show-error", "--fail-with-body", "--max-time", "60"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (block.page.name, command, done.stdout, done.stderr)
            num_sent += 1
    assert num_sent >= 5


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda p: p.name)
def test_programs_of_the_pages_run(page: Path, server: Server) -> None:
    """One after another in one namespace: later ones go on with the client of earlier ones."""
    names: dict[str, object] = {}
    ran = set()
    for block in blocks("python"):
        if block.page != page:
            continue
        code = compile(block.text.replace(HERE, server.url), str(page), "exec")
        needed = set(re.findall(r"^(?:import|from) (\w+)", block.text, flags=re.M)) & CLIENTS
        if all(importlib.util.find_spec(name) for name in needed):
            exec(code, names)
            ran |= needed
    assert "openai" in ran


def test_prometheus_accepts_the_files_that_the_page_has_made(tmp_path: Path) -> None:
    (block,) = [block for block in SHELL if "sed -e 's|turboserve:8000" in block.text]
    lines = [line for line in block.text.splitlines(keepends=True) if not line.startswith("prometheus ")]
    script = "".join(lines).replace("/tmp/", f"{tmp_path}/")
    if shutil.which("promtool") is None:
        script = re.sub(r"^promtool .*$", "", script, flags=re.M)
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "TURBOSERVE_API_KEY": "k"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = (tmp_path / "prometheus.yml").read_text()
    assert "127.0.0.1:8000" in made and str(tmp_path / "turboserve.key") in made
