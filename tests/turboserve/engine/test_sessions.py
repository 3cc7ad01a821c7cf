"""Sessions, formats, pressure and restarts through the step loop: answers never depend on any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.turboserve.engine.fakes import Sink, add, make_loop, make_parts, request, run, text_of

from turboquant_kv.codec.format import KVFormat
from turboserve.cache.disk import DiskStore
from turboserve.cache.memory import MemoryLimits
from turboserve.cache.sizes import peak_bytes
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.step_loop import StepLoop
from turboserve.errors import KVFormatError, OverloadedError, SessionBusyError, SessionNotFoundError
from turboserve.messages import (
    DeleteSession,
    ForkSession,
    GetSession,
    ListSessions,
    Request,
    SamplingParams,
    SessionInfo,
    SessionPage,
    UpdateSession,
)

FMT = KVFormat(k_bits=4, v_bits=4, page_tokens=16, sink_tokens=16, centred=False)


def prompt(rng: np.random.Generator, num_tokens: int) -> str:
    return text_of([int(t) for t in rng.integers(0, 256, num_tokens)])


def alone(model: Any, one: Request, fmt: KVFormat | None = FMT) -> list[int]:
    """The answer of a server that has done nothing else."""
    return run(make_loop(make_parts(model, fmt=fmt)), one)[0].tokens


def session_info(loop: StepLoop, command: GetSession | ForkSession) -> SessionInfo:
    answer = loop.answer(command)
    assert isinstance(answer, SessionInfo)
    return answer


def step_all(loop: StepLoop, parts: EngineParts) -> None:
    while loop.has_work:
        loop.step()
        assert parts.memory.committed_bytes <= parts.memory.budget_bytes
        assert parts.runtime.unique_bytes() <= parts.memory.budget_bytes  # type: ignore[attr-defined]
        loop.check_integrity()


@pytest.mark.parametrize("fmt", [None, FMT], ids=["f16", "4/4"])
def test_an_old_answer_that_grows_preempts_a_young_one_which_then_goes_on(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turboserve.engine.prepare.OPEN_ANSWER_BLOCK", 16)
    open_ended = request("old", prompt(rng, 150), max_tokens=None, tenant="a", stop=("never",))
    sampled = SamplingParams(temperature=0.9, seed=7)
    young = request("young", prompt(rng, 60), max_tokens=150, tenant="b", sampling=sampled)
    parts = make_parts(model, fmt=fmt, max_context=300)
    expected = [run(make_loop(make_parts(model, fmt=fmt, max_context=300)), r)[0].tokens for r in (open_ended, young)]
    parts.memory.budget_bytes = peak_bytes(parts.runtime, 151 + 16) + peak_bytes(parts.runtime, 61 + 150)
    loop = make_loop(parts)
    sinks = add(loop, open_ended, young)
    step_all(loop, parts)
    assert parts.memory.events().preemptions["growth"] >= 1
    assert [s.tokens for s in sinks] == expected
    assert len(sinks[0].tokens) == 300 - 151 and sinks[1].finished.usage.completion_tokens == 150


def test_rows_of_several_formats_decode_together_as_alone(model: Any, rng: np.random.Generator) -> None:
    names = [None, "f16", "8/4", "4/3", "f16"]
    requests = [
        request(str(i), prompt(rng, 20 + 17 * i), max_tokens=10 + 3 * i, tenant=str(i), kv_format=name)
        for i, name in enumerate(names)
    ]
    expected = [alone(model, r) for r in requests]
    parts = make_parts(model, fmt=FMT)
    loop = make_loop(parts)
    sinks = add(loop, *requests)
    step_all(loop, parts)
    assert [s.tokens for s in sinks] == expected
    assert [s.finished.usage.kv_format for s in sinks] == ["4/4", "f16", "8/4", "4/3", "f16"]
    assert alone(model, requests[1]) == alone(model, requests[1], None)
    stats = loop.snapshot()
    shown = [c.kv for c in stats.conversations]
    assert (stats.kv.tokens, stats.kv.raw_equivalent, stats.kv.uncompressed) == tuple(
        sum(getattr(kv, kind) for kv in shown) for kind in ("tokens", "raw_equivalent", "uncompressed")
    )


def test_an_unknown_format_is_refused(model: Any, rng: np.random.Generator) -> None:
    (sink,) = run(make_loop(make_parts(model, fmt=FMT)), request("a", prompt(rng, 9), kv_format="5/1"))
    assert isinstance(sink.error, KVFormatError)


def test_formats_never_share_and_a_session_keeps_its_own(model: Any, rng: np.random.Generator) -> None:
    loop, content = make_loop(make_parts(model, fmt=FMT)), prompt(rng, 80)
    run(loop, request("a", content, session_id="s", kv_format="8/4"))
    (same,) = run(loop, request("b", content, session_id="s"))
    assert same.finished.usage.kv_format == "8/4" and same.finished.usage.cached_tokens > 60
    (other,) = run(loop, request("c", content))
    assert other.finished.usage.kv_format == "4/4" and other.finished.usage.cached_tokens == 0


def test_a_named_session_is_listed_forked_and_deleted(model: Any, rng: np.random.Generator) -> None:
    parts = make_parts(model, fmt=FMT)
    loop, content = make_loop(parts), prompt(rng, 80)
    (first,) = run(loop, request("a", content, session_id="chat", tenant="me"))
    assert first.finished.usage.session_id == "chat"
    info = session_info(loop, GetSession("me", "chat"))
    assert info.is_explicit and info.tokens == 81 + 8 - 1 and info.tier == "memory" and info.requests == 1
    fork = session_info(loop, ForkSession("me", "chat", "copy"))
    assert (fork.session_id, fork.tokens, fork.kv) == ("copy", info.tokens, info.kv)
    pages = parts.runtime.totals().compressed
    assert pages == info.kv.compressed, "a fork costs no page"
    page = loop.answer(ListSessions("me", 1))
    assert isinstance(page, SessionPage)
    assert len(page.sessions) == 1 and page.has_more
    rest = loop.answer(ListSessions("me", 5, page.sessions[0].session_id))
    assert isinstance(rest, SessionPage)
    assert {s.session_id for s in (*page.sessions, *rest.sessions)} == {"chat", "copy"} and not rest.has_more
    with pytest.raises(SessionNotFoundError):
        session_info(loop, GetSession("you", "chat"))
    loop.answer(DeleteSession("me", "chat"))
    longer = request("b", content + first.text + prompt(rng, 9), session_id="copy", tenant="me")
    (second,) = run(loop, longer)
    unlimited = make_loop(make_parts(model, fmt=FMT))
    run(unlimited, request("a", content, session_id="copy", tenant="me"))
    assert second.tokens == run(unlimited, longer)[0].tokens and second.finished.usage.cached_tokens > 80
    loop.answer(DeleteSession("me", "copy"))
    loop.check_integrity()
    assert parts.runtime.totals().compressed == 0


def test_a_running_session_can_be_forked_but_not_deleted(model: Any, rng: np.random.Generator) -> None:
    parts = make_parts(model, fmt=FMT)
    loop = make_loop(parts)
    one = request("a", prompt(rng, 60), max_tokens=40, session_id="chat")
    (sink,) = add(loop, one)
    for _ in range(15):
        loop.step()
    with pytest.raises(SessionBusyError):
        loop.answer(DeleteSession("", "chat"))
    info, fork = session_info(loop, GetSession("", "chat")), session_info(loop, ForkSession("", "chat"))
    assert info.tier == "running" and fork.tier == "memory" and fork.tokens == info.tokens > 60
    loop.check_integrity()
    while loop.has_work:
        loop.step()
    assert sink.tokens == alone(model, one)
    loop.check_integrity()


def test_requests_with_a_common_beginning_that_come_together_compute_it_once(
    model: Any, rng: np.random.Generator
) -> None:
    parts = make_parts(model, fmt=FMT)
    loop, system = make_loop(parts), prompt(rng, 200)
    requests = [request(str(i), system + prompt(rng, 10 + i), max_tokens=6) for i in range(4)]
    expected = [alone(model, r) for r in requests]
    sinks = add(loop, *requests)
    while loop.has_work:
        loop.step()
    assert [s.tokens for s in sinks] == expected
    computed = sum(s.finished.usage.prompt_tokens - s.finished.usage.cached_tokens for s in sinks)
    assert computed <= 201 + sum(10 + i + FMT.page_tokens for i in range(4)), (
        "the beginning once, each rest and page cut"
    )


def fill(loop: StepLoop, rng: np.random.Generator, num: int, **options: Any) -> list[tuple[str, Sink]]:
    """Conversations of different callers, one after another."""
    filled = []
    for i in range(num):
        content = prompt(rng, 90)
        filled.append((content, run(loop, request(f"f{i}", content, tenant=f"t{i}", session_id="s", **options))[0]))
    return filled


def test_under_pressure_named_sessions_are_requantised_if_allowed_and_say_so(
    model: Any, rng: np.random.Generator
) -> None:
    parts = make_parts(model, fmt=FMT, limits=MemoryLimits(allow_requantise=True))
    loop = make_loop(parts)
    fill(loop, rng, 6)
    parts.memory.budget_bytes = parts.memory.committed_bytes + peak_bytes(parts.runtime, 71) - 2000
    run(loop, request("new", prompt(rng, 50), max_tokens=20, tenant="new"))
    assert parts.memory.events().requantisations["4/4>4t/3t"] >= 1
    formats = [session_info(loop, GetSession(f"t{i}", "s")).kv_format for i in range(6)]
    assert "4t/3t" in formats and set(formats) <= {"4/4", "4t/3t"}
    loop.check_integrity()


def store(folder: Path) -> DiskStore:
    return DiskStore(folder, limit_bytes=1 << 30, write_rate=1e12, fingerprint="test")


def second_turns(rng: np.random.Generator, filled: list[tuple[str, Sink]]) -> list[Request]:
    return [
        request("x", content + sink.text + prompt(rng, 20), tenant=f"t{i}", session_id="s")
        for i, (content, sink) in enumerate(filled)
    ]


@pytest.mark.parametrize("fmt", [None, FMT], ids=["f16", "4/4"])
def test_spilled_sessions_come_back_with_the_same_answers(
    model: Any, seed: int, fmt: KVFormat | None, tmp_path: Path
) -> None:
    """Those of a server that had memory for all of them."""
    unlimited = make_loop(make_parts(model, fmt=fmt))
    rng = np.random.default_rng(seed)
    turns = second_turns(rng, fill(unlimited, rng, 8))
    expected = [run(unlimited, turn)[0] for turn in turns]
    disk = store(tmp_path)
    parts = make_parts(model, fmt=fmt, disk=disk)
    parts.memory.budget_bytes = peak_bytes(parts.runtime, 150) * 3
    loop = make_loop(parts)
    fill(loop, np.random.default_rng(seed), 8)
    assert parts.memory.events().spills["pressure"] >= 4
    assert {session_info(loop, GetSession(f"t{i}", "s")).tier for i in range(8)} == {"memory", "disk"}
    for turn, same in zip(turns, expected, strict=True):
        (second,) = run(loop, turn)
        assert second.tokens == same.tokens
        assert second.finished.usage.cached_tokens == same.finished.usage.cached_tokens > 80
        loop.check_integrity()
    assert parts.memory.events().restores["request"] >= 4
    disk.close()


def test_sessions_survive_a_restart(model: Any, seed: int, tmp_path: Path) -> None:
    unlimited = make_loop(make_parts(model, fmt=FMT))
    rng = np.random.default_rng(seed)
    turns = second_turns(rng, fill(unlimited, rng, 3))
    loop = make_loop(make_parts(model, fmt=FMT, disk=store(tmp_path)))
    fill(loop, np.random.default_rng(seed), 3)
    loop.answer(UpdateSession("t1", "s", is_pinned=True))
    before = [session_info(loop, GetSession(f"t{i}", "s")) for i in range(3)]
    loop.close()
    again = make_loop(make_parts(model, fmt=FMT, disk=store(tmp_path)))
    for i, (turn, old) in enumerate(zip(turns, before, strict=True)):
        info = session_info(again, GetSession(f"t{i}", "s"))
        assert info.tier == "disk" and (info.tokens, info.kv, info.is_pinned) == (old.tokens, old.kv, old.is_pinned)
        (second,) = run(again, turn)
        assert second.tokens == run(unlimited, turn)[0].tokens and second.finished.usage.cached_tokens > 80
    again.check_integrity()
    again.close()


def test_who_waits_too_long_for_memory_is_refused_with_the_numbers(
    model: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turboserve.engine.scheduler.MAX_ROOM_WAIT_S", 0.05)  # the fake clock's steps are 1 ms
    parts = make_parts(model, fmt=FMT)
    parts.memory.budget_bytes = peak_bytes(parts.runtime, 200) * 3 // 2
    loop = make_loop(parts)
    sinks = add(loop, *(request(str(i), prompt(rng, 50), max_tokens=140, tenant=str(i)) for i in range(2)))
    step_all(loop, parts)
    assert len(sinks[0].tokens) == 140
    error = sinks[1].error
    assert isinstance(error, OverloadedError) and error.status == 503 and error.retry_after_s
    assert f"{parts.memory.budget_bytes:,}" in error.message
    assert parts.memory.events().refusals["no_room"] == 1


def test_pinned_sessions_stay_and_what_they_leave_no_room_for_is_refused_at_once(
    model: Any, rng: np.random.Generator
) -> None:
    parts = make_parts(model, fmt=FMT)
    loop = make_loop(parts)
    fill(loop, rng, 2)
    for i in range(2):
        loop.answer(UpdateSession(f"t{i}", "s", is_pinned=True))
    parts.memory.budget_bytes = parts.memory.committed_bytes * 2
    (sink,) = run(loop, request("big", prompt(rng, 300), max_tokens=100, tenant="new"))
    assert isinstance(sink.error, OverloadedError) and sink.error.retry_after_s
    assert all(session_info(loop, GetSession(f"t{i}", "s")).is_pinned for i in range(2))
    loop.check_integrity()


def test_memory_of_a_format_that_nobody_uses_any_more_is_given_back(model: Any, rng: np.random.Generator) -> None:
    parts = make_parts(model, fmt=FMT)
    loop, family = make_loop(parts), parts.memory.family
    run(loop, request("a", prompt(rng, 300), kv_format="8/8"))
    parts.memory.drop_idle()
    slack, unused = family.slack_bytes(), family.slack_by_format()["8/8"]
    assert unused > 0 and family.totals().compressed == 0
    run(loop, request("b", prompt(rng, 50)))  # there is plenty: nothing is given back
    assert family.slack_by_format()["8/8"] == unused
    parts.memory.budget_bytes = slack + parts.memory.committed_bytes
    (sink,) = run(loop, request("c", prompt(rng, 90)))
    assert sink.finished.usage.completion_tokens == 8
    assert family.allocated_bytes() <= parts.memory.budget_bytes and family.slack_bytes() < slack
    loop.check_integrity()


@pytest.mark.parametrize("fmt", [None, FMT], ids=["f16", "4/4"])
def test_named_sessions_of_any_length_are_read_back_after_a_restart(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, tmp_path: Path
) -> None:
    """Shorter than a page, exact rows only, down to a few tokens: nothing of them is computed again."""
    lengths = (1, 5, 15, 16, 17, 31, 33, 40, 64, 90)
    loop = make_loop(make_parts(model, fmt=fmt, disk=store(tmp_path)))
    contents = [prompt(rng, n) for n in lengths]
    firsts = [
        run(loop, request(str(n), text, tenant=str(n), session_id="s", max_tokens=3))[0]
        for n, text in zip(lengths, contents, strict=True)
    ]
    seconds = [
        request("x", text + first.text + prompt(rng, 4), tenant=str(n), session_id="s")
        for n, text, first in zip(lengths, contents, firsts, strict=True)
    ]
    held = [session_info(loop, GetSession(str(n), "s")).tokens for n in lengths]
    loop.close()
    again = make_loop(make_parts(model, fmt=fmt, disk=store(tmp_path)))
    found = [run(again, second)[0] for second in seconds]
    assert [sink.finished.usage.cached_tokens for sink in found] == held
    again.check_integrity()
    again.close()
