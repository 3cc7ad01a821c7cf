"""What a stress run asks for: conversations of random length, format and caller, drawn from one seed.

Pure data; `child.py` plays it against an engine, `run.py` judges the answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NAMES = ("Paula", "Tom", "Greta", "Omar", "Nina", "Felix", "Ruth", "Boris")
CITIES = ("Lisbon", "Oslo", "Madrid", "Vienna", "Prague", "Athens", "Dublin", "Warsaw")
THINGS = ("river", "garden", "window", "train", "market", "bridge", "harbour", "museum")
QUESTIONS = ("What is my name?", "Where do I live?", "What is 6 times 7?", "Hello!", "Who are you?")
SHARED = "The harbour near house 12 was painted in the year 1950. The market near house 7 was red. "
FORMATS = (None, None, None, "4/4", "8/4", "f16")  # None: the server's own
TENANTS = ("", "a", "b")


@dataclass(frozen=True, slots=True)
class Turn:
    """One user message; `cancel_after` tokens an earlier try of it is given up, None: there is none."""

    text: str
    max_tokens: int
    cancel_after: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """One conversation. With `forks` it begins as a copy of that conversation after its first turn."""

    index: int
    tenant: str
    session_id: str | None
    kv_format: str | None
    turns: tuple[Turn, ...]
    forks: int | None = None


def make_plans(num_conversations: int, num_turns: int, num_forks: int, seed: int) -> list[Plan]:
    """`num_conversations` in all; the last `num_forks` of them fork one of the others."""
    rng = np.random.default_rng(seed)
    plans = [_conversation(index, num_turns, rng) for index in range(num_conversations - num_forks)]
    named = [plan for plan in plans if plan.session_id is not None and plan.kv_format is None]
    for index in range(num_conversations - num_forks, num_conversations):
        source = named[int(rng.integers(len(named)))]
        turns = (source.turns[0], *(_next_turn(rng) for _ in range(num_turns - 1)))
        plans.append(Plan(index, source.tenant, f"fork-{index}", None, turns, source.index))
    return plans


def _conversation(index: int, num_turns: int, rng: np.random.Generator) -> Plan:
    return Plan(
        index=index,
        tenant=str(rng.choice(TENANTS)),
        session_id=f"s-{index}" if index % 2 else None,
        kv_format=FORMATS[int(rng.integers(len(FORMATS)))],
        turns=(_first_turn(rng), *(_next_turn(rng) for _ in range(num_turns - 1))),
    )


def _num_sentences(rng: np.random.Generator) -> int:
    """Mostly short, now and then several hundred tokens."""
    return min(int(rng.geometric(0.3)), 16)


def _first_turn(rng: np.random.Generator) -> Turn:
    """Facts about the speaker in front of filler; half of them begin alike."""
    name, city = NAMES[int(rng.integers(len(NAMES)))], CITIES[int(rng.integers(len(CITIES)))]
    filler = " ".join(
        f"The {rng.choice(THINGS)} near house {rng.integers(1000)} was painted in the year {rng.integers(1800, 2000)}."
        for _ in range(_num_sentences(rng))
    )
    return _turn(rng, f"{rng.choice(['', SHARED])}My name is {name} and I live in {city}. {filler}".strip())


def _next_turn(rng: np.random.Generator) -> Turn:
    return _turn(rng, str(rng.choice(QUESTIONS)))


def _turn(rng: np.random.Generator, text: str) -> Turn:
    cancel_after = int(rng.integers(0, 5)) if rng.random() < 0.15 else None
    return Turn(text, int(rng.integers(2, 8)), cancel_after)
