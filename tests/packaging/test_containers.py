"""The container files without a container engine: what they name must exist and fit together."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from turboserve.cli.main import app
from turboserve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def instructions() -> list[tuple[str, str]]:
    """(keyword, arguments) of the Dockerfile, continuation lines joined, comments dropped."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def arguments(keyword: str) -> list[str]:
    return [rest for word, rest in instructions() if word == keyword]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in arguments("ENV") for pair in shlex.split(rest))


def test_copied_files_exist_and_reach_the_build() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [rest.split()[:-1] for rest in arguments("COPY") if not rest.startswith("--from")]
    sources = {source.removeprefix("./") for group in copied for source in group}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_image_runs_as_nobody_in_particular() -> None:
    words = [word for word, _ in instructions()]
    (user,) = arguments("USER")
    assert user not in ("root", "0")
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert all(rest.split(":")[-1].split()[0] not in ("latest", "") and ":" in rest for rest in arguments("FROM"))
    assert not re.search(r"API_KEY\s*=", (ROOT / "Dockerfile").read_text()), "a key must not be baked in"


def test_command_and_health_check_are_real() -> None:
    (entry,), (command,), (check,) = (arguments(word) for word in ("ENTRYPOINT", "CMD", "HEALTHCHECK"))
    assert json.loads(entry) == ["turboserve"]
    assert json.loads(command)[0] in {c.name for c in app.registered_commands}
    python, dash_c, code = json.loads(check[check.index("[") :])
    assert (python, dash_c) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    assert "/health'" in code


def test_environment_names_settings() -> None:
    names = {key for key in environment() if key.startswith("TURBOSERVE_")}
    names |= {key for key in COMPOSE["services"]["turboserve"]["environment"] if key.startswith("TURBOSERVE_")}
    assert {name.removeprefix("TURBOSERVE_").lower() for name in names} <= set(Settings.model_fields)
    volumes = json.loads(arguments("VOLUME")[0])
    assert any(environment()["TURBOSERVE_CACHE_DIR"].startswith(volume) for volume in volumes)
    assert environment()["TURBOSERVE_PORT"] in arguments("EXPOSE")


def test_compose_publishes_on_this_machine_only_and_demands_a_key() -> None:
    for service in COMPOSE["services"].values():
        assert service["ports"], "unpublished"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
    server = COMPOSE["services"]["turboserve"]
    assert server["environment"]["TURBOSERVE_API_KEY"].startswith("${TURBOSERVE_API_KEY:?")
    assert server["ports"][0].endswith(":" + environment()["TURBOSERVE_PORT"])
    mounts = {volume.split(":")[1] for volume in server["volumes"]}
    assert mounts == set(json.loads(arguments("VOLUME")[0]))


def test_compose_refers_only_to_what_it_defines() -> None:
    named = {key for key in ("volumes", "secrets") for key in COMPOSE[key]}
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in named or source == "./models" or (ROOT / source).exists(), source
        assert set(service.get("secrets", [])) <= named
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])


@pytest.mark.parametrize("name", ["turboserve", "prometheus"])
def test_services_restart_and_cannot_gain_privileges(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["restart"] == "unless-stopped"
    assert service["security_opt"] == ["no-new-privileges:true"]
