"""The container files without a container engine: what they name must exist and fit together."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
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
    names |= {key for server in servers() for key in server["environment"] if key.startswith("TURBOSERVE_")}
    assert {name.removeprefix("TURBOSERVE_").lower() for name in names} <= set(Settings.model_fields)
    volumes = json.loads(arguments("VOLUME")[0])
    assert any(environment()["TURBOSERVE_CACHE_DIR"].startswith(volume) for volume in volumes)
    assert environment()["TURBOSERVE_PORT"] in arguments("EXPOSE")


def servers() -> list[dict[str, Any]]:
    """The CPU's and the GPU's, and those behind the gateway."""
    return [service for service in COMPOSE["services"].values() if "build" in service]


def is_replica(service: dict[str, Any]) -> bool:
    return service["profiles"] == ["replicas"] and "build" in service


def test_compose_publishes_on_this_machine_only_and_demands_a_key() -> None:
    for service in COMPOSE["services"].values():
        assert bool(service["ports"]) != is_replica(service), "published in no way, or in two"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    for server in servers():
        assert server["environment"]["TURBOSERVE_API_KEY"].startswith("${TURBOSERVE_API_KEY:?")
        assert is_replica(server) or server["ports"][0].endswith(":" + environment()["TURBOSERVE_PORT"])
        mounts = {volume.split(":")[1] for volume in server["volumes"]}
        assert mounts == set(json.loads(arguments("VOLUME")[0]))


def test_compose_refers_only_to_what_it_defines() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or source == "./models" or (ROOT / source).exists(), source
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])


def test_each_profile_has_one_server_and_what_watches_it() -> None:
    """Both servers answer to the name that Prometheus asks, and no service starts without a profile."""
    for profile, backend in (("cpu", "cpu"), ("cuda", "${CUDA_BACKEND:-cuda12}")):
        started = {name: s for name, s in COMPOSE["services"].items() if profile in s["profiles"]}
        (server,) = [service for service in servers() if service in started.values()]
        assert set(started) - {"prometheus", "grafana"} == {n for n, s in started.items() if s is server}
        names = {name for name, service in started.items() if service is server}
        names |= set(server.get("networks", {}).get("default", {}).get("aliases", []))
        assert "turboserve" in names
        (default,) = arguments("ARG")
        build = server["build"] if isinstance(server["build"], dict) else {}
        assert build.get("args", {}).get("BACKEND", default.removeprefix("BACKEND=")) == backend


def test_replicas_share_a_store_and_the_gateway_knows_them_by_their_names() -> None:
    started = {name: s for name, s in COMPOSE["services"].items() if "replicas" in s["profiles"]}
    replicas = {name: service for name, service in started.items() if is_replica(service)}
    assert len(replicas) == 2 and set(started) - set(replicas) == {"gateway"}
    for server in replicas.values():
        settings = server["environment"]
        assert settings["TURBOSERVE_KV_STORE_SHARED"] == "true"
        assert any(settings["TURBOSERVE_KV_STORE_DIR"].startswith(v.split(":")[1]) for v in server["volumes"])
        assert "/ready" in server["healthcheck"]["test"][-1]
        compile(server["healthcheck"]["test"][-1], "healthcheck", "exec")
    gateway = started["gateway"]
    (mounted,) = gateway["volumes"]
    text = (ROOT / mounted.split(":")[0]).read_text()
    addresses = set(re.findall(r"^\s*server \S+ (\S+)", text, re.M))
    assert {f"{name}:{environment()['TURBOSERVE_PORT']}" for name in replicas} < addresses
    (bound,) = re.findall(r"^\s+bind :(\d+)", text, re.M)
    assert gateway["ports"][0].split(":")[-1] == bound
    assert "init-addr last,libc,none" in text, "it starts although the third server's name is unknown"


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_write_to_volumes_only_and_cannot_gain_privileges(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if "build" in service:
        assert arguments("USER") and arguments("HEALTHCHECK")
    else:
        assert not service["user"].startswith(("0", "root"))
        assert service["healthcheck"]["test"][0] == "CMD"
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "an image that may change"


def test_prometheus_finds_the_key_where_its_configuration_looks(tmp_path: Path, rng: np.random.Generator) -> None:
    """The shell that stands before Prometheus, run here with another folder and with `echo` in Prometheus' place."""
    service = COMPOSE["services"]["prometheus"]
    config = yaml.safe_load((ROOT / "config" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    key_file = Path(job["authorization"]["credentials_file"])
    (mount,) = service["tmpfs"]
    assert Path(mount.split(":")[0]) == key_file.parent and "mode=0700,uid=65534" in mount
    assert service["user"].startswith("65534")
    shell = [part.replace("$$", "$").replace(str(key_file.parent), str(tmp_path)) for part in service["entrypoint"]]
    shell = [part.replace("/bin/prometheus", "/bin/echo") for part in shell]
    key = rng.bytes(8).hex() + " %s\\n"
    done = subprocess.run(
        [*shell, *service["command"]], env={"TURBOSERVE_API_KEY": key}, capture_output=True, text=True, check=True
    )
    assert (tmp_path / key_file.name).read_text() == key
    assert done.stdout.split() == service["command"]
    files = {volume.split(":")[1] for volume in service["volumes"]}
    assert {"/etc/prometheus/prometheus.yml", *(f"/etc/prometheus/{rule}" for rule in config["rule_files"])} <= files
