"""Which markers a model's tokenizer, template and parser use for calls and for reasoning.

Owns what is taken from mlx-lm's tokenizer wrapper; everything else in this package knows markers from here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Parser = Callable[[str, Any], Any]
"""mlx-lm's: text between the markers, and the functions, to one {"name", "arguments"} or a list of them."""

# What models without markers of their own are told to write by others, and many do.
DEFAULT_CALL = ("<tool_call>", "</tool_call>")
# Reasoning that mlx-lm does not look for.
_MORE_THINKING = (("[THINK]", "[/THINK]"), ("<think>", "</think>"))
# An added token of this kind is markup even where neither template nor parser names it.
_LOOKS_LIKE_MARKUP = re.compile(
    r"[<\[][^\s<>\[\]]*(?:tool|think|function|arg_(?:key|value)|channel)[^\s<>\[\]]*[>\]]", re.I
)


@dataclass(frozen=True, slots=True)
class Markup:
    """One model's markers.

    call_start, call_end  around a call, or around several; an empty end: the answer's end
    parser                of what stands between them; None: JSON alone
    think_start, _end     around reasoning; "": this model does none
    control               texts of added tokens that must not be forged, longest first
    visible_ids           special tokens that readers of an answer must see, and users must not, with their texts
    """

    call_start: str = DEFAULT_CALL[0]
    call_end: str = DEFAULT_CALL[1]
    parser: Parser | None = None
    parser_name: str = ""
    has_own_calls: bool = False  # the model was trained on these markers, as far as its tokenizer tells
    think_start: str = ""
    think_end: str = ""
    think_start_ids: tuple[int, ...] = ()
    think_end_ids: tuple[int, ...] = ()
    special: frozenset[str] = frozenset()
    ids_of_added: dict[str, int] = field(default_factory=dict)  # special or not
    control: tuple[str, ...] = ()
    visible_ids: dict[int, str] = field(default_factory=dict)
    special_ids: frozenset[int] = frozenset()
    template: str = ""

    @property
    def has_thinking(self) -> bool:
        return bool(self.think_start)


def markup_of(tokenizer: Any) -> Markup:
    """The markers of mlx-lm's TokenizerWrapper; one around a tokenizer without any has the default ones."""
    template = template_source(tokenizer)
    parser = getattr(tokenizer, "tool_parser", None)
    start, end = getattr(tokenizer, "tool_call_start", None), getattr(tokenizer, "tool_call_end", None)
    think_start, think_end = _thinking(tokenizer, template)
    sources = template + _module_source(parser) + think_start + think_end + (start or "") + (end or "")
    added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
    special_ids = {i for i, token in added.items() if token.special} | set(getattr(tokenizer, "all_special_ids", ()))
    special = {str(added[i]) for i in special_ids if i in added} | set(tokenizer.all_special_tokens)
    control = special | {
        text
        for text in map(str, added.values())
        if text.strip() and (text in sources or _LOOKS_LIKE_MARKUP.match(text))
    }
    markers = _module_source(parser) + think_start + think_end
    hidden = set(getattr(tokenizer, "eos_token_ids", ()))
    return Markup(
        call_start=start or DEFAULT_CALL[0],
        call_end=DEFAULT_CALL[1] if start is None else end or "",
        parser=parser,
        parser_name=_module_name(parser),
        has_own_calls=start is not None,
        think_start=think_start,
        think_end=think_end,
        think_start_ids=_ids(tokenizer, think_start),
        think_end_ids=_ids(tokenizer, think_end),
        special=frozenset(special),
        ids_of_added={str(token): i for i, token in added.items()},
        control=tuple(sorted((t for t in control if t), key=len, reverse=True)),
        visible_ids={i: str(added[i]) for i in special_ids - hidden if i in added and str(added[i]) in markers},
        special_ids=frozenset(special_ids),
        template=template,
    )


def template_source(tokenizer: Any) -> str:
    """The text of its chat template, of all that it has; "" where there is none."""
    renderer = getattr(tokenizer, "_chat_template", None)  # mlx-lm's own, in place of a template
    if renderer is not None:
        return _module_source(renderer)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        return template
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else ""


def _thinking(tokenizer: Any, template: str) -> tuple[str, str]:
    start, end = getattr(tokenizer, "think_start", None), getattr(tokenizer, "think_end", None)
    if start and end:
        return start, end
    return next(((s, e) for s, e in _MORE_THINKING if s in template and e in template), ("", ""))


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()


def _module_source(function: Callable[..., Any] | None) -> str:
    """A parser's source without the backslashes of its patterns: it names every marker that it reads."""
    module = inspect.getmodule(function)
    try:
        return inspect.getsource(module).replace("\\", "") if function is not None and module is not None else ""
    except (OSError, TypeError):
        return ""


def _module_name(parser: Parser | None) -> str:
    return getattr(parser, "__module__", "").rpartition(".")[2] if parser is not None else ""
