"""`turboserve bench serve` against a real server with the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.e2e.server import Server

from turboserve.cli.main import main
from turboserve.models.tiny import MODEL_PATH

OPTIONS = ("--streams", "2", "--requests", "4", "--warmup", "2", "--prompt-tokens", "200-400", "--answer-tokens", "16")


def test_a_round_of_ragged_streams(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.forget_sessions()
    file = tmp_path / "report.json"
    with pytest.raises(SystemExit) as status:
        main(["bench", "serve", server.url, *OPTIONS, "--ignore-eos", str(MODEL_PATH), "--json", str(file)])
    output = capsys.readouterr()
    assert status.value.code == 0, output.out + output.err
    (found,) = json.loads(file.read_text())["servers"]
    counts, figures = found["counts"], found["medians"]
    assert counts["failed"] == 0 and counts["answer_tokens"] == 4 * 16, "the bias keeps answers from ending early"
    assert counts["cached_tokens"] < 0.1 * counts["prompt_tokens"], "only the template's tokens are the same"
    assert counts["prompt_tokens"] == pytest.approx(counts["asked_prompt_tokens"], rel=0.05)
    assert counts["shortest_prompt"] >= 200 * 0.9 and counts["longest_prompt"] <= 400 * 1.1
    assert 0 < figures["ttft_p50_s"] <= figures["ttft_p99_s"] and figures["itl_p50_s"] > 0
    assert figures["tokens_per_s"] > 0 and figures["steady_tokens_per_s"] > 0
    stats = server.wait_until_idle()
    assert figures["kv_peak_bytes"] == pytest.approx(stats["kv_bytes"]["total"], rel=0.5)
    assert found["rounds"][0]["kv_peak"]["kv_format"] == stats["kv_format"]
