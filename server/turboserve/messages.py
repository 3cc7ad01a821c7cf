"""What the layers tell each other: requests, events, byte records, statistics. Plain frozen dataclasses, nothing else.

`api`, `engine` and `cache` share these instead of copying them into forms of their own. A request has four forms from
body to batch row: the HTTP body (api), `Request` here, the engine's state of it, and the memory's lease.
Times ending in `_unix_s` are Unix seconds, all others seconds of the engine's clock. Imports errors alone, and the
library's record of bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from turboquant_kv.kv_bytes import NO_BYTES, KVBytes
from turboserve.errors import TurboServeError

FinishReason = Literal["stop", "length", "tool_calls"]
CacheTier = Literal["running", "memory", "disk"]
"""Where a conversation's cache is: a request works on it; idle and ready to continue; not in memory."""

# Statistics name this many conversations, the largest first, however many are held: neither a reply
# nor a scrape may grow with the number of callers.
MAX_SHOWN_CONVERSATIONS = 20

# --- requests


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Bounds are enforced by the HTTP schema."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None


ConstraintKind = Literal["json_object", "json_schema", "regex", "lark", "choice"]
"""What a constraint's text is: "" (any JSON object), a JSON schema, a regular expression, a Lark grammar, a JSON
list of strings."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer must look like, enforced token by token. `param` is the body's field, for complaints."""

    kind: ConstraintKind
    text: str = ""
    param: str = "response_format"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions that the model may call, and whether it must.

    functions  OpenAI's tool objects {"type": "function", "function": {"name", "description", "parameters", "strict"}}
    choice     none: not described to the model, and its answer is text; required: the answer is calls and nothing else
    name       with `required`: of this function alone
    """

    functions: tuple[Mapping[str, object], ...]
    choice: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    is_parallel: bool = True  # whether one answer may hold several calls


@dataclass(frozen=True, slots=True)
class Request:
    """One validated completion: of a conversation, or of a bare prompt.

    `tenant` is the server's own view of the caller, never a body field.
    """

    request_id: str
    messages: tuple[Mapping[str, object], ...] = ()  # {"role": str, "content": str, ...}, content already plain text
    prompt: str | tuple[int, ...] | None = None  # text or token ids to continue as they are; then without messages
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None  # None: the server's limit, up to the context length
    min_tokens: int = 0  # before these, no end-of-answer token is drawn
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # end the answer as the model's own end tokens do
    ignore_eos: bool = False  # the model's own end tokens do not end the answer
    include_stop: bool = False  # the stop string that ended the answer is part of its text
    skip_special_tokens: bool = True  # control tokens are left out of the text
    num_top_logprobs: int | None = None  # None: no logprobs; 0: of the drawn tokens alone
    tools: ToolUse | None = None
    constraint: Constraint | None = None
    add_generation_prompt: bool = True  # the conversation's last message is followed by the answer's opening
    continue_final_message: bool = False  # the last message is the beginning of the answer
    template_kwargs: Mapping[str, object] = field(
        default_factory=dict
    )  # for the chat template, such as enable_thinking
    thinking_tokens: int | None = None  # most tokens of reasoning; None: as many as the model likes
    tenant: str = ""
    num_draft_tokens: int | None = None  # of speculative decoding, a step; None: as the server is set, 0: none
    session_id: str | None = None  # an explicit session: continued when it exists, created when not
    kv_format: str | None = None  # "4/3", "f16", ...; None: the session's own, else the server's
    cache_key: str | None = None  # OpenAI's prompt_cache_key: of equally long prefixes, prefer this one's
    adapter: str = ""  # the name of the adapter that answers; "": the model alone


@dataclass(frozen=True, slots=True)
class ListSessions:
    """At most `limit` of a caller's sessions following the one called `after`. Answered with a SessionPage."""

    tenant: str
    limit: int
    after: str | None = None


@dataclass(frozen=True, slots=True)
class GetSession:
    """Answered with a SessionInfo."""

    tenant: str
    session_id: str


@dataclass(frozen=True, slots=True)
class ForkSession:
    """A new explicit session sharing all pages; new_id None: the server chooses. Answered with its SessionInfo."""

    tenant: str
    session_id: str
    new_id: str | None = None


@dataclass(frozen=True, slots=True)
class UpdateSession:
    """None leaves a value; a `ttl_s` of 0 takes the session's own limit away. Answered with a SessionInfo."""

    tenant: str
    session_id: str
    is_pinned: bool | None = None
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class DeleteSession:
    """Gives its memory and its file back. Answered with None."""

    tenant: str
    session_id: str


@dataclass(frozen=True, slots=True)
class GetSessionTree:
    """How a caller's sessions share their beginnings, and their pages. Answered with a SessionTree."""

    tenant: str


@dataclass(frozen=True, slots=True)
class ExportSession:
    """All that another server needs to continue it; the session stays. Answered with an ExportedSession."""

    tenant: str
    session_id: str


@dataclass(frozen=True, slots=True)
class CheckImport:
    """Whether a session of which `fields` are told could be taken in, before its contents are there.

    Answered with None, or with why not. `session_id`: the name that it is to have.
    """

    tenant: str
    session_id: str
    fields: Mapping[str, Any]  # of an ExportedSession, by whoever sent them


@dataclass(frozen=True, slots=True)
class ImportSession:
    """Take an exported session in, as its importer's own; nothing in it is believed. Answered with its SessionInfo."""

    tenant: str
    session_id: str
    fields: Mapping[str, Any]
    header: Mapping[str, Any]
    arrays: list[Any]  # NumPy's
    tokens: Any  # NumPy, int32, (T,)


SessionCommand = (
    ListSessions
    | GetSession
    | ForkSession
    | UpdateSession
    | DeleteSession
    | GetSessionTree
    | ExportSession
    | CheckImport
    | ImportSession
)

# --- questions about text, answered by the engine without computing an answer


@dataclass(frozen=True, slots=True)
class Tokenize:
    """The prompt that this request's messages or text would be. Answered with a tuple of token ids."""

    request: Request


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Token ids to text, control tokens included. Answered with a str."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RenderTemplate:
    """The text of the prompt that these messages would be. Answered with a str."""

    request: Request


@dataclass(frozen=True, slots=True)
class Embed:
    """Texts, or token ids, to vectors of the loaded model, with an adapter or without. Answered with Embeddings."""

    inputs: tuple[str | tuple[int, ...], ...]
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector of unit length for each input: the mean of the model's last hidden states. In float32."""

    vectors: tuple[array[float], ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class FillInMiddle:
    """The prompt that has the model write what lies between two texts. Answered with a MiddlePrompt.

    The future's exception is an UnsupportedParameterError where the tokenizer has no tokens for that.
    """

    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True)
class MiddlePrompt:
    """Token ids to continue, and those that end the continuation beside the model's own end tokens."""

    tokens: tuple[int, ...]
    stop_token_ids: tuple[int, ...] = ()


TextQuestion = Tokenize | Detokenize | RenderTemplate | Embed | FillInMiddle

# --- events of one request


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one finished request, and its conversation's KV bytes.

    session_id: under which the conversation can now be looked up, explicit or opaque; "" when it was not kept.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    kv: KVBytes
    kv_format: str
    session_id: str = ""
    reasoning_tokens: int = 0  # of the completion's
    draft_tokens: int = 0  # that were guessed for it
    accepted_draft_tokens: int = 0  # of the completion's, those that had been guessed


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's text and bytes, its natural log-probability as the model gave it, and the likeliest others'.

    A token that is a piece of a character has bytes that are no text by themselves.
    """

    text: str
    raw: bytes
    logprob: float
    token_id: int = -1
    top: tuple[TokenLogprob, ...] = ()  # likeliest first; of these `top` is empty


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Newly decoded text of the answer; never a broken character, never part of a stop string.

    logprobs: of the tokens since the last delta, where the request asks for them. Their text is not always `text`:
    a piece of a character is held back, and what begins a stop string is.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Newly decoded text of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the answer's `index`-th tool call.

    The first piece of each has its id and name, later ones "" in their place. The arguments of all pieces, joined,
    are one JSON object; calls do not overlap.
    """

    index: int
    call_id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete. `stopped_by`: the stop string or token id of the request that ended it."""

    reason: FinishReason
    usage: Usage
    stopped_by: str | int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error."""

    error: TurboServeError


Delta = TextDelta | ReasoningDelta | ToolCallDelta
Event = Delta | Finished | Failed
"""Each request ends with exactly one Finished or Failed, after which nothing more is delivered."""

# --- sessions and statistics


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One caller's session.

    `kv` and `kv_format` say what it holds in memory, or held when it went to disk; `disk_bytes` what its
    file takes. `hits` counts requests that found part of their prompt here, `requests` those that ended here.
    """

    session_id: str
    is_explicit: bool
    tokens: int
    kv: KVBytes
    kv_format: str
    tier: CacheTier
    hits: int
    created_unix_s: float
    last_used_unix_s: float
    is_pinned: bool = False
    ttl_s: float | None = None  # counted from the last use; None: until memory is needed
    requests: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SessionPage:
    """Some of a caller's sessions, by last use, newest first; `has_more` when others follow the last one."""

    sessions: tuple[SessionInfo, ...] = ()
    has_more: bool = False


@dataclass(frozen=True, slots=True)
class PageCounts:
    """What a session's cache is made of: compressed pages, those of them that others hold too, tokens kept exact.

    Where layers differ (sliding windows), of those that hold most pages.
    """

    compressed: int
    shared: int
    exact_tokens: int


@dataclass(frozen=True, slots=True)
class PrefixNode:
    """A point up to which sessions have the same tokens, or where one ends. `parent`: its place in the list."""

    parent: int | None  # None: nothing before it is shared
    tokens: int  # from the beginning to here
    kv_format: str  # sessions of different formats share nothing
    session_ids: tuple[str, ...] = ()  # that end here


@dataclass(frozen=True, slots=True)
class SessionTree:
    """A caller's newest sessions with their pages (None: running, or on disk alone), and the tree of their tokens."""

    sessions: tuple[tuple[SessionInfo, PageCounts | None], ...] = ()
    nodes: tuple[PrefixNode, ...] = ()  # each behind its parent
    has_more: bool = False  # older sessions are left out


@dataclass(frozen=True, slots=True)
class ExportedSession:
    """A copy of a session: what is said of it, and its caches as arrays.

    `read`: what fetches header and arrays, from any thread; None: they could not be read after all.
    """

    fields: Mapping[str, Any]  # JSON values
    tokens: Any  # NumPy, int32, (T,)
    read: Callable[[], tuple[Mapping[str, Any], list[Any]] | None]


@dataclass(frozen=True, slots=True)
class FormatQuality:
    """What `turboserve eval` measured of a format on this model: means over texts, against the uncompressed model."""

    kv_format: str
    kl_mean: float  # nats
    flips: float  # share of positions whose likeliest token differs
    perplexity_ratio: float
    num_tokens: int  # over how many
    measured_unix_s: float


@dataclass(frozen=True, slots=True)
class ConversationStats:
    """One conversation as statistics show it.

    `conversation_id` is opaque and carries no text: an explicit session's name is its caller's own and
    is shown to that caller only, in answer to `GetSession`.
    """

    conversation_id: str
    tier: CacheTier
    kv: KVBytes
    hits: int
    idle_s: float
    kv_format: str = ""
    is_explicit: bool = False
    is_pinned: bool = False
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """The disk store. `reason`: why it is off or takes no more; "" while it works."""

    is_enabled: bool = False
    is_writable: bool = False
    reason: str = ""
    num_bytes: int = 0
    limit_bytes: int = 0
    num_entries: int = 0
    num_damaged: int = 0  # files found damaged since the start, and dropped
    pending_bytes: int = 0  # in memory, outside the KV budget, until they are written


@dataclass(frozen=True, slots=True)
class AdmissionStats:
    """KV bytes reserved when requests were admitted beside those they took in the end."""

    num_requests: int = 0  # ended, and so in both sums
    estimated_bytes: int = 0
    actual_bytes: int = 0
    last_estimated_bytes: int = 0
    last_actual_bytes: int = 0

    def plus(self, estimated_bytes: int, actual_bytes: int) -> AdmissionStats:
        """With one more ended request."""
        return AdmissionStats(
            self.num_requests + 1,
            self.estimated_bytes + estimated_bytes,
            self.actual_bytes + actual_bytes,
            estimated_bytes,
            actual_bytes,
        )


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """What the cache memory did since start, counted by reason. Reasons are few and fixed, never a caller's text.

    evictions        pressure | quota | expired | superseded | deleted | unreadable | out_of_memory
    requantisations  4/4 -> 4t/3t and so on, as "4/4>4t/3t"
    spills           pressure | idle (written ahead, while still in memory)
    restores         request | failed (unreadable: computed again)
    preemptions      growth (an older answer needed the room)
    refusals         no_room | never_fits | quota
    """

    evictions: Mapping[str, int] = field(default_factory=dict)
    requantisations: Mapping[str, int] = field(default_factory=dict)
    spills: Mapping[str, int] = field(default_factory=dict)
    restores: Mapping[str, int] = field(default_factory=dict)
    preemptions: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)
    prefix_lookups: int = 0
    prefix_hits: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    integrity_failures: int = 0


@dataclass(frozen=True, slots=True)
class KernelTrial:
    """What the device's fused kernels did when they were tried for this model, beside the backend that replaces them.

    step_s: seconds of one layer's decode step by backend and by tokens before it; empty where nothing was timed.
    """

    fused: str  # "gpu-metal", "gpu-cuda"
    taken: str  # the same, or "mlx-ops"
    outcome: str  # faster | slower | wrong | failed
    step_s: Mapping[tuple[str, int], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A consistent copy of the engine's state, taken between two steps."""

    model_id: str
    kv_format: str  # "4/3", or "f16" when nothing is compressed
    kv_backend: str  # "cpu-numpy", "mlx-ops", ...
    model_dtype: str
    kv: KVBytes = NO_BYTES
    kv_budget_bytes: int = 0
    kv_token_bytes: float = 0.0  # one more token of a long conversation, all layers
    kv_token_raw_bytes: float = 0.0
    max_context_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    conversations: tuple[ConversationStats, ...] = ()  # the MAX_SHOWN_CONVERSATIONS largest
    layers_compressed: int = 0
    layers_uncompressed: int = 0
    details: Mapping[str, str] = field(default_factory=dict)  # codec, scale, calibration, BLAS, ...
    num_conversations: Mapping[CacheTier, int] = field(default_factory=dict)
    kv_disk: KVBytes = NO_BYTES  # what conversations on disk would take in memory, by kind
    kv_committed_bytes: int = 0  # held, or promised to running requests; never above the budget
    kv_scratch_bytes: int = 0  # the most that one step may allocate beside the budget
    events: CacheEvents = CacheEvents()
    admission: AdmissionStats = AdmissionStats()
    disk: DiskStatus = DiskStatus()
    kernel_trial: KernelTrial | None = None  # None: there was nothing to try, as on a CPU
    choices: tuple[str, ...] = ()  # of trials when the model was loaded, whose other outcomes would round otherwise
    quality: tuple[FormatQuality, ...] = ()  # of formats that were evaluated on this model before it was loaded
    rows_apart: bool = False  # requests that run at the same time are computed one by one; `details` say why
