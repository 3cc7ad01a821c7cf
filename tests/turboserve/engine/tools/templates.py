"""Chat templates in the manner of several families, and a small tokenizer with their markers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from turboserve.engine.model_folder import EMBEDDED_DIR

QWEN = """\
{%- for m in messages %}<|im_start|>{{ m.role if m.role != 'tool' else 'user' }}
{% if m.role == 'tool' %}<tool_response>
{{ m.content }}
</tool_response>{% else %}{{ m.content or '' }}{% endif %}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# The arguments' text is taken as it is: an object would be shown in Python's notation.
STRINGS = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Concatenates: an object as arguments raises, and so does content that is null.
CONCATENATING = """\
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}
{%- for call in m.tool_calls or [] %}{{ call['function']['name'] + ' ' + call['function']['arguments'] }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Loops over the arguments, as templates of XML-like calls do, and refuses content beside them: null must stay null.
ITEMS = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.tool_calls %}{% if m.content is defined %}{{ raise_exception('content beside calls') }}{% endif %}
{%- for call in m.tool_calls %}<tool_call>{{ call.function.name }}
{%- for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>
{%- set text = value if value is string else value | tojson %}<arg_value>{{ text }}</arg_value>{% endfor %}</tool_call>
{%- endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Insists on ids of nine letters and digits, and knows no system message.
MISTRAL = """\
{%- for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS][
{%- for call in m.tool_calls %}{% if call.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}
{{- {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} | tojson }}
{%- if not loop.last %}, {% endif %}{% endfor %}]<|im_end|>
{%- elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}
{{- '[TOOL_RESULTS]' }}{{ {"content": m.content, "call_id": m.tool_call_id} | tojson }}[/TOOL_RESULTS]
{%- elif m.role == 'assistant' %}{{ m.content }}<|im_end|>
{%- else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"""

LLAMA = """\
{%- for m in messages %}<|im_start|>{{ m.role if m.role != 'tool' else 'ipython' }}
{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}}
{%- else %}{{ m.content | trim }}{% endif %}<|im_end|>
{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Knows nothing of functions, and shows the content of all messages alike.
IGNORANT = """\
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Refuses what it does not know.
STRICT = """\
{%- for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('only two roles') }}{% endif %}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

THINKING = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}
{%- set content = m.content.split('</think>')[-1].lstrip() %}
{%- if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ content }}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% else %}<think>

</think>

{% endif %}{% endif %}"""


def tokenizer_with(
    template: str | None = None, added: Sequence[str] = (), special: Sequence[str] = (), parser: str | None = None
) -> Any:
    """The embedded model's tokenizer with another template, more tokens, and the parser of another model."""
    inner = load(EMBEDDED_DIR, {"trust_remote_code": False})._tokenizer
    inner.add_tokens(list(added))
    inner.add_tokens(list(special), special_tokens=True)
    if template is not None:
        inner.chat_template = template
    if parser is None:
        return TokenizerWrapper(inner)
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    return TokenizerWrapper(
        inner,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
        tool_parser=module.parse_tool_call,
    )
