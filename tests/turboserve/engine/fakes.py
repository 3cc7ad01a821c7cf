"""A random two-layer model, a tokenizer with one character per token, and sinks that remember.

Each token has one character and back, so streamed text tells exactly which tokens were drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.qwen2 import Model, ModelArgs
from tests.turboserve.cache.fakes import GuardedMemory

from turboquant_kv.codec.format import KVFormat
from turboserve.cache.interfaces import SessionDisk
from turboserve.cache.memory import MemoryLimits
from turboserve.engine.generation import Generation
from turboserve.engine.loaded_model import EngineParts, LoadedModel
from turboserve.engine.passes import OwnPasses
from turboserve.engine.protocol import EngineTelemetry, NullTelemetry
from turboserve.engine.served_formats import ServedFormats
from turboserve.engine.step_loop import StepLoop
from turboserve.engine.token_rules import TokenRule
from turboserve.errors import TurboServeError
from turboserve.messages import Event, Failed, Finished, Request, SamplingParams, TextDelta, TokenLogprob
from turboserve.settings import Settings

VOCAB = 256
FIRST_CHAR = 0x100
MAX_CONTEXT = 512
GREEDY = SamplingParams(temperature=0.0)


def text_of(tokens: Sequence[int]) -> str:
    return "".join(chr(FIRST_CHAR + t) for t in tokens)


def tokens_of(text: str) -> list[int]:
    return [ord(c) - FIRST_CHAR if ord(c) >= FIRST_CHAR else ord(c) for c in text]


class CharTokenizer:
    """What the engine uses of mlx-lm's TokenizerWrapper."""

    has_chat_template = True
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012  mirrors the attribute of a real tokenizer
    all_special_tokens: tuple[str, ...] = ()

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return "".join(f"{m['role'][0]}{m['content']}" for m in messages)

    def encode(self, text: str, **options: Any) -> list[int]:
        return tokens_of(text)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return text_of(ids)


class Sink:
    """Remembers events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def put(self, event: Event) -> None:
        assert not self.ended.is_set(), f"{event} after the last event"
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, TextDelta))

    @property
    def tokens(self) -> list[int]:
        return tokens_of(self.text)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [one for e in self.events if isinstance(e, TextDelta) for one in e.logprobs]

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return last

    @property
    def error(self) -> TurboServeError:
        last = self.events[-1]
        assert isinstance(last, Failed), last
        return last.error


class RecordingTelemetry(NullTelemetry):
    """Counts calls by name and label."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def request_finished(self, reason: str, /) -> None:
        self.calls.append(("finished", reason))

    def request_failed(self, code: str, /) -> None:
        self.calls.append(("failed", code))

    def request_refused(self, reason: str, /) -> None:
        self.calls.append(("refused", reason))

    def request_cancelled(self, stage: str, /) -> None:
        self.calls.append(("cancelled", stage))

    def add_prompt_tokens(self, num_tokens: int, num_cached: int, /) -> None:
        self.calls.append(("prompt", (num_tokens, num_cached)))


def passes_of(loop: StepLoop) -> OwnPasses:
    """What the loop's runner calls the model by, whose `model` a test may replace."""
    assert isinstance(loop.runner._passes, OwnPasses)
    return loop.runner._passes


def random_model(seed: int) -> Any:
    """Random weights, widened so that greedy choices are far from ties."""
    mx.random.seed(seed)
    args = ModelArgs(
        model_type="qwen2",
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=2,
        rms_norm_eps=1e-6,
        vocab_size=VOCAB,
        num_key_value_heads=1,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=False,
    )
    model = Model(args)
    model.eval()
    for layer in model.layers:
        layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * 6
    mx.eval(model.parameters())
    return model


def make_parts(
    model: Any,
    *,
    fmt: KVFormat | None = None,
    budget_bytes: int = 1 << 28,
    max_context: int = MAX_CONTEXT,
    eos_ids: frozenset[int] = frozenset(),
    limits: MemoryLimits | None = None,
    disk: SessionDisk | None = None,
) -> EngineParts:
    loaded = LoadedModel(
        model=model,
        tokenizer=CharTokenizer(),
        model_id="random",
        dtype="float32",
        max_context=max_context,
        weights_bytes=1,
        weights_fingerprint="none",
        eos_ids=eos_ids,
    )
    family = ServedFormats(model, fmt)
    return EngineParts(
        loaded, family.default_runtime, GuardedMemory(family, budget_bytes, limits or MemoryLimits(), disk)
    )


class Clock:
    """Moves on by a millisecond whenever it is read."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


def make_settings(**changes: Any) -> Settings:
    return Settings(**{"prefill_chunk_tokens": 16, **changes})


def make_loop(parts: EngineParts, telemetry: EngineTelemetry | None = None, **settings: Any) -> StepLoop:
    return StepLoop(parts, make_settings(**settings), telemetry or NullTelemetry(), Clock())


def request(
    request_id: str,
    content: str,
    *,
    max_tokens: int | None = 8,
    sampling: SamplingParams = GREEDY,
    tenant: str = "",
    stop: tuple[str, ...] = (),
    session_id: str | None = None,
    kv_format: str | None = None,
) -> Request:
    messages = ({"role": "user", "content": content},)
    return Request(
        request_id,
        messages,
        sampling=sampling,
        max_tokens=max_tokens,
        stop=stop,
        tenant=tenant,
        session_id=session_id,
        kv_format=kv_format,
    )


def add(loop: StepLoop, *requests: Request, rules: Sequence[TokenRule | None] | None = None) -> list[Sink]:
    sinks = [Sink() for _ in requests]
    for one, sink, rule in zip(requests, sinks, rules or [None] * len(requests), strict=True):
        loop.add(Generation(one, sink, 1000.0, rule=rule))
    return sinks


def run(loop: StepLoop, *requests: Request, max_steps: int = 2000) -> list[Sink]:
    """Add requests and step until nothing is left to do."""
    sinks = add(loop, *requests)
    for _ in range(max_steps):
        if not loop.has_work:
            return sinks
        loop.step()
    raise AssertionError(f"still working after {max_steps} steps")
