"""Which rank a process is, the way between ranks, and what they agree upon."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.turboserve.distributed.processes import environment

from turboserve.cli.distributed import check_supported
from turboserve.engine.distributed import channel
from turboserve.engine.distributed.channel import Connection, Listener, PeerGoneError, connect
from turboserve.engine.distributed.place import Place, place_in
from turboserve.engine.distributed.ranks import ALONE, FirstRank, OtherRank, RanksEndedError
from turboserve.errors import StartupError
from turboserve.settings import Settings

SECRET = "0" * 64


class Group:
    """As much of MLX's group as is asked."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@contextmanager
def joined(num_ranks: int) -> Iterator[tuple[FirstRank, list[OtherRank]]]:
    """All ranks in this process, connected as processes are."""
    listener, others = Listener("127.0.0.1"), dict[int, Connection]()

    def come(rank: int) -> None:
        others[rank] = connect("127.0.0.1", listener.port, rank, SECRET)

    comers = [threading.Thread(target=come, args=(rank,)) for rank in range(1, num_ranks)]
    for comer in comers:
        comer.start()
    connections = listener.accept(SECRET, num_ranks - 1)
    for comer in comers:
        comer.join()
    first = FirstRank(Group(0, num_ranks), connections)
    rest = [OtherRank(Group(rank, num_ranks), others[rank]) for rank in range(1, num_ranks)]
    try:
        yield first, rest
    finally:
        for one in rest:
            one._is_ending = True
        first.close()
        for connection in [*connections.values(), *others.values()]:
            connection.close()


def test_ranks_hear_what_each_of_them_says() -> None:
    with joined(3) as (first, rest):
        heard: dict[int, list[Any]] = {}

        def say(one: OtherRank) -> None:
            heard[one.rank] = one.exchange("number", 10 * one.rank)

        threads = [threading.Thread(target=say, args=(one,)) for one in rest]
        for thread in threads:
            thread.start()
        assert first.exchange("number", 0) == [0, 10, 20]
        for thread in threads:
            thread.join()
        assert heard == {1: [0, 10, 20], 2: [0, 10, 20]}


def test_a_rank_at_another_question_ends_the_run() -> None:
    with joined(2) as (first, (second,)):
        second.send(["say", "budget", 1])
        with pytest.raises(RanksEndedError, match="rank 1 is at"):
            first.exchange("weights", 2)


def test_what_a_rank_complains_of_is_told_and_ends_the_run() -> None:
    with joined(2) as (first, (second,)):
        told, event = list[str](), threading.Event()

        def note(why: str) -> None:
            told.append(why)
            event.set()

        first.on_lost = note
        second.close("it has no memory left")
        assert event.wait(5) and told == ["rank 1 of 2: it has no memory left"]
        with pytest.raises(RanksEndedError, match="no memory left"):
            first.send(["do", "trim", [1]])


def test_a_closed_connection_is_noticed_at_once() -> None:
    with joined(2) as (first, (second,)):
        event = threading.Event()
        first.on_lost = lambda why: event.set()
        began = time.monotonic()
        second._is_ending = True
        second._connection.close()
        assert event.wait(5) and time.monotonic() - began < 2
        with pytest.raises(RanksEndedError, match="rank 1 of 2 is gone"):
            first.exchange("anything", 1)


def test_a_rank_that_lives_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "SILENCE_S", 1.5)
    listener, event = Listener("127.0.0.1"), threading.Event()
    silent = connect("127.0.0.1", listener.port, 1, SECRET)  # no thread of it sends signs of life
    connections = listener.accept(SECRET, 1)
    first = FirstRank(Group(0, 2), connections)
    first.on_lost = lambda why: event.set()
    assert event.wait(10) and first.lost is not None and "said nothing" in first.lost
    silent.close()
    connections[1].close()


def test_strangers_are_sent_away() -> None:
    listener = Listener("127.0.0.1")
    accepted: list[dict[int, Connection]] = []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept(SECRET, 1)))
    thread.start()
    with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(1) == b""
    wrong = connect("127.0.0.1", listener.port, 1, "1" * 64)
    with pytest.raises(PeerGoneError):
        wrong.receive()
    right = connect("127.0.0.1", listener.port, 1, SECRET)
    thread.join(10)
    assert list(accepted[0]) == [1]
    for connection in (wrong, right, accepted[0][1]):
        connection.close()


LONELY = """
import sys, time
from tests.turboserve.distributed.test_ranks import Group, SECRET
from turboserve.engine.distributed.channel import connect
from turboserve.engine.distributed.ranks import OtherRank
rank = OtherRank(Group(1, 2), connect("127.0.0.1", int(sys.argv[1]), 1, SECRET))
print("waits", flush=True)
time.sleep(600)  # as in a collective
"""


def test_a_rank_without_rank_0_ends_whatever_it_waits_for() -> None:
    listener = Listener("127.0.0.1")
    lonely = subprocess.Popen(
        [sys.executable, "-c", LONELY, str(listener.port)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        connection = listener.accept(SECRET, 1)[1]
        assert lonely.stdout is not None and lonely.stdout.readline() == "waits\n"
        connection.close()
        assert lonely.wait(timeout=10) == 1
    finally:
        lonely.kill()
        lonely.communicate()


def test_a_process_alone_agrees_with_itself() -> None:
    assert ALONE.exchange("anything", 3) == [3] and ALONE.least("anything", 4) == 4
    ALONE.check_same("anything", 3, "differs")


def test_other_weights_are_a_line_that_names_the_rank() -> None:
    with joined(2) as (first, (second,)):
        thread = threading.Thread(target=lambda: second.exchange("weights", "b"))
        thread.start()
        with pytest.raises(StartupError, match="--distributed: rank 1 has other weights"):
            first.check_same("weights", "a", "has other weights than rank 0: copy the folder")
        thread.join()


def test_the_place_is_read_from_the_launchers_environment(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([["10.0.0.1:32323", "10.0.1.1:32324"], ["10.0.0.2:32325"]]))
    assert place_in({"MLX_RANK": "1", "MLX_HOSTFILE": str(hostfile)}) == Place(1, "10.0.0.1")
    assert place_in({"MLX_RANK": "0", "NCCL_HOST_IP": "10.0.0.3"}) == Place(0, "10.0.0.3")
    assert place_in({"MLX_RANK": "0", "MLX_JACCL_COORDINATOR": "10.0.0.4:5000"}).first_host == "10.0.0.4"
    assert place_in({"OMPI_COMM_WORLD_RANK": "2"}).rank == 2
    for environment_ in ({}, {"MLX_RANK": "x"}):
        with pytest.raises(StartupError, match=r"mlx\.launch"):
            place_in(environment_)
    hostfile.write_text("[]")
    with pytest.raises(StartupError, match="names no address of rank 0"):
        place_in({"MLX_RANK": "1", "MLX_HOSTFILE": str(hostfile)})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"adapters": ("law=/a",)}, "LoRA adapters cannot be divided"),
        ({"models": {"a": {}}}, "serves one model"),
        ({"kv_format": "auto"}, "name a --kv-format"),
        ({"kv_store_dir": "/kept", "kv_store_shared": True}, "leave kv_store_shared off"),
    ],
)
def test_what_a_divided_model_cannot_do_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StartupError, match=complaint):
        check_supported(Settings(distributed=True, **changes))
