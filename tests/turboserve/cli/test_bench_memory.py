"""`turboserve bench memory`: figures that are those of the caches' formats, and mistakes that are told early."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from turboquant_kv.codec.format import KVFormat
from turboserve.cli.bench_memory import parse_wanted
from turboserve.cli.config import UsageError
from turboserve.cli.main import main

LAYERS, KV_HEADS, DIM = 8, 2, 128  # of the embedded model


def test_what_is_measured_is_what_formats_take(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = sorted(int(n) for n in rng.choice(np.arange(256, 700), 2, replace=False))
    file = tmp_path / "out.json"
    args = ["--formats", "f16,4/4,tiny", "--lengths", ",".join(map(str, lengths)), "--json", str(file)]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "memory", *args, "--cache-dir", str(tmp_path)])
    assert not ended.value.code
    rows = json.loads(file.read_text())
    assert [(row["kv_format"], row["num_tokens"]) for row in rows] == [
        (name, length) for name in ("f16", "4/4", "2t/2t") for length in lengths
    ]
    printed = capsys.readouterr().out
    assert "how many times smaller that is than uncompressed in float32 (raw)" in printed.splitlines()[0]
    for row in rows:
        assert row["kv_format"] in printed
        raw = LAYERS * KV_HEADS * DIM * 2 * 4 * row["num_tokens"]  # keys and values in float32
        assert row["raw_bytes"] == raw
        if row["kv_format"] == "f16":
            assert raw <= row["total_bytes"] < raw + LAYERS * KV_HEADS * DIM * 2 * 4 * 256, "grown by whole steps"
            continue
        fmt = KVFormat.parse(row["kv_format"])
        pages = fmt.num_pages(row["num_tokens"])
        assert row["compressed_bytes"] == LAYERS * pages * fmt.page_bytes(KV_HEADS, DIM, DIM)
        assert row["token_bytes"] == LAYERS * fmt.token_bytes(KV_HEADS, DIM, DIM)


@pytest.mark.parametrize(
    ("formats", "lengths", "words"),
    [("9/9", "1K", "no codec"), ("4/4", "1K,x", "such as 4096"), ("4/4", "255", "256 tokens or more")],
)
def test_mistakes_in_options(formats: str, lengths: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_wanted(formats, lengths)


def test_a_context_or_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, words in (
        (["--lengths", "17K"], "context of 16384 tokens"),
        (["--json", str(tmp_path / "no" / "x.json")], "there is no folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["bench", "memory", *args, "--cache-dir", str(tmp_path)])
        assert ended.value.code == 2 and words in capsys.readouterr().err
