"""`turboserve bench serve` as users meet it: exit statuses, files, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.turboserve.bench_client import scripted
from tests.turboserve.bench_client.scripted import Script, scripted_server

from turboserve.cli.bench_serve import Options, api_url, end_tokens
from turboserve.cli.config import UsageError
from turboserve.cli.main import main

SMALL = ("--streams", "2", "--requests", "4", "--prompt-tokens", "60", "--answer-tokens", "5", "--warmup", "1")


def status_of(*options: str) -> object:
    with pytest.raises(SystemExit) as status:
        main(["bench", "serve", *options])
    return status.value.code


def test_one_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "r.json", tmp_path / "r.svg"
    with scripted_server(Script()) as script:
        assert status_of(script.url, *SMALL, "--json", str(files[0]), "--plot", str(files[1])) == 0
    output = capsys.readouterr()
    assert "time to first token, p99, ms" in output.out and "4 requests, none failed" in output.out
    assert "round 1/1: 4/4 answered" in output.err
    (server,) = json.loads(files[0].read_text())["servers"]
    assert server["counts"]["answer_tokens"] == 20 and server["model"] == "scripted"
    assert ElementTree.fromstring(files[1].read_text()).tag.endswith("svg")


def test_a_failed_request_is_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(Script([scripted.good, scripted.good, scripted.drops, scripted.errs])) as script:
        assert status_of(script.url, *SMALL) == 1
    output = capsys.readouterr()
    assert "4 requests, 2 FAILED" in output.out and "1 x connection dropped" in output.out
    assert "requests FAILED" in output.err


def test_two_servers_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(Script()) as first, scripted_server(Script()) as second:
        assert status_of(first.url, "--against", second.url, *SMALL, "--rounds", "2", "--model", "mine") == 0
    assert {body["model"] for body in first.bodies} == {"mine"}
    assert {body["model"] for body in second.bodies} == {"scripted"}
    assert len(first.bodies) == len(second.bodies) == 1 + 1 + 2 * 4
    output = capsys.readouterr()
    assert "A / B" in output.out and "2 rounds (medians)" in output.out
    rounds = [line.split()[0] for line in output.err.splitlines() if "round " in line]
    assert rounds == [first.url, second.url, second.url, first.url]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt-tokens", "long"), "--prompt-tokens long: expected tokens such as 300"),
        (("--answer-tokens", "9-3"), "--answer-tokens 9-3: expected"),
        (("--shared-prefix", "300"), "--shared-prefix 300: a shared prefix of 300 tokens needs longer prompts"),
        (("--rate", "0"), "--rate 0: expected a number above 0"),
        (("--ignore-eos", "nowhere"), "--ignore-eos nowhere: expected token ids"),
        (("--against", "localhost:8000"), "--against 'localhost:8000': expected a URL"),
        (("--json", "/nowhere/r.json"), "/nowhere/r.json: its folder does not exist"),
    ],
)
def test_options_that_cannot_be_used_are_status_2(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of("http://127.0.0.1:1", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"turboserve: {words}") and error.count("\n") == 1


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("http://127.0.0.1:1", "--requests", "1") == 1
    error = capsys.readouterr().err
    assert error.startswith("turboserve: no server answers at http://127.0.0.1:1/v1") and error.count("\n") == 1


def test_defaults_depend_on_what_is_given() -> None:
    one, two = Options().plan(1), Options().plan(2)
    assert (one.rounds, two.rounds, one.pace.num_requests, one.warm_up) == (1, 3, 32, 8)
    assert one.mix.seed != two.mix.seed, "prompts that a server has seen would be answered from its caches"
    assert Options(duration_s=5.0).plan(1).pace.num_requests is None
    assert Options(seed=3, warm_up=0, rounds=2).plan(2).mix.seed == 3


def test_urls() -> None:
    assert api_url("URL", "http://127.0.0.1:8000") == "http://127.0.0.1:8000/v1"
    assert api_url("URL", "http://127.0.0.1:8000/") == "http://127.0.0.1:8000/v1"
    assert api_url("URL", "https://host/openai/v1/") == "https://host/openai/v1"
    with pytest.raises(UsageError, match="expected a URL"):
        api_url("URL", "ftp://host")


def test_end_tokens_of_a_model_folder(tmp_path: Path) -> None:
    assert end_tokens("2, 32000") == (2, 32000)
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 6]}')
    assert end_tokens(str(tmp_path)) == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert end_tokens(str(tmp_path)) == (7,), "what generation ends with wins"
    (tmp_path / "generation_config.json").write_text("not JSON")
    assert end_tokens(str(tmp_path)) == (5, 6)
