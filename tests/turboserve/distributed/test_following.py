"""A follower repeats all that is done to caches, and whatever differs ends the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.turboserve.cache.fakes import FakeDisk
from tests.turboserve.distributed.pair import First, Pair, make_pair
from tests.turboserve.engine.fakes import Sink, add, make_loop, make_parts, random_model, request, run, text_of

from turboquant_kv.codec.format import KVFormat
from turboserve.cache.memory import MemoryLimits
from turboserve.cache.sizes import peak_bytes
from turboserve.engine.distributed.digest import digest_of
from turboserve.engine.distributed.ranks import RanksEndedError
from turboserve.engine.step_loop import StepLoop
from turboserve.messages import Request, SamplingParams

FORMATS = [None, KVFormat(k_bits=4, v_bits=3, page_tokens=16, sink_tokens=16, centred=False)]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(7)


@pytest.fixture(params=FORMATS, ids=lambda fmt: "f16" if fmt is None else fmt.name)
def fmt(request: pytest.FixtureRequest) -> KVFormat | None:
    value: KVFormat | None = request.param
    return value


def requests_of(rng: np.random.Generator, count: int, **options: Any) -> list[Request]:
    """Unequal lengths, some of them beginning alike, some drawn."""
    begin = [int(t) for t in rng.integers(0, 256, 40)]
    found = []
    for i in range(count):
        own = [int(t) for t in rng.integers(0, 256, int(rng.integers(1, 60)))]
        sampling = SamplingParams(temperature=0.8, seed=i) if i % 3 == 2 else SamplingParams(temperature=0)
        text = text_of(begin + own if i % 2 else own)
        found.append(request(f"r{i}", text, max_tokens=int(rng.integers(2, 30)), sampling=sampling, **options))
    return found


def assert_equal_books(pair: Pair, loop: StepLoop) -> None:
    lead: Any = pair.parts.divided
    assert digest_of(pair.formats.kv, []) == digest_of(lead.formats.kv, [])
    loop.check_integrity()
    pair.formats.check_integrity()


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_everything_that_happens_to_caches_is_repeated(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, overlap: str
) -> None:
    requests = requests_of(rng, 24)
    pair = make_pair(model, fmt)
    loop = make_loop(pair.parts, overlap=overlap, max_running=6)
    sinks = add(loop, *requests)
    for step in range(4000):
        if not loop.has_work:
            break
        if step in (5, 9, 14):
            loop.cancel(f"r{step}")
        loop.step()
    expected = run(make_loop(make_parts(model, fmt=fmt), overlap=overlap), *requests)
    cancelled = {5, 9, 14}
    for i, (sink, wanted) in enumerate(zip(sinks, expected, strict=True)):
        assert i in cancelled or sink.tokens == wanted.tokens
    assert pair.parts.divided is not None and loop.snapshot().details["distributed"].startswith("2 ranks")
    assert_equal_books(pair, loop)
    loop.close()
    assert pair.first.messages[-1] == ["close"]


def test_conversations_go_on_fork_and_are_preempted_alike(model: Any, rng: np.random.Generator) -> None:
    fmt = FORMATS[1]
    pair = make_pair(model, fmt, budget_bytes=250_000)
    loop = make_loop(pair.parts, max_running=8)
    turns = [text_of([int(t) for t in rng.integers(0, 256, 50)]) for _ in range(6)]
    for n in range(2):
        asked = [
            request(f"{n}.{i}", turn * (1 + n), max_tokens=None if i == 1 else 20, session_id=f"s{i}")
            for i, turn in enumerate(turns)
        ]
        run(loop, *asked)
    assert pair.parts.memory.events().evictions or loop.snapshot().events.preemptions
    assert_equal_books(pair, loop)


def test_conversations_are_requantised_alike(model: Any, rng: np.random.Generator) -> None:
    fmt = KVFormat(k_bits=4, v_bits=4, page_tokens=16, sink_tokens=16, centred=False)
    pair = make_pair(model, fmt, limits=MemoryLimits(allow_requantise=True))
    loop, memory = make_loop(pair.parts), pair.parts.memory
    prompts = [text_of([int(t) for t in rng.integers(0, 256, n)]) for n in (90, 90, 90, 90, 90, 90, 50)]
    for i, prompt in enumerate(prompts[:-1]):
        run(loop, request(f"r{i}", prompt, tenant=f"t{i}", session_id="s"))
    memory.budget_bytes = memory.committed_bytes + peak_bytes(pair.parts.runtime, 71) - 2000
    run(loop, request("new", prompts[-1], max_tokens=20, tenant="new"))
    assert memory.events().requantisations["4/4>4t/3t"] >= 1
    assert {message[1] for message in pair.first.messages if message[0] == "do"} >= {"convert", "runtime"}
    assert_equal_books(pair, loop)


def test_guesses_are_checked_alike(model: Any, rng: np.random.Generator, fmt: KVFormat | None) -> None:
    pair = make_pair(model, fmt)
    loop = make_loop(pair.parts, speculate="lookup")
    begin = [int(t) for t in rng.integers(0, 256, 20)]
    prompts = [text_of(begin * 3 + [i]) for i in range(4)]
    asked = [request(f"r{i}", prompt, max_tokens=40) for i, prompt in enumerate(prompts)]
    got = run(loop, *asked)
    expected = run(make_loop(make_parts(model, fmt=fmt)), *asked)
    assert [sink.tokens for sink in got] == [sink.tokens for sink in expected]
    assert any(message[:2] == ["do", "trim_rows"] for message in pair.first.messages)
    assert_equal_books(pair, loop)


def test_an_unknown_format_is_refused_and_the_run_goes_on(model: Any) -> None:
    pair = make_pair(model, FORMATS[1])
    loop = make_loop(pair.parts)
    refused, answered = run(loop, request("a", text_of([1, 2]), kv_format="7/7"), request("b", text_of([1, 2])))
    assert "7/7" in str(refused.error) and answered.tokens
    assert_equal_books(pair, loop)


def test_every_rank_stores_its_part_and_what_one_lacks_is_computed_again(model: Any, rng: np.random.Generator) -> None:
    disks = FakeDisk(), FakeDisk()
    pair = make_pair(model, FORMATS[1], disks=disks)
    loop = make_loop(pair.parts)
    prompt = text_of([int(t) for t in rng.integers(0, 256, 120)])
    first = run(loop, request("a", prompt, session_id="s"))[0]
    pair.parts.memory.write_all()
    pair.parts.memory.drop_idle()
    assert disks[0].files.keys() == disks[1].files.keys() and disks[0].files
    again = run(loop, request("b", prompt, session_id="s"))[0]
    assert again.tokens == first.tokens and pair.parts.memory.events().restores["request"] == 1
    pair.parts.memory.write_all()
    pair.parts.memory.drop_idle()
    disks[1].files.clear()
    last = run(loop, request("c", prompt, session_id="s"))[0]
    assert last.tokens == first.tokens and pair.parts.memory.events().restores["failed"] == 1
    assert_equal_books(pair, loop)


class Forgetful(First):
    """Loses one word on the way."""

    verb = ""

    def changed(self, message: list[Any]) -> list[Any] | None:
        if message[:2] == ["do", self.verb] and self.verb:
            self.verb = ""
            return None
        return message


def two_requests(rng: np.random.Generator) -> list[Request]:
    return [request(f"r{i}", text_of([int(t) for t in rng.integers(0, 256, 30)])) for i in range(2)]


@pytest.mark.parametrize("verb", ["extend_rows", "logits", "filter_rows", "fork"])
def test_a_lost_word_ends_the_run(model: Any, rng: np.random.Generator, verb: str) -> None:
    pair = make_pair(model, FORMATS[1], first=Forgetful)
    loop = make_loop(pair.parts)  # tries batches, which is repeated as well
    assert isinstance(pair.first, Forgetful)
    pair.first.verb = verb
    one, other = two_requests(rng)
    again = request("again", "".join(str(m["content"]) for m in one.messages) + "more")
    with pytest.raises(RanksEndedError, match=r"here, and not on rank 0|its caches are not those"):
        run(loop, one, other)
        run(loop, again)


class Twisted(First):
    """Has the follower read another number of tokens once."""

    is_due = False

    def changed(self, message: list[Any]) -> list[Any] | None:
        if self.is_due and message[:2] == ["do", "fill"]:
            self.is_due = False
            return ["do", "fill", [message[2][0], [message[2][1][0][:-1]]]]
        return message


def test_another_length_is_seen_after_the_step(model: Any, rng: np.random.Generator, fmt: KVFormat | None) -> None:
    pair = make_pair(model, fmt, first=Twisted)
    loop = make_loop(pair.parts)
    assert isinstance(pair.first, Twisted)
    pair.first.is_due = True
    with pytest.raises(RanksEndedError, match="its caches are not those of rank 0"):
        run(loop, two_requests(rng)[0])


def test_what_raises_here_alone_ends_the_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(model, None)
    loop = make_loop(pair.parts)

    def failing(number: int, tokens: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setitem(pair.follower._verbs, "fill", failing)
    with pytest.raises(RanksEndedError, match="RuntimeError here, and not on rank 0: no memory left"):
        run(loop, request("a", text_of([1, 2, 3])))


def test_a_failing_device_ends_the_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(model, None)
    loop = make_loop(pair.parts)
    sinks = add(loop, request("a", text_of([1, 2, 3])))
    while not loop.runner.num_rows:
        loop.step()

    def failing(*args: Any) -> Any:
        raise RuntimeError("the device fails")

    monkeypatch.setattr("turboserve.engine.runner.mx.eval", failing)
    with pytest.raises(RanksEndedError, match="the device of rank 0 failed"):
        loop.step()
    assert isinstance(sinks[0], Sink)
