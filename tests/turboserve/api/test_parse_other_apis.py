"""Any body of Anthropic's API or of the Responses API becomes a request or one of our errors, as /openapi.json says."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tests.turboserve.api.scripted import MODEL_ID
from tests.turboserve.api.test_parse import JSON, TEXT

from turboserve.api.anthropic.body import KINDS, CountTokensBody, MessagesBody
from turboserve.api.anthropic.request import parse_count, parse_messages
from turboserve.api.anthropic.routes import SHAPES as ANTHROPIC_SHAPES
from turboserve.api.model_names import ServedNames
from turboserve.api.openapi import ApiDescription
from turboserve.api.responses.body import ITEM_KINDS, TEXT_KINDS, ResponsesBody
from turboserve.api.responses.request import parse_response
from turboserve.api.responses.routes import SHAPES as RESPONSES_SHAPES
from turboserve.api.responses.store import ResponseStore
from turboserve.api.routes import router
from turboserve.api.validation import validated
from turboserve.errors import InvalidRequestError, ModelNotFoundError
from turboserve.messages import Request, SamplingParams

DOCUMENT = ApiDescription(router.routes, needs_key=False, shapes=(*ANTHROPIC_SHAPES, *RESPONSES_SHAPES)).document
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
STORE = ResponseStore(1, 1, 1)

TYPES = st.sampled_from([*KINDS, *ITEM_KINDS, *TEXT_KINDS, "image", "custom", "function", "any", "refusal", "alien"])
NAMES = ("role", "content", "text", "id", "name", "input", "tool_use_id", "thinking", "call_id", "output", "arguments")
PIECE = st.fixed_dictionaries(
    {},
    optional={
        "type": TYPES | JSON,
        **{name: TEXT | st.dictionaries(TEXT, JSON, max_size=1) | JSON for name in NAMES},
        "role": st.sampled_from(["user", "assistant", "system", "developer", "alien"]),
    },
)
PIECES = st.lists(PIECE, max_size=3)
# Mostly right at every level, so that deep ones are reached.
TURN = st.builds(
    lambda rest, role, content: {**rest, "role": role, "content": content},
    PIECE,
    st.sampled_from(["user", "assistant", "system", "developer"]),
    TEXT | PIECES | JSON,
)
RIGHT_PARTS = {
    kind: st.builds(lambda text, kind=kind: {"type": kind, "text": text}, TEXT) for kind in ("text", "input_text")
}
RIGHT_BLOCKS = st.lists(
    RIGHT_PARTS["text"]
    | st.builds(lambda text: {"type": "thinking", "thinking": text}, TEXT)
    | st.builds(lambda name, value: {"type": "tool_use", "id": name, "name": name, "input": {name: value}}, TEXT, JSON),
    max_size=3,
)
RIGHT_TURNS = st.lists(
    st.builds(lambda content: {"role": "user", "content": content}, TEXT | st.lists(RIGHT_PARTS["text"], max_size=2))
    | st.builds(lambda content: {"role": "assistant", "content": content}, TEXT | RIGHT_BLOCKS)
    | st.builds(
        lambda text: {"role": "user", "content": [{"type": "tool_result", "tool_use_id": text, "content": text}]}, TEXT
    ),
    min_size=1,
    max_size=4,
)
RIGHT_ITEMS = st.lists(
    st.builds(lambda content: {"role": "user", "content": content}, TEXT | st.lists(RIGHT_PARTS["input_text"]))
    | st.builds(lambda text: {"type": "function_call", "call_id": text, "name": text, "arguments": text}, TEXT)
    | st.builds(lambda text: {"type": "function_call_output", "call_id": text, "output": text}, TEXT)
    | st.builds(lambda text: {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}, TEXT),
    max_size=4,
)
INPUTS = st.lists(TURN | PIECE, max_size=3) | JSON
VALUES = JSON | PIECE | PIECES | st.integers(0, 3) | st.booleans()


def fields(model: Any) -> st.SearchStrategy[dict[str, object]]:
    names = [field.alias or name for name, field in model.model_fields.items()]
    return st.dictionaries(st.sampled_from([*names, "alien"]), VALUES, max_size=3)


def fits(model: type, body: object) -> bool:
    schema = {"$ref": f"#/components/schemas/{model.__name__}", "components": DOCUMENT["components"]}
    return bool(Draft202012Validator(schema).is_valid(body))


def check(request: Request) -> None:
    assert request.messages
    for message in request.messages:
        assert message["role"] in ("system", "user", "assistant", "tool") and isinstance(message["content"], str)
    assert request.add_generation_prompt is not request.continue_final_message
    assert 0 <= request.sampling.temperature <= 2 and 0 < request.sampling.top_p <= 1
    assert request.tools is None or request.tools.functions


def refused(error: InvalidRequestError | ModelNotFoundError) -> None:
    assert error.param and error.message and len(error.message) < 1000


@given(fields(MessagesBody), RIGHT_TURNS | INPUTS)
@QUICK
def test_any_body_of_anthropics_is_parsed_or_refused(parameters: dict[str, object], messages: object) -> None:
    body = {"max_tokens": 5, **parameters, "messages": messages}
    try:
        request, _ = parse_messages(
            body, request_id="msg_1", tenant="", names=ServedNames(MODEL_ID), sampling_defaults=SamplingParams()
        )
    except (InvalidRequestError, ModelNotFoundError) as error:
        return refused(error)
    check(request)
    assert fits(MessagesBody, body)
    assert parse_count(body, request_id="r", tenant="", names=ServedNames(MODEL_ID)).messages == request.messages
    assert fits(CountTokensBody, body)


@given(fields(ResponsesBody) | st.just({}), RIGHT_ITEMS | INPUTS)
@QUICK
def test_any_body_of_the_responses_api_is_parsed_or_refused(parameters: dict[str, object], items: object) -> None:
    body = {**parameters, "input": items}
    try:
        parsed = parse_response(
            validated(ResponsesBody, body),
            STORE,
            request_id="resp_1",
            tenant="",
            names=ServedNames(MODEL_ID),
            sampling_defaults=SamplingParams(),
        )
    except (InvalidRequestError, ModelNotFoundError) as error:
        return refused(error)
    check(parsed.request)
    assert fits(ResponsesBody, body)
    assert all(isinstance(item["id"], str) for item in parsed.items)


def test_the_strategies_reach_both_ends() -> None:
    """Bodies that are accepted, and the schema's refusal of some that are not."""
    block = {"type": "text", "text": "a"}
    assert fits(MessagesBody, {"max_tokens": 5, "messages": [{"role": "user", "content": [block]}]})
    assert not fits(MessagesBody, {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "text"}]}]})
    part = {"type": "input_text", "text": "a"}
    assert fits(ResponsesBody, {"input": [{"role": "user", "content": [part]}]})
    assert not fits(ResponsesBody, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]})
