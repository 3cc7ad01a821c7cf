"""`turboserve config`: what applies, where it comes from, and a file to begin with that means the defaults."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest

from turboserve.cli import config, settings_view
from turboserve.cli.main import main
from turboserve.settings import Settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("TURBOSERVE_")]:
        monkeypatch.delenv(name)


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["config", *args])
    assert not ended.value.code
    return capsys.readouterr().out


def test_each_setting_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.toml"
    file.write_text('max_running = 7\nport = 1111\nkv_budget = "auto"\napi_keys = ["secret-1"]\n')
    monkeypatch.setenv("TURBOSERVE_PORT", "2222")
    monkeypatch.setenv("turboserve_api_key", "secret-2")
    shown = said(capsys, "show", "--json", "--config", str(file))
    rows = {row["key"]: (row["value"], row["source"]) for row in json.loads(shown)}
    assert list(rows) == list(Settings.model_fields)
    assert rows["max_running"] == ("7", str(file)) and rows["port"] == ("2222", "TURBOSERVE_PORT")
    assert rows["kv_budget"] == ('"auto"', str(file)) and rows["host"] == ('"127.0.0.1"', "default")
    assert rows["api_key"] == ('"***"', "turboserve_api_key") and rows["api_keys"] == ('"***"', str(file))
    changed = said(capsys, "show", "--changed", "--config", str(file))
    assert [line.split()[0] for line in changed.splitlines()] == ["port", "api_key", "api_keys", "max_running"]
    assert "secret" not in shown + changed


def test_the_first_file_means_the_defaults_with_and_without_its_comments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "turboserve.toml"
    said(capsys, "init", str(file))
    assert config.resolve({}, file).model_dump() == Settings().model_dump()
    text = file.read_text()
    uncommented = re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE)
    assert set(tomllib.loads(uncommented)) == set(Settings.model_fields) - {"models"}
    file.write_text(uncommented)
    assert config.resolve({}, file).model_dump() == Settings().model_dump()
    with pytest.raises(SystemExit) as ended:
        main(["config", "init", str(file)])
    assert ended.value.code == 2 and "--force" in capsys.readouterr().err
    assert file.read_text() == uncommented
    said(capsys, "init", str(file), "--force")
    assert file.read_text() == text == said(capsys, "init", "-")


def test_shown_values_are_toml(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.resolve({"kv_store_dir": 'a "quoted" \\ path', "template_kwargs": ["x", "y"], "log_json": True})
    text = "\n".join(f"{key} = {settings_view.shown(key, getattr(settings, key))}" for key in Settings.model_fields)
    assert Settings(**tomllib.loads(text)).model_dump() == settings.model_dump()
