"""`--kv-format auto` takes the smallest format within the limit, measures once, and says what it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turboquant_kv.cache.calibration import calibration_for
from turboserve.engine import format_choice
from turboserve.engine.format_choice import CANDIDATES, choose_format
from turboserve.engine.loaded_model import LoadedModel
from turboserve.engine.loading import held_out_text, load
from turboserve.machine_memory import detect_memory
from turboserve.settings import Settings


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(Settings(), lambda line: None, detect_memory())


def test_the_smallest_format_within_the_limit_is_taken_and_told(loaded: LoadedModel, tmp_path: Path) -> None:
    calibration = calibration_for(loaded.model, loaded.tokenizer, tmp_path, loaded.weights_fingerprint)
    lines: list[str] = []

    def choose(limit: float) -> str:
        return choose_format(loaded, calibration, limit, tmp_path, held_out_text(), lines.append)

    assert choose(5.0) == CANDIDATES[0]
    assert lines[-1].startswith(f"kv format auto: {CANDIDATES[0]}, mean KL 0.")
    (path,) = (tmp_path / "kv-format").glob("*.json")
    limit = 0.5 * json.loads(path.read_text())["kl"][CANDIDATES[0]]
    tighter = choose(limit)
    assert tighter in CANDIDATES[1:]
    known = json.loads(path.read_text())["kl"]
    assert known[tighter] <= limit < known[CANDIDATES[CANDIDATES.index(tighter) - 1]]
    lines.clear()
    assert choose(limit) == tighter
    assert not any("measuring" in line for line in lines), "figures are kept"


def test_no_format_is_f16_and_damaged_figures_are_measured_again(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def measured(loaded: object, calibration: object, name: str, text: str) -> float:
        asked.append(name)
        return 0.5

    monkeypatch.setattr(format_choice, "_worst_kl", measured)
    path = tmp_path / "kv-format" / f"{loaded.weights_fingerprint}.json"
    path.parent.mkdir()
    path.write_text('{"version": 1, "kl": [')
    lines: list[str] = []
    calibration = calibration_for(loaded.model, loaded.tokenizer, tmp_path, loaded.weights_fingerprint)
    assert choose_format(loaded, calibration, 0.1, tmp_path, "", lines.append) == "f16"
    assert asked == list(CANDIDATES)
    assert "measured again" in caplog.text
    assert "no format stays within 0.1 nats" in lines[-1]
