"""`turboserve config`: the settings that apply here and where each comes from, and a file to begin with."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from turboserve.cli import config
from turboserve.cli.config import CONFIG_ENV, ENV_PREFIX, SECRET_KEYS, UsageError, variable_of
from turboserve.cli.options import ConfigFile, commands_app, example
from turboserve.cli.serve_flags import help_of
from turboserve.errors import StartupError
from turboserve.settings import Settings

app = commands_app(
    help="Show the settings that apply, or write a file of them.",
    epilog=example("turboserve config show --changed", "turboserve config init turboserve.toml"),
)
DEFAULT_FILE = Path("turboserve.toml")


@app.command("show", epilog=example("turboserve config show --changed"))
def show_command(
    changed: Annotated[bool, Option("--changed", help="Only those that differ from their defaults.")] = False,
    as_json: Annotated[bool, Option("--json", help="As JSON.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Show every setting as it would apply, and whether a variable, a file or nobody set it. Keys are not shown."""
    settings, file = config.resolve({}, config_file), config.settings_file(config_file)
    sources = origins(file)
    defaults = Settings.model_construct()
    rows = [
        {"key": key, "value": shown(key, getattr(settings, key)), "source": sources.get(key, "default")}
        for key in Settings.model_fields
        if not (changed and getattr(settings, key) == getattr(defaults, key))
    ]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    width = max((len(f"{row['key']} = {row['value']}") for row in rows), default=0)
    for row in rows:
        line = f"{row['key']} = {row['value']}"
        typer.echo(f"{line:<{min(width, 60)}}  {'' if row['source'] == 'default' else '# ' + row['source']}".rstrip())


def origins(file: Path | None) -> dict[str, str]:
    """For each setting that something sets: what."""
    found: dict[str, str] = {}
    for part in [] if file is None else config.files_of(file):
        contents = tomllib.loads(part.read_text(encoding="utf-8"))
        found |= {key: str(part) for key, value in contents.items() if value != {}}
    return found | {key: name for key in Settings.model_fields if (name := variable_of(key)) is not None}


def shown(key: str, value: Any) -> str:
    """A value as a settings file has it. Secrets are stars."""
    if key in SECRET_KEYS and value:
        return '"***"'
    if key == "models":
        return "{ " + ", ".join(value) + " }" if value else "{}"
    return _toml(value)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps("" if value is None else str(value), ensure_ascii=False)


@app.command("init", epilog=example("turboserve config init", "turboserve serve --config turboserve.toml"))
def init_command(
    file: Annotated[Path, Argument(help="The file; - writes to standard output.", metavar="FILE")] = DEFAULT_FILE,
    force: Annotated[bool, Option("--force", help="Also over a file that is there.")] = False,
) -> None:
    """Write a settings file in which every key is explained and left at its default."""
    text = "\n".join(template()) + "\n"
    if str(file) == "-":
        sys.stdout.write(text)
        return
    if file.exists() and not force:
        raise UsageError(f"{file} is there already: name another file, or pass --force")
    try:
        handle = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)  # it may come to hold a key
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as exc:
        raise StartupError(f"{file}: {exc.strerror or exc}") from exc
    typer.echo(f"{file}: uncomment what you change, then `turboserve serve --config {file}`")


def template() -> Iterator[str]:
    """Lines of a settings file: each key with its default, commented out, below what it means."""
    yield f"# Settings of `turboserve serve --config FILE`, or {CONFIG_ENV}=FILE. Each is also a flag and a variable:"
    yield f"# max_running is --max-running and {ENV_PREFIX}MAX_RUNNING. A flag wins over a variable, it over this file."
    defaults = Settings.model_construct()
    for key in Settings.model_fields:
        yield ""
        if key == "models":
            yield '# Several models: a table each, such as [models.small] with model = "OWNER/NAME" (docs/models.md).'
            continue
        yield f"# {help_of(key)}"
        yield f"# {key} = {_toml(getattr(defaults, key))}"
