"""The chat completion body as pydantic models: what the server acts on, every number bounded.

Fields that nobody declared are let pass, because clients of other servers send many; `parameters.py` knows which of
them would change the answer. With `strict_parameters` they are refused, and so is 1.0 for an integer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, StringConstraints, ValidationInfo

MAX_MESSAGES = 4096  # a long agent run has hundreds; more is abuse and costs quadratic template time
MAX_PARTS = 1024
MAX_TOOL_CALLS = 128
MAX_TOOLS = 512  # OpenAI takes 128; agents with several tool servers pass that
MAX_STOPS = 16
MAX_STOP_CHARS = 1000  # of a choice as well
MAX_STOP_IDS = 256
MAX_BIASES = 1024
MAX_TOKENS = 1_000_000
MAX_TOP_K = 1_000_000
MAX_CHOICES = 128  # OpenAI's; the server's own limit is `max_running`
MAX_TOP_LOGPROBS = 20  # OpenAI's
MAX_GRAMMAR_CHARS = 1 << 18
MAX_OPTIONS = 4096  # of a choice between texts
INT32_MAX = (1 << 31) - 1
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


def is_strict(info: ValidationInfo) -> bool:
    """Whether the server was told to be as exact as its schema."""
    return bool(info.context and info.context.get("is_strict"))


def _whole(value: object, info: ValidationInfo) -> object:
    """Some clients compute their integers in floating point."""
    if type(value) is float and value.is_integer() and not is_strict(info):
        return int(value)
    return value


Whole = BeforeValidator(_whole)


class FirstError(FailFast):
    """A list's first wrong item is the only one reported; unlike pydantic's own, it may stand in a union."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


def at_most(num_members: int) -> BeforeValidator:
    """Refuses a larger object before its members are looked at; of lists `FirstError` looks at one wrong item alone."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > num_members:
            raise ValueError(f"at most {num_members} members are taken")
        return value

    return BeforeValidator(check)


Unlimited = Literal[-1]  # how local servers spell "no limit", and their clients send it unasked

Name = Annotated[str, Field(max_length=256)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
NumTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
TokenLimit = Annotated[NumTokens | Unlimited, Whole]
NumThoughts = Annotated[Annotated[int, Field(ge=0, le=MAX_TOKENS)] | Unlimited, Whole]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Repetition = Annotated[float, Field(ge=0.01, le=10)]  # logits divided by less would leave float32
# Empty is not "not given": who sends an empty rule would take any text for an answer that follows it.
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Options = Annotated[list[StopText], FirstError(), Field(min_length=1, max_length=MAX_OPTIONS)]
SchemaText = Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS)]  # empty is no JSON, and refused as such
Schema = dict[str, Any]  # a JSON schema; the engine says what of it cannot be enforced
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StrictModel(BaseModel):
    """Base of bodies of our own design: no coercion between types, no unknown field, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class OpenModel(BaseModel):
    """Base of what clients of many servers send: no coercion between types, unknown fields are dropped."""

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, json_schema_extra={"additionalProperties": True}
    )


# --- messages


class TextPart(OpenModel):
    """A piece of text content; pieces are joined by newlines."""

    type: Literal["text"]
    text: str


class RefusalPart(OpenModel):
    """An earlier answer's refusal; the model sees its text."""

    type: Literal["refusal"]
    refusal: str


Parts = Annotated[list[TextPart | RefusalPart], FirstError(), Field(max_length=MAX_PARTS)]


class FunctionCall(OpenModel):
    """Name and arguments of a call, these as JSON text or as the object itself."""

    name: Name
    arguments: str | dict[str, Any] = ""


class ToolCall(OpenModel):
    """A tool call of an earlier answer."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(OpenModel):
    """`system`, or `developer`, which newer clients say for the same thing."""

    role: Literal["system", "developer"]
    content: str | Parts
    name: Name | None = None


class UserMessage(OpenModel):
    """What a user said."""

    role: Literal["user"]
    content: str | Parts
    name: Name | None = None


class AssistantMessage(OpenModel):
    """What we, or OpenAI, answered earlier; clients replay it with fields that have no bearing here."""

    role: Literal["assistant"]
    content: str | Parts | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], FirstError(), Field(max_length=MAX_TOOL_CALLS)] | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ToolMessage(OpenModel):
    """A tool's result, in answer to the call with that id."""

    role: Literal["tool"]
    content: str | Parts
    tool_call_id: Name
    name: Name | None = None


class FunctionMessage(OpenModel):
    """A function's result as OpenAI's first design had it: in answer to the latest call of that name."""

    role: Literal["function"]
    content: str | Parts | None
    name: Name


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage,
    Field(discriminator="role"),
]

# --- tools


class Function(OpenModel):
    """A function that the model may call; `parameters` is a JSON schema of an object."""

    # Wider than OpenAI's names: tool servers put colons and slashes between theirs and the tool's.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(OpenModel):
    """A tool; of OpenAI's kinds only functions, which the caller carries out."""

    type: Literal["function"] = "function"
    function: Function


class FunctionName(OpenModel):
    """A function by its name."""

    name: Name


class NamedTool(OpenModel):
    """The answer must be a call of this function."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(OpenModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], FirstError(), Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(OpenModel):
    """The model sees these of the tools alone."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required", "any"] | NamedTool | AllowedToolsChoice

# --- the answer's form


class NamedSchema(OpenModel):
    """OpenAI's wrapping of a JSON schema. It is enforced, whatever `strict` says."""

    name: Name | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextFormat(OpenModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(OpenModel):
    """A JSON object; with llama.cpp's `schema`, one that fits it."""

    type: Literal["json_object"]
    schema_: Annotated[Schema | None, Field(alias="schema")] = None


class JsonSchemaFormat(OpenModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(OpenModel):
    """vLLM's constraints: exactly one of them, unless all that are given are null or false."""

    json_: Annotated[Schema | SchemaText | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: GrammarText | None = None
    choice: Options | None = None
    grammar: GrammarText | None = None
    structural_tag: None = None


class ConstraintFields(BaseModel):
    """What the answer's text must be, as fields of every body that asks for an answer; at most one may constrain it.

    Its config is that of the bodies, with which pydantic merges it.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: Schema | None = None
    guided_json: Schema | SchemaText | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Options | None = None
    guided_grammar: GrammarText | None = None


# --- the body


class Thinking(OpenModel):
    """Whether the model thinks first, as Anthropic's and several Chinese services spell it."""

    type: Literal["enabled", "disabled", "auto", "adaptive"]
    budget_tokens: NumThoughts | None = None


class Reasoning(OpenModel):
    """Whether, and how hard, the model thinks first, as OpenRouter spells it."""

    effort: Effort | None = None
    max_tokens: NumThoughts | None = None
    enabled: bool | None = None
    exclude: bool | None = None


class StreamOptions(OpenModel):
    """What a stream contains beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI pads its chunks against traffic analysis; we never do


TemplateValue = bool | int | float | Annotated[str, Field(max_length=64, pattern=r"^[\w .,:/+-]*$")] | None


class SamplingBody(OpenModel, ConstraintFields):
    """What chat completions and bare prompts have in common. `null` means "not given" everywhere, as clients in many
    languages send it.

    Fields that are not declared are ignored, and refused where the server's `strict_parameters` is set.
    """

    model: Annotated[str, Field(max_length=1024)] | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Annotated[int, Field(ge=0, le=MAX_TOP_K)] | Unlimited, Whole] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    repeat_penalty: Repetition | None = None
    logit_bias: (
        Annotated[
            dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], at_most(MAX_BIASES), Field(max_length=MAX_BIASES)
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX), Whole] | None = None

    max_tokens: TokenLimit | None = None
    n_predict: TokenLimit | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), Whole] | None = None
    num_draft_tokens: Annotated[int, Field(ge=0, le=1000), Whole] | None = None
    stop: StopText | Annotated[list[StopText], FirstError(), Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, le=INT32_MAX), Whole]], FirstError(), Field(max_length=MAX_STOP_IDS)]
        | None
    ) = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # The conversation's cache: this server's own, and OpenAI's hint. Their grammar is in `session_request.py`.
    session_id: Annotated[str, Field(max_length=1024)] | None = None
    kv_format: Annotated[str, Field(max_length=64)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], FirstError(), Field(min_length=1, max_length=MAX_MESSAGES)]

    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), Whole] | None = None

    tools: Annotated[list[Tool], FirstError(), Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], FirstError(), Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, TemplateValue] | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    thinking: Thinking | bool | None = None
    think: bool | Effort | None = None
    reasoning: Reasoning | None = None
    thinking_token_budget: NumThoughts | None = None
    thinking_budget: NumThoughts | None = None
    thinking_budget_tokens: NumThoughts | None = None
    reasoning_budget_tokens: NumThoughts | None = None
    max_thinking_tokens: NumThoughts | None = None
    include_reasoning: bool | None = None
