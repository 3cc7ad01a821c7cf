"""Every command's help fits a screen and ends with examples that the command itself understands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from tests.turboserve.cli.test_main import run

from turboserve.cli.main import app
from turboserve.cli.options import EXAMPLE_HEADING, HELP_COLUMNS

MOST_LINES = 40
ROOT = Path(__file__).resolve().parents[3]


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group below, with the words that name it."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


ROOT_COMMAND: Any = typer.main.get_command(app)
COMMANDS = list(commands(ROOT_COMMAND))


def context_of(path: tuple[str, ...], args: list[str] | None = None) -> Any:
    """The context in which the command at `path` parses `args`; nothing is carried out."""
    context, command = None, ROOT_COMMAND
    for name in ("turboserve", *path):
        if context is not None:
            command = command.commands[name]
        is_last = context is not None and command is not None and not getattr(command, "commands", {})
        given = list(args or []) if is_last else []
        context = command.make_context(
            name, given, parent=context, resilient_parsing=not (is_last and args is not None)
        )
    return context


def resolve(words: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """Which command the words name, and what is left for it."""
    path: list[str] = []
    command: Any = ROOT_COMMAND
    while words and words[0] in getattr(command, "commands", {}):
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    return tuple(path), words


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(HELP_COLUMNS))
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.parametrize("path", [path for path, _ in COMMANDS], ids=lambda path: " ".join(path) or "turboserve")
def test_help_fits_a_screen_and_its_examples_work(path: tuple[str, ...]) -> None:
    lines = context_of(path).get_help().splitlines()
    assert len(lines) <= MOST_LINES
    assert max(len(line) for line in lines) <= HELP_COLUMNS + 20, "a long option or example may stick out, no more"
    at = next(i for i, line in enumerate(lines) if line.strip() == EXAMPLE_HEADING)
    shown = [line.strip() for line in lines[at + 1 :]]
    assert shown
    for line in shown:
        words = shlex.split(line.rpartition("|")[2])
        assert words[0] == "turboserve"
        found, rest = resolve(words[1:])
        if "--help" not in rest:
            assert found[: len(path)] == path or found
            context_of(found, rest)  # raises for what the command does not know


def test_the_rest_of_serves_options_is_one_flag_away() -> None:
    command = ROOT_COMMAND.commands["serve"]
    context = context_of(("serve",))
    brief = context.get_help()
    assert "--help-all" in brief and "--stuck-step-s" not in brief
    assert all(not param.hidden for param in command.params), "completion knows every option"
    context.meta["turboserve.help_all"] = True
    assert all(opt in context.get_help() for param in command.params for opt in param.opts if opt.startswith("--"))


def test_the_manual_names_every_command_and_every_option() -> None:
    manual = (ROOT / "docs" / "cli.md").read_text()
    for path, command in COMMANDS:
        if path:
            assert f"turboserve {' '.join(path)}" in manual, path
        if path == ("serve",):
            continue  # its options are the settings, in config/default.toml
        options = [opt for param in command.params for opt in param.opts if opt.startswith("--")]
        missing = [opt for opt in options if not re.search(rf"{opt}(?![\w-])", manual)]
        assert not missing, (path, missing)


def test_a_shell_completes_commands_and_rare_options() -> None:
    for words, wanted in (("turboserve se", {"serve", "sessions"}), ("turboserve serve --stu", {"--stuck-step-s"})):
        asked = {"_TURBOSERVE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert set(run(**asked).stdout.split()) == wanted
