"""Texts through a model, teacher-forced in one of three modes, all contestants in lockstep with the uncompressed run.

prefill  the whole text in chunks
decode   the first half in chunks, without figures; then token by token
batch    the same with all texts as rows of one batch, whose lengths differ. A contestant that cannot be batched
         decodes its texts alone instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx

from turboquant_kv.evaluation.comparison import Comparison, chunks, compared, log_probabilities
from turboquant_kv.evaluation.contestants import Contestant
from turboquant_kv.evaluation.shifted import at_offset

Mode = Literal["prefill", "decode", "batch"]
MODES: tuple[Mode, ...] = ("prefill", "decode", "batch")
STAGGER = 17  # rows of a batch differ in length by so many tokens, so that their pages do not end together


@dataclass(frozen=True)
class TextRun:
    """One contestant over one text: the comparison's first position, counted from the text's beginning."""

    text: str
    offset: int
    first_position: int
    comparison: Comparison


@dataclass
class Conversation:
    """One contestant's caches, of one text or of a batch, as the model sees them."""

    model: Any
    caches: list[Any]
    shift: int
    attention_layers: Sequence[bool]

    def read(self, rows: Sequence[Sequence[int]]) -> mx.array:
        """(B, T, V): log-probabilities after each token."""
        seen = at_offset(self.caches, self.shift, self.attention_layers)
        return log_probabilities(self.model, rows, seen)


@dataclass
class Forcing:
    """How to run texts. progress: told in words what is being done."""

    model: Any
    base: Contestant
    attention_layers: Sequence[bool]
    mode: Mode
    chunk_tokens: int
    progress: Callable[[str], None] = field(default=lambda line: None)

    def start(self, contestant: Contestant, shift: int) -> Conversation:
        """An empty conversation at an offset."""
        return Conversation(self.model, contestant.new_caches(shift), shift, self.attention_layers)

    def run(
        self, texts: dict[str, list[int]], contestants: Sequence[Contestant], shift: int
    ) -> dict[str, list[TextRun]]:
        """Every text (by its name, as tokens) through every contestant; by contestant."""
        runs: dict[str, list[TextRun]] = defaultdict(list)
        if self.mode == "batch":
            together = [c for c in contestants if c.batches]
            alone = [c for c in contestants if not c.batches] if self.base.batches else list(contestants)
            if self.base.batches and together:
                for name, found in self._batched(texts, together, shift).items():
                    runs[name] += found
            contestants = alone
        if not contestants:
            return dict(runs)
        for row, (text, tokens) in enumerate(texts.items()):
            prompt = 0 if self.mode == "prefill" else prompt_length(len(tokens), row)
            step = self.chunk_tokens if self.mode == "prefill" else 1
            where = f"{text}{f' at offset {shift}' if shift else ''}"
            for name, comparison in self.compare(tokens, contestants, shift, prompt, step, where).items():
                runs[name].append(TextRun(text, shift, prompt, comparison))
        return dict(runs)

    def compare(
        self,
        tokens: Sequence[int],
        contestants: Sequence[Contestant],
        shift: int,
        prompt: int,
        step_tokens: int,
        where: str,
    ) -> dict[str, Comparison]:
        """One text: `prompt` tokens in chunks without figures, the rest in steps of step_tokens with them."""
        base = self.start(self.base, shift)
        others = {c.name: self.start(c, shift) for c in contestants}
        parts: dict[str, list[Comparison]] = {name: [] for name in others}
        for chunk in chunks(tokens, prompt, self.chunk_tokens):
            for conversation in (base, *others.values()):
                conversation.read([tokens[chunk]])
        for chunk in chunks(tokens[prompt:], len(tokens) - prompt - 1, step_tokens):
            first, last = prompt + chunk.start, prompt + chunk.stop
            if (first - prompt) % self.chunk_tokens == 0:
                self.progress(f"{where}: token {first} of {len(tokens)}")
            following = mx.array(list(tokens[first + 1 : last + 1]))
            expected = base.read([tokens[first:last]])[0]
            for name, conversation in others.items():
                parts[name].append(compared(expected, conversation.read([tokens[first:last]])[0], following))
        self._release([self.base, *contestants], [base, *others.values()])
        return {name: Comparison.joined(of_name) for name, of_name in parts.items()}

    def _batched(
        self, texts: dict[str, list[int]], contestants: Sequence[Contestant], shift: int
    ) -> dict[str, list[TextRun]]:
        """All texts as rows of a batch; each row decodes as long as the shortest rest."""
        rows = list(texts.values())
        prompts = [prompt_length(len(tokens), row) for row, tokens in enumerate(rows)]
        num_steps = min(len(tokens) - prompt for tokens, prompt in zip(rows, prompts, strict=True)) - 1
        everyone = [self.base, *contestants]
        batches = [self._prefilled(c, rows, prompts, shift) for c in everyone]
        parts: dict[str, list[list[Comparison]]] = {c.name: [[] for _ in rows] for c in contestants}
        for step in range(num_steps):
            if step % self.chunk_tokens == 0:
                self.progress(f"{len(rows)} texts in a batch at offset {shift}: step {step} of {num_steps}")
            now = [[tokens[prompt + step]] for tokens, prompt in zip(rows, prompts, strict=True)]
            following = mx.array([tokens[prompt + step + 1] for tokens, prompt in zip(rows, prompts, strict=True)])
            expected = batches[0].read(now)[:, 0]
            for contestant, batch in zip(contestants, batches[1:], strict=True):
                both = compared(expected, batch.read(now)[:, 0], following)
                for row, part in enumerate(parts[contestant.name]):
                    part.append(_row(both, row))
        self._release(everyone, batches)
        return {
            name: [
                TextRun(text, shift, prompt, Comparison.joined(part))
                for text, prompt, part in zip(texts, prompts, of_name, strict=True)
            ]
            for name, of_name in parts.items()
        }

    def _prefilled(
        self, contestant: Contestant, rows: Sequence[list[int]], prompts: Sequence[int], shift: int
    ) -> Conversation:
        """A batch whose rows have read their prompts, each by itself."""
        singles = []
        for tokens, prompt in zip(rows, prompts, strict=True):
            conversation = self.start(contestant, shift)
            for chunk in chunks(tokens, prompt, self.chunk_tokens):
                conversation.read([tokens[chunk]])
            singles.append(conversation.caches)
        batch = contestant.merge(singles)
        for caches in singles:
            contestant.release(caches)
        return Conversation(self.model, batch, shift, self.attention_layers)

    @staticmethod
    def _release(contestants: Sequence[Contestant], conversations: Sequence[Conversation]) -> None:
        for contestant, conversation in zip(contestants, conversations, strict=True):
            contestant.release(conversation.caches)


def prompt_length(num_tokens: int, row: int) -> int:
    """Tokens that the row of a batch reads before it decodes: about half, and different in each row."""
    return max(1, num_tokens // 2 - STAGGER * row % (num_tokens // 4 + 1))


def _row(comparison: Comparison, row: int) -> Comparison:
    """One position of a comparison, which is one row of a batch."""
    at = slice(row, row + 1)
    return Comparison(comparison.kl[at], comparison.nll[at], comparison.base_nll[at], comparison.flips[at])
