"""Constraints end to end: the embedded model's answers at temperature 1, in an engine with other streams."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from tests.turboserve.engine.fakes import Sink
from tests.turboserve.engine.hard_grammars import hard_constraints

from turboserve.engine.engine import TurboEngine
from turboserve.engine.loading import build_parts
from turboserve.errors import InvalidRequestError
from turboserve.messages import Constraint, Event, Failed, Request, SamplingParams
from turboserve.settings import Settings

TIMEOUT_S = 120.0  # generous: only a hang reaches it

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "languages": {"type": "array", "items": {"enum": ["en", "fr", "de"]}, "minItems": 1, "maxItems": 3},
        "friend": {"anyOf": [{"$ref": "#/$defs/friend"}, {"type": "null"}]},
    },
    "required": ["name", "age", "languages", "friend"],
    "additionalProperties": False,
    "$defs": {"friend": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}},
}


class TimedSink(Sink):
    """Remembers when each event came as well."""

    def __init__(self) -> None:
        super().__init__()
        self.request_id = ""
        self.times_s: list[float] = []

    def put(self, event: Event) -> None:
        self.times_s.append(time.monotonic())
        super().put(event)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TurboEngine]:
    settings = Settings(
        kv_format="f16", kv_budget="256MiB", cache_dir=tmp_path_factory.mktemp("cache"), grammar_timeout_s=3.0
    )
    engine = TurboEngine(settings, build_parts, model_id="tiny")
    engine.start()
    engine.wait_until_ready(TIMEOUT_S)
    yield engine
    engine.stop()


def submit(engine: TurboEngine, constraint: Constraint | None, **options: Any) -> TimedSink:
    sink, seed = TimedSink(), secrets.randbits(31)
    print(f"seed={seed}")  # pytest shows it when the test fails
    messages = ({"role": "user", "content": "Tell me about somebody you know, as JSON."},)
    options = {"sampling": SamplingParams(temperature=1.0, seed=seed), "max_tokens": 150, **options}
    sink.request_id = secrets.token_hex(4)
    engine.submit(Request(sink.request_id, messages, constraint=constraint, **options), sink)
    return sink


def schema_of(schema: object) -> Constraint:
    return Constraint("json_schema", json.dumps(schema))


def test_answers_in_one_batch_are_each_what_was_asked_for(engine: TurboEngine) -> None:
    people = [submit(engine, schema_of(PERSON)) for _ in range(4)]
    choice = submit(engine, Constraint("choice", '["red", "green", "blue"]'))
    plate = submit(engine, Constraint("regex", "[A-Z]{2}-[0-9]{3}"))
    free = submit(engine, None, max_tokens=8)
    anything = submit(engine, Constraint("json_object"))
    assert all(sink.ended.wait(TIMEOUT_S) for sink in (*people, choice, plate, free, anything))
    assert choice.text in ("red", "green", "blue") and choice.finished.reason == "stop"
    assert re.fullmatch("[A-Z]{2}-[0-9]{3}", plate.text) and plate.finished.reason == "stop"
    assert free.finished.usage.completion_tokens <= 8
    ended = [sink for sink in people if sink.finished.reason == "stop"]
    assert ended, "none came to its end"
    for sink in ended:
        jsonschema.validate(json.loads(sink.text), PERSON, cls=jsonschema.Draft202012Validator)
    assert anything.finished.reason == "length" or isinstance(json.loads(anything.text), dict)


def test_an_answer_without_room_ends_by_length(engine: TurboEngine) -> None:
    sink = submit(engine, schema_of({"type": "string", "minLength": 2000}), max_tokens=10)
    assert sink.ended.wait(TIMEOUT_S)
    assert sink.finished.reason == "length" and sink.finished.usage.completion_tokens == 10
    assert sink.text.startswith('"')


def test_no_hard_constraint_holds_up_a_stream(engine: TurboEngine) -> None:
    """Each is refused in time, or begins to be answered, while a free stream's tokens keep coming."""
    free = submit(engine, None, max_tokens=3000, ignore_eos=True, skip_special_tokens=False)
    hard = hard_constraints()
    num_refused = num_long = 0
    for name in (
        "300 patterns of names",
        "multiples of a large prime",
        "9,000 properties",
        "rules that call each other",
    ):
        began_s = time.monotonic()
        sink = submit(engine, hard[name], max_tokens=2)
        assert sink.ended.wait(TIMEOUT_S)
        if isinstance(sink.events[-1], Failed):
            num_refused += 1
            assert isinstance(sink.error, InvalidRequestError) and sink.error.param == "response_format"
        ended_s = time.monotonic()
        if ended_s - began_s > 1.5:  # bench/structured.py measures gaps on a quiet machine
            num_long += 1
            assert sum(began_s < t < ended_s for t in free.times_s) >= 2
    engine.cancel(free.request_id)
    assert free.ended.wait(TIMEOUT_S)
    assert num_refused >= 2 and num_long >= 2


def test_what_becomes_too_much_work_fails_alone(engine: TurboEngine) -> None:
    free = submit(engine, None, max_tokens=60, ignore_eos=True)
    hard = submit(engine, hard_constraints()["counts that catch up"])
    assert hard.ended.wait(TIMEOUT_S) and free.ended.wait(TIMEOUT_S)
    assert isinstance(hard.error, InvalidRequestError) and "any further" in hard.error.message
    assert free.finished.usage.completion_tokens == 60
