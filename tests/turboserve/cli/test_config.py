"""Settings from flags, environment and file: who wins, and one line for each mistake."""

from __future__ import annotations

import inspect
import os
import tomllib
from pathlib import Path

import pytest

from turboserve.cli import config
from turboserve.cli.config import UsageError
from turboserve.cli.serve_flags import NO_SETTINGS, serve_command
from turboserve.settings import Settings, named_adapter

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("TURBOSERVE_")]:
        monkeypatch.delenv(name)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    return file


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, 'port = 1111\nkv_format = "4/3"\nmax_running = 7\nlog_json = true\n')
    monkeypatch.setenv("TURBOSERVE_PORT", "2222")
    monkeypatch.setenv("TURBOSERVE_KV_FORMAT", "3/3")
    settings = config.resolve({"port": "3333", "host": None, "log_json": False}, file)
    assert (settings.port, settings.kv_format, settings.max_running) == (3333, "3/3", 7)
    assert (settings.log_json, settings.host) == (False, "127.0.0.1")


def test_file_can_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOSERVE_CONFIG", str(write(tmp_path, "port = 1111")))
    assert config.resolve({}).port == 1111


def test_lists_and_paths_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOSERVE_CACHE_DIR", "/some/where")
    settings = config.resolve({"allowed_hosts": ["a.local", "b.local"]})
    assert settings.allowed_hosts == ("a.local", "b.local")
    assert settings.cache_dir == Path("/some/where")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "99999"}, ("--port '99999'", "less than or equal to 65535")),
        ({"port": "http"}, ("--port 'http'", "integer")),
        ({"max_running": "0"}, ("--max-running '0'", "greater than or equal to 1")),
        ({"prefill_chunk_tokens": "5"}, ("--prefill-chunk-tokens '5'", "at least 16")),
        ({"overlap": "maybe"}, ("--overlap 'maybe'", "auto")),
        ({"send_timeout_s": "0"}, ("--send-timeout-s", "greater than 0")),
        ({"kv_format": "5/4"}, ("--kv-format '5/4'", "4/3", "f16")),
        ({"kv_format": "4/4/4"}, ("--kv-format", "KEY_CODEC/VALUE_CODEC")),
        ({"kv_budget": "plenty"}, ("kv_budget='plenty'", "512MiB")),
        ({"kv_store_bytes": "lots"}, ("--kv-store-bytes 'lots'", 'expected a number of bytes such as "512MiB"')),
        ({"kv_store_bytes": "1kB"}, ("--kv-store-bytes", "greater than or equal to 1048576")),
        ({"session_ttl_s": "-1"}, ("--session-ttl-s", "greater than or equal to 0")),
        ({"api_keys": [""]}, ("***", "at least 1 character")),
        ({"dequantize": "maybe"}, ("--dequantize 'maybe'", "auto, always, never")),
        ({"log_level": "loud"}, ("--log-level 'loud'", "debug, info")),
    ],
)
def test_bad_flag_is_one_line(flags: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        config.resolve(flags)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_byte_counts_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOSERVE_KV_STORE_DIR", "")
    settings = config.resolve({"kv_store_bytes": "1.5 GiB", "kv_store_write_rate": 2 << 20})
    assert (settings.kv_store_bytes, settings.kv_store_write_rate) == (3 << 29, 2 << 20)
    assert settings.kv_store_dir is None
    monkeypatch.setenv("TURBOSERVE_KV_STORE_DIR", "/some/where")
    file = write(tmp_path, 'max_session_bytes_per_caller = "10kB"')
    settings = config.resolve({}, file)
    assert (settings.kv_store_dir, settings.max_session_bytes_per_caller) == (Path("/some/where"), 10_000)


def test_a_shared_store_needs_a_folder(tmp_path: Path) -> None:
    for flags, file in (({"kv_store_shared": True}, None), ({}, write(tmp_path, "kv_store_shared = true"))):
        with pytest.raises(UsageError, match=r"kv.store.shared.*: set --kv-store-dir") as caught:
            config.resolve(flags, file)
        assert "\n" not in str(caught.value)
    assert config.resolve({"kv_store_shared": True, "kv_store_dir": "/kept"}).kv_store_shared


FORMAT_SPELLINGS = [
    *(("F16", "f16"), (" f16 ", "f16"), ("4", "4/4"), ("04/3", "4/3"), ("8/4", "8/4"), ("3T/2t", "3t/2t")),
    *(("balanced", "4t/3t"), ("Compact", "3t/2t"), ("tiny", "2t/2t")),
]


@pytest.mark.parametrize(("given", "name"), FORMAT_SPELLINGS)
@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_a_kv_format_is_read_the_same_wherever_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, given: str, name: str
) -> None:
    """As over HTTP: tests/turboserve/api/test_sessions.py."""
    if source == "variable":
        monkeypatch.setenv("TURBOSERVE_KV_FORMAT", given)
    flags = {"kv_format": given} if source == "flag" else {}
    file = write(tmp_path, f'kv_format = "{given}"') if source == "file" else None
    assert config.resolve(flags, file).kv_format == name


def test_bad_variable_is_named_as_it_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOSERVE_MAX_QUEUED", "many")
    with pytest.raises(UsageError, match=r"^TURBOSERVE_MAX_QUEUED='many': expected a valid integer"):
        config.resolve({})
    monkeypatch.setenv("TURBOSERVE_MAX_QUEUED", "5")
    monkeypatch.setenv("TURBOSERVE_ALLOWED_HOSTS", "a.local,b.local")
    with pytest.raises(UsageError, match="TURBOSERVE_ALLOWED_HOSTS"):
        config.resolve({})
    monkeypatch.setenv("TURBOSERVE_ALLOWED_HOSTS", "[]")
    monkeypatch.setenv("TURBOSERVE_API_KEYS", "topsecret")
    with pytest.raises(UsageError, match="TURBOSERVE_API_KEYS") as caught:
        config.resolve({})
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", ("prot = 1", "unknown key", "did you mean port?")),
        ("port = 'x'", ("port = 'x'", "integer")),
        ("port = [", ("not valid TOML",)),
        ("api_key = 12345", ("api_key = ***", "string")),
    ],
)
def test_bad_file_is_named(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        config.resolve({}, file)
    message = str(caught.value)
    assert str(file) in message
    assert all(word in message for word in words), message
    assert "12345" not in message


def test_adapters_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.resolve({"adapters": ["law=/x/y=z", "/a/tax-2", "b/c=d/e"]})
    assert [tuple(map(str, named_adapter(one))) for one in settings.adapters] == [
        ("law", "/x/y=z"),
        ("tax-2", "/a/tax-2"),
        ("e", "b/c=d/e"),
    ]
    for wrong in (["law="], [""], ["="], ["/a/b c"], ["a:b=/x"], ["law=/x", "/y/law"]):
        with pytest.raises(UsageError, match="adapters"):
            config.resolve({"adapters": wrong})
    monkeypatch.setenv("TURBOSERVE_ADAPTERS", '["law=/x"]')
    assert config.resolve({}).adapters == ("law=/x",)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        config.resolve({}, tmp_path / "absent.toml")


def test_default_toml_states_every_default() -> None:
    text = (ROOT / "config" / "default.toml").read_text()
    assert set(tomllib.loads(text)) == set(Settings.model_fields)
    assert config.resolve({}, ROOT / "config" / "default.toml").model_dump() == Settings().model_dump()


def test_every_setting_has_a_flag() -> None:
    flags = set(inspect.signature(serve_command).parameters) - {*NO_SETTINGS}
    assert flags == set(Settings.model_fields) - {"models"}  # tables of a file
