"""What applies where a request says nothing: the model's generation_config.json, and the limit of an answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.turboserve.engine.fakes import MAX_CONTEXT, make_loop, make_parts, request, run

from turboserve.engine.loading import load
from turboserve.engine.model_folder import EMBEDDED_DIR
from turboserve.engine.sampling_defaults import FILE, chosen_defaults, described, read_sampling_defaults
from turboserve.machine_memory import MemoryInfo
from turboserve.messages import SamplingParams
from turboserve.settings import Settings


def write(folder: Path, content: object) -> Path:
    (folder / FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("config", "defaults"),
    [
        # A published chat model's.
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
            SamplingParams(0.7, 0.8, 20, repetition_penalty=1.05),
        ),
        ({"temperature": 0.6, "min_p": 0.05, "top_k": -1}, SamplingParams(0.6, min_p=0.05)),
        ({"do_sample": False, "eos_token_id": 3}, SamplingParams(0.0)),
        (
            {"do_sample": False, "temperature": 0.6, "top_k": 5, "repetition_penalty": 1.1},
            SamplingParams(0.0, repetition_penalty=1.1),
        ),
        ({"do_sample": None, "max_new_tokens": 5}, SamplingParams()),
        ({"temperature": None, "top_p": 1}, SamplingParams()),
    ],
)
def test_the_models_own_values(tmp_path: Path, config: dict[str, Any], defaults: SamplingParams) -> None:
    assert read_sampling_defaults(write(tmp_path, config)) == defaults
    assert chosen_defaults("openai", tmp_path) == SamplingParams()


@pytest.mark.parametrize(
    "config",
    [
        *({"temperature": value} for value in (-0.1, 2.1, "0.5", True, [1])),
        *({"top_p": value} for value in (0, 1.5)),
        *({"top_k": value} for value in (-2, 1.5)),
        *({"min_p": 2}, {"repetition_penalty": 0}, [], "{", '"text"', '{"top_p": NaN}'),
    ],
)
def test_what_no_request_could_say_is_left_out_and_told(
    tmp_path: Path, config: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_sampling_defaults(write(tmp_path, config)) == SamplingParams()
    assert FILE in caplog.text


def test_without_a_file_openais_values_apply(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingParams() and not caplog.text
    assert described(SamplingParams()) == "temperature 1"
    assert described(SamplingParams(0.7, 0.8, 20)) == "temperature 0.7, top_p 0.8, top_k 20"


def test_loading_reads_and_tells_them() -> None:
    lines: list[str] = []
    loaded = load(Settings(dequantize="never"), lines.append, MemoryInfo(1 << 40, 1 << 40))
    assert loaded.sampling_defaults == read_sampling_defaults(EMBEDDED_DIR) == SamplingParams(0.0)
    assert [line for line in lines if line.startswith("sampling") and "temperature 0," in line]


def test_an_answer_ends_at_the_servers_limit_where_none_is_asked(model: Any) -> None:
    limited = run(make_loop(make_parts(model), default_max_tokens=11), request("a", "prompt", max_tokens=None))
    assert (len(limited[0].tokens), limited[0].finished.reason) == (11, "length")
    asked = run(make_loop(make_parts(model), default_max_tokens=11), request("a", "prompt", max_tokens=20))
    assert len(asked[0].tokens) == 20
    for setting in (0, 4096):
        (free,) = run(make_loop(make_parts(model), default_max_tokens=setting), request("a", "prompt", max_tokens=None))
        assert free.finished.usage.prompt_tokens + len(free.tokens) == MAX_CONTEXT
