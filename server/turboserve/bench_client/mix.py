"""What is asked of a server, and when: lengths, prompts and arrivals, all drawn from one seed. Sends nothing."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

WARM_UP_ROUND = -1  # its prompts are none of the measured ones
# Short and common, so that tokenizers have most of them as one token each.
WORDS = """
about after again air all also and any are around art ask away back bad bank base be bed before best big bird
black blue board boat body book both box boy bread bring build but buy call can car case cat cause change city
class clear close cloud coat cold color come cook cost count course cut dark day deep desk do dog door down draw
dress drive dry early earth east eat edge end engine even every eye face fact fall far farm fast father field
fill find fire first fish floor fly food foot form found four free friend from front full game garden gave girl
give glass go gold good great green ground group grow half hand hard have head hear heart heat help here high
hill hold home horse hot hour house how ice idea if in iron job just keep kind king know lake lamp land large
last late lead learn leave left letter life light line list little live long look love low machine made main man
many map mark may mean meet milk mind minute money month moon more morning most mother move music name near need
""".split()  # noqa: SIM905 - one word a line would be a page


def words(rng: random.Random, num_words: int) -> list[str]:
    """Words in random order, each again only after all others, so that equally many take equally many tokens."""
    drawn: list[str] = []
    while len(drawn) < num_words:
        drawn += rng.sample(WORDS, len(WORDS))
    return drawn[:num_words]


@dataclass(frozen=True, slots=True)
class Span:
    """A length, or a range of them from which each request draws its own, uniformly and inclusive."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """`300`, `1000-16000` or `1K-16K`. Raises ValueError."""
        match = re.fullmatch(r"(\d{1,9}[kK]?)(?:-(\d{1,9}[kK]?))?", text.strip(), re.ASCII)
        if match is None:
            raise ValueError("expected tokens such as 300, or a range such as 1000-16000")
        low = _amount(match[1])
        high = _amount(match[2]) if match[2] else low
        if not 1 <= low <= high:
            raise ValueError("expected at least 1 token, and a range from the smaller to the larger")
        return cls(low, high)

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def _amount(text: str) -> int:
    return int(text[:-1]) * 1024 if text[-1] in "kK" else int(text)


@dataclass(frozen=True, slots=True)
class TokenScale:
    """How a server counts our prompts: about `overhead + per_word * words` tokens, the chat template in `overhead`."""

    per_word: float = 1.0
    overhead: float = 0.0

    def num_words(self, num_tokens: int) -> int:
        """Words that come closest to so many tokens; at least one."""
        return max(1, round((num_tokens - self.overhead) / self.per_word))


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be made."""

    prompt_tokens: int
    answer_tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Mix:
    """What every request looks like. `end_tokens` are ids that answers are kept from ending with."""

    prompt_tokens: Span = Span(300, 300)
    answer_tokens: Span = Span(128, 128)
    shared_prefix: int = 0
    temperature: float = 1.0
    top_p: float | None = None
    end_tokens: tuple[int, ...] = ()
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for a shared prefix that leaves nothing of the shortest prompt."""
        if self.shared_prefix >= self.prompt_tokens.low:
            raise ValueError(f"a shared prefix of {self.shared_prefix} tokens needs longer prompts")

    def ask(self, round_number: int, index: int, scale: TokenScale, server: int = 0) -> Ask:
        """Request `index` of a round, the same for the same seed, and beginning (after the prefix) like no other.

        Every server gets the same lengths but words of its own, so that one server can be measured against itself.
        """
        name = f"{self.seed}/{round_number}/{index}"
        lengths = random.Random(name)
        prompt_tokens, answer_tokens = self.prompt_tokens.draw(lengths), self.answer_tokens.draw(lengths)
        num_words = scale.num_words(prompt_tokens)
        prefix = self._prefix(min(round(self.shared_prefix / scale.per_word), num_words - 1))
        rest = words(random.Random(f"{name}/{server}"), num_words - len(prefix))
        return Ask(prompt_tokens, answer_tokens, " ".join(prefix + rest))

    def _prefix(self, num_words: int) -> list[str]:
        return words(random.Random(f"{self.seed}/prefix"), num_words)

    def body(self, ask: Ask, model: str) -> dict[str, Any]:
        """The request as JSON, with all that a server may be asked for."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": ask.text}],
            "max_tokens": ask.answer_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.top_p is not None:
            body["top_p"] = self.top_p
        if self.end_tokens:
            body["logit_bias"] = {str(token): -100 for token in self.end_tokens}
        return body


@dataclass(frozen=True, slots=True)
class Pace:
    """When requests are made: by `streams` clients that each wait for their answer, or `rate` a second in any case.

    A round ends after `num_requests` of them, or begins no more after `duration_s`; one of the two may be None.
    """

    streams: int = 8
    rate: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None

    def has_more(self, index: int, now_s: float) -> bool:
        """Whether request `index` is still to be made at that time."""
        if self.num_requests is not None and index >= self.num_requests:
            return False
        return self.duration_s is None or now_s < self.duration_s


def arrivals(rate: float, seed: int, round_number: int) -> Iterator[float]:
    """Endless seconds at which requests arrive: a Poisson process of `rate` a second."""
    rng = random.Random(f"{seed}/{round_number}/arrivals")
    now_s = 0.0
    while True:
        now_s += rng.expovariate(rate)
        yield now_s
