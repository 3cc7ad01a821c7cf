"""From flags, environment and TOML files to one `Settings`, or one line that says what is wrong.

Owns the precedence (flag > TURBOSERVE_* > file > default) and the wording of complaints. It leaves to
the engine what needs the model (does the budget fit, is the context too long).
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsConfigDict, SettingsError

from turboserve.errors import StartupError
from turboserve.logs import LEVELS
from turboserve.machine_memory import MemoryInfo, resolve_budget
from turboserve.settings import ModelEntry, Settings, named_adapter

ENV_PREFIX = "TURBOSERVE_"
CONFIG_ENV = "TURBOSERVE_CONFIG"
# Variables of ours that are no settings.
OTHER_VARIABLES = (CONFIG_ENV, "TURBOSERVE_BLAS", "TURBOSERVE_ROUTER_KEY")
DEQUANTIZE_MODES = ("auto", "always", "never")
SECRET_KEYS = ("api_key", "api_keys")
# Judges the budget's spelling before a model is loaded; whether it fits is asked again with the real memory.
_AMPLE_MEMORY = MemoryInfo(total_bytes=1 << 50, available_bytes=1 << 50)


class UsageError(Exception):
    """A setting that cannot be used; the message is one line naming key, value and expectation. Exit status 2."""


def closest(name: str, names: Iterable[str]) -> str | None:
    """Of `names` the one that was probably meant."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def resolve(flags: Mapping[str, object], config_file: Path | None = None) -> Settings:
    """Settings from `flags` (None: not given), the environment and `config_file`. Raises UsageError.

    `config_file` may be a folder: then all its `*.toml` but `*.example.toml` count as one file.
    """
    given = {key: value for key, value in flags.items() if value not in (None, [])}
    file = settings_file(config_file)
    parts = [] if file is None else files_of(file)
    _check_together([(part, _read_toml(part)) for part in parts])

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=parts)

    try:
        settings = FromFile(**given)  # type: ignore[arg-type]
    except ValidationError as exc:
        raise UsageError(_complaint(exc.errors()[0], given, file)) from exc
    except SettingsError as exc:  # a list in the environment that is not JSON
        raise UsageError(_bad_list(str(exc))) from exc
    _check_choices(settings, given, file)
    _check_models(settings)
    _warn_of_variables()
    return settings


def _warn_of_variables() -> None:
    """Variables that look like a setting and are none are ours by mistake, or another program's: they end nothing."""
    for name in os.environ:
        key = name.upper().removeprefix(ENV_PREFIX).lower()
        if not name.upper().startswith(ENV_PREFIX) or key in Settings.model_fields or name.upper() in OTHER_VARIABLES:
            continue
        near = difflib.get_close_matches(key, Settings.model_fields, n=1, cutoff=0.8)
        if near:
            sys.stderr.write(f"turboserve: {name} is no setting; did you mean {ENV_PREFIX}{near[0].upper()}?\n")


def settings_file(config_file: Path | None) -> Path | None:
    """The file or folder that was named, by flag or by variable."""
    return config_file or (Path(env) if (env := os.environ.get(CONFIG_ENV)) else None)


def variable_of(key: str) -> str | None:
    """The environment variable that sets `key`, if one does."""
    return next((name for name in os.environ if name.upper() == ENV_PREFIX + key.upper()), None)


def files_of(file: Path) -> list[Path]:
    """The TOML files that a --config means. Raises UsageError for a folder without any."""
    if not file.is_dir():
        return [file]
    parts = sorted(part for part in file.glob("*.toml") if not part.name.endswith(".example.toml"))
    if not parts:
        raise UsageError(f"--config {file}: this folder holds no *.toml")
    return parts


def _check_together(parts: list[tuple[Path, dict[str, Any]]]) -> None:
    """Raises UsageError when two files of a folder set the same: which one wins would be hard to see."""
    where: dict[str, Path] = {}
    for part, contents in parts:
        for key in _set_by(contents):
            if first := where.get(key):
                raise UsageError(f"--config: {key} is set in {first} and in {part}; keep one of them")
            where[key] = part


def _set_by(contents: Mapping[str, Any]) -> Iterator[str]:
    for key, value in contents.items():
        if key == "models" and isinstance(value, dict):
            yield from (f"models.{name}" for name in value)
        else:
            yield key


def _bad_list(message: str) -> str:
    """pydantic-settings says which field it could not parse, and quotes nothing of it."""
    named = re.search(r'field "(\w+)"', message)
    key = named[1].upper() if named else "ALLOWED_HOSTS"
    return f'{ENV_PREFIX}{key}: expected a JSON list such as ["one", "two"]'


def _read_toml(file: Path) -> dict[str, Any]:
    """Read here as well, because pydantic-settings ignores a missing file; an operator who names one wants to know."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"--config {file}: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"--config {file}: not valid TOML: {exc}") from exc


def _check_choices(settings: Settings, given: Mapping[str, object], file: Path | None) -> None:
    """Raises UsageError for text settings whose values are limited, and for one that means nothing without another."""
    choices: dict[str, Callable[[str], str | None]] = {
        "dequantize": lambda value: None if value in DEQUANTIZE_MODES else f"one of {', '.join(DEQUANTIZE_MODES)}",
        "log_level": lambda value: None if value.lower() in LEVELS else f"one of {', '.join(LEVELS)}",
    }
    for key, problem_with in choices.items():
        value = getattr(settings, key)
        if expectation := problem_with(value):
            raise UsageError(f"{_named(key, value, given, file)}: expected {expectation}")
    if settings.kv_store_shared and settings.kv_store_dir is None:
        raise UsageError(
            f"{_named('kv_store_shared', True, given, file)} shares no folder: set --kv-store-dir (kv_store_dir) to one"
        )
    try:
        resolve_budget(settings.kv_budget, _AMPLE_MEMORY, weights_bytes=0)
    except StartupError as exc:
        raise UsageError(str(exc)) from exc


def _check_models(settings: Settings) -> None:
    """What several models need beside values that are fine by themselves. Raises UsageError."""
    if not settings.models:
        return
    if settings.model or settings.served_model_name:
        raise UsageError("MODEL and served_model_name are for one model: leave them out, or remove the [models] tables")
    if settings.adapters:
        raise UsageError("adapters belong to one model: set them in its table [models.NAME]")
    names: dict[str, str] = {}
    for name, entry in settings.models.items():
        adapters = [named_adapter(spec).name for spec in entry.adapters]
        own = {name, *entry.aliases}
        for spelling in own:
            if spelling.rpartition(":")[2] in adapters:
                raise UsageError(f"models.{name}: {spelling!r} ends like a name of an adapter, and could mean either")
        for spelling in own | {f"{model}:{adapter}" for model in own for adapter in adapters}:
            if (other := names.setdefault(spelling, name)) != name:
                raise UsageError(f"models.{name}: {spelling!r} is a name of models.{other} already")
        if entry.dequantize is not None and entry.dequantize not in DEQUANTIZE_MODES:
            modes = ", ".join(DEQUANTIZE_MODES)
            raise UsageError(f"models.{name}.dequantize = {entry.dequantize!r}: expected one of {modes}")
        _check_budget(f"models.{name}.kv_budget", entry.kv_budget or "auto")
    _check_budget("models_memory", settings.models_memory)


def _check_budget(key: str, value: str) -> None:
    try:
        resolve_budget(value, _AMPLE_MEMORY, weights_bytes=0)
    except StartupError as exc:
        raise UsageError(str(exc).replace("kv_budget", key, 1)) from exc


def _complaint(error: ErrorDetails, given: Mapping[str, object], file: Path | None) -> str:
    if len(error["loc"]) > 2 and error["loc"][0] == "models":
        return _complaint_about_model(error, file)
    key = str(error["loc"][0]) if error["loc"] else "settings"
    if error["type"] == "extra_forbidden":
        near = closest(key, Settings.model_fields)
        return f"{_named(key, error['input'], given, file)}: unknown key" + (f"; did you mean {near}?" if near else "")
    return f"{_named(key, error['input'], given, file)}: expected {_expectation(error)}"


def _complaint_about_model(error: ErrorDetails, file: Path | None) -> str:
    _, name, key, *_ = (str(part) for part in error["loc"])
    place = f"{file}: " if file else ""
    if key == "[key]":
        return f"{place}models.{name}: expected letters, digits and ._:/@+- only, beginning with a letter or digit"
    value = error["input"]
    place += f"models.{name}.{key} = {repr(value) if isinstance(value, str) else value}"
    if error["type"] != "extra_forbidden":
        return f"{place}: expected {_expectation(error)}"
    near = closest(key, ModelEntry.model_fields)
    served = " of a model; it may be one of the whole server" if key in Settings.model_fields else ""
    return f"{place}: unknown key{served}" + (f"; did you mean {near}?" if near else "")


def _expectation(error: ErrorDetails) -> str:
    text = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"a number {text}" if text.startswith(("less", "greater")) else text


def _named(key: str, value: object, given: Mapping[str, object], file: Path | None) -> str:
    """The setting as whoever set it spelled it; secrets are not repeated."""
    shown = "***" if key in SECRET_KEYS else repr(value) if isinstance(value, str) else str(value)
    if key in given:
        return "MODEL " + shown if key == "model" else f"--{key.replace('_', '-')} {shown}"
    if variable_of(key) is not None:
        return f"{ENV_PREFIX}{key.upper()}={shown}"
    return f"{file}: {key} = {shown}" if file else f"{key} = {shown}"
