"""Every parameter that we know of a chat completion, and what becomes of it: data, and the table in docs/api.md.

honoured   a field of `ChatBody`; the answer follows it
no effect  nothing about the answer depends on it, or not by itself: passes unmentioned, whatever its value
ignored    the answer might be another elsewhere: passes, and is named in the log and in a reply's header
refused    the caller would take one thing for another: only values that ask for nothing pass

A name that is not in the table is ignored. With `strict_parameters` what is ignored is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from turboserve.errors import UnsupportedParameterError

logger = logging.getLogger("turboserve.api")

Status = Literal["honoured", "no effect", "ignored", "refused"]

NOTHING: tuple[object, ...] = (None, False, "", [], {})  # asks for nothing, whatever the parameter
IGNORED_HEADER = "X-TurboServe-Ignored"
MAX_NAMED = 16  # in one reply's header
MAX_LOGGED = 256  # names of unknown parameters in the log, ever: they are a caller's text
MAX_NAME_CHARS = 40


@dataclass(frozen=True)
class Parameter:
    """What becomes of some parameters that go together; `note` is the table's last column."""

    names: tuple[str, ...]
    status: Status
    note: str
    neutral: tuple[object, ...] = ()  # refused or ignored: further values that ask for nothing
    nothing: tuple[object, ...] = NOTHING

    def asks(self, value: object) -> bool:
        """Whether this value asks for anything."""
        # `0 == False` in Python, but not in JSON.
        passing = (*self.nothing, *self.neutral)
        return not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in passing)


def _honoured(names: str, note: str) -> Parameter:
    return Parameter(tuple(names.split()), "honoured", note)


def _no_effect(names: str, note: str) -> Parameter:
    return Parameter(tuple(names.split()), "no effect", note)


def _ignored(names: str, note: str, *neutral: object) -> Parameter:
    return Parameter(tuple(names.split()), "ignored", note, neutral)


def _refused(names: str, note: str, *neutral: object) -> Parameter:
    return Parameter(tuple(names.split()), "refused", note, neutral)


def _always_refused(names: str, note: str) -> Parameter:
    """Of these, an empty value asks for something too."""
    return Parameter(tuple(names.split()), "refused", note, nothing=(None,))


PARAMETERS: tuple[Parameter, ...] = (
    _honoured("messages", "1 to 4096 messages, see below; required"),
    _honoured("model", "the served model's id; without it the served model"),
    _honoured("temperature", "0 to 2; 0 is greedy; the model's own default, else 1"),
    _honoured("top_p", "above 0, up to 1; the model's own default, else 1"),
    _honoured("top_k", "0 to 1,000,000; 0 and -1 are off; the model's own default, else off"),
    _honoured("min_p", "0 to 1; the model's own default, else 0"),
    _honoured("presence_penalty frequency_penalty", "-2 to 2; 0"),
    _honoured(
        "repetition_penalty repeat_penalty",
        "0.01 to 10; two names of one thing, both only if equal; the model's own default, else 1",
    ),
    _honoured("logit_bias", "up to 1024 token ids, each -100 to 100"),
    _honoured("seed", "64-bit integer; -1 and none: random; further choices of `n` count on from it"),
    _honoured(
        "max_tokens max_completion_tokens n_predict",
        "1 to 1,000,000, or -1 for no limit of the caller's; several only if equal; the setting "
        "`default_max_tokens` (4,096; 0: none), at most what the context holds",
    ),
    _honoured("min_tokens", "up to `max_tokens`; before these no end token is drawn; 0"),
    _honoured(
        "num_draft_tokens", "tokens guessed ahead in a step where the server guesses, at most; 0: none; as it is set"
    ),
    _honoured("stop", "a string, or up to 16 of them, each 1 to 1000 characters"),
    _honoured("stop_token_ids", "up to 256 token ids that end the answer as the model's own end tokens do"),
    _honoured("ignore_eos", "the model's own end tokens do not end the answer; false"),
    _honoured("include_stop_str_in_output", "the stop string that ended the answer is part of it; false"),
    _honoured("skip_special_tokens", "control tokens are left out of the text; true"),
    _honoured("n", "1 to 128 answers, and at most `max_running`; with a session 1; 1"),
    _honoured("logprobs", "the drawn tokens' log-probabilities, in streams too; false"),
    _honoured("top_logprobs", "0 to 20 likeliest tokens beside each drawn one; needs `logprobs`"),
    _honoured("stream", "server-sent events instead of one reply; false"),
    _honoured("stream_options", "`include_usage`, with `stream` only: a last chunk with the token counts"),
    _honoured("tools", "up to 512 functions, see [Tools](#tools)"),
    _honoured(
        "tool_choice",
        "`auto`, `none`, `required` (also `any`), a function by name, or `allowed_tools`; `auto`",
    ),
    _honoured("parallel_tool_calls", "false: one answer holds one call at most; true"),
    _honoured("functions function_call", "OpenAI's first design of the same, answered in its shape"),
    _honoured("response_format", "`text`, `json_object`, `json_schema`, see [Structured output](#structured-output)"),
    _honoured(
        "structured_outputs guided_json guided_regex guided_choice guided_grammar",
        "vLLM's names; grammars are Lark's; one constraint for a request",
    ),
    _honoured("json_schema", "llama.cpp's name for a schema"),
    _honoured("add_generation_prompt", "false: no answer is opened behind the last message; true"),
    _honoured(
        "continue_final_message",
        "the last message, an assistant's, is the beginning of the answer; true if an assistant's text is last",
    ),
    _honoured("chat_template_kwargs", "names in the setting `template_kwargs`, with plain values; others are refused"),
    _honoured(
        "reasoning_effort",
        "passed to the chat template; `none` asks it not to think; models that do not know it are not changed",
    ),
    _honoured(
        "enable_thinking thinking think",
        "true, or `type` `enabled`: asks the chat template to think; false: not to: Qwen's, DeepSeek's, Ollama's names",
    ),
    _honoured(
        "reasoning", "OpenRouter's: `effort`, `max_tokens`, `enabled`, and `exclude` as a false `include_reasoning`"
    ),
    _honoured(
        "thinking_token_budget thinking_budget thinking_budget_tokens reasoning_budget_tokens max_thinking_tokens",
        "most tokens of reasoning, -1 for no limit: vLLM's, Qwen's, llama.cpp's and others' names; several only if "
        "equal",
    ),
    _honoured("include_reasoning", "false: reasoning is left out of the reply; true"),
    _honoured("session_id", "a name for the conversation, as the header `X-Session-Id`, see [Sessions](#sessions)"),
    _honoured(
        "kv_format",
        "`balanced`, `compact`, `tiny`, `f16`, or `KEY_CODEC/VALUE_CODEC` from 2, 3, 4, 8, 2t, 3t, 4t, such as `4/4`; "
        "the session's, else the server's",
    ),
    _honoured(
        "prompt_cache_key", "up to 1024 characters; of equally long kept prefixes, the one with this key is used"
    ),
    # OpenAI
    _no_effect("user metadata safety_identifier store service_tier", "for OpenAI's own books"),
    _no_effect("prediction", "a guess at the answer, which only makes it quicker elsewhere"),
    _no_effect("prompt_cache_retention prompt_cache_options", "conversations are kept as the settings say"),
    _ignored("verbosity", "for OpenAI's models; ask for brevity in the messages", "medium"),
    _refused("modalities", "answers are text", ["text"]),
    _refused("audio", "answers are text"),
    _always_refused(
        "web_search_options", "nothing is looked up, also where `{}` asks for it; offer a search as a function"
    ),
    _refused("moderation", "nothing is moderated"),
    # vLLM, SGLang, text-generation-inference
    _no_effect("request_id rid priority", "requests are served by age, under ids of the server's"),
    _no_effect("stream_interval", "each step's text is sent at once"),
    _no_effect("guided_decoding_backend", "there is one"),
    _no_effect("spaces_between_special_tokens no_stop_trim separate_reasoning stream_reasoning", "as it is here"),
    _no_effect("media_io_kwargs mm_processor_kwargs mm_kwargs", "for images and sounds"),
    _no_effect("early_stopping diversity_penalty", "for beam search alone"),
    _ignored("guided_whitespace_pattern", "any JSON whitespace is allowed"),
    _ignored("cache_salt", "prefixes are shared within one key, never between keys"),
    _ignored("truncate_prompt_tokens truncation_side truncate", "a prompt that is too long is an error", -1),
    _ignored("add_special_tokens", "the chat template has them"),
    _ignored("return_token_ids return_tokens_as_token_ids return_prompt_text", "replies have OpenAI's fields"),
    _ignored("prompt_logprobs", "replies have OpenAI's fields", 0),
    _refused("best_of", "ask for several answers with n", 1),
    _refused("use_beam_search", "answers are sampled"),
    _refused("num_beams", "answers are sampled", 1),
    _refused("length_penalty", "it belongs to beam search", 1),
    _refused("echo", "the prompt is not repeated"),
    _refused("suffix", "chat completions have none"),
    _refused("documents", "put them into the messages"),
    _refused("chat_template", "the served model's own is used"),
    _refused("bad_words logprob_token_ids", "use logit_bias or a constraint"),
    _always_refused("allowed_token_ids", "use logit_bias or a constraint; `[]`, which allows none, is refused too"),
    _refused(
        "logits_processors custom_logit_processor repetition_detection vllm_xargs", "no code of callers runs here"
    ),
    _refused("kv_transfer_params ec_transfer_params", "caches stay on this server"),
    _always_refused(
        "regex ebnf structural_tag", "use guided_regex, guided_grammar or response_format; empty ones are refused too"
    ),
    _refused("lora lora_path lora_request", "one model is served as it is"),
    _refused("watermark watermarking", "answers carry no mark"),
    # llama.cpp, text-generation-webui, Ollama, LM Studio, Open WebUI, OpenRouter
    _no_effect("cache_prompt id_slot slot_id n_cache_reuse", "every conversation is kept and found again by itself"),
    _no_effect("mirostat_tau mirostat_eta", "nothing without `mirostat`"),
    _no_effect(
        "dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers", "nothing without `dry_multiplier`"
    ),
    _no_effect("xtc_threshold", "nothing without `xtc_probability`"),
    _no_effect("dynatemp_exponent", "nothing without `dynatemp_range`"),
    _no_effect("smoothing_curve", "nothing without `smoothing_factor`"),
    _no_effect("parse_tool_calls", "calls are always told from text"),
    _no_effect(
        "num_gpu num_thread num_batch main_gpu low_vram numa use_mmap use_mlock keep_alive ttl draft_model",
        "how the server runs is its operator's business",
    ),
    _no_effect("chat_id background_tasks", "Open WebUI's own"),
    _ignored("num_ctx context_length", "the context is as long as the server's setting"),
    _ignored("n_keep num_keep n_discard", "a prompt that is too long is an error", 0),
    _ignored("repeat_last_n repetition_penalty_range", "penalties look at the whole answer", 64, -1),
    _ignored("samplers sampler_order sampler_priority", "the order is fixed"),
    _ignored("min_keep t_max_predict_ms", "not here", 0),
    _ignored("timings_per_token return_progress return_tokens response_fields usage", "replies have OpenAI's fields"),
    _ignored("n_probs", "use logprobs", 0),
    _ignored("reasoning_format", "reasoning is in reasoning_content", "auto", "deepseek", "parsed"),
    _ignored("provider models route transforms plugins", "there is one model and no router"),
    _refused("mirostat mirostat_mode", "not a sampler of this server", 0),
    _refused("typical_p typ_p tfs tfs_z", "not a sampler of this server", 1),
    _refused("top_a epsilon_cutoff eta_cutoff", "not a sampler of this server", 0),
    _refused("top_n_sigma", "not a sampler of this server", 0, -1),
    _refused("dynatemp_range dynamic_temperature", "not a sampler of this server", 0),
    _refused("dry_multiplier", "not a sampler of this server", 0),
    _refused("xtc_probability", "not a sampler of this server", 0),
    _refused("smoothing_factor penalty_alpha no_repeat_ngram_size", "not a sampler of this server", 0),
    _refused("encoder_repetition_penalty guidance_scale", "not a sampler of this server", 1),
    _refused("ban_eos_token", "use ignore_eos"),
    _refused("custom_token_bans", "use logit_bias"),
    _refused("grammar", "a grammar of llama.cpp's; guided_grammar takes Lark"),
)

_BY_NAME: Mapping[str, Parameter] = {name: parameter for parameter in PARAMETERS for name in parameter.names}


def names(status: Status) -> frozenset[str]:
    """All parameters of one status."""
    return frozenset(name for name, parameter in _BY_NAME.items() if parameter.status == status)


HONOURED = names("honoured")


def without_unsupported(body: Mapping[str, object], *, is_strict: bool) -> tuple[dict[str, object], list[str]]:
    """The body's honoured parameters, and the names of those that are ignored.

    Raises UnsupportedParameterError for one that would change the answer. With `is_strict` unknown ones stay in the
    body, for its model to refuse.
    """
    honoured, ignored = {}, []
    for name, value in body.items():
        parameter = _BY_NAME.get(name)
        if name in HONOURED or (parameter is None and is_strict):
            honoured[name] = value
        elif parameter is None:
            ignored.append(name)
        elif parameter.status != "no effect" and parameter.asks(value):
            if parameter.status == "refused" or is_strict:
                raise UnsupportedParameterError(
                    f"{name} is not supported by this server: {parameter.note}.", param=name
                )
            ignored.append(name)
    return honoured, ignored


def not_declared(declared: Container[str], body: Mapping[str, object]) -> list[str]:
    """Of a route that declares these alone: the names of other parameters, which are ignored.

    Raises UnsupportedParameterError for one that would change the answer.
    """
    ignored = []
    for name, value in body.items():
        parameter = _BY_NAME.get(name)
        if name in declared or (
            parameter is not None and (parameter.status == "no effect" or not parameter.asks(value))
        ):
            continue
        if parameter is not None and parameter.status == "refused":
            raise UnsupportedParameterError(f"{name} is not supported by this server: {parameter.note}.", param=name)
        ignored.append(name)
    return ignored


_logged: set[str] = set()


def ignored_header(ignored: Iterable[str]) -> str:
    """The names as a header may hold them. Each is logged once in the process's life, a bounded number in all."""
    shown = [re.sub(r"[^A-Za-z0-9_.-]", "?", name[:MAX_NAME_CHARS]) for name in ignored]
    for name in shown:
        if name not in _logged and len(_logged) < MAX_LOGGED:
            _logged.add(name)
            logger.warning("ignored a parameter that this server does not know or follow: %s", name)
    return ", ".join(shown[:MAX_NAMED])


def undeclared_properties() -> dict[str, dict[str, object]]:
    """JSON schemas of what `ChatBody` does not declare, for `/openapi.json`."""
    return {
        name: {"enum": [*parameter.nothing, *parameter.neutral], "description": f"Refused otherwise: {parameter.note}."}
        if parameter.status == "refused"
        else {"description": f"{parameter.status.capitalize()}: {parameter.note}."}
        for name, parameter in _BY_NAME.items()
        if parameter.status != "honoured"
    }


def parameter_table() -> str:
    """The table in docs/api.md, as Markdown."""
    rows = [f"| {_code(p.names)} | {p.status} | {p.note}{_passing(p)} |" for p in PARAMETERS]
    return "\n".join(["| Parameter | | What it does, and its default |", "|---|---|---|", *rows])


def _passing(parameter: Parameter) -> str:
    return f"; {_code(parameter.neutral)} asks for nothing" if parameter.neutral else ""


def _code(values: Iterable[object]) -> str:
    return ", ".join(f"`{value}`".replace("'", '"') for value in values)
