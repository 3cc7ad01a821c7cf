"""The fuzzers' targets hold on their seeds and on seeds with bytes changed, and notice what they are there for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.fuzz import entries, targets
from tests.fuzz.targets import TARGETS, seeds

from turboserve.cache.disk import container
from turboserve.cache.transfers import Transfers
from turboserve.engine import text


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_their_neighbours_hold(name: str, rng: np.random.Generator) -> None:
    for seed in seeds()[name]:
        TARGETS[name](seed)
        for _ in range(60):
            changed = bytearray(seed)
            for _ in range(int(rng.integers(1, 4)) if changed else 0):
                changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
            TARGETS[name](bytes(changed[: int(rng.integers(len(changed) + 1))]))
            TARGETS[name](bytes(changed))


def test_an_exported_session_is_taken_as_long_as_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []
    restore = Transfers.restore

    def watched(*args: Any) -> Any:
        taken.append(args)
        return restore(*args)

    monkeypatch.setattr(Transfers, "restore", watched)
    monkeypatch.setattr(entries, "_change", lambda *args: None)
    used = entries._stored().served.totals().compressed
    entries.transfer(b"")
    assert len(taken) == 1 and entries._stored().served.totals().compressed == used
    monkeypatch.setattr(Transfers, "restore", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        entries.transfer(b"")


def test_a_body_that_raises_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "parse_chat", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        targets.body(b"{}")


def test_an_array_beyond_its_file_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    beyond = {"a": np.zeros(1 << 20)}
    monkeypatch.setattr(container, "read", lambda file: (None, beyond))
    with pytest.raises(AssertionError):
        targets.store(b"{}\n")


def test_a_stop_string_that_is_sent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_possible_stop_len", lambda text, stops: 0)
    with pytest.raises(AssertionError):
        targets.text(b"\x02" + b"ea" + b"bxx")  # two tokens with "ab" across them
