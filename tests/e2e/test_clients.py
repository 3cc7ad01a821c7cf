"""The checks of foreign clients that need no environment of their own; `make clients` runs those of all clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.clients.anthropic_python import check as anthropic_check
from tests.clients.openai_python import check as openai_check
from tests.clients.steps import Target
from tests.e2e.server import Server

KEYLESS = "a_wrong_key_is_refused"  # needs a server with a key


def named(steps: list[Any]) -> list[Any]:
    return [pytest.param(step, id=step.__name__) for step in steps if step.__name__ != KEYLESS]


def target_of(server: Server) -> Target:
    server.wait_until_idle()
    return Target(server.url, "turboserve-tiny", "unused")


@pytest.mark.parametrize("step", named(openai_check.STEPS))
def test_openais_client(server: Server, step: Callable[[Target], None]) -> None:
    step(target_of(server))


@pytest.mark.parametrize("step", named(anthropic_check.STEPS))
def test_anthropics_client(server: Server, step: Callable[[Target], None]) -> None:
    step(target_of(server))
