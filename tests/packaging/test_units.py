"""What starts the server on a machine: systemd's units and launchd's agent name real commands, settings and ports."""

from __future__ import annotations

import plistlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from turboserve.cli.main import app
from turboserve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = ROOT / "config" / "systemd"
SERVICE = (SYSTEMD / "turboserve.service").read_text()
AGENT: dict[str, Any] = plistlib.loads((ROOT / "config/launchd/org.turboserve.server.plist").read_bytes())
INSTALLED_AT = "/opt/turboserve/bin/turboserve"


def values(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", SERVICE, flags=re.MULTILINE)


def settings_named(names: list[str]) -> set[str]:
    return {name.removeprefix("TURBOSERVE_").lower() for name in names if name.startswith("TURBOSERVE_")}


def test_commands_and_settings_are_real() -> None:
    commands = {command.name for command in app.registered_commands}
    (start,) = values("ExecStart")
    assert shlex.split(start)[:3] == [INSTALLED_AT, "serve", "--config"] and "serve" in commands
    assert AGENT["ProgramArguments"][1:3] == ["serve", "--config"]
    assigned = [pair.split("=")[0] for line in values("Environment") for pair in shlex.split(line)]
    assert settings_named(assigned + list(AGENT["EnvironmentVariables"])) <= set(Settings.model_fields)
    assert not any("API_KEY=" in line for line in (*values("Environment"), str(AGENT)))


def test_running_answers_have_their_grace_period() -> None:
    grace_s = Settings().shutdown_grace_s
    assert float(values("TimeoutStopSec")[0]) > grace_s and AGENT["ExitTimeOut"] > grace_s


def test_the_socket_is_where_the_server_would_listen() -> None:
    (listen,) = re.findall(r"^ListenStream=(.*)$", (SYSTEMD / "turboserve.socket").read_text(), flags=re.MULTILINE)
    assert listen == f"{Settings().host}:{Settings().port}"


def test_systemd_accepts_the_units_and_finds_the_service_confined(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    command = tmp_path / "turboserve"  # must exist for the check; where it is installed is the operator's business
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    (tmp_path / "turboserve.service").write_text(SERVICE.replace(INSTALLED_AT, str(command)))
    shutil.copy(SYSTEMD / "turboserve.socket", tmp_path)
    units = [str(tmp_path / "turboserve.service"), str(tmp_path / "turboserve.socket")]
    checks = [["verify", "--man=no", *units]]
    known = subprocess.run([analyze, "security", "--help"], capture_output=True, text=True, check=False).stdout
    if "--offline" in known:  # from systemd 250 on; 0 is confined best, 10 not at all
        checks.append(["security", "--offline=true", "--threshold=25", units[0]])
    for arguments in checks:
        done = subprocess.run([analyze, *arguments], capture_output=True, text=True, check=False)
        # Unknown keys are only warned of.
        assert done.returncode == 0 and "Unknown" not in done.stderr, done.stdout + done.stderr
