"""From a parsed JSON object to `messages.Request`s: what we support, what we refuse, and why.

Every refusal names the parameter. Messages never quote the prompt. No file is opened and no
name looked up anywhere: a model is served if its id, or its adapter's name, is a served one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from turboserve.api.chat_body import ChatBody, Reasoning, Thinking
from turboserve.api.chat_messages import plain_messages
from turboserve.api.chat_tools import tool_use
from turboserve.api.model_names import ServedNames
from turboserve.api.parameters import without_unsupported
from turboserve.api.sampling_request import checked_choices, choices_of, common_request, token_limit
from turboserve.api.validation import validated
from turboserve.errors import InvalidRequestError
from turboserve.messages import Request, SamplingParams
from turboserve.settings import DEFAULT_TEMPLATE_KWARGS, Settings


@dataclass(frozen=True, slots=True)
class ChatRules:
    """What of a body's acceptance the operator decides."""

    is_strict: bool = False  # what would be ignored is refused
    template_kwargs: frozenset[str] = frozenset(DEFAULT_TEMPLATE_KWARGS)
    max_choices: int = 32  # more than run at once would wait for one another

    @classmethod
    def of(cls, settings: Settings) -> ChatRules:
        """The rules that these settings say."""
        return cls(settings.strict_parameters, frozenset(settings.template_kwargs), settings.max_running)


NO_DEFAULTS, USUAL_RULES = SamplingParams(), ChatRules()


class Delivery(NamedTuple):
    """How the answer to a chat completion is to be written."""

    stream: bool  # as server-sent events, else whole
    include_usage: bool  # streams only: a last chunk with the token counts
    is_legacy: bool = False  # a call is a function_call, as OpenAI's first design had it
    shows_reasoning: bool = True
    shows_logprobs: bool = False


class ChatRequest(NamedTuple):
    """What to ask of the engine, how to answer, and which parameters had no say."""

    requests: tuple[Request, ...]  # one for each choice
    delivery: Delivery
    ignored: tuple[str, ...] = ()  # as the caller spelled them


def parse_chat(
    body: Mapping[str, object],
    *,
    request_id: str,
    tenant: str,
    names: ServedNames,
    session_headers: Iterable[str] = (),
    defaults: SamplingParams = NO_DEFAULTS,
    rules: ChatRules = USUAL_RULES,
) -> ChatRequest:
    """What to ask of the engine, and how to answer. `defaults` apply where the body says nothing.

    Raises ModelNotFoundError and every kind of InvalidRequestError, naming the parameter.
    """
    known, ignored = without_unsupported(body, is_strict=rules.is_strict)
    chat = validated(ChatBody, known, is_strict=rules.is_strict)
    adapter = names.adapter_of(chat.model)
    is_continued = _is_continued(chat)
    common = common_request(
        chat, request_id=request_id, tenant=tenant, defaults=defaults, session_headers=session_headers
    )
    request = replace(
        common,
        messages=plain_messages(chat.messages),
        num_top_logprobs=_num_top_logprobs(chat),
        tools=tool_use(chat),
        add_generation_prompt=chat.add_generation_prompt is not False and not is_continued,
        continue_final_message=is_continued,
        template_kwargs=_template_kwargs(chat, rules.template_kwargs),
        thinking_tokens=_thinking_tokens(chat),
        adapter=adapter,
    )
    delivery = Delivery(
        stream=bool(chat.stream),
        include_usage=bool(chat.stream_options and chat.stream_options.include_usage),
        is_legacy=bool(chat.functions),
        shows_reasoning=_shows_reasoning(chat),
        shows_logprobs=bool(chat.logprobs),
    )
    num_choices = checked_choices(request, chat.n or 1, rules.max_choices)
    return ChatRequest(tuple(choices_of(request, num_choices)), delivery, tuple(ignored))


def _num_top_logprobs(chat: ChatBody) -> int | None:
    if chat.logprobs:
        return chat.top_logprobs or 0
    if chat.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true.", param="top_logprobs")
    return None


def _is_continued(chat: ChatBody) -> bool:
    """Whether the last message is the beginning of the answer: an assistant's text is, unless the body says no."""
    last = chat.messages[-1]
    is_answer = last.role == "assistant" and not last.tool_calls and last.function_call is None
    if chat.continue_final_message:
        if not is_answer:
            raise InvalidRequestError(
                "continue_final_message: the last message is no assistant's text.", param="continue_final_message"
            )
        if chat.add_generation_prompt:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message exclude each other.", param="add_generation_prompt"
            )
        return True
    return is_answer and chat.continue_final_message is None and chat.add_generation_prompt is None


THINKING_BUDGETS = (
    "thinking_token_budget",
    "thinking_budget",
    "thinking_budget_tokens",
    "reasoning_budget_tokens",
    "max_thinking_tokens",
)
NO_REASONING = Reasoning()


def _thinking_tokens(chat: ChatBody) -> int | None:
    budget = token_limit(chat, *THINKING_BUDGETS)
    if budget is None and isinstance(chat.thinking, Thinking):
        budget = chat.thinking.budget_tokens
    if budget is None and chat.reasoning is not None:
        budget = chat.reasoning.max_tokens
    return None if budget == -1 else budget


def _shows_reasoning(chat: ChatBody) -> bool:
    return chat.include_reasoning is not False and not (chat.reasoning or NO_REASONING).exclude


def _template_kwargs(chat: ChatBody, allowed: frozenset[str]) -> dict[str, object]:
    """What the chat template is told; a template that does not know a name is not changed by it."""
    given = dict(chat.chat_template_kwargs or {})
    for name in given:
        if name not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            # Any other name may be somebody's text.
            param = "chat_template_kwargs" + (f".{name}" if re.fullmatch(r"[A-Za-z0-9_]{1,64}", name) else "")
            raise InvalidRequestError(f"{param}: this server passes {known} to chat templates.", param=param)
    kwargs: dict[str, object] = {}
    thinks, effort = _thinks(chat), _effort(chat)
    if thinks is not None:
        kwargs |= {"enable_thinking": thinks, "thinking": thinks}  # templates know one of the two names
    if effort not in (None, "none"):
        kwargs["reasoning_effort"] = effort
    return kwargs | given


def _effort(chat: ChatBody) -> str | None:
    spelled = (chat.reasoning_effort, (chat.reasoning or NO_REASONING).effort, chat.think)
    return next((effort for effort in spelled if isinstance(effort, str)), None)


def _thinks(chat: ChatBody) -> bool | None:
    """Whether the body asks the model to think before its answer; None: it does not say."""
    thinking = chat.thinking
    if isinstance(thinking, Thinking):
        thinking = {"enabled": True, "disabled": False}.get(thinking.type)
    for spelled in (chat.enable_thinking, thinking, chat.think, (chat.reasoning or NO_REASONING).enabled):
        if isinstance(spelled, bool):
            return spelled
    effort = _effort(chat)
    return None if effort is None else effort != "none"
