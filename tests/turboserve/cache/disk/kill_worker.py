"""A process that talks in a few named, pinned sessions, to be killed at any moment; what must be found afterwards.

    python -m tests.turboserve.cache.disk.kill_worker FOLDER SESSIONS

The memory and the store are the real ones; caches are rows made of their tokens, so that every row can be checked.
It prints `answered SESSION TURN` when an answer has ended and `stored SESSION TURN` when that turn is on the device.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from tests.turboserve.cache.disk.conversations import open_store
from tests.turboserve.cache.fakes import FakeFamily, converse, memory_for, span

from turboserve.cache.disk import DiskStore
from turboserve.cache.interfaces import Arrays, Caches
from turboserve.cache.memory import Memory
from turboserve.messages import UpdateSession

PIECE_TOKENS = 64
ROW_BYTES = 256
WRITE_RATE = 1e6  # a first turn takes a twentieth of a second
BUDGET_BYTES = 100_000_000


class RowsFamily(FakeFamily):
    """Exports a row of bytes per token, in pieces."""

    def export_caches(self, caches: Caches) -> tuple[dict[str, Any], Arrays]:
        arrays = [np.array(caches[0].tokens, np.int32), rows_of(caches[0].tokens)]
        cuts = [[0, PIECE_TOKENS], [0, PIECE_TOKENS]]
        described = [
            {"dtype": str(a.dtype), "shape": list(a.shape), "cut": c} for a, c in zip(arrays, cuts, strict=True)
        ]
        return {"format": caches[0].runtime.name, "arrays": described}, arrays

    def import_caches(self, name: str, header: Any, arrays: Arrays) -> Caches:
        if not np.array_equal(rows_of(arrays[0]), arrays[1]):
            raise ValueError("rows of other tokens")
        return super().import_caches(name, header, arrays)


def rows_of(tokens: Any) -> Any:
    ids = np.asarray(tokens, np.uint64)[:, None]
    return ((ids * 2654435761 + np.arange(ROW_BYTES, dtype=np.uint64) * 97) >> 5).astype(np.uint8)


def history(session: int, turn: int) -> list[int]:
    """All tokens of a session after that turn."""
    return span(100_000 * (session + 1), 150 + 40 * turn)


def open_memory(folder: Path, write_rate: float = WRITE_RATE) -> tuple[Memory, DiskStore]:
    store = open_store(folder, write_rate=write_rate)
    return memory_for(RowsFamily(), BUDGET_BYTES, store), store  # type: ignore[arg-type]


def found_turns(memory: Memory, num_sessions: int) -> list[int]:
    """The turn at which each session stands, -1: it is gone. Raises AssertionError when one is no whole turn."""
    turns = []
    for session in range(num_sessions):
        held = memory.idle.get("caller", str(session))
        if held is None:
            turns.append(-1)
            continue
        turn = (len(held.tokens) - 150) // 40
        assert held.tokens.tolist() == history(session, turn), "a session stands between two turns"
        assert held.session.is_pinned or turn == 0, "a pin was lost"
        turns.append(turn)
    return turns


def main() -> None:
    num_sessions = int(sys.argv[2])
    memory, store = open_memory(Path(sys.argv[1]))
    turns = found_turns(memory, num_sessions)
    now_s = 1000.0
    while True:
        for session in range(num_sessions):
            now_s += 1.0
            turns[session] += 1
            converse(memory, history(session, turns[session]), now_s, "caller", session_id=str(session))
            print("answered", session, turns[session], flush=True)
            assert store.flush(30)
            if turns[session] == 0:
                memory.answer(UpdateSession("caller", str(session), is_pinned=True), now_s)
                assert store.flush(30)
            print("stored", session, turns[session], flush=True)


if __name__ == "__main__":
    main()
