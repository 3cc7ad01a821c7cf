"""What a server takes and how it counts, asked once before anything is measured.

The number of tokens of a prompt is known to the server's tokenizer alone: two prompts, answered by one token each, show
what the chat template takes, and what a word does: they differ by each of our words once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from turboserve.bench_client.asking import Clock, Outcome, Target, ask, error_message
from turboserve.bench_client.mix import WORDS, Ask, Mix, TokenScale
from turboserve.errors import StartupError

FEW = WORDS[:16]
# mlx_lm.server answers /v1/models with nothing where no model was ever downloaded.
NAMELESS = "name the model yourself (--model or --against-model; mlx_lm.server takes default_model)"
# What a strict server may refuse, from the harmless loss to the larger one.
OPTIONAL_FIELDS: tuple[tuple[str, ...], ...] = (
    (),
    ("stream_options",),
    ("logit_bias",),
    ("stream_options", "logit_bias"),
)
LOSSES = {
    "stream_options": "it refuses stream_options: without usage, tokens are pieces of text as streamed",
    "logit_bias": "it refuses logit_bias: answers may end early",
}


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found: the model to ask for, how prompts are counted, fields to leave out, and what to tell the user."""

    target: Target
    scale: TokenScale
    left_out: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


async def find_model(client: httpx.AsyncClient, target: Target) -> tuple[str, list[str]]:
    """The first model that the server lists, with notes. Raises StartupError."""
    try:
        reply = await client.get(f"{target.url}/models", headers=target.headers)
        _check_status(reply, target)
        names = [str(model["id"]) for model in reply.json()["data"]]
    except httpx.HTTPError as exc:
        raise StartupError(f"no server answers at {target.url}: {type(exc).__name__}: {exc}") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise StartupError(f"{target.url}/models lists no models; {NAMELESS}") from exc
    if not names:
        raise StartupError(f"{target.url}/models is empty; {NAMELESS}")
    notes = [f"{len(names)} models are listed, the first is asked; --model names another"] if len(names) > 1 else []
    return names[0], notes


def _check_status(reply: httpx.Response, target: Target) -> None:
    if reply.status_code != 200:
        hint = "; give its key with --api-key" if reply.status_code == 401 else ""
        raise StartupError(f"{target.url} answered {reply.status_code}: {error_message(reply.text)[:300]}{hint}")


async def probe(client: httpx.AsyncClient, target: Target, mix: Mix, timeout_s: float) -> Probe:
    """Everything that has to be known first; an empty `target.model` is looked up. Raises StartupError."""
    notes: list[str] = []
    if not target.model:
        model, notes = await find_model(client, target)
        target = Target(target.url, model, target.api_key)
    left_out = await _find_left_out(client, target, mix, timeout_s)
    notes += [LOSSES[name] for name in left_out]
    scale = await _calibrate(client, target, timeout_s)
    if scale is None:
        notes.append("it gives no usage: one token a word was assumed for prompts")
    return Probe(target, scale or TokenScale(), left_out, notes)


async def _find_left_out(client: httpx.AsyncClient, target: Target, mix: Mix, timeout_s: float) -> tuple[str, ...]:
    """Fields without which the server takes our requests; () is the rule."""
    body = mix.body(Ask(1, 1, " ".join(FEW)), target.model)
    first = ""
    for names in OPTIONAL_FIELDS:
        if not set(names) <= set(body):
            continue
        outcome = Outcome(0, 0, 0.0)
        kept = {key: value for key, value in body.items() if key not in names}
        await ask(client, target, kept, outcome, Clock(), timeout_s)
        if not outcome.error:
            return names
        first = first or f"{outcome.error}: {outcome.detail}"
        if outcome.error not in ("HTTP 400", "HTTP 422"):
            break
    raise StartupError(f"{target.url} does not answer a short request: {first}")


async def _calibrate(client: httpx.AsyncClient, target: Target, timeout_s: float) -> TokenScale | None:
    """None when the server does not count."""
    few_tokens = await _prompt_tokens(client, target, FEW, timeout_s)
    many_tokens = await _prompt_tokens(client, target, FEW + WORDS, timeout_s)
    if few_tokens is None or many_tokens is None or many_tokens <= few_tokens:
        return None
    per_word = (many_tokens - few_tokens) / len(WORDS)
    return TokenScale(per_word, few_tokens - per_word * len(FEW))


async def _prompt_tokens(client: httpx.AsyncClient, target: Target, words: list[str], timeout_s: float) -> int | None:
    body: dict[str, Any] = {
        "model": target.model,
        "messages": [{"role": "user", "content": " ".join(words)}],
        "max_tokens": 1,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json", **target.headers}
    try:
        reply = await client.post(
            f"{target.url}/chat/completions", content=orjson.dumps(body), headers=headers, timeout=timeout_s
        )
        _check_status(reply, target)
        return int(reply.json()["usage"]["prompt_tokens"])
    except httpx.HTTPError as exc:
        raise StartupError(f"{target.url} gave no answer: {type(exc).__name__}: {exc}") from exc
    except (ValueError, KeyError, TypeError):
        return None
