"""Simon Willison's `llm`, program and library: `python -m tests.clients.llm.check URL MODEL KEY`.

It learns the server from extra-openai-models.yaml in a folder of this check's own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = tempfile.TemporaryDirectory(prefix="llm-check-")
os.environ["LLM_USER_PATH"] = FOLDER.name  # before llm is imported, which reads its models there

import llm  # noqa: E402
import openai  # noqa: E402
from tests.clients.steps import (  # noqa: E402
    LONG_LIST_SCHEMA,
    PERSON_QUESTION,
    PERSON_SCHEMA,
    WEATHER_ANSWER,
    WEATHER_QUESTION,
    WEATHER_RESULT,
    Step,
    Target,
    run_steps,
)

CHAT, RESPONSES, COMPLETION = "served", "served-responses", "served-completion"


def model_of(target: Target, name: str = CHAT) -> Any:
    """The model as llm knows it from its file, with the target's key."""
    shared = {"model_name": target.model, "api_base": f"{target.url}/v1", "api_key_name": "turboserve"}
    can = {"supports_schema": True, "supports_tools": True}
    models = [
        {"model_id": CHAT, **shared, **can},
        {"model_id": RESPONSES, "responses": True, **shared, **can},
        {"model_id": COMPLETION, "completion": True, **shared},
    ]
    Path(FOLDER.name, "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    model = llm.get_model(name)
    model.key = target.key
    return model


def get_weather(city: str) -> str:
    """Get the weather in a city"""
    return WEATHER_RESULT


def several_turns(target: Target) -> None:
    for name in (CHAT, RESPONSES):
        conversation = model_of(target, name).conversation()
        conversation.prompt("My name is Paula and I live in Lisbon.", temperature=0).text()
        assert "Paula" in conversation.prompt("What is my name?", temperature=0).text(), name


def a_stream_is_the_whole_answer(target: Target) -> None:
    for name in (CHAT, RESPONSES):
        model = model_of(target, name)
        whole = model.prompt("Who are you?", stream=False, temperature=0)
        streamed = model.prompt("Who are you?", stream=True, temperature=0)
        pieces = list(streamed)
        assert len(pieces) > 5 and "".join(pieces) == whole.text(), name
        assert streamed.usage() is not None and streamed.usage().output == whole.usage().output, name


def a_tool_round_trip(target: Target) -> None:
    """llm has no tool_choice: whether to call is the model's decision."""
    for name in (CHAT, RESPONSES):
        for stream in (False, True):
            chain = model_of(target, name).chain(
                WEATHER_QUESTION, tools=[get_weather], stream=stream, options={"temperature": 0}
            )
            assert chain.text().endswith(WEATHER_ANSWER), (name, chain.text())
            first = next(iter(chain._responses))
            assert [(call.name, call.arguments) for call in first.tool_calls()] == [("get_weather", {"city": "Lisbon"})]


def json_by_a_schema(target: Target) -> None:
    for name in (CHAT, RESPONSES):
        text = model_of(target, name).prompt(PERSON_QUESTION, schema=PERSON_SCHEMA, temperature=0).text()
        assert json.loads(text) == {"name": "Paula", "age": 31}, (name, text)


def completions_of_text(target: Target) -> None:
    assert model_of(target, COMPLETION).prompt("Once upon", temperature=0, max_tokens=8).text()


def embeddings(target: Target) -> None:
    """llm takes the server of its OpenAI embeddings from the environment alone."""
    from llm.default_plugins.openai_models import OpenAIEmbeddingModel

    os.environ["OPENAI_BASE_URL"] = f"{target.url}/v1"
    try:
        model = OpenAIEmbeddingModel("served-embeddings", target.model)
        model.key = target.key
        first, second = model.embed_multi(["a river", "a garden"])
    finally:
        del os.environ["OPENAI_BASE_URL"]
    assert len(first) == len(second) > 0 and first != second


def the_program_answers_and_keeps_a_log(target: Target) -> None:
    model_of(target)
    program = [sys.executable, "-m", "llm"]
    asked = [*program, "-m", CHAT, "-o", "temperature", "0", "--key", target.key]
    subprocess.run([*asked, "My name is Paula."], check=True, capture_output=True, timeout=120)
    reply = subprocess.run(
        [*asked, "--continue", "What is my name?"], check=True, capture_output=True, text=True, timeout=120
    )
    assert "Paula" in reply.stdout, reply.stdout


def cancelling_in_mid_stream(target: Target) -> None:
    """As its users do it: Ctrl-C."""
    model_of(target)
    program = [sys.executable, "-m", "llm", "-m", CHAT, "--key", target.key, "--schema", json.dumps(LONG_LIST_SCHEMA)]
    with subprocess.Popen([*program, "Count."], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            with target.expect_cancelled():
                process.stdout.read(10)
                process.send_signal(signal.SIGINT)
        finally:
            process.kill()


def errors_are_typed(target: Target) -> None:
    cases: list[tuple[type[openai.APIStatusError], str, dict[str, Any], str]] = [
        (openai.BadRequestError, target.key, {"logit_bias": {"99999999": 1}}, "Hello!"),
        (openai.BadRequestError, target.key, {}, "word " * 20_000),
        (openai.AuthenticationError, "wrong", {}, "Hello!"),
    ]
    for kind, key, options, text in cases:
        for stream in (False, True):
            model = model_of(target)
            model.key = key
            try:
                model.prompt(text, stream=stream, **options).text()
            except kind:
                continue
            raise AssertionError(f"no {kind.__name__} for {options}")


STEPS: list[Step] = [
    several_turns,
    a_stream_is_the_whole_answer,
    a_tool_round_trip,
    json_by_a_schema,
    completions_of_text,
    embeddings,
    the_program_answers_and_keeps_a_log,
    cancelling_in_mid_stream,
    errors_are_typed,
]

if __name__ == "__main__":
    run_steps(STEPS)
