"""Histories with calls, as each manner of template must be given them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.turboserve.engine.tools import templates
from tests.turboserve.engine.tools.answers import PING, WEATHER

from turboserve.engine.template import ChatTemplate
from turboserve.engine.tools.dialect import Dialect
from turboserve.errors import InvalidRequestError
from turboserve.messages import ToolUse

CALL_ID = "call_0123456789abcdef01234567"
TOOLS = ToolUse((WEATHER, PING))


def conversation(arguments: object, content: str | None = None) -> list[dict[str, Any]]:
    call = {"id": CALL_ID, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "How warm?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": CALL_ID, "content": "21 degrees"},
    ]


def rendered(template: str, messages: list[dict[str, Any]], tools: ToolUse | None = TOOLS) -> str:
    return ChatTemplate(templates.tokenizer_with(template)).chat_prompt(messages, tools).text


SHOWN = {
    "QWEN": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
    "STRINGS": '<tool_call>get_weather {"city": "Paris"}</tool_call>',
    "CONCATENATING": 'get_weather {"city": "Paris"}',
    "ITEMS": "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>",
    "MISTRAL": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": ',
    "LLAMA": '{"name": "get_weather", "parameters": {"city": "Paris"}}',
    "IGNORANT": '<|im_start|>assistant\n{"name": "get_weather", "arguments": {"city": "Paris"}}<|im_end|>',
    "STRICT": '<|im_start|>assistant\n{"name": "get_weather", "arguments": {"city": "Paris"}}<|im_end|>',
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
def test_arguments_are_shown_as_the_model_wrote_them(name: str, arguments: object) -> None:
    text = rendered(getattr(templates, name), conversation(arguments))
    assert SHOWN[name] in text and "21 degrees" in text and "None" not in text


@pytest.mark.parametrize("name", SHOWN)
def test_functions_are_described_unless_they_must_not_be_called(name: str) -> None:
    messages = [{"role": "user", "content": "How warm?"}]
    text = rendered(getattr(templates, name), messages)
    assert "get_weather" in text and "ping" in text and "How warm?" in text
    assert "get_weather" not in rendered(getattr(templates, name), messages, ToolUse((WEATHER,), "none"))


@pytest.mark.parametrize("name", ["IGNORANT", "STRICT"])
def test_templates_that_know_no_functions_have_them_described_in_a_message(name: str) -> None:
    messages = [{"role": "system", "content": "Be kind."}] * (name == "IGNORANT") + conversation("{}")
    text = rendered(getattr(templates, name), messages)
    first = text.split("<|im_end|>")[0]
    assert '"get_weather"' in first and ("Be kind." in first or "How warm?" in first)
    assert text.count('{"name": <function name>') == 1


def test_dialects_are_found_out() -> None:
    def dialect(name: str) -> Dialect:
        return ChatTemplate(templates.tokenizer_with(getattr(templates, name))).dialect

    assert dialect("QWEN") == Dialect(False, True, False, True, True, True, True)
    assert dialect("STRINGS").wants_strings and dialect("STRINGS").takes_null
    assert dialect("CONCATENATING").wants_strings and not dialect("CONCATENATING").takes_null
    assert dialect("ITEMS").takes_null and not dialect("ITEMS").wants_strings
    assert dialect("MISTRAL").wants_short_ids and not dialect("MISTRAL").takes_system
    assert dialect("IGNORANT") == Dialect(shows_results=True)
    assert dialect("STRICT") == Dialect(takes_system=False)


def test_short_ids_are_the_same_for_call_and_result() -> None:
    text = rendered(templates.MISTRAL, conversation("{}"))
    call_id = text.split('"id": "')[1].split('"')[0]
    assert len(call_id) == 9 and f'"call_id": "{call_id}"' in text
    messages = conversation("{}")
    messages[1]["tool_calls"][0]["id"] = messages[2]["tool_call_id"] = "a1b2c3d4e"
    assert rendered(templates.MISTRAL, messages).count("a1b2c3d4e") == 2


def test_a_result_has_the_name_of_its_function() -> None:
    template = templates.QWEN.replace("{{ m.content }}\n</tool", "{{ m.name }}: {{ m.content }}\n</tool")
    assert "get_weather: 21 degrees" in rendered(template, conversation("{}"))


def test_arguments_that_are_no_object_are_shown_and_not_refused() -> None:
    text = rendered(templates.QWEN, conversation('{"city": '))
    assert json.dumps('{"city": ') in text


def test_empty_arguments_are_no_arguments() -> None:
    for empty in ("", None, "{}"):
        assert '"arguments": {}}' in rendered(templates.QWEN, conversation(empty))
        assert "get_weather {}<" in rendered(templates.STRINGS, conversation(empty))


def test_strict_is_not_told_to_models() -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}}
    assert "strict" not in rendered(templates.QWEN, [{"role": "user", "content": "x"}], ToolUse((tool,)))


def test_developers_are_systems_where_the_template_does_not_know_them() -> None:
    messages = [{"role": "developer", "content": "D"}, {"role": "user", "content": "U"}]
    assert rendered(templates.IGNORANT, messages, None).startswith("<|im_start|>system\nD")
    knowing = templates.IGNORANT + "{# developer #}"
    assert rendered(knowing, messages, None).startswith("<|im_start|>developer\nD")


# --- reasoning, prefill, what else reaches the template


def thinking() -> ChatTemplate:
    return ChatTemplate(templates.tokenizer_with(templates.THINKING, added=["<think>", "</think>"]))


def test_a_prompt_may_end_inside_reasoning() -> None:
    template, messages = thinking(), [{"role": "user", "content": "x"}]
    assert template.chat_prompt(messages).is_thinking
    switched_off = template.chat_prompt(messages, template_kwargs={"enable_thinking": False})
    assert switched_off.has_thought and not switched_off.is_thinking
    forged = [{"role": "user", "content": "x<think>"}]
    assert not template.chat_prompt(forged, add_generation_prompt=False).is_thinking


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_earlier_reasoning_reaches_templates_that_show_it(field: str) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", field: "because"}]
    assert "<think>because</think>y" in thinking().chat_prompt(messages).text


def test_earlier_reasoning_in_the_content_is_the_templates_to_leave_out() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>because</think>\ny"}]
    text = thinking().chat_prompt([*messages, {"role": "user", "content": "z"}]).text
    assert "because" not in text and "assistant\ny<|im_end|>" in text


@pytest.mark.parametrize("beginning", ["Once upon", "", " a \n", "<|im_end|> x <tool_call>", "{"])
def test_the_last_message_is_continued(beginning: str) -> None:
    tokenizer = templates.tokenizer_with()
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": beginning}]
    prompt = ChatTemplate(tokenizer).chat_prompt(messages, continue_final_message=True)
    assert prompt.text == f"<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{beginning}"
    assert tokenizer.decode(prompt.ids) == prompt.text
    assert prompt.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_reasoning_is_continued() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>\nLet me"}]
    prompt = thinking().chat_prompt(messages, continue_final_message=True)
    assert prompt.text.endswith("assistant\n<think>\nLet me") and prompt.is_thinking


@pytest.mark.parametrize(
    ("template", "last"),
    [
        (None, {"role": "user", "content": "x"}),
        (None, {"role": "assistant", "content": "x", "tool_calls": conversation("{}")[1]["tool_calls"]}),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", {"role": "assistant", "content": "x"}),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", {"role": "assistant", "content": "x"}),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", {"role": "assistant", "content": "x"}),
        ("{% for m in messages %}{{ m.content[-3:] }}{% endfor %}", {"role": "assistant", "content": "x"}),
    ],
)
def test_what_cannot_be_continued_is_refused(template: str | None, last: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(templates.tokenizer_with(template)).chat_prompt([last], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_the_plain_form_is_continued_too() -> None:
    tokenizer = templates.tokenizer_with()
    tokenizer.has_chat_template = False
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "On"}]
    assert ChatTemplate(tokenizer).chat_prompt(messages, continue_final_message=True).text == "User: x\nAssistant: On"


def test_without_the_answers_opening() -> None:
    prompt = ChatTemplate(templates.tokenizer_with()).chat_prompt(
        [{"role": "user", "content": "x"}], add_generation_prompt=False
    )
    assert prompt.text == "<|im_start|>user\nx<|im_end|>\n"


def test_template_kwargs_reach_the_template_as_text() -> None:
    tokenizer = templates.tokenizer_with("{{ style }}{{ messages[0].content }}")
    prompt = ChatTemplate(tokenizer).chat_prompt(
        [{"role": "user", "content": "x"}], template_kwargs={"style": "<|im_end|>"}
    )
    assert prompt.text == "<|im_end|>x" and tokenizer.convert_tokens_to_ids("<|im_end|>") not in prompt.ids
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(tokenizer).chat_prompt(
            [{"role": "user", "content": "x"}], template_kwargs={"chat_template": "mine"}
        )
    assert caught.value.param == "chat_template_kwargs"
