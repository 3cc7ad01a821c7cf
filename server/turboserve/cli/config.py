"""From flags, environment and a TOML file to one `Settings`, or one line that says what is wrong.

Owns the precedence (flag > TURBOSERVE_* > file > default) and the wording of complaints. It leaves to
the engine what needs the model (does the budget fit, is the context too long).
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsConfigDict, SettingsError

from turboserve.errors import StartupError
from turboserve.logs import LEVELS
from turboserve.machine_memory import MemoryInfo, resolve_budget
from turboserve.settings import Settings

ENV_PREFIX = "TURBOSERVE_"
CONFIG_ENV = "TURBOSERVE_CONFIG"
DEQUANTIZE_MODES = ("auto", "always", "never")
SECRET_KEYS = ("api_key", "api_keys")
# Judges the budget's spelling before a model is loaded; whether it fits is asked again with the real memory.
_AMPLE_MEMORY = MemoryInfo(total_bytes=1 << 50, available_bytes=1 << 50)


class UsageError(Exception):
    """A setting that cannot be used; the message is one line naming key, value and expectation. Exit status 2."""


def resolve(flags: Mapping[str, object], config_file: Path | None = None) -> Settings:
    """Settings from `flags` (None: not given), the environment and `config_file`. Raises UsageError."""
    given = {key: value for key, value in flags.items() if value not in (None, [])}
    file = config_file or (Path(env) if (env := os.environ.get(CONFIG_ENV)) else None)
    if file is not None:
        _check_toml(file)

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        settings = FromFile(**given)  # type: ignore[arg-type]
    except ValidationError as exc:
        raise UsageError(_complaint(exc.errors()[0], given, file)) from exc
    except SettingsError as exc:  # a list in the environment that is not JSON
        raise UsageError(_bad_list(str(exc))) from exc
    _check_choices(settings, given, file)
    return settings


def _bad_list(message: str) -> str:
    """pydantic-settings says which field it could not parse, and quotes nothing of it."""
    named = re.search(r'field "(\w+)"', message)
    key = named[1].upper() if named else "ALLOWED_HOSTS"
    return f'{ENV_PREFIX}{key}: expected a JSON list such as ["one", "two"]'


def _check_toml(file: Path) -> None:
    """pydantic-settings ignores a missing file; an operator who names one wants to know."""
    try:
        tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"--config {file}: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"--config {file}: not valid TOML: {exc}") from exc


def _check_choices(settings: Settings, given: Mapping[str, object], file: Path | None) -> None:
    """Raises UsageError for text settings whose values are limited."""
    choices: dict[str, Callable[[str], str | None]] = {
        "dequantize": lambda value: None if value in DEQUANTIZE_MODES else f"one of {', '.join(DEQUANTIZE_MODES)}",
        "log_level": lambda value: None if value.lower() in LEVELS else f"one of {', '.join(LEVELS)}",
    }
    for key, problem_with in choices.items():
        value = getattr(settings, key)
        if expectation := problem_with(value):
            raise UsageError(f"{_named(key, value, given, file)}: expected {expectation}")
    try:
        resolve_budget(settings.kv_budget, _AMPLE_MEMORY, weights_bytes=0)
    except StartupError as exc:
        raise UsageError(str(exc)) from exc


def _complaint(error: ErrorDetails, given: Mapping[str, object], file: Path | None) -> str:
    key = str(error["loc"][0]) if error["loc"] else "settings"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Settings.model_fields, n=1)
        return f"{_named(key, error['input'], given, file)}: unknown key" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    expectation = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if expectation.startswith(("less", "greater")):
        expectation = f"a number {expectation}"
    return f"{_named(key, error['input'], given, file)}: expected {expectation}"


def _named(key: str, value: object, given: Mapping[str, object], file: Path | None) -> str:
    """The setting as whoever set it spelled it; secrets are not repeated."""
    shown = "***" if key in SECRET_KEYS else repr(value) if isinstance(value, str) else str(value)
    if key in given:
        return "MODEL " + shown if key == "model" else f"--{key.replace('_', '-')} {shown}"
    if any(name.upper() == ENV_PREFIX + key.upper() for name in os.environ):
        return f"{ENV_PREFIX}{key.upper()}={shown}"
    return f"{file}: {key} = {shown}" if file else f"{key} = {shown}"
