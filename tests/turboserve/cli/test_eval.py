"""`turboserve eval`: options are judged before anything is loaded; the table, JSON and drawing tell one story."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from turboquant_kv import evaluation
from turboquant_kv.cache import calibration
from turboquant_kv.cache.calibration import calibration_text
from turboserve.cli import eval as evaluating
from turboserve.cli.config import UsageError
from turboserve.cli.main import main
from turboserve.engine.kept_quality import kept_quality


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--formats", "4/4,9/9"], "--formats '9/9': expected balanced, compact, tiny"),
        (["--formats", "f16"], "--formats 'f16': f16 is what all others are compared with"),
        (["--offsets", "0,far"], "--offsets 'far': expected positions"),
        (["--offsets", "8K,8192"], "--offsets (8192, 8192): expected different positions"),
        (["--text", "absent.txt"], "--text absent.txt: No such file or directory"),
        (["--tokens", "5"], "--tokens 5: expected at least 64"),
        (["--needles", "1000"], "--needles 1000: expected 0 to 12"),
        (["--mode", "backwards"], "--mode 'backwards': expected prefill, decode, batch"),
        (["--json", "absent/figures.json"], "--json absent/figures.json: there is no folder absent"),
        (["--plot", "absent/figures.svg"], "--plot absent/figures.svg: there is no folder absent"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_line(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("turboserve.engine.loading.load", load)
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *options])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"turboserve: {line}") and shown.err.count("\n") == 1 and not shown.out


def test_a_folder_without_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(tmp_path)])
    assert stopped.value.code == 1
    assert "config.json" in capsys.readouterr().err.splitlines()[-1]


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match="UTF-8"):
        evaluating.read_texts([file])


def test_files_of_one_name_are_both_read(tmp_path: Path) -> None:
    files = [tmp_path / folder / "text.txt" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(file.parent.name)
    assert list(evaluating.read_texts(files).values()) == ["a", "b"]


def test_built_in_texts_are_long_and_share_nothing_with_each_other_or_the_calibration() -> None:
    texts = list(evaluating.built_in_texts().values())
    assert len(texts) == 4 and min(map(len, texts)) > 30_000
    paragraphs = [{p.strip() for p in text.split("\n\n") if len(p) > 120} for text in (*texts, calibration_text())]
    for i, mine in enumerate(paragraphs):
        assert len(mine) > 5
        for other in paragraphs[:i]:
            # a document's navigation may stand at the head of several
            assert len(mine & other) < 0.05 * len(mine)


def test_offsets_and_formats_are_read() -> None:
    assert evaluating.parse_offsets("0,8K,32768") == (0, 8192, 32768)
    assert evaluating.parse_formats("4,04/3,3t/2t,4/4") == ("4/4", "4/3", "3t/2t")


def test_the_embedded_model_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [rival for rival in evaluation.standard_rivals() if rival.name in ("r44", "q8_0")]  # all of them take longer
    monkeypatch.setattr(evaluation, "standard_rivals", lambda: few)
    monkeypatch.setattr(calibration, "NUM_TOKENS", 256)
    figures, drawing, text = tmp_path / "figures.json", tmp_path / "figures.svg", tmp_path / "text.txt"
    text.write_text(" ".join(f"Line {i} of a text says that {i * i} is the square of {i}." for i in range(40)))
    main_options = ["--formats", "4/4,2/2", "--rivals", "--text", str(text), "--text", __file__, "--tokens", "224"]
    files = ["--json", str(figures), "--plot", str(drawing), "--cache-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *main_options, "--needles", "1", "--offsets", "0,4K", *files])
    assert not stopped.value.code
    shown = capsys.readouterr()
    saved = json.loads(figures.read_text())
    assert (saved["version"], saved["model"], saved["mode"]) == (1, "turboserve-tiny", "prefill")
    assert [item["text"] for item in saved["texts"]] == ["text.txt", "test_eval.py"]
    rows = [line.split("|")[1:-1] for line in shown.out.splitlines() if line.startswith("|")]
    by_name = {row[0].strip(): row for row in rows if len(row) > 3}
    for result in saved["results"]:
        cells = by_name[result["name"]]
        kl = result["offsets"][0]["kl_mean"]
        assert cells[1].split() == [f"{kl['mean']:.5f}", f"+-{kl['high'] - kl['mean']:.5f}"]
        assert cells[-2].strip() == f"{result['bytes'][1]['ratio']:.2f}"
    kl_of = {result["name"]: result["offsets"][0]["kl_mean"]["mean"] for result in saved["results"]}
    assert set(kl_of) == {"4/4", "2/2", "r44", "q8_0"}
    assert kl_of["4/4"] < kl_of["2/2"] and max(kl_of["4/4"], kl_of["q8_0"]) < kl_of["r44"]
    ElementTree.parse(drawing)
    assert "at offset 4096" in shown.err
    (kept,) = (tmp_path / "quality").iterdir()
    known = {one.kv_format: one for one in kept_quality(tmp_path, kept.stem)}
    assert {name: one.kl_mean for name, one in known.items()} == {name: kl_of[name] for name in ("4/4", "2/2")}
    assert known["4/4"].num_tokens == sum(item["tokens"] for item in saved["texts"])
    kept.write_text(kept.read_text()[:-9])  # damaged: as if nothing had been measured
    assert kept_quality(tmp_path, kept.stem) == ()


def test_one_text_has_no_interval() -> None:
    from turboquant_kv.evaluation import Estimate

    assert evaluating.shown(Estimate.of([0.25]), ".2f") == "0.25 -"
    assert evaluating.shown(Estimate(0.25, 0.2, 0.3), ".2f") == "0.25 +-0.05"
