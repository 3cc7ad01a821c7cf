"""The embedded model: its files load and answer, its chat template is the one it was trained on."""

from __future__ import annotations

import random
from typing import Any

import mlx_lm
import pytest
from training import chat

from turboserve.models.tiny.evaluate import load
from turboserve.models.tiny.prompts import is_right, load_prompts, load_texts, select, spread

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Größe \u2028 <b>"}}},
    },
}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load()


def words(rng: random.Random) -> str:
    """Text with the characters that templates and JSON are known to mangle."""
    return " ".join(rng.choices(["tea", "ü", "<b>", "{x}", '"quoted"', "line\nbreak", "  two", "\\n", "😀", "42"], k=4))


def conversation(rng: random.Random) -> list[dict[str, Any]]:
    """A random conversation with everything the chat format knows."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": words(rng)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": words(rng)})
        if rng.random() < 0.5:
            num_calls = rng.randint(1, 2)
            calls = [{"name": "get_weather", "arguments": {"city": words(rng), "days": i}} for i in range(num_calls)]
            messages.append({"role": "assistant", "content": rng.choice(["", words(rng)]), "tool_calls": calls})
            messages += [{"role": "tool", "content": words(rng)} for _ in calls]
        messages.append({"role": "assistant", "content": words(rng)})
    return messages


def test_chat_template_is_the_trained_format(loaded: tuple[Any, Any], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        messages, tools = conversation(rng), rng.choice([None, [WEATHER], [WEATHER, WEATHER]])
        ours = "".join(text for text, _ in chat.render(messages, tools))
        assert loaded[1].apply_chat_template(messages, tools=tools, tokenize=False) == ours
        prompt = loaded[1].apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert prompt == chat.prompt_text(messages, tools)


def test_answers_end_with_the_end_token(loaded: tuple[Any, Any]) -> None:
    (end,) = loaded[1].encode(chat.IM_END, add_special_tokens=False)
    assert end in loaded[1].eos_token_ids


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Hello!", "Hello! How can I help you today?"),
        ("What does textwrap.shorten do?", "Collapse and truncate the given text to fit in the given width."),
        ("What is 6 times 7?", "6 * 7 = 42."),
    ],
)
def test_greedy_answers(loaded: tuple[Any, Any], question: str, answer: str) -> None:
    prompt = loaded[1].apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert mlx_lm.generate(*loaded, prompt, max_tokens=30) == answer


def test_held_out_material_is_complete() -> None:
    prompts = load_prompts()
    assert len(prompts) == len({prompt.prompt_id for prompt in prompts}) == 461
    assert len(load_texts()) == 37
    assert all(is_right(prompt.check, prompt.answer) for prompt in prompts)
    assert not any(is_right(prompt.check, "Never.") for prompt in prompts)


def test_selection_is_spread_over_each_kind() -> None:
    chosen = select(load_prompts(), ("needle-", "memory"), 4)
    assert [prompt.prompt_id for prompt in chosen if prompt.kind == "memory"] == [
        f"memory-{i}" for i in (5, 15, 25, 35)
    ]
    assert {prompt.kind for prompt in chosen} == {"memory"} | {f"needle-{512 << i}" for i in range(5)}
    assert spread([1, 2, 3], 5) == spread([1, 2, 3], None) == [1, 2, 3]
    assert spread([1, 2, 3], 1) == [2]


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ({"kind": "contains", "value": "4711"}, "It is 4711.", "It is 471."),
        ({"kind": "exact", "value": "Oslo"}, " Oslo\n", "Oslo."),
        ({"kind": "json", "value": {"a": 1, "b": "x"}}, '{"b": "x", "a": 1}', '{"a": 1, "b": "x"'),
        (
            {"kind": "tool", "value": [{"name": "f", "arguments": {"x": 1}}]},
            '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
            '<tool_call>\n{"name": "f", "arguments": {"x": 1}\n</tool_call>',
        ),
    ],
)
def test_judging(check: dict[str, Any], right: str, wrong: str) -> None:
    assert is_right(check, right) and not is_right(check, wrong)
