"""Two real ranks keep graphs of their steps, or do not, and either way get the same answers."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from tests.turboserve.distributed.graph_ranks import LATER, SCENES
from tests.turboserve.distributed.processes import START_TIMEOUT_S, environment, free_ports, start


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each rank has printed, by rank."""
    hostfile = tmp_path_factory.mktemp("graphs") / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    command = [sys.executable, "-m", "tests.turboserve.distributed.graph_ranks"]
    ranks = [start(command, environment(MLX_HOSTFILE=str(hostfile), MLX_RANK=str(rank))) for rank in (0, 1)]
    try:
        for rank in ranks:
            assert rank.popen.wait(timeout=2 * START_TIMEOUT_S) == 0, rank.text
    finally:
        for rank in ranks:
            rank.end()
    return [[json.loads(line) for line in rank.lines if line.startswith("{")] for rank in ranks]


def test_sums_have_an_order_where_each_needs_the_one_before(said: list[list[dict[str, Any]]]) -> None:
    wanted = {"one after the other": True, "none": True, "side by side": False, "twice": False}
    assert said[0][0] == wanted


def test_a_rank_with_graphs_and_one_without_answer_alike(said: list[list[dict[str, Any]]]) -> None:
    told = {one["scene"]: one for one in said[0][1:]}
    num_kept = {one["scene"]: one["num_kept"] for one in said[1]}
    assert list(told) == list(num_kept) == list(SCENES)
    assert all(one["tokens"] == told["anew"]["tokens"] for one in told.values())
    assert len(told["anew"]["tokens"]) == 4 and all(len(tokens) == 40 for tokens in told["anew"]["tokens"])
    assert all(one["num_compared"] > 40 for one in told.values())
    is_kept = {scene: one["choice"].startswith("kept (a step of 2 rows") for scene, one in told.items()}
    assert is_kept == {scene: scene == "kept" or scene.endswith("later") for scene in SCENES}
    assert "not every rank can keep them" in told["rank 1 cannot trace"]["choice"]
    assert num_kept["rank 1 fails later"] == LATER < num_kept["kept"] == num_kept["rank 0 fails later"]
    assert num_kept["anew"] == num_kept["rank 0 cannot trace"] == num_kept["rank 1 cannot trace"] == 0
