"""Conversations and bare prompts to token ids, through the model's own chat template.

The template runs in transformers' sandboxed Jinja environment. Control text in what callers write stays text
(`control_text`); history and functions take the form that the template expects (`tools/history`). Leaves validation
of the messages' shape to the HTTP schema.

A model without a template gets the plain form

    User: ...
    Assistant: ...
    Assistant:
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from turboserve.engine.control_text import ControlTexts
from turboserve.engine.template_process import Patience, TemplateProcess, template_of, variables_of
from turboserve.engine.tools.dialect import Dialect, dialect_of
from turboserve.engine.tools.history import described_functions, shaped_messages
from turboserve.engine.tools.markup import Markup, markup_of
from turboserve.errors import ContextLengthError, EngineUnavailableError, InvalidRequestError, TurboServeError
from turboserve.messages import Request, ToolUse

Message = Mapping[str, object]

MAX_CHARS = 32 << 20  # of a rendered prompt; no model's context holds as many
USUAL_TIMEOUT_S = 10.0

# What transformers takes by these names is no variable of a template.
_RESERVED = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids and the text they are of.

    is_thinking  it ends inside the model's reasoning
    has_thought  it ends behind it: where thinking is switched off, templates write an empty one
    """

    ids: list[int]
    text: str
    is_thinking: bool = False
    has_thought: bool = False


class ChatTemplate:
    """Renders and tokenises for one tokenizer; not thread-safe, since tokenizers are not."""

    def __init__(self, tokenizer: Any, process: TemplateProcess | None = None, max_chars: int = MAX_CHARS) -> None:
        """`tokenizer`: mlx-lm's TokenizerWrapper around a transformers tokenizer.

        `process`: where its template is rendered, to at most `max_chars` characters; None: on the calling thread.
        """
        self._tokenizer, self._process, self._max_chars = tokenizer, process, max_chars
        self._patience = Patience(USUAL_TIMEOUT_S)  # with the prompt that is being read
        self.markup: Markup = markup_of(tokenizer)
        self._control = ControlTexts(self.markup)

    @cached_property
    def dialect(self) -> Dialect:
        """Tried out when a conversation first needs it."""
        return dialect_of(lambda messages, tools: self._render_raw(messages, tools, True, {}))

    def try_out(self) -> None:
        """Find out what the template expects, before the first prompt's time begins."""
        self._patience = Patience(USUAL_TIMEOUT_S)
        if self._tokenizer.has_chat_template:
            with suppress(EngineUnavailableError):  # the first prompt that needs it tries again
                _ = self.dialect

    def prompt_of(self, request: Request, vocab_len: int | None = None, *, patience: Patience | None = None) -> Prompt:
        """What the model reads for this request. Raises InvalidRequestError where there is nothing to read.

        With `patience`, also what its `check` raises.

        A bare prompt is tokenised as it is, with the special tokens that the tokenizer begins texts with; control text
        in it becomes control tokens, as it does for /v1/completions of vLLM and llama.cpp: whoever writes prompts
        without a template writes the markup. Token ids are taken as they are, below `vocab_len`.
        """
        self._patience = patience or Patience(USUAL_TIMEOUT_S)
        if request.prompt is not None:
            return self._bare(request.prompt, vocab_len)
        return self.chat_prompt(
            request.messages,
            request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            template_kwargs=request.template_kwargs,
        )

    def encode(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        """Token ids of the conversation up to where the assistant answers.

        Raises InvalidRequestError when the template refuses the messages or nothing remains.
        """
        return self.chat_prompt(messages, ToolUse(tuple(tools)) if tools else None).ids

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: ToolUse | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> Prompt:
        """The conversation as the model reads it. Functions are described unless they must not be called.

        continue_final_message: it ends with the last message's text, whatever the template puts behind a turn.
        Raises InvalidRequestError when the template refuses the messages, or the last one cannot be continued.
        """
        if reserved := _RESERVED & set(template_kwargs or ()):
            raise InvalidRequestError(
                f"{min(reserved)!r} cannot be set for the chat template.", param="chat_template_kwargs"
            )
        functions = described_functions(tools)
        shaped = shaped_messages(messages, functions, self._dialect_for(messages, functions), self.markup.template)
        guard = self._control.guard(shaped, functions, template_kwargs)
        plain = [guard.swap_message(message) for message in shaped]
        plain_tools = [guard.swap(tool) for tool in functions] if self._describes(functions) else []
        ending = ""
        if continue_final_message:
            ending = guard.mark + "end"
            plain[-1:] = [_to_be_continued(plain, ending)]
        rendered = self._render(
            plain, plain_tools, add_generation_prompt and not continue_final_message, guard.swap(template_kwargs or {})
        )
        if continue_final_message:
            rendered = _cut(rendered, ending, str(plain[-1]["content"]), self.markup)
        pieces = guard.split(rendered)
        ids = self._encode_pieces(pieces, with_bos=not self._tokenizer.has_chat_template)
        if not ids:
            raise InvalidRequestError("The prompt is empty.", param="messages")
        think_end = self.markup.think_end
        return Prompt(
            ids,
            "".join(text for text, _ in pieces),
            is_thinking=self._is_thinking(rendered, continue_final_message),
            has_thought=bool(think_end) and rendered.rstrip().endswith(think_end),
        )

    def _describes(self, functions: Sequence[Message]) -> bool:
        """Whether the template itself describes functions, where there are some."""
        return bool(functions) and self.dialect.describes

    def _dialect_for(self, messages: Sequence[Message], functions: Sequence[Message]) -> Dialect:
        has_calls = any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)
        return self.dialect if functions or has_calls else Dialect()

    def _bare(self, prompt: str | tuple[int, ...], vocab_len: int | None) -> Prompt:
        if isinstance(prompt, str):
            ids, text = list(self._tokenizer.encode(prompt)), prompt
        else:
            ids = list(prompt)
            limit = vocab_len if vocab_len is not None else len(self._tokenizer)
            if wrong := [token for token in ids if not 0 <= token < limit]:
                raise InvalidRequestError(
                    f"{wrong[0]} is no token of this model: ids go from 0 to {limit - 1}.", param="prompt"
                )
            text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if not ids:
            raise InvalidRequestError("The prompt is empty.", param="prompt")
        return Prompt(ids, text)

    def _is_thinking(self, rendered: str, is_continued: bool) -> bool:
        """Whether the template opened reasoning for the answer, or the message to continue did so."""
        start, end = self.markup.think_start, self.markup.think_end
        if not start:
            return False
        if not is_continued:
            return rendered.rstrip().endswith(start)
        return rendered.rfind(start) > rendered.rfind(end)

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, object],
    ) -> str:
        try:
            rendered = self._render_raw(messages, tools, add_generation_prompt, template_kwargs)
        except TurboServeError:  # ours: too long, too late, or not by this template's doing
            raise
        except Exception as exc:  # templates are programs: anything can come out of one
            reason = str(exc).strip() or type(exc).__name__
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {reason[:500]}", param="messages"
            ) from exc
        if not isinstance(rendered, str):
            raise InvalidRequestError("The model's chat template did not produce text.", param="messages")
        return rendered

    def _render_raw(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, object],
    ) -> Any:
        if not self._tokenizer.has_chat_template:
            return _plain_form(messages, add_generation_prompt)
        template = template_of(self._tokenizer, tools) if self._process is not None else None
        if template is not None:
            assert self._process is not None
            text = self._process.render(
                template,
                [{key: value for key, value in message.items() if value is not None} for message in messages],
                list(tools) or None,
                variables_of(self._tokenizer, template_kwargs),
                add_generation_prompt=add_generation_prompt,
                max_chars=self._max_chars,
                patience=self._patience,
            )
            if text is None:
                raise ContextLengthError(
                    f"The prompt is too long: with the model's chat template it has over {self._max_chars:,} "
                    "characters. Shorten the messages.",
                    param="messages",
                )
            return text
        return self._tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **template_kwargs,
        )

    def _encode_pieces(self, pieces: list[tuple[str, bool]], *, with_bos: bool) -> list[int]:
        ids: list[int] = []
        for index, (text, is_literal) in enumerate(pieces):
            self._patience.check()
            is_first = with_bos and index == 0
            if is_literal:
                ids += self._control.encode_literal(self._tokenizer, text, with_bos=is_first)
            else:
                ids += self._tokenizer.encode(text, add_special_tokens=is_first, split_special_tokens=False)
        return ids


def _to_be_continued(messages: Sequence[dict[str, Any]], ending: str) -> dict[str, Any]:
    last: Mapping[str, Any] = messages[-1] if messages else {}
    if last.get("role") != "assistant" or last.get("tool_calls"):
        raise InvalidRequestError(
            "Only an assistant's message without tool calls can be continued, and the last one is none.",
            param="continue_final_message",
        )
    return {**last, "content": str(last.get("content") or "") + ending}


def _cut(rendered: str, ending: str, content: str, markup: Markup) -> str:
    """The text up to the end of the last message, which must stand there as it was given."""
    before, mark, after = rendered.partition(ending)
    written = content.removesuffix(ending)
    answer = written.rpartition(markup.think_end)[2] if markup.think_end else written
    if not mark or ending in after or not before.endswith(answer.lstrip()):
        raise InvalidRequestError(
            "This model's chat template changes the last message, so that it cannot be continued.",
            param="continue_final_message",
        )
    return before


def _plain_form(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    lines = [f"{str(m['role']).capitalize()}: {m.get('content') or ''}\n" for m in messages]
    return "".join(lines) + ("Assistant:" if add_generation_prompt else "")
