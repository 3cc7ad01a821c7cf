"""Any body becomes a request or one of our errors, and what is accepted is declared in /openapi.json."""

from __future__ import annotations

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.turboserve.api.contract import Contract
from tests.turboserve.api.scripted import MODEL_ID

from turboserve.api.body import parse_object
from turboserve.api.chat_body import MAX_TOKENS, ChatBody
from turboserve.api.chat_request import ChatRules, parse_chat
from turboserve.api.model_names import ServedNames
from turboserve.api.openapi import ApiDescription
from turboserve.api.parameters import PARAMETERS
from turboserve.api.routes import router
from turboserve.errors import InvalidRequestError, ModelNotFoundError
from turboserve.messages import Request

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "alien"])
FIELDS = st.sampled_from(
    ["content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", "reasoning", "alien"]
)
MESSAGES = st.lists(st.dictionaries(FIELDS, JSON, max_size=3) | JSON, max_size=3)
WITH_ROLE = st.lists(st.builds(lambda role, rest: {"role": role, **rest}, ROLES, st.dictionaries(FIELDS, JSON)))
NAMES = st.sampled_from([*ChatBody.model_fields, *(name for one in PARAMETERS for name in one.names), "alien"])
DECLARED = Contract(ApiDescription(router.routes, needs_key=False).document)
CHAT_BODY = {"$ref": "#/components/schemas/ChatBody"}
GOOD = st.just([{"role": "user", "content": "hi"}])


def parse(body: dict[str, object], *, is_strict: bool = False) -> Request | None:
    """The first choice's; None for a refusal, whose shape is checked."""
    try:
        requests, *_ = parse_chat(
            body, request_id="r", tenant="", names=ServedNames(MODEL_ID), rules=ChatRules(is_strict=is_strict)
        )
    except (InvalidRequestError, ModelNotFoundError) as error:
        assert error.param and error.message and error.status in (400, 404)
        assert len(error.message) < 1000
        return None
    return requests[0]


@given(st.dictionaries(NAMES, JSON, max_size=3), GOOD | MESSAGES | WITH_ROLE)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_object_is_parsed_or_refused(parameters: dict[str, object], messages: list[object]) -> None:
    request = parse({**parameters, "messages": messages})
    strictly = parse({**parameters, "messages": messages}, is_strict=True)
    if request is None:
        assert strictly is None
        return
    assert strictly in (None, request)
    DECLARED.validate(CHAT_BODY, {**parameters, "messages": messages})
    assert 1 <= len(request.messages) == len(messages)
    assert all(isinstance(message["content"], str) for message in request.messages)
    assert request.max_tokens is None or 1 <= request.max_tokens <= MAX_TOKENS
    assert 0 <= request.sampling.temperature <= 2 and 0 < request.sampling.top_p <= 1
    assert all(request.stop)
    assert not (request.add_generation_prompt and request.continue_final_message)


@given(st.binary(max_size=64) | JSON.map(repr).map(str.encode))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    try:
        value = parse_object(body)
    except InvalidRequestError as error:
        assert error.message
    else:
        assert orjson.loads(orjson.dumps(value)) == value
