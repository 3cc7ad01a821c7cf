"""Who compiles what, in how many processes, and when it is known to have been done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.turboserve.engine.ahead.conftest import CONFIG

from turboserve.engine.ahead import shares
from turboserve.engine.ahead.shares import MIB, OF_KERNELS, UNITS, Job
from turboserve.engine.weight_files import read_shapes
from turboserve.settings import Settings
from turboserve.weight_sizes import model_bytes

GIB = 1 << 30


@pytest.mark.parametrize("count", range(1, 10))
def test_every_unit_has_one_process_and_no_process_is_idle(count: int) -> None:
    given = shares.shares(UNITS, count)
    assert sorted(unit for share in given for unit in share) == sorted(UNITS)
    assert all(given) and len(given) == min(count, len(UNITS))


def test_what_others_wait_for_comes_first_in_its_process() -> None:
    for count in range(1, 10):
        (own,) = (share for share in shares.shares(UNITS, count) if "kernels" in share)
        assert own[0] == "kernels"


def test_nothing_of_ours_is_compiled_where_nothing_is_compressed() -> None:
    assert shares.units_for("4t/3t", "f16") == UNITS
    assert {"kernels", "trial", "means"}.isdisjoint(shares.units_for("f16", "f16"))


@pytest.mark.parametrize(
    ("wanted", "cores", "free_bytes", "expected"),
    [
        (12, 32, 100 * GIB, 8),  # one for each unit
        (3, 16, 100 * GIB, 3),
        (8, 8, 100 * GIB, 4),
        (8, 16, 6 * GIB, 3),  # half of what is free, by a GiB each
        (8, 2, 100 * GIB, 0),
        (8, 16, GIB, 0),
        (8, 16, -GIB, 0),
        (0, 16, 100 * GIB, 0),
    ],
)
def test_processes_are_as_many_as_there_are_cores_and_memory_for(
    wanted: int, cores: int, free_bytes: int, expected: int
) -> None:
    count, why = shares.num_processes(wanted, cores, len(UNITS), free_bytes, 1024 * MIB)
    assert count == expected and why


def test_a_miniature_takes_its_own_layers_and_what_lies_around_them(folder: Path) -> None:
    found = read_shapes(folder)
    of_layers = {name: shape for name, shape in found.items() if ".layers." in name}
    total = model_bytes(folder)
    assert 0 < shares.process_bytes(found, total) - shares.CONTEXT_BYTES < total
    assert shares.process_bytes(of_layers, 1000) == shares.CONTEXT_BYTES + 400  # two of five


def test_a_job_arrives_as_it_was_sent() -> None:
    job = Job(("draws",), {"kv_format": "4/3"}, "model", 7, "own", ("a", "b"), "ended", (9, 0), 4, 2.5)
    assert Job.from_json(job.to_json()) == job
    without = Job((), {}, "", 7, "", (), "", None, 1, 0.0)
    assert Job.from_json(without.to_json()) == without


OTHERS: dict[str, Any] = {
    "kv_format": "4/3",
    "projections": "off",
    "keep_graphs": "off",
    "speculate": "lookup",
    "draft_model": "other",
    "adapters": ("a=b",),
    "max_running": 3,
}


def test_a_mark_is_of_all_that_decides_what_is_compiled_and_of_nothing_else() -> None:
    shapes = {"model.embed_tokens.weight": (8, 4)}

    def mark(**changed: Any) -> str:
        told = {"config": CONFIG, "shapes": shapes, "device": "H200", "sources": "1", **changed}
        settings = told.pop("settings", Settings())
        return shares.fingerprint(settings=settings, **told)

    assert set(OTHERS) == set(OF_KERNELS)
    marks = [mark(settings=Settings(**{name: value})) for name, value in OTHERS.items()]
    marks += [mark(config=CONFIG | {"hidden_size": 256}), mark(shapes={}), mark(device="H100"), mark(sources="2")]
    assert len({mark(), *marks}) == len(marks) + 1
    assert mark(settings=Settings(port=9, api_key="k", log_level="debug")) == mark()
