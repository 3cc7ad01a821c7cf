"""Who guesses: look-up in the row's own text, and a model that reads along; with the served model as its own draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboserve.engine.fakes import (
    GREEDY,
    VOCAB,
    Sink,
    add,
    make_loop,
    make_parts,
    random_model,
    request,
    text_of,
)

from turboquant_kv.codec.format import KVFormat
from turboserve.engine import speculation as speculation_module
from turboserve.engine.generation import Generation
from turboserve.engine.speculation_choice import as_draft, reason_against, wants_draft_model
from turboserve.engine.speculation_lookup import LookupDrafter
from turboserve.engine.speculation_model import DraftModel, ModelDrafter
from turboserve.engine.speculation_pace import Acceptance
from turboserve.engine.step_loop import StepLoop
from turboserve.errors import StartupError
from turboserve.messages import Request, SamplingParams
from turboserve.settings import Settings

FORMATS = [None, KVFormat(k_bits=4, v_bits=3, page_tokens=16, sink_tokens=16, centred=False)]


@pytest.fixture(params=FORMATS, ids=lambda fmt: "f16" if fmt is None else fmt.name)
def fmt(request: pytest.FixtureRequest) -> KVFormat | None:
    value: KVFormat | None = request.param
    return value


def new_row(prompt: Sequence[int], answer: Sequence[int] = ()) -> Generation:
    row = Generation(request("a", ""), Sink(), 0.0, prompt=list(prompt), max_answer_len=1000)
    row.answer = list(answer)
    return row


def looked_up(text: list[int], limit: int) -> list[int]:
    """The same, told slowly: the longest match of at most 8 tokens, the latest that `limit` tokens follow."""
    for length in range(min(8, len(text) - 1), 1, -1):
        places = [i for i in range(len(text) - length) if text[i : i + length] == text[-length:]]
        if places:
            full = [i for i in places if i + length + limit <= len(text)]
            at = (full[-1] if full else places[0]) + length
            return text[at : at + limit]
    return []


def test_what_followed_last_time_is_looked_up(rng: np.random.Generator) -> None:
    num_found = 0
    for _ in range(300):
        text = [int(t) for t in rng.integers(0, int(rng.integers(2, 12)), int(rng.integers(1, 40)))]
        cut, limit = int(rng.integers(0, len(text))) + 1, int(rng.integers(1, 8))
        row, drafter = new_row(text[:cut]), LookupDrafter()
        for token in [None, *text[cut:]]:
            if token is not None:
                row.answer.append(token)
            (offer,) = drafter.offers([row], [limit], [Acceptance()])
            (draft,) = drafter.draft([row], [offer.most])
            assert draft == looked_up([*row.prompt, *row.answer], limit)
            assert offer.most == len(draft) and (offer.rate > 0) == bool(draft)
            num_found += bool(draft)
    assert num_found > 500


def test_rows_that_may_have_none_are_not_looked_up() -> None:
    drafter, rows = LookupDrafter(), [new_row([1, 2, 3, 1, 2]), new_row([1, 2, 3, 1, 2])]
    offers = drafter.offers(rows, [0, 4], [Acceptance(), Acceptance()])
    assert [offer.most for offer in offers] == [0, 3]


def answers(loop: StepLoop, requests: list[Request]) -> list[Sink]:
    sinks = []
    for one in requests:
        sinks += add(loop, one)
        for _ in range(4):
            loop.step()
    while loop.has_work:
        loop.step()
    loop.check_integrity()
    return sinks


def requests_of(rng: np.random.Generator, num: int) -> list[Request]:
    samplings = [GREEDY, SamplingParams(temperature=1.0, seed=3), SamplingParams(temperature=0.8, seed=4, top_p=0.9)]
    texts = [text_of([int(t) for t in np.tile(rng.integers(0, VOCAB, 9), 4)]) for _ in range(num)]
    return [
        request(f"r{i}", text, max_tokens=40, tenant=str(i), sampling=samplings[i % 3]) for i, text in enumerate(texts)
    ]


def assert_nearly_all_equal(got: list[Sink], want: list[Sink]) -> None:
    # a wider product is another order of summing, which may decide one draw among hundreds (ties.py)
    assert sum(g.tokens != w.tokens for g, w in zip(got, want, strict=True)) <= 1


def drafted_tokens(sinks: list[Sink]) -> int:
    return sum(sink.finished.usage.draft_tokens for sink in sinks)


def draft_of(model: Any, cache_bytes: int = 1 << 26) -> DraftModel:
    return DraftModel(model, "draft", 1, cache_bytes)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_looked_up_tokens_change_no_answer(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, overlap: str
) -> None:
    """As the settings make it, choosing by itself when it is worth it."""
    requests = requests_of(rng, 5)
    want = answers(make_loop(make_parts(model, fmt=fmt)), requests)
    loop = make_loop(make_parts(model, fmt=fmt), speculate="lookup", overlap=overlap)
    got = answers(loop, requests)
    assert_nearly_all_equal(got, want)
    assert drafted_tokens(got) > 5  # how often a random model's answers repeat is its own matter
    assert "drafted" in loop.snapshot().details["speculation"]


@pytest.mark.parametrize("which", ["itself", "another"])
def test_a_model_s_guesses_change_no_answer(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own guesses come nearly all true, sampled ones as well; another model's hardly any."""
    monkeypatch.setattr(speculation_module, "most_worth", lambda offers, times: max(offer.most for offer in offers))
    requests = requests_of(rng, 6)
    want = answers(make_loop(make_parts(model, fmt=fmt)), requests)
    parts = make_parts(model, fmt=fmt)
    draft = draft_of(model if which == "itself" else random_model(int(rng.integers(1 << 30))))
    loop = make_loop(replace(parts, draft=draft), max_running=4)
    got = answers(loop, requests)
    assert_nearly_all_equal(got, want)
    usages = [s.finished.usage for s in got]
    drafted, accepted = sum(u.draft_tokens for u in usages), sum(u.accepted_draft_tokens for u in usages)
    assert drafted > 60
    if which == "another":
        assert accepted < 0.3 * drafted
    elif fmt is None:
        assert accepted > 0.7 * drafted  # the last step's may be cut by an answer's end
    drafter = loop.runner.speculation._drafter  # type: ignore[union-attr]
    assert isinstance(drafter, ModelDrafter)
    drafter.offers([], [], [])
    assert drafter._batch is None and not drafter._fed and not drafter._single


def test_rows_beyond_the_draft_s_memory_go_on_without(model: Any, rng: np.random.Generator) -> None:
    requests = requests_of(rng, 4)
    want = answers(make_loop(make_parts(model)), requests)
    room = int(1.5 * make_parts(model).runtime.bytes_for(100))  # for one conversation, whose arrays grow in steps
    loop = make_loop(replace(make_parts(model), draft=draft_of(model, room)))
    drafter, most_bytes = loop.runner.speculation._drafter, 0  # type: ignore[union-attr]
    assert isinstance(drafter, ModelDrafter)
    sinks = add(loop, *requests)
    while loop.has_work:
        loop.step()
        held = [*(drafter._batch or []), *drafter._single]
        most_bytes = max(most_bytes, sum(cache.nbytes for cache in held if getattr(cache, "keys", held) is not None))
    got = sinks
    assert 0 < most_bytes <= room
    assert_nearly_all_equal(got, want)
    roomy = answers(make_loop(replace(make_parts(model), draft=draft_of(model))), requests)
    assert 0 < drafted_tokens(got) < drafted_tokens(roomy)


def test_a_draft_model_whose_caches_cannot_be_cut_is_refused() -> None:
    with pytest.raises(StartupError, match="cannot be cut back"):
        ModelDrafter(draft_of(small_models.EVERY_KIND["recurrent"]()), VOCAB, 16)


@pytest.mark.parametrize("kind", sorted(set(small_models.EVERY_KIND) - {"dense", "with_sinks", "capped"}))
def test_caches_that_cannot_be_cut_have_no_guesses(kind: str) -> None:
    loop = make_loop(make_parts(small_models.EVERY_KIND[kind]()), speculate="lookup")
    assert loop.runner.speculation is None and "cut" in loop.snapshot().details["speculation"]


def test_who_guesses() -> None:
    def reason(wanted: str, *, model: bool = False, cut: bool = True, rows: bool = True) -> str | None:
        return reason_against(wanted, has_draft_model=model, can_cut=cut, stores_no_padding=rows)

    assert reason("off", model=True) == "as set"
    assert reason("auto") == "no draft model" and reason("auto", model=True) is None
    assert reason("lookup") is None and reason("draft", model=True) is None
    assert "cut" in str(reason("lookup", cut=False)) and "cut" in str(reason("auto", model=True, rows=False))
    assert not wants_draft_model(Settings()) and wants_draft_model(Settings(draft_model="x"))
    assert not wants_draft_model(Settings(draft_model="x", speculate="lookup"))
    with pytest.raises(StartupError, match="--draft-model"):
        wants_draft_model(Settings(speculate="draft"))


def test_a_draft_of_another_vocabulary_is_refused(model: Any) -> None:
    class Tokenizer:
        def __init__(self, size: int) -> None:
            self.size = size

        def get_vocab(self) -> dict[str, int]:
            return {chr(0x100 + i): i for i in range(self.size)}

    loaded = make_parts(model).loaded
    served, same, other = (replace(loaded, tokenizer=Tokenizer(n), model_id=str(n)) for n in (VOCAB, VOCAB, 200))
    assert as_draft(same, served, 800).cache_bytes == 100
    with pytest.raises(StartupError, match="another vocabulary"):
        as_draft(other, served, 800)
