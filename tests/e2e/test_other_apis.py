"""The embedded model through Anthropic's client and through the Responses API of OpenAI's."""

from __future__ import annotations

from typing import Any

import anthropic
from tests.e2e.server import Server

QUESTION: list[Any] = [{"role": "user", "content": "Hello, who are you?"}]


def test_anthropics_client_gets_the_same_answer(server: Server) -> None:
    model = server.client.models.list().data[0].id
    chat = server.client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0, timeout=120) as client:
        options: Any = {"model": model, "max_tokens": 24, "messages": QUESTION, "extra_body": {"temperature": 0}}
        with client.messages.stream(**options) as stream:
            started = [event.message.usage for event in stream if event.type == "message_start"]
            streamed = stream.get_final_message()
        whole = client.messages.create(**options)
        counted = client.messages.count_tokens(model=model, messages=QUESTION).input_tokens
    assert streamed.content[0].text == whole.content[0].text == chat.choices[0].message.content  # type: ignore[union-attr]
    assert chat.usage is not None
    for usage in (streamed.usage, whole.usage):
        cached = usage.cache_read_input_tokens
        assert cached is not None and usage.input_tokens + cached == counted == chat.usage.prompt_tokens
        assert usage.output_tokens == chat.usage.completion_tokens
    assert [usage.input_tokens for usage in started] in ([counted], [0])  # 0: not counted in time


def test_a_response_continues_from_its_cache(server: Server) -> None:
    create = server.client.responses.create
    first = create(input="My name is Ada.", temperature=0, max_output_tokens=24)
    second = create(input="What is my name?", previous_response_id=first.id, temperature=0, max_output_tokens=24)
    said: list[Any] = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What is my name?"},
    ]
    again = create(input=said, temperature=0, max_output_tokens=24)
    assert second.output_text == again.output_text != ""
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    assert server.client.responses.retrieve(second.id) == second
