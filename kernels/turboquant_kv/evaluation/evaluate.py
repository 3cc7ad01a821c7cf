"""`evaluate`: formats side by side against the same model uncompressed, as plain data that tables are made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from turboquant_kv.cache import seam
from turboquant_kv.cache.calibration import Calibration, calibrate, calibration_text
from turboquant_kv.cache.probe import ModelLayers, probe_layers
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError
from turboquant_kv.codec.format_name import PLAIN_FORMAT, parse_format_name
from turboquant_kv.evaluation.comparison import Comparison
from turboquant_kv.evaluation.contestants import (
    Contestant,
    FormatContestant,
    RivalContestant,
    check_compressible,
)
from turboquant_kv.evaluation.forcing import MODES, Forcing, Mode, TextRun, prompt_length
from turboquant_kv.evaluation.recall import MAX_NEEDLES, Greedy, Needles, compare_greedy, find_needles, plant
from turboquant_kv.evaluation.rivals import Rival
from turboquant_kv.evaluation.statistics import Estimate

JSON_VERSION = 1
LONG_TOKENS = 16_384  # a second length at which bytes are counted: exact ends weigh little there
MIN_TOKENS = 64  # of a text; of shorter ones little but exact tokens would be measured


@dataclass(frozen=True)
class Plan:
    """How to evaluate.

    num_tokens     of each text, at most; shorter texts are used whole
    offsets        positions of the texts' first token; needles and greedy answers use the first of them
    mode           "prefill", "decode" or "batch" (forcing.py)
    num_needles    planted facts in each text, 0 for none
    num_greedy     greedy answers, 0 for none, of answer_tokens tokens each
    """

    num_tokens: int = 512
    offsets: tuple[int, ...] = (0,)
    mode: Mode = "prefill"
    chunk_tokens: int = 256
    num_needles: int = 0
    num_greedy: int = 0
    answer_tokens: int = 48

    def check(self) -> None:
        """Raises ValueError naming the entry and what was expected."""
        if self.num_tokens < MIN_TOKENS:
            raise ValueError(f"tokens {self.num_tokens}: expected at least {MIN_TOKENS}")
        if not self.offsets or min(self.offsets) < 0 or len(set(self.offsets)) < len(self.offsets):
            raise ValueError(f"offsets {self.offsets}: expected different positions from 0 on")
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}: expected {', '.join(MODES)}")
        if not 0 <= self.num_needles <= MAX_NEEDLES:
            raise ValueError(f"needles {self.num_needles}: expected 0 to {MAX_NEEDLES}")
        if self.num_greedy < 0:
            raise ValueError(f"greedy {self.num_greedy}: expected 0 or more")
        if self.chunk_tokens < 1 or self.answer_tokens < 1:
            raise ValueError("chunks and answers need at least one token")


@dataclass(frozen=True)
class Figures:
    """One contestant at one offset: means over texts, with their 95% intervals. KL in nats."""

    kl_mean: Estimate
    kl_median: Estimate
    kl_p99: Estimate
    flips: Estimate  # share of positions whose likeliest token differs
    perplexity: Estimate  # geometric mean over texts
    perplexity_ratio: Estimate  # over the uncompressed one

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> Figures:
        """One comparison per text."""

        def over_texts(figure: Callable[[Comparison], float]) -> Estimate:
            return Estimate.of([figure(comparison) for comparison in comparisons])

        return cls(
            over_texts(lambda c: float(c.kl.mean())),
            over_texts(lambda c: float(np.median(c.kl))),
            over_texts(lambda c: float(np.quantile(c.kl, 0.99))),
            over_texts(lambda c: float(c.flips.mean())),
            over_texts(lambda c: float(c.nll.mean())).exp(),
            over_texts(lambda c: float(c.nll.mean() - c.base_nll.mean())).exp(),
        )

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_dict() for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Result:
    """All that was measured of one format or rival. `bytes_for` is by number of tokens; ratios are to float16."""

    name: str
    kind: str
    description: str
    backend: str
    bytes_for: Mapping[int, int]
    half_bytes_for: Mapping[int, int]
    runs: tuple[TextRun, ...]
    needles: Needles | None = None
    greedy: Greedy | None = None

    def token_bytes(self, num_tokens: int) -> float:
        """Bytes a token at one of the counted lengths."""
        return self.bytes_for[num_tokens] / num_tokens

    def ratio(self, num_tokens: int) -> float:
        """How many times smaller than float16 at one of the counted lengths."""
        return self.half_bytes_for[num_tokens] / self.bytes_for[num_tokens]

    def figures(self, offset: int) -> Figures:
        """Over all texts at one of the plan's offsets."""
        return Figures.of([run.comparison for run in self.runs if run.offset == offset])

    def by_position(self, offset: int) -> list[tuple[int, int, float]]:
        """(first, end, mean KL) of stretches of positions in the text, each as long as all before it; first is 64."""
        pairs = [
            (run.first_position + np.arange(len(run.comparison.kl)), run.comparison.kl)
            for run in self.runs
            if run.offset == offset
        ]
        positions, kl = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        bins, first, end = [], 0, 64
        while first <= positions.max():
            inside = (positions >= first) & (positions < end)
            if inside.any():
                bins.append((first, end, float(kl[inside].mean())))
            first, end = end, 2 * end
        return bins

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: figures, not positions."""
        offsets = list(dict.fromkeys(run.offset for run in self.runs))
        return {
            "name": self.name,
            "kind": self.kind,
            "description": self.description,
            "backend": self.backend,
            "bytes": [
                {"tokens": n, "bytes": self.bytes_for[n], "token_bytes": self.token_bytes(n), "ratio": self.ratio(n)}
                for n in self.bytes_for
            ],
            "offsets": [
                {
                    "offset": offset,
                    **self.figures(offset).to_dict(),
                    "by_position": [
                        {"first": first, "end": end, "kl": kl} for first, end, kl in self.by_position(offset)
                    ],
                }
                for offset in offsets
            ],
            "texts": [
                {
                    "text": run.text,
                    "offset": run.offset,
                    "positions": len(run.comparison.kl),
                    "kl_mean": float(run.comparison.kl.mean()),
                    "flips": float(run.comparison.flips.mean()),
                    "nll": float(run.comparison.nll.mean()),
                    "base_nll": float(run.comparison.base_nll.mean()),
                }
                for run in self.runs
            ],
            "needles": None
            if self.needles is None
            else {
                "log_probability": self.needles.log_probability,
                "base_log_probability": self.needles.base_log_probability,
                "loss": Estimate.of(self.needles.losses).to_dict(),
            },
            "greedy": None
            if self.greedy is None
            else {
                "agreed": self.greedy.agreed,
                "answer_tokens": self.greedy.answer_tokens,
                "mean": Estimate.of(self.greedy.agreed).to_dict(),
                "same": self.greedy.num_same,
            },
        }


@dataclass(frozen=True)
class Evaluation:
    """Every contestant over the same texts. notes: contestants that were left out or computed elsewhere, and why."""

    plan: Plan
    dtype: str  # of exact tokens
    text_tokens: Mapping[str, int]
    results: tuple[Result, ...]
    base_perplexity: Mapping[int, float]  # by offset
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    model: str = ""

    @property
    def byte_lengths(self) -> tuple[int, ...]:
        """Lengths at which bytes were counted."""
        return byte_lengths(self.plan)

    def result(self, name: str) -> Result:
        """Of one contestant. Raises KeyError."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able. `version` rises whenever an entry changes its meaning or goes; new entries do not raise it."""
        plan = self.plan
        return {
            "version": JSON_VERSION,
            "model": self.model,
            "dtype": self.dtype,
            "mode": plan.mode,
            "tokens": plan.num_tokens,
            "chunk_tokens": plan.chunk_tokens,
            "offsets": list(plan.offsets),
            "texts": [{"text": name, "tokens": n} for name, n in self.text_tokens.items()],
            "base_perplexity": [{"offset": o, "perplexity": p} for o, p in self.base_perplexity.items()],
            "results": [result.to_dict() for result in self.results],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
        }


@dataclass
class _Field:
    """Who takes part, and what is told about those who do not."""

    contestants: list[Contestant] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def byte_lengths(plan: Plan) -> tuple[int, ...]:
    """Numbers of tokens at which bytes are counted."""
    return (plan.num_tokens,) if plan.num_tokens == LONG_TOKENS else (plan.num_tokens, LONG_TOKENS)


def evaluate(
    model: Any,
    tokenizer: Any,
    formats: Sequence[str],
    texts: Mapping[str, str],
    plan: Plan | None = None,
    *,
    rivals: Sequence[Rival] = (),
    calibration: Calibration | None = None,
    backend: str = "auto",
    progress: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Compare formats such as `4/3` with the uncompressed model over texts, which are given by name.

    model, tokenizer: as mlx_lm.load gives them. calibration: means of keys and values; None measures them on the
    built-in calibration text, which must be none of `texts`. progress: told in one line what is being done.

    Raises UnsupportedFormatError for a format that does not exist, UnsupportedModelError for a model that cannot be
    compressed, ValueError for a plan or a text that cannot be used. Formats and rivals that cannot store the model's
    layers are left out, with a note; ValueError when none is left.
    """
    started, plan = time.monotonic(), Plan() if plan is None else plan
    plan.check()
    parsed = _parse(formats)
    tokens = _tokenised(tokenizer, texts, plan)
    seam.install()
    layers = probe_layers(model)
    check_compressible(layers)
    if calibration is None and any(fmt.centred for fmt in parsed):
        progress("measuring means of keys and values")
        calibration = calibrate(model, tokenizer.encode(calibration_text(), add_special_tokens=False))
    base = FormatContestant(model, None, layers, None, backend)
    taking_part = _gather(model, parsed, rivals, layers, calibration, backend)
    contestants = taking_part.contestants
    attention_layers = [shape is not None for shape in layers.shapes]
    forcing = Forcing(model, base, attention_layers, plan.mode, plan.chunk_tokens, progress)
    runs: dict[str, list[TextRun]] = {c.name: [] for c in contestants}
    for offset in plan.offsets:
        for name, found in forcing.run(tokens, contestants, offset).items():
            runs[name] += found
    needles, greedy = _recall(forcing, tokenizer, tokens, contestants, plan)
    half = {n: _half_bytes(layers, n) for n in byte_lengths(plan)}
    results = tuple(
        Result(
            name=c.name,
            kind=c.kind,
            description=c.description,
            backend=c.backend,
            bytes_for={n: c.bytes_for(n) for n in half},
            half_bytes_for=half,
            runs=tuple(runs[c.name]),
            needles=needles.get(c.name),
            greedy=greedy.get(c.name),
        )
        for c in contestants
    )
    return Evaluation(
        plan=plan,
        dtype=next(str(shape.dtype) for shape in layers.shapes if shape is not None).removeprefix("mlx.core."),
        text_tokens={name: len(of_text) for name, of_text in tokens.items()},
        results=results,
        base_perplexity=_base_perplexity(results, plan),
        notes=tuple(taking_part.notes),
        seconds=time.monotonic() - started,
    )


def _parse(formats: Sequence[str]) -> list[KVFormat]:
    """Each once. Raises UnsupportedFormatError."""
    parsed = {}
    for name in map(parse_format_name, formats):
        if name == PLAIN_FORMAT:
            raise UnsupportedFormatError(f"{PLAIN_FORMAT} is what all others are compared with: leave it out")
        parsed[name] = KVFormat.parse(name)
    return list(parsed.values())


def _tokenised(tokenizer: Any, texts: Mapping[str, str], plan: Plan) -> dict[str, list[int]]:
    """With the tokens that the tokenizer puts before a text. Raises ValueError for texts that are too short."""
    if not texts:
        raise ValueError("there is no text to evaluate on")
    found = {name: _first_tokens(tokenizer, text, plan.num_tokens) for name, text in texts.items()}
    for name, tokens in found.items():
        if len(tokens) < MIN_TOKENS:
            raise ValueError(f"text {name} has {len(tokens)} tokens: expected at least {MIN_TOKENS}")
    return found


def _first_tokens(tokenizer: Any, text: str, num_tokens: int) -> list[int]:
    """Of a text that may be a whole book: all of it is read only where its beginning does not suffice."""
    beginning = text[: 8 * num_tokens]
    tokens = list(tokenizer.encode(beginning))
    if len(tokens) <= num_tokens and len(beginning) < len(text):
        tokens = list(tokenizer.encode(text))
    return tokens[:num_tokens]


def _gather(
    model: Any,
    formats: Sequence[KVFormat],
    rivals: Sequence[Rival],
    layers: ModelLayers,
    calibration: Calibration | None,
    backend: str,
) -> _Field:
    found = _Field()
    for fmt in formats:
        try:
            contestant = FormatContestant(model, fmt, layers, calibration, backend)
        except UnsupportedFormatError as error:
            found.notes.append(f"{fmt.name} left out: {error}")
            continue
        if contestant.is_elsewhere:
            found.notes.append(
                f"{fmt.name}: no kernel in the backend that would serve it, computed by {contestant.backend}"
            )
        found.contestants.append(contestant)
    for rival in rivals:
        try:
            found.contestants.append(RivalContestant(model, rival, layers))
        except UnsupportedFormatError as error:
            found.notes.append(f"{rival.name} left out: {error}")
    if not found.contestants:
        raise ValueError("; ".join(["there is nothing to compare", *found.notes]))
    return found


def _recall(
    forcing: Forcing,
    tokenizer: Any,
    tokens: Mapping[str, list[int]],
    contestants: Sequence[Contestant],
    plan: Plan,
) -> tuple[dict[str, Needles], dict[str, Greedy]]:
    """Needles in each text, and greedy answers to beginnings of all texts in turn."""
    shift, all_tokens = plan.offsets[0], list(tokens.values())
    needles: dict[str, Needles] = {}
    greedy: dict[str, Greedy] = {}
    if plan.num_needles:
        haystacks = [plant(tokenizer, text, plan.num_needles, seed) for seed, text in enumerate(all_tokens)]
        needles = find_needles(forcing, haystacks, contestants, shift)
    if plan.num_greedy:
        prompts = []
        for i in range(plan.num_greedy):
            text, turn = all_tokens[i % len(all_tokens)], i // len(all_tokens)
            prompts.append(text[: prompt_length(len(text), turn)])
        greedy = compare_greedy(forcing, prompts, contestants, shift, plan.answer_tokens)
    return needles, greedy


def _half_bytes(layers: ModelLayers, num_tokens: int) -> int:
    """Of the uncompressed model's caches: attention layers in float16 without slack, all others as they are."""
    per_token = sum(s.raw_token_bytes * 2 // s.dtype.size for s in layers.shapes if s is not None)
    return num_tokens * per_token + sum(state.bytes_for(num_tokens) for state in layers.states)


def _base_perplexity(results: Sequence[Result], plan: Plan) -> dict[int, float]:
    """By offset: the uncompressed model's, over all texts."""
    runs = results[0].runs
    return {
        offset: float(np.exp(np.mean([r.comparison.base_nll.mean() for r in runs if r.offset == offset])))
        for offset in plan.offsets
    }
