"""A server that is killed within moments of an answer: each stored session is as it was, or as it became."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.turboserve.cache.disk.kill_worker import found_turns, history, open_memory
from tests.turboserve.cache.fakes import lease_for

NUM_SESSIONS = 3
NUM_KILLS = 8
WINDOW_S = 0.2  # after an answer


def kill_in(folder: Path, num_answers: int, delay_s: float) -> tuple[dict[int, int], dict[int, int]]:
    """Kill a worker that long after it gave so many answers; the last turns that it said were stored, and answered."""
    said: dict[str, dict[int, int]] = {"stored": {}, "answered": {}}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "tests.turboserve.cache.disk.kill_worker", str(folder), str(NUM_SESSIONS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        assert worker.stdout is not None
        while num_answers:
            word = note(worker.stdout.readline(), said)
            num_answers -= word == "answered"
        time.sleep(delay_s)
        worker.kill()
        for line in worker.stdout:
            if line.endswith("\n"):  # the last one may be cut off
                note(line, said)
    return said["stored"], said["answered"]


def note(line: str, said: dict[str, dict[int, int]]) -> str:
    word, session, turn = line.split()
    said[word][int(session)] = int(turn)
    return word


def lost_after_kills(folder: Path, num_kills: int, moments: random.Random) -> list[str]:
    """What was not found as it was or as it became."""
    wrong = []
    least = dict.fromkeys(range(NUM_SESSIONS), -1)  # turns that were stored
    for kill in range(num_kills):
        stored, answered = kill_in(folder, moments.randint(4, 9), moments.uniform(0.0, WINDOW_S))
        least |= stored
        memory, store = open_memory(folder, write_rate=1e12)
        assert store.counts.integrity_failures == 0
        found = found_turns(memory, NUM_SESSIONS)
        for session, turn in enumerate(found):
            most = max(least[session], answered.get(session, -1)) + 1  # an answer whose line was not written yet
            if not least[session] <= turn <= most:
                wrong.append(f"kill {kill}: session {session} stands at {turn}, stored was {least[session]}")
            if turn >= 0:
                lease = lease_for(memory, [*history(session, turn), 7], 900, 1e6, "caller", session_id=str(session))
                assert lease.cached_len == len(history(session, turn)), "it cannot be continued"
                memory.drop(lease, lease.caches)
        store.close()
        least = dict(enumerate(found))
    return wrong


def test_a_kill_within_moments_of_an_answer_costs_no_stored_session(tmp_path: Path, seed: int) -> None:
    assert lost_after_kills(tmp_path, NUM_KILLS, random.Random(seed)) == []
