"""What chat completions and bare prompts have in common, from body to `messages.Request`: all but the prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from turboserve.api.chat_body import INT64_MIN, SamplingBody
from turboserve.api.chat_tools import constraint
from turboserve.api.session_request import chosen_session, normal_kv_format
from turboserve.errors import InvalidRequestError
from turboserve.messages import Request, SamplingParams

# The body spells these as the engine does: a new one is added to both and is passed on.
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams) if field.name != "logit_bias")
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")  # names of one thing


def common_request(
    body: SamplingBody,
    *,
    request_id: str,
    tenant: str,
    defaults: SamplingParams,
    session_headers: Iterable[str] = (),
) -> Request:
    """Without messages and prompt. `defaults` apply where the body says nothing.

    Raises InvalidRequestError, naming the parameter.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream=true.", param="stream_options")
    max_tokens, min_tokens = token_limit(body, *TOKEN_LIMITS), body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequestError("min_tokens is larger than max_tokens.", param="min_tokens")
    return Request(
        request_id=request_id,
        sampling=_sampling(body, defaults),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        num_draft_tokens=body.num_draft_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        constraint=constraint(body),
        tenant=tenant,
        session_id=chosen_session(body.session_id, session_headers),
        kv_format=normal_kv_format(body.kv_format),
        cache_key=body.prompt_cache_key or None,
    )


def checked_choices(request: Request, num_choices: int, max_choices: int, num_prompts: int = 1) -> int:
    """The number of answers to each prompt.

    Raises InvalidRequestError for more in all than one request may have, or than continue a session.
    """
    if num_choices * num_prompts > max_choices:
        asked = "" if num_prompts == 1 else f"{num_choices} answers to each of {num_prompts} prompts are too many: "
        raise InvalidRequestError(f"n: {asked}at most {max_choices} answers of a request run together here.", param="n")
    if num_prompts > 1 and request.session_id is not None:
        raise InvalidRequestError("prompt: a session continues with one prompt, so give only one.", param="prompt")
    if num_choices > 1 and request.session_id is not None:
        raise InvalidRequestError("n: a session continues with one answer, so n must be 1.", param="n")
    return num_choices


def choices_of(request: Request, num_choices: int, first: int = 0) -> list[Request]:
    """Requests for the same prompt, the answers from the `first` on: with ids and, of a seed, seeds of their own."""
    return [
        replace(request, request_id=_choice_id(request, first + i), sampling=_reseeded(request.sampling, i))
        for i in range(num_choices)
    ]


def token_limit(body: SamplingBody, *names: str) -> int | None:
    """A number of tokens that several names stand for; None for none, which clients also spell -1."""
    number = _agreed(body, *names)
    return None if number is None or number < 0 else int(number)


def _choice_id(request: Request, choice: int) -> str:
    return f"{request.request_id}-{choice}" if choice else request.request_id


def _reseeded(sampling: SamplingParams, i: int) -> SamplingParams:
    """With one seed all choices would say the same."""
    if sampling.seed is None or not i:
        return sampling
    return replace(sampling, seed=(sampling.seed + i - INT64_MIN) % (1 << 64) + INT64_MIN)


def _sampling(body: SamplingBody, defaults: SamplingParams) -> SamplingParams:
    given = {name: getattr(body, name) for name in SAMPLING_FIELDS if getattr(body, name) is not None}
    repetition = _agreed(body, "repetition_penalty", "repeat_penalty")
    if repetition is not None:
        given["repetition_penalty"] = repetition
    if body.top_k == -1:
        given["top_k"] = 0
    if body.seed == -1:
        given["seed"] = None
    logit_bias = tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())
    return replace(defaults, **given, logit_bias=logit_bias or defaults.logit_bias)


def _agreed(body: SamplingBody, *names: str) -> float | None:
    """What several names of one parameter say. Raises InvalidRequestError where they say different things."""
    given = {name: value for name in names if (value := getattr(body, name, None)) is not None}
    if len(set(given.values())) > 1:
        raise InvalidRequestError(f"{' and '.join(given)} differ; give one of them.", param=list(given)[-1])
    return next(iter(given.values()), None)
