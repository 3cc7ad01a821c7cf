"""Two questions that a mean divergence does not answer: are planted facts found, and when do greedy answers part?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant_kv.evaluation.contestants import Contestant
from turboquant_kv.evaluation.forcing import Conversation, Forcing

NAMES = (
    "Alder",
    "Birch",
    "Cedar",
    "Hazel",
    "Juniper",
    "Maple",
    "Rowan",
    "Willow",
    "Aspen",
    "Poplar",
    "Spruce",
    "Linden",
)
MAX_NEEDLES = len(NAMES)


@dataclass(frozen=True)
class Haystack:
    """A text with planted facts, then questions. answers: where the tokens of each right number are."""

    tokens: list[int]
    answers: list[slice]


def plant(tokenizer: Any, text_tokens: Sequence[int], num_needles: int, seed: int = 0) -> Haystack:
    """Facts "The code for NAME is NUMBER." at even distances in the text; behind it each is asked for and answered.

    The questions repeat the facts' own words, in another order; another seed has other numbers and another
    order. Raises ValueError for more needles than names.
    """
    if not 0 < num_needles <= MAX_NEEDLES:
        raise ValueError(f"{num_needles} needles: expected 1 to {MAX_NEEDLES}")
    rng = np.random.default_rng((num_needles, seed))
    numbers = rng.choice(np.arange(10_000, 100_000), num_needles, replace=False)
    facts = []
    for name, number in zip(NAMES, numbers, strict=False):
        parts = (f"\nThe code for {name} is", f" {number}", ".\n")
        facts.append([list(tokenizer.encode(part, add_special_tokens=False)) for part in parts])
    tokens: list[int] = []
    for i, fact in enumerate(facts):
        start, end = (len(text_tokens) * x // num_needles for x in (i, i + 1))
        middle = (start + end) // 2
        tokens += [*text_tokens[start:middle], *(token for part in fact for token in part), *text_tokens[middle:end]]
    answers = []
    for i in rng.permutation(num_needles):
        asked, number_tokens, rest = facts[i]
        first = len(tokens) + len(asked)
        answers.append(slice(first, first + len(number_tokens)))
        tokens += [*asked, *number_tokens, *rest]
    return Haystack(tokens, answers)


@dataclass(frozen=True)
class Needles:
    """Log-probabilities, in nats, of each planted number when asked for: compressed and not."""

    log_probability: list[float]
    base_log_probability: list[float]

    @property
    def losses(self) -> list[float]:
        """How much less likely each number became; in nats, negative where it became likelier."""
        return [base - own for own, base in zip(self.log_probability, self.base_log_probability, strict=True)]


def find_needles(
    forcing: Forcing, haystacks: Sequence[Haystack], contestants: Sequence[Contestant], shift: int
) -> dict[str, Needles]:
    """Each contestant reads each text and its questions in chunks; the needles of all of them, in order."""
    found = {contestant.name: Needles([], []) for contestant in contestants}
    for i, haystack in enumerate(haystacks):
        label = f"needles in text {i + 1} of {len(haystacks)}"
        compared = forcing.compare(haystack.tokens, contestants, shift, 0, forcing.chunk_tokens, label)
        for name, comparison in compared.items():
            # figures at position p are of the token at p + 1
            places = [slice(answer.start - 1, answer.stop - 1) for answer in haystack.answers]
            found[name].log_probability.extend(-float(comparison.nll[p].sum()) for p in places)
            found[name].base_log_probability.extend(-float(comparison.base_nll[p].sum()) for p in places)
    return found


@dataclass(frozen=True)
class Greedy:
    """agreed: tokens of each answer before it parts from the uncompressed one; all of them where it does not."""

    agreed: list[int]
    answer_tokens: int

    @property
    def num_same(self) -> int:
        return sum(n == self.answer_tokens for n in self.agreed)


def compare_greedy(
    forcing: Forcing,
    prompts: Sequence[Sequence[int]],
    contestants: Sequence[Contestant],
    shift: int,
    answer_tokens: int,
) -> dict[str, Greedy]:
    """Continue each prompt greedily. Ends of text are tokens like others, so that all answers have one length."""
    agreed: dict[str, list[int]] = {c.name: [] for c in contestants}
    for i, prompt in enumerate(prompts):
        forcing.progress(f"greedy answer {i + 1} of {len(prompts)}")
        expected = _answer(forcing, forcing.base, prompt, shift, answer_tokens, None)
        for contestant in contestants:
            got = _answer(forcing, contestant, prompt, shift, answer_tokens, expected)
            agreed[contestant.name].append(len(got))
    return {name: Greedy(of_name, answer_tokens) for name, of_name in agreed.items()}


def _answer(
    forcing: Forcing,
    contestant: Contestant,
    prompt: Sequence[int],
    shift: int,
    answer_tokens: int,
    expected: Sequence[int] | None,
) -> list[int]:
    """The greedy answer, or as much of it as is `expected`."""
    conversation = forcing.start(contestant, shift)
    token = _likeliest(conversation, prompt, forcing.chunk_tokens)
    answer: list[int] = []
    while expected is None or token == expected[len(answer)]:
        answer.append(token)
        if len(answer) == answer_tokens:
            break
        token = _likeliest(conversation, [token], 1)
    contestant.release(conversation.caches)
    return answer


def _likeliest(conversation: Conversation, tokens: Sequence[int], chunk_tokens: int) -> int:
    for start in range(0, len(tokens), chunk_tokens):
        last = conversation.read([tokens[start : start + chunk_tokens]])[0, -1]
    return int(mx.argmax(last))
