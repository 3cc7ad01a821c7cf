"""`turboserve plan` with a trial of its own, and its bytes beside those of a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.e2e.server import Server

from turboserve.cli import plan
from turboserve.cli.main import main
from turboserve.settings import Settings


def test_the_model_is_tried_where_nothing_was_measured(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "TRIAL", ((1, 64), (3, 200)))
    monkeypatch.setattr(plan, "TRIAL_ANSWER", 8)
    out = tmp_path / "plan.json"
    wanted = ["--users", "20", "--context", "1K", "--cache-dir", str(cache_dir), "--json", str(out)]
    with pytest.raises(SystemExit) as ended:
        main(["plan", *wanted])
    assert ended.value.code == 0, capsys.readouterr().err
    said = json.loads(out.read_text())
    assert [point["streams"] for point in said["points"]] == [1, 3]
    assert all(point["step_s"] > 0 and point["prefill_tokens_per_s"] > 0 for point in said["points"])
    assert "turboserve-tiny: 20 users" in capsys.readouterr().out


def test_conversations_take_the_bytes_that_are_planned(server: Server) -> None:
    """Of a server in 4/3; rows that are exact are counted up to a step of their buffer."""
    server.client.chat.completions.create(
        model="turboserve-tiny",
        messages=[{"role": "user", "content": "The market near house 7 was red. " * 60}],
        max_tokens=4,
        extra_body={"session_id": "planned"},
    )
    shown = server.get("/v1/sessions/planned").json()
    model = plan.model_of(Settings())
    planned, held = model.kv_bytes("4/3", shown["tokens"]), shown["kv_bytes"]["total"]
    assert planned == pytest.approx(held, rel=0.03)
    assert model.kv_bytes("f16", shown["tokens"]) == shown["raw_equivalent_bytes"]
