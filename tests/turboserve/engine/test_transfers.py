"""Sessions that move from one server's memory to another's: the same answers, and nothing foreign gets in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboserve.engine.fakes import add, make_loop, make_parts, request, run
from tests.turboserve.engine.test_sessions import FMT, prompt, session_info

from turboquant_kv.codec.format import KVFormat
from turboserve.cache.interfaces import ServedModel
from turboserve.cache.memory import MemoryLimits
from turboserve.cache.transfers import Transfers
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.step_loop import StepLoop
from turboserve.errors import (
    InvalidRequestError,
    KVFormatError,
    OverloadedError,
    SessionExistsError,
    SessionImportError,
    SessionNotFoundError,
)
from turboserve.messages import CheckImport, ExportedSession, ExportSession, GetSession, ImportSession, SessionInfo

FINE = KVFormat(k_bits=8, v_bits=8, page_tokens=16, sink_tokens=16, centred=False)


def exported(loop: StepLoop, session_id: str = "s", tenant: str = "") -> ExportedSession:
    answer = loop.answer(ExportSession(tenant, session_id))
    assert isinstance(answer, ExportedSession)
    return answer


def taken_in(loop: StepLoop, file: ExportedSession, name: str = "s", tenant: str = "", **changes: Any) -> SessionInfo:
    found = file.read()
    assert found is not None
    header, arrays = found
    command = ImportSession(tenant, name, file.fields, header, arrays, file.tokens)
    answer = loop.answer(replace(command, **changes))
    assert isinstance(answer, SessionInfo)
    return answer


def as_model(parts: EngineParts, model: ServedModel) -> EngineParts:
    """The same, whose memory says so of its model."""
    parts.memory._commands._transfers = Transfers(parts.memory.family, model, None)
    return parts


@pytest.mark.parametrize("kind", small_models.EVERY_KIND)
@pytest.mark.parametrize("fmt", [None, FINE], ids=["f16", "8/8"])
def test_a_session_goes_on_elsewhere_as_if_it_had_stayed(kind: str, fmt: KVFormat | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    content, more = prompt(rng, 70), prompt(rng, 20)
    here, there = (make_loop(make_parts(small_models.EVERY_KIND[kind](), fmt=fmt)) for _ in range(2))
    (first,) = run(here, request("a", content, session_id="s", tenant="me"))
    info = taken_in(there, exported(here, tenant="me"), name="moved", tenant="you")
    assert (info.tokens, info.is_explicit, info.tier) == (
        session_info(here, GetSession("me", "s")).tokens,
        True,
        "memory",
    )
    second = content + first.text + more
    (stayed,) = run(here, request("b", second, session_id="s", tenant="me"))
    (moved,) = run(there, request("c", second, session_id="moved", tenant="you"))
    assert moved.tokens == stayed.tokens
    assert moved.finished.usage.cached_tokens == stayed.finished.usage.cached_tokens > 60
    for loop in (here, there):
        loop.check_integrity()


def test_only_its_caller_exports_a_session(model: Any, rng: np.random.Generator) -> None:
    loop = make_loop(make_parts(model, fmt=FMT))
    run(loop, request("a", prompt(rng, 40), session_id="s", tenant="me"))
    for tenant, name in (("you", "s"), ("me", "other")):
        with pytest.raises(SessionNotFoundError):
            loop.answer(ExportSession(tenant, name))


def test_a_running_session_leaves_as_far_as_it_has_come(model: Any, rng: np.random.Generator) -> None:
    here, there = (make_loop(make_parts(model, fmt=FMT)) for _ in range(2))
    (sink,) = add(here, request("a", prompt(rng, 40), session_id="s", max_tokens=30))
    while len(sink.tokens) < 10:
        here.step()
    info = taken_in(there, exported(here))
    assert 41 < info.tokens < 41 + 30
    while here.has_work:
        here.step()
    assert session_info(here, GetSession("", "s")).tokens > info.tokens
    for loop in (here, there):
        loop.check_integrity()


def test_what_is_of_another_kind_is_named_and_leaves_nothing(model: Any, rng: np.random.Generator) -> None:
    ours = ServedModel("ours", "weights", frozenset({"law"}))
    here, there = (make_loop(as_model(make_parts(model, fmt=FMT), ours)) for _ in range(2))
    run(here, request("a", prompt(rng, 60), session_id="s"))
    file = exported(here)
    wrong = {
        "model": "other weights",
        "adapter": "unknown",
        "layout": "newer",
        "calibration": "measured elsewhere",
    }
    for kind, value in wrong.items():
        with pytest.raises(SessionImportError) as caught:
            there.answer(CheckImport("", "s", {**file.fields, kind: value}))
        assert caught.value.param == kind and "Nothing was taken" in caught.value.message
        with pytest.raises(SessionImportError):
            taken_in(there, file, fields={**file.fields, kind: value})
    values: tuple[object, ...] = ("5/1", "4", "x" * 200, None, 7, ["4/4"], {}, "\x00")
    for strange in values:
        for kind in ("kv_format", "wanted_format"):
            with pytest.raises((SessionImportError, KVFormatError)):
                there.answer(CheckImport("", "s", {**file.fields, kind: strange}))
    with pytest.raises(SessionImportError):  # caches that are not in the format that was told before they came
        taken_in(there, file, fields={**file.fields, "kv_format": "8/4", "wanted_format": "8/4"})
    with pytest.raises(SessionImportError):
        there.answer(CheckImport("", "s", {}))
    with pytest.raises(SessionNotFoundError):
        there.answer(GetSession("", "s"))
    assert taken_in(there, file, fields={**file.fields, "adapter": "law"}).tokens == len(file.tokens)
    there.check_integrity()


def test_a_part_of_a_divided_models_session_goes_nowhere(model: Any, rng: np.random.Generator) -> None:
    loop = make_loop(as_model(make_parts(model, fmt=FMT), ServedModel("ours", "weights", is_divided=True)))
    run(loop, request("a", prompt(rng, 40), session_id="s"))
    for command in (ExportSession("", "s"), CheckImport("", "t", {"model": "weights"})):
        with pytest.raises(InvalidRequestError, match="divided among ranks"):
            loop.answer(command)
    loop.check_integrity()


def test_contents_that_contradict_themselves_are_refused_and_hold_no_memory(
    model: Any, rng: np.random.Generator
) -> None:
    here, there = (make_loop(make_parts(model, fmt=FMT)) for _ in range(2))
    run(here, request("a", prompt(rng, 60), session_id="s"))
    file = exported(here)
    found = file.read()
    assert found is not None
    header, arrays = found
    empty = there.snapshot().kv
    changes: list[dict[str, Any]] = [
        {"tokens": file.tokens[:-1]},
        {"tokens": file.tokens[:0]},
        {"tokens": np.zeros(10_000, np.int32)},
        {"arrays": arrays[:-1]},
        {"arrays": [*arrays, arrays[0]]},
        {"arrays": [a.astype(np.float64) for a in arrays]},
        {"arrays": arrays[::-1]},
        {"header": {}},
        {"header": {**header, "layers": header["layers"][:1]}},
        {"header": {**header, "version": 99}},
        {"header": {**header, "format": None}},
        {"header": {**header, "layers": [{"kind": "KVCache", "offset": 0}] * len(header["layers"])}},
    ]
    for change in changes:
        with pytest.raises(SessionImportError) as caught:
            taken_in(there, file, **change)
        assert caught.value.param == "file"
    assert there.snapshot().kv.compressed == empty.compressed
    there.check_integrity()
    assert taken_in(there, file).tokens == len(file.tokens)


def test_a_model_of_another_geometry_is_refused_though_its_fingerprints_were_forged(rng: np.random.Generator) -> None:
    here = make_loop(make_parts(small_models.dense(num_layers=2), fmt=None))
    run(here, request("a", prompt(rng, 40), session_id="s"))
    file = exported(here)
    other = make_loop(make_parts(small_models.capped(head_dim=32, num_kv_heads=4), fmt=None))
    run(other, request("a", prompt(rng, 40), session_id="s"))
    with pytest.raises(SessionImportError):
        taken_in(other, file, name="t", fields={**exported(other).fields})
    other.check_integrity()


def test_nothing_is_written_over_and_nobody_is_pushed_out_for_nothing(model: Any, rng: np.random.Generator) -> None:
    here = make_loop(make_parts(model, fmt=FMT))
    (first,) = run(here, request("a", prompt(rng, 60), session_id="s"))
    file = exported(here)
    for command in (CheckImport("", "s", file.fields), None):
        with pytest.raises(SessionExistsError):
            taken_in(here, file) if command is None else here.answer(command)
    parts = make_parts(model, fmt=FMT, limits=MemoryLimits(max_sessions_per_caller=1))
    there = make_loop(parts)
    run(there, request("a", prompt(rng, 40), session_id="kept"))
    with pytest.raises(SessionImportError):
        taken_in(there, file, tokens=file.tokens[:-1])
    assert session_info(there, GetSession("", "kept")).tokens > 0, "what failed has pushed nobody out"
    taken_in(there, file)
    with pytest.raises(SessionNotFoundError):
        there.answer(GetSession("", "kept"))
    assert first.tokens


def test_a_session_without_room_is_refused_with_the_figures(model: Any, rng: np.random.Generator) -> None:
    here = make_loop(make_parts(model, fmt=FMT))
    run(here, request("a", prompt(rng, 150), session_id="s"))
    there = make_loop(make_parts(model, fmt=FMT, budget_bytes=4096))
    with pytest.raises(OverloadedError, match=r"\d+ bytes"):
        taken_in(there, exported(here))
    there.check_integrity()
