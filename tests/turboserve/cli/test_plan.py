"""`turboserve plan`: bytes as the library counts them, speeds as they were measured, mistakes in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboserve.cli import plan
from turboserve.cli.main import main
from turboserve.settings import Settings
from turboserve.sizing.speeds import Speeds, fit

TRUE = Speeds(0.004, 0.001, 1e-9, 2000.0)
FORMAT = "4t/3t"


def run(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, and what was printed."""
    status = 0
    try:
        main(args)
    except SystemExit as exc:
        status = int(exc.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def report(model: plan.Model, streams: int, prompt: int, answer: int = 64, **changes: Any) -> dict[str, Any]:
    """What `bench serve --json` would have written of a machine of TRUE's speeds."""
    context, requests = prompt + answer / 2, 2 * streams
    step_s = TRUE.step_s(streams, model.kv_bytes(FORMAT, context))
    ttft_s = prompt / TRUE.prefill_tokens_per_s * (streams + 1) / 2 + step_s
    counts = {
        "requests": requests, "failed": 0, "prompt_tokens": prompt * requests, "cached_tokens": 0,
        "answer_tokens": answer * requests,
    }  # fmt: skip
    server = {
        "counts": counts, "medians": {"itl_p50_s": step_s, "ttft_p50_s": ttft_s},
        "rounds": [{"kv_peak": {"kv_format": FORMAT}}],
    }  # fmt: skip
    return {"plan": {"pace": {"streams": streams, "rate": None}}, "servers": [{**server, **changes}]}


@pytest.fixture
def model() -> plan.Model:
    return plan.model_of(Settings())


@pytest.fixture
def files(model: plan.Model, tmp_path: Path) -> list[str]:
    found = []
    for streams, prompt in ((1, 300), (8, 300), (4, 3000)):
        path = tmp_path / f"{streams}-{prompt}.json"
        path.write_text(json.dumps(report(model, streams, prompt)))
        found += ["--measured", str(path)]
    return found


def test_speeds_come_back_from_reports(model: plan.Model) -> None:
    loads = ((1, 300), (8, 300), (4, 3000), (2, 1000))
    points = [point for load in loads for point in plan.points_of(report(model, *load), model)]
    found = fit(points)
    assert (found.fixed_s, found.row_s, found.kv_s_per_byte) == pytest.approx(
        (TRUE.fixed_s, TRUE.row_s, TRUE.kv_s_per_byte), rel=1e-4
    )
    assert found.prefill_tokens_per_s == pytest.approx(2000.0, rel=1e-6)


def test_every_format_is_planned(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    wanted = ["--users", "1000", "--context", "4K", "--memory", "8GB", "--json", str(out)]
    assert run(["plan", *wanted, *files], capsys)[0] == 0
    said = json.loads(out.read_text())
    by_format = {one["kv_format"]: one for one in said["formats"]}
    assert list(by_format) == ["f16", "4t/3t", "3t/2t", "2t/2t"]
    machines = [one["need"]["machines"] for one in by_format.values()]
    assert machines == sorted(machines, reverse=True) and machines[0] > machines[-1] > 0
    for one in by_format.values():
        assert one["need"]["users_by_memory"] == one["budget_bytes"] // one["conversation_bytes"]
    assert max(abs(point["error"]) for point in said["points"]) < 1e-6


def test_the_plan_is_a_table(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = run(["plan", "--users", "50", "--context", "8K", "--memory", "8GB", *files], capsys)
    lines = printed.splitlines()
    assert status == 0 and lines[0].startswith("turboserve-tiny: 50 users, each with 8,192 tokens")
    assert lines[4].split()[0] == "format" and [line.split()[0] for line in lines[5:9]] == [
        "f16",
        "4t/3t",
        "3t/2t",
        "2t/2t",
    ]
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--users", "0"], "--users"),
        (["--context", "0"], "--context 0: expected tokens"),
        (["--context", "many"], "--context many: expected tokens"),
        (["--formats", "5/1"], "--formats 5/1: expected"),
        (["--memory", "much"], "--memory much: expected an amount"),
        (["--think", "-1"], "--think -1: expected a number of 0 or more"),
        (["--min-rate", "0"], "--min-rate 0: expected a number above 0"),
        (["--max-ttft", "nan"], "--max-ttft nan: expected"),
    ],
)
def test_mistakes_are_one_line(changes: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--users": "5", "--context": "4K"} | {changes[0]: changes[1]}
    status, _, error = run(["plan", *(word for pair in given.items() for word in pair)], capsys)
    assert status == 2 and words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"servers": []}', '{"servers": [1], "plan": 3}', "\xff", "[" * 9999]
)
def test_files_that_hold_no_measurement_are_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.json"
    path.write_text(content)
    status, _, error = run(["plan", "--users", "5", "--context", "4K", "--measured", str(path)], capsys)
    assert status == 1 and "one.json is no report" in error and len(error.splitlines()) == 1


NOT_SENSIBLE = [
    *(("streams", value) for value in (0, -1, 1.5, "8", None, [1], True, 1 << 31, float("nan"), 10**300)),
    *(("requests", value) for value in (0, -8, 1 << 31, float("inf"))),
    *(("failed", value) for value in (-1, 9)),
    *(("prompt_tokens", value) for value in (-300, 8 * 10**18, 8 * 10**300, float("nan"))),
    *(("answer_tokens", value) for value in (-1, 0, 1 << 40)),
    *(("cached_tokens", value) for value in (-1, 2400, 10**9)),
    *(("itl_p50_s", value) for value in (0, -1, 1e-300, float("nan"), float("inf"), 10**400, "1", None)),
    *(("ttft_p50_s", value) for value in (0.0, -0.2, 1e9, float("nan"), float("inf"))),
    *(("kv_format", value) for value in ("zz", 5, None, "9/9")),
]


@pytest.mark.parametrize(("key", "value"), NOT_SENSIBLE, ids=str)
def test_a_figure_that_nothing_can_measure_is_named(
    key: str, value: object, files: list[str], model: plan.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = report(model, 4, 300)
    server = said["servers"][0]
    tables = said["plan"]["pace"], server["counts"], server["medians"], server["rounds"][0]["kv_peak"]
    (holder,) = (table for table in tables if key in table)
    holder[key] = value
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(said))
    wanted = ["--users", "5", "--context", "4K", "--memory", "8GB"]
    status, printed, error = run(["plan", *wanted, *files, "--measured", str(path)], capsys)
    assert (status, printed) == (1, "") and len(error.splitlines()) == 1
    assert "odd.json is no report" in error and f"{key} is " in error


def test_extreme_figures_give_a_plan_or_one_line(
    model: plan.Model, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    most = plan.MAX_COUNT - 1
    for _ in range(60):
        given = []
        for number in range(int(rng.integers(2, 4))):
            streams, prompt, answer = (int(2 ** rng.uniform(0, 31)) for _ in range(3))
            said = report(model, streams, 300)
            said["servers"][0]["counts"] = {
                "requests": int(rng.choice([1, 8, most])), "failed": 0, "prompt_tokens": min(prompt, most),
                "answer_tokens": min(answer, most), "cached_tokens": int(prompt * rng.uniform(0, 0.99)),
            }  # fmt: skip
            seconds = {key: float(10 ** rng.uniform(-9, 6)) for key in ("itl_p50_s", "ttft_p50_s")}
            said["servers"][0]["medians"] = seconds
            path = tmp_path / f"{number}.json"
            path.write_text(json.dumps(said))
            given += ["--measured", str(path)]
        status, printed, error = run(["plan", "--users", "5", "--context", "4K", "--memory", "8GB", *given], capsys)
        if status:
            assert status == 1 and len(error.splitlines()) == 1, error
        else:
            assert not re.search(r"nan|\binf|(?<![\w.])-[0-9]", printed), printed


def test_what_failed_or_went_at_a_rate_is_no_measurement(
    model: plan.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = report(model, 1, 300)
    failed["servers"][0]["counts"]["failed"] = failed["servers"][0]["counts"]["requests"]
    rated = report(model, 1, 300)
    rated["plan"]["pace"]["rate"] = 3.0
    for content, why in ((failed, "no request succeeded"), (rated, "at a rate")):
        path = tmp_path / "one.json"
        path.write_text(json.dumps(content))
        _, _, error = run(["plan", "--users", "5", "--context", "4K", "--measured", str(path)], capsys)
        assert why in error


def test_one_load_is_not_enough(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(["plan", "--users", "5", "--context", "4K", *files[:2]], capsys)
    assert status == 1 and "at least two runs" in error


def test_a_machine_without_room_is_refused_with_the_figures(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run(["plan", "--users", "5", "--context", "4K", "--memory", "1MB", *files], capsys)
    assert status == 1 and "Not enough memory" in error
