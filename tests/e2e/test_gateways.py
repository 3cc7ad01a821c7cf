"""Shipped gateway configurations in front of real servers; `python -m tests.stress.replicas` does it at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.stress.replicas import GATEWAYS, one_server, program, run

SESSIONS, TURNS = 12, 4


@pytest.fixture(scope="module")
def hit_rate_of_one(cache_dir: Path) -> float:
    return one_server(cache_dir, SESSIONS, TURNS)


@pytest.mark.gateway
@pytest.mark.parametrize("name", GATEWAYS)
def test_three_replicas_behind_a_gateway(name: str, cache_dir: Path, request: pytest.FixtureRequest) -> None:
    if program(name) is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install nginx-light haproxy)")
    report = run(name, cache_dir, SESSIONS, TURNS, request.getfixturevalue("hit_rate_of_one"))
    print("\n".join(report.lines()))
    report.check()
