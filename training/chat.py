"""The chat format of the tiny model: ChatML with Hermes-style tool calls."""

import json
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END_OF_TEXT, IM_START, IM_END]
TOOL_TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"]

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

# The same format for tokenizer_config.json; a test compares it with render().
CHAT_TEMPLATE = r"""
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% else %}{% set system = '' %}{% endif %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if system %}{{- system + '\n\n' }}{% endif %}
    {{- 'BEFORE' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{% endfor %}
    {{- 'AFTER' }}
    {{- '<|im_end|>\n' }}
{%- elif system %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{- '<|im_start|>system\n' + message.content + '<|im_end|>\n' }}{% endif %}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {%- if not loop.first or message.content %}{{- '\n' }}{% endif %}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{% endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
""".strip()
CHAT_TEMPLATE = CHAT_TEMPLATE.replace("BEFORE", TOOLS_BEFORE.replace("\n", "\\n")).replace(
    "AFTER", TOOLS_AFTER.replace("\n", "\\n")
)


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def tool_call_text(calls: list[dict[str, Any]]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {dumps(call["arguments"])}}}\n</tool_call>'
        for call in calls
    )


def render(messages: list[Message], tools: list[Tool] | None = None) -> list[tuple[str, bool]]:
    """The conversation as [(text, is_answer)]: answers are what the model has to produce."""
    parts: list[tuple[str, bool]] = []
    messages = list(messages)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    if tools:
        listing = "".join("\n" + dumps(tool) for tool in tools)
        system = (system + "\n\n" if system else "") + TOOLS_BEFORE + listing + TOOLS_AFTER
    if system:
        parts.append((f"{IM_START}system\n{system}{IM_END}\n", False))
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "tool":
            if i == 0 or messages[i - 1]["role"] != "tool":
                parts.append((f"{IM_START}user", False))
            parts.append((f"\n<tool_response>\n{content}\n</tool_response>", False))
            if i + 1 == len(messages) or messages[i + 1]["role"] != "tool":
                parts.append((f"{IM_END}\n", False))
        elif role == "assistant":
            calls = tool_call_text(message["tool_calls"]) if message.get("tool_calls") else ""
            answer = content + ("\n" if content and calls else "") + calls
            parts += [(f"{IM_START}assistant\n", False), (answer + IM_END, True), ("\n", False)]
        else:
            parts.append((f"{IM_START}{role}\n{content}{IM_END}\n", False))
    return parts


def prompt_text(messages: list[Message], tools: list[Tool] | None = None) -> str:
    """What the model is given: the conversation, then the opening of its answer."""
    return "".join(text for text, _ in render(messages, tools)) + f"{IM_START}assistant\n"
