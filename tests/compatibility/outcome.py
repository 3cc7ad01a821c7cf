"""What becomes of one model type: a folder with tiny random weights, loaded and served as the server does it.

The answers of three requests of different lengths are compared with mlx-lm's own, and those computed together with
those computed alone, token by token and by the log-probabilities of the tokens.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes
from tests.compatibility.configs import NOT_IMPORTABLE, NOT_TRIED, VOCAB, config_of

from turboquant_kv.cache import key_guard
from turboquant_kv.codec.format_name import PLAIN_FORMAT
from turboserve.engine.generation import Generation
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.loading import build_parts
from turboserve.engine.model_folder import EMBEDDED_DIR
from turboserve.engine.protocol import NullTelemetry
from turboserve.engine.step_loop import StepLoop
from turboserve.engine.warm_up import Plan, warm_up
from turboserve.errors import StartupError
from turboserve.messages import Event, Failed, Request, SamplingParams, TextDelta
from turboserve.settings import Settings

PROMPT_LENS = (20, 70, 170)  # the first stays exact, the last fills a page
ANSWER_LENS = (7, 4, 5)
CHUNK_TOKENS = 64  # of a prompt, so that longer ones are read in several pieces
MAX_STEPS = 500
MEASURED_CODECS = ("4t", "8")  # of keys: the default format's, and the next larger one
# In nats. Sums in another order differ by 1e-5; attention over a wrong position by far more.
SAME = 5e-3
# Compressed keys and values may change tokens' log-probabilities by so much of what another prompt changes of them;
# up to 0.16 of it were seen.
CLOSE = 0.4

COMPRESSED, MIXED, EXACT, REFUSED = "compressed", "mixed", "exact only", "refused"
CRASHED, NOT_HAD = "crashed", "not tried"
TOGETHER, ONE_BY_ONE, FAILING, WRONG = "together", "row by row", "row by row, after a failure each step", "WRONG"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the table. `layers`: compressed ones of all; rows: of the default format, exact_rows: of f16."""

    model_type: str
    kv: str
    layers: str = ""
    rows: str = ""
    exact_rows: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens with the model's log-probability of each; `leads` of each over the next likely one."""

    tokens: list[int]
    logprobs: list[float]
    leads: list[float]


class Sink:
    """Collects one request's tokens, or its failure."""

    def __init__(self) -> None:
        self.answer = Answer([], [], [])
        self.failure: Exception | None = None

    def put(self, event: Event) -> None:
        if isinstance(event, Failed):
            self.failure = event.error
        for token in event.logprobs if isinstance(event, TextDelta) else ():
            self.answer.tokens.append(token.token_id)
            self.answer.logprobs.append(token.logprob)
            self.answer.leads.append(token.top[0].logprob - token.top[1].logprob)


class WatchedModel:
    """A model whose batched decode steps are counted."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.forget()

    def forget(self) -> None:
        self.num_batched = self.num_failed = 0

    def __call__(self, tokens: mx.array, *args: Any, **kwargs: Any) -> Any:
        if tokens.shape[0] == 1 or tokens.shape[1] != 1:
            return self._model(tokens, *args, **kwargs)
        self.num_batched += 1
        try:
            logits = self._model(tokens, *args, **kwargs)
            mx.eval(logits)
        except Exception:
            self.num_failed += 1
            raise
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def try_out(model_type: str, folder: Path, seed: int, died: str = "") -> Outcome:
    """Write the model into `folder`, serve it, and say how that went. Nothing is raised for what a model does.

    died: what an earlier try in the server's own format ended its process with; only f16 is tried then.
    """
    cache_dir = folder.parent / "cache"
    if model_type in NOT_TRIED:
        return Outcome(model_type, NOT_HAD, why=NOT_TRIED[model_type])
    try:
        write_folder(model_type, folder, seed)
    except RuntimeError as exc:
        if "No Metal" not in str(exc):
            raise
        return Outcome(model_type, NOT_HAD, why="mlx-lm runs it on Metal only")
    setattr(key_guard, "KEY_CODECS", MEASURED_CODECS)  # noqa: B010 - a constant; half of a start's time goes into others
    parts, refusal = (None, f"{CRASHED}: {died}") if died else _start(folder, cache_dir)
    if parts is not None:
        return _served(model_type, parts, folder, seed)
    parts, last_refusal = _start(folder, cache_dir, kv_format=PLAIN_FORMAT)
    if parts is None:
        return Outcome(model_type, REFUSED, why=last_refusal)
    outcome = _served(model_type, parts, folder, seed)
    return outcome if outcome.kv == REFUSED else replace(outcome, kv=EXACT, why=refusal)


def write_folder(model_type: str, folder: Path, seed: int) -> None:
    """config.json, random weights, and the embedded model's tokenizer."""
    folder.mkdir(parents=True)
    config = config_of(model_type)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_DIR / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    weights: Any = {"none": mx.zeros((1,))}
    if model_type not in NOT_IMPORTABLE:
        mx.random.seed(seed)
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
        weights = dict(tree_flatten(model.parameters()))
        _try_forward(model)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def _try_forward(model: Any) -> None:
    """Raises what a device that lacks the model's kernels raises."""
    mx.eval(model(mx.array([[0]])))


def _start(folder: Path, cache_dir: Path, **settings: Any) -> tuple[EngineParts | None, str]:
    """As the engine's thread does: the parts, or none and the line that it ends with."""
    try:
        parts = build_parts(_settings(folder, cache_dir, **settings), lambda line: None)
    except (Exception, SystemExit) as exc:
        return None, _told(exc, folder)
    loaded = replace(parts.loaded, model=WatchedModel(parts.loaded.model), eos_ids=frozenset())
    return replace(parts, loaded=loaded), ""


def _settings(folder: Path, cache_dir: Path, **settings: Any) -> Settings:
    return Settings(
        **{
            "model": str(folder),
            "cache_dir": cache_dir,
            "kv_budget": "512MiB",
            "prefill_chunk_tokens": CHUNK_TOKENS,
            **settings,
        }
    )


def _served(model_type: str, parts: EngineParts, folder: Path, seed: int) -> Outcome:
    settings = _settings(folder, Path("unused"))
    try:
        loop = StepLoop(parts, settings, NullTelemetry(), time.monotonic)
    except Exception as exc:
        return Outcome(model_type, REFUSED, why=_told(exc, folder))
    plan = Plan.for_device(loop.prefill_tokens, settings.max_running, parts.loaded.max_context)
    warm_up(loop.runner, parts, loop.vocab_len, plan)
    rng = np.random.default_rng(seed)
    prompts = [[int(t) for t in rng.integers(0, VOCAB // 2, n)] for n in PROMPT_LENS]
    runtime = parts.runtime
    num_layers = runtime.layers_compressed + runtime.layers_uncompressed
    kv = COMPRESSED if runtime.layers_compressed == num_layers else MIXED if runtime.layers_compressed else EXACT
    layers = f"{runtime.layers_compressed} of {num_layers}" if kv == MIXED else str(num_layers)
    rows = _rows(parts, loop, prompts, None)
    exact = _rows(parts, loop, prompts, PLAIN_FORMAT) if runtime.fmt is not None else rows
    loop.check_integrity()
    return Outcome(model_type, kv, layers, rows, exact, "" if kv != EXACT else "no layer keeps a plain KV cache")


def _rows(parts: EngineParts, loop: StepLoop, prompts: Sequence[list[int]], fmt: str | None) -> str:
    """How rows of this format decode, and whether they answer as they should."""
    try:
        alone = [_run(loop, [prompt], fmt, f"{fmt}-alone-{i}", i)[0] for i, prompt in enumerate(prompts)]
        parts.loaded.model.forget()
        together = _run(loop, prompts, fmt, f"{fmt}-together", 0)
        model = parts.loaded.model
        num_batched, num_failed = model.num_batched, model.num_failed
        complaint = _wrong_alone(parts, prompts, alone, fmt)
    except Exception as exc:
        log.exception("a request failed")
        return f"{WRONG}: a request fails with {type(exc).__name__} ({exc})"
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        difference = differ(a, b)
        if difference:
            complaint = complaint or f"{WRONG}: together, row {i} is {difference}"
    if complaint:
        return complaint
    if not num_batched:
        return ONE_BY_ONE
    return TOGETHER if not num_failed else FAILING


def _wrong_alone(parts: EngineParts, prompts: Sequence[list[int]], alone: Sequence[Answer], fmt: str | None) -> str:
    """Uncompressed answers must be mlx-lm's own; of compressed ones the longest prompt's be close to it."""
    model = parts.loaded.model
    if fmt != PLAIN_FORMAT and parts.runtime.layers_compressed:
        answer, *others, last = alone[-1], *prompts[-1]
        other = [*((token + 1) % (VOCAB // 2) for token in others), last]
        return far_from(answer, *(likelihoods(model, prompt, answer.tokens) for prompt in (prompts[-1], other)))
    for prompt, answer in zip(prompts, alone, strict=True):
        difference = differ(answer, reference(model, prompt, answer.tokens))
        if difference:
            return f"{WRONG}: alone, {len(prompt)} tokens are answered otherwise than by mlx-lm: {difference}"
    return ""


def far_from(got: Answer, wanted: np.ndarray, other: np.ndarray) -> str:
    """Whether an answer's tokens (T) are as likely as mlx-lm wants them behind this prompt, and not behind another."""
    by, apart = (float(np.abs(got.logprobs - logprobs).mean()) for logprobs in (wanted, other))
    if by <= max(SAME, CLOSE * apart):
        return ""
    return f"{WRONG}: compressed, tokens are off by {by:.2g} nats, and by {apart:.2g} from another prompt's"


def likelihoods(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """mlx-lm's log-probability (T) of each of these tokens behind the prompt and the ones before."""
    caches, piece, logprobs = make_prompt_cache(model), prompt, []
    for token in tokens:
        logprobs.append(next_logprobs(model, piece, caches)[token])
        piece = [token]
    return np.array(logprobs)


def next_logprobs(model: Any, tokens: Sequence[int], caches: Sequence[Any]) -> np.ndarray:
    """mlx-lm's log-probabilities (V,) of what comes behind these tokens, which it adds to the caches."""
    logits = model(mx.array([tokens]), cache=caches)[0, -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits))


def reference(model: Any, prompt: list[int], tokens: Sequence[int]) -> Answer:
    """mlx-lm's own greedy choices after the prompt and each of these tokens, from its own caches."""
    caches = make_prompt_cache(model)
    answer, piece = Answer([], [], []), prompt
    for token in tokens:
        logprobs = next_logprobs(model, piece, caches)
        first, second = np.sort(logprobs)[[-1, -2]]
        answer.tokens.append(int(logprobs.argmax()))
        answer.logprobs.append(float(first))
        answer.leads.append(float(first - second))
        piece = [token]
    return answer


def differ(got: Answer, want: Answer, limit: float = SAME) -> str:
    """How two answers differ beyond `limit`; "" where they do not, or part where two tokens are as good."""
    if len(got.tokens) != len(want.tokens):
        return f"{len(got.tokens)} tokens long instead of {len(want.tokens)}"
    for i, (a, b) in enumerate(zip(got.tokens, want.tokens, strict=True)):
        by = abs(got.logprobs[i] - want.logprobs[i])
        if not by <= limit:
            return f"off by {by:.2g} nats at token {i}"
        if a != b:
            return "" if want.leads[i] <= limit else f"another token at {i}, by {want.leads[i]:.2g} nats"
    return ""


def _run(loop: StepLoop, prompts: Sequence[list[int]], fmt: str | None, tenant: str, first: int) -> list[Answer]:
    """Greedy answers of requests that are there at once. Raises what one fails with."""
    sinks = [Sink() for _ in prompts]
    for i, (prompt, sink) in enumerate(zip(prompts, sinks, strict=True)):
        request = Request(
            f"{tenant}-{i}",
            prompt=tuple(prompt),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=ANSWER_LENS[first + i],
            num_top_logprobs=2,
            tenant=f"{tenant}-{i}",  # of its own: nothing is found in another's cache
            kv_format=fmt,
        )
        loop.add(Generation(request, sink, time.monotonic()))
    for _ in range(MAX_STEPS):
        if not loop.has_work:
            break
        loop.step()
    for sink in sinks:
        if sink.failure is not None:
            raise sink.failure
    return [sink.answer for sink in sinks]


def _told(error: BaseException, folder: Path) -> str:
    """The server's own line without the folder's name; what is no refusal, but a traceback, is called a crash."""
    line = " ".join(str(error).split()).replace(str(folder), folder.name)
    return line if isinstance(error, StartupError) else f"{CRASHED}: {type(error).__name__}: {line}"


log = logging.getLogger(__name__)
