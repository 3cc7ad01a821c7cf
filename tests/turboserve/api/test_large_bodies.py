"""Bodies that are large for no good reason: refused or read, and nobody else waits meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from tests.turboserve.api.conftest import Service, connect_client, error_of, raw_request, running
from tests.turboserve.api.scripted import WAIT_S

from turboserve.api import body as body_module
from turboserve.api.body import MAX_CONTAINERS, MAX_MEMBERS, MAX_STRINGS, MAX_VALUES, parse_object
from turboserve.api.completion_body import MAX_PROMPT_TOKENS
from turboserve.api.held_bytes import CountedBody, HeldBytes
from turboserve.api.http_server import bind
from turboserve.errors import InvalidRequestError, StartupError
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

NUM_BYTES = 8_000_000
HI = '"messages":[{"role":"user","content":"hi"}]'
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ANTHROPIC, EMBED, TOKENIZE, OLLAMA = "/v1/messages", "/v1/embeddings", "/tokenize", "/api/chat"
EVERY_PATH = (CHAT, TEXT, RESPONSES, ANTHROPIC, EMBED, TOKENIZE, "/detokenize", OLLAMA, "/api/generate")

LONGEST_S = 0.15  # of what was between 0.2 and 60 s; a collection of this process's garbage alone takes a third of it


@pytest.fixture(scope="module")
def roomy() -> Iterator[Service]:
    with running(max_body_bytes=8 << 20, request_timeout_s=30.0) as service:
        yield service


def full(begin: str, piece: Callable[[int], str], end: str, num_pieces: int | None = None) -> bytes:
    """So many pieces, or as many as fill the body."""
    if num_pieces is None:
        num_pieces = NUM_BYTES // (len(piece(1_000_000)) + 1)
    return (begin + ",".join(map(piece, range(num_pieces))) + end).encode()


@contextmanager
def turns(service: Service) -> Iterator[list[float]]:
    """How long the event loop had to wait for its turns, in seconds.

    Of the time on the clock and the time that this process computed the smaller one counts: while another program has
    the processor, both would grow by turns that nobody here took.
    """
    gaps: list[float] = []
    is_over = False

    async def beat() -> None:
        wall_s, cpu_s = time.monotonic(), time.process_time()
        while not is_over:
            await asyncio.sleep(0.001)
            now_s, computed_s = time.monotonic(), time.process_time()
            gaps.append(min(now_s - wall_s, computed_s - cpu_s))
            wall_s, cpu_s = now_s, computed_s

    with service.connect() as sock:
        while (link := service.served(sock)) is None:
            time.sleep(0.001)
        beating = asyncio.run_coroutine_threadsafe(beat(), link.loop)
        yield gaps
        is_over = True
        beating.result(WAIT_S)


def unknown_keys() -> bytes:
    return full("{" + HI + ',"model":"scripted/model","prompt":"x","input":"x",', lambda i: f'"k{i}":0', "}")


CASES = [
    *((path, unknown_keys()) for path in EVERY_PATH),
    (CHAT, full("{" + HI + ',"metadata":{', lambda i: f'"k{i}":0', "}}")),
    (RESPONSES, full('{"input":"x","metadata":{', lambda i: f'"k{i}":0', "}}")),
    (RESPONSES, full('{"input":"x","metadata":{', lambda i: f'"k{i}":0', "}}", MAX_MEMBERS)),
    (CHAT, full("{" + HI + ',"logit_bias":{', lambda i: f'"x{i}":0', "}}")),
    (CHAT, full("{" + HI + ',"logit_bias":{', lambda i: f'"x{i}":0', "}}", MAX_MEMBERS)),
    (CHAT, full('{"messages":[{"role":"user","content":[', lambda i: '{"type":"text"}', "]}]}")),
    (CHAT, full('{"messages":[{"role":"user","content":[', lambda i: "{}", "]}]}", MAX_CONTAINERS - 9)),
    (
        ANTHROPIC,
        full('{"max_tokens":5,"messages":[{"role":"user","content":[', lambda i: "{}", "]}]}", MAX_CONTAINERS - 9),
    ),
    (CHAT, full('{"messages":[{"role":"assistant","content":"x","annotations":[', lambda i: "[]", "]}]}")),
    (CHAT, full('{"messages":[', lambda i: "{}", "]}", MAX_CONTAINERS - 9)),
    (CHAT, full("{" + HI + ',"stop":[', lambda i: "1", "]}", MAX_VALUES - 9)),
    (CHAT, full("{" + HI + ',"tools":[', lambda i: '{"type":1}', "]}", MAX_CONTAINERS - 9)),
    (RESPONSES, full('{"input":[', lambda i: "{}", "]}", MAX_CONTAINERS - 9)),
    (OLLAMA, full('{"model":"scripted/model","messages":[', lambda i: "{}", "]}", MAX_CONTAINERS - 9)),
    (TEXT, full('{"prompt":[', lambda i: '""', "]}")),
    (TEXT, full('{"prompt":[', lambda i: '""', "]}", MAX_STRINGS - 9)),
    (TEXT, full('{"prompt":[', lambda i: "1", "]}")),
    (TEXT, full('{"prompt":[1,', lambda i: '"x"', "]}", MAX_STRINGS - 9)),
    (EMBED, full('{"input":[', lambda i: '"a"', "]}")),
    (EMBED, full('{"input":[', lambda i: "[]", "]}", MAX_CONTAINERS - 9)),
    ("/detokenize", full('{"tokens":[', lambda i: "-1", "]}", MAX_VALUES - 9)),
]


@pytest.mark.parametrize(("path", "body"), CASES, ids=[f"{i}-{path}" for i, (path, _) in enumerate(CASES)])
def test_no_body_keeps_others_from_their_turn(roomy: Service, path: str, body: bytes) -> None:
    longest: list[float] = []
    while not longest or (min(longest) >= LONGEST_S and len(longest) < 3):  # a body that does it does it every time
        with turns(roomy) as gaps, connect_client(roomy) as client:
            reply = client.post(path, content=body, headers={"content-type": "application/json"}, timeout=60)
        assert reply.status_code == 400 and len(reply.content) < 1000, reply.text[:300]
        longest.append(max(gaps))
        roomy.wait_quiet()
    assert min(longest) < LONGEST_S, longest


@pytest.mark.parametrize("text", ['said "yes, no" [{' * 300_000, '\\"' * 1_500_000, "ä" * 1_300_000, "\\" * 3_000_000])
def test_punctuation_inside_texts_is_no_structure(roomy: Service, text: str) -> None:
    """Prompts may be made of what separates values elsewhere."""
    with connect_client(roomy) as client:
        body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
        reply = client.post(CHAT, content=body, headers={"content-type": "application/json"}, timeout=60)
    assert reply.status_code == 200, reply.text[:300]
    assert roomy.engine.received[-1].messages[0]["content"] == text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[" + ",".join(['"x"'] * (MAX_STRINGS + 1)) + "]", "strings"),
        ("[" + ",".join(["[]"] * (MAX_CONTAINERS + 1)) + "]", "strings"),
        ("[" + ",".join(["1"] * (MAX_VALUES + 2)) + "]", "values"),
        ("{" + ",".join(f'"{i}":1' for i in range(MAX_MEMBERS + 1)) + "}", "members"),
        ("[" * 251 + "]" * 251, "250 levels"),
    ],
)
def test_what_is_too_much_is_refused_by_its_kind(text: str, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        parse_object(f'{{"x": {text}}}'.encode())


@pytest.mark.parametrize(
    "text",
    [
        "[" + ",".join(['"x"'] * (MAX_STRINGS - 1)) + "]",
        "[" + ",".join(["[]"] * (MAX_CONTAINERS - 2)) + "]",
        "[" + ",".join(["1"] * MAX_VALUES) + "]",
        "{" + ",".join(f'"{i}":1' for i in range(MAX_MEMBERS)) + "}",
        "[" * 249 + "]" * 249,
    ],
)
def test_what_is_just_not_too_much_is_read(text: str) -> None:
    assert parse_object(f'{{"x": {text}}}'.encode()) == {"x": json.loads(text)}


@pytest.mark.parametrize(("path", "name"), [(TEXT, "prompt"), (EMBED, "input"), ("/detokenize", "tokens")])
def test_as_many_token_ids_as_are_declared_are_taken(roomy: Service, path: str, name: str) -> None:
    """The limit in /openapi.json is one that a body can reach."""
    ids = full(f'{{"model":null,"{name}":[', lambda i: "7", "", MAX_PROMPT_TOKENS)
    with connect_client(roomy) as client:
        for end, status in (("]}", 200), (",7]}", 400)):
            reply = client.post(path, content=ids + end.encode(), headers={"content-type": "application/json"})
            assert reply.status_code == status, reply.text[:300]
    assert error_of(reply)["param"] == name and f"{MAX_PROMPT_TOKENS}" in str(error_of(reply)["message"])
    roomy.wait_quiet()


def test_strings_are_told_from_structure_as_json_does(monkeypatch: pytest.MonkeyPatch, rng: object) -> None:
    """With limits near the truth: exactly what is over them is refused, whatever stands inside strings."""
    from random import Random

    random = Random(str(rng))
    for _ in range(200):
        words = ["".join(random.choice('\\",[]{}ab') for _ in range(random.randrange(9))) for _ in range(9)]
        num_strings = random.randrange(1, 9)
        text = json.dumps({"x": words[:num_strings]})
        monkeypatch.setattr(body_module, "MAX_STRINGS", num_strings + 1)
        monkeypatch.setattr(body_module, "MAX_CONTAINERS", 2)
        monkeypatch.setattr(body_module, "MAX_VALUES", num_strings - 1)
        assert parse_object(text.encode()) == {"x": words[:num_strings]}
        monkeypatch.setattr(body_module, "MAX_STRINGS", num_strings)
        with pytest.raises(InvalidRequestError, match="too many parts"):
            parse_object(text.encode())


def test_a_large_honest_body_is_answered(roomy: Service) -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i}"} for i in range(4000)]
    messages.append({"role": "user", "content": "hi"})
    with turns(roomy) as gaps, connect_client(roomy) as client:
        reply: httpx.Response = client.post(CHAT, json={"messages": messages}, timeout=60)
    assert reply.status_code == 200 and len(roomy.engine.received[-1].messages) == 4001
    assert max(gaps) < LONGEST_S, sorted(gaps)[-5:]


def test_what_all_bodies_take_is_bounded_and_counted() -> None:
    """Bodies that are being answered, that wait and that have not all arrived; the place of one that ends is free."""

    def held(service: Service) -> float:
        lines = service.telemetry.exposition().decode().splitlines()
        return float(next(line for line in lines if line.startswith("turboserve_http_held_bytes ")).split()[1])

    filler = "x" * 7_000_000
    body = json.dumps({"messages": [{"role": "user", "content": "forever"}], "user": filler}).encode()
    with running(max_body_bytes=8 << 20, max_held_bytes=64 << 20, request_timeout_s=30.0) as service:
        with contextlib.ExitStack() as stack:
            for i in range(3):
                sock = stack.enter_context(service.connect())
                sock.sendall(raw_request(body))
                service.engine.wait_live(i + 1)
            half = stack.enter_context(service.connect())
            half.sendall(raw_request(body)[:-10])
            deadline = time.monotonic() + WAIT_S
            while held(service) < 8 * 7_000_000 - 200:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with connect_client(service) as client:
                reply = client.post(CHAT, content=body, headers={"content-type": "application/json"}, timeout=WAIT_S)
                assert reply.status_code == 503 and reply.headers["retry-after"]
                assert client.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}]}).status_code == 200
        service.wait_quiet()
        while held(service):
            assert time.monotonic() < deadline + WAIT_S, held(service)
            time.sleep(0.01)


def test_text_that_python_holds_in_four_bytes_a_character_counts_so() -> None:
    emoji = json.dumps({"messages": [{"role": "user", "content": "hi"}], "user": "🙂" * 1_900_000}, ensure_ascii=False)
    ascii_text = json.dumps({"messages": [{"role": "user", "content": "hi"}], "user": "x" * 7_600_000})
    with running(max_body_bytes=8 << 20, max_held_bytes=64 << 20, request_timeout_s=30.0) as service:
        with connect_client(service) as client, contextlib.ExitStack() as stack:
            for _ in range(3):
                sock = stack.enter_context(service.connect())
                body = json.dumps({"messages": [{"role": "user", "content": "forever"}], "user": "x" * 7_000_000})
                sock.sendall(raw_request(body.encode()))
            service.engine.wait_live(3)
            for text, status in ((emoji, 503), (ascii_text, 200)):
                reply = client.post(
                    CHAT, content=text.encode(), headers={"content-type": "application/json"}, timeout=WAIT_S
                )
                assert reply.status_code == status
        service.wait_quiet()


LISTS: dict[str, Callable[[int], str]] = {
    "token ids": lambda i: str(100_000 + i),
    "texts": lambda i: f'"{i:x}"',
    "texts of wide characters": lambda i: f'"{i:x}🙂"',
    "lists": lambda i: "[]",
    "small objects": lambda i: '{"a":1}',
    "members": lambda i: "{" + ",".join(f'"{i % 7}-{j}":{1000 + j}' for j in range(2731)) + "}",
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("end", ["x", "é", "🙂", "\\u00e9", "\\ud83d\\ude42"])
def test_a_body_is_counted_as_at_least_what_it_takes(kind: str, end: str, rng: np.random.Generator) -> None:
    """As it came and as the values that are made of it; one wide character at its end widens all of its text."""
    num = int(rng.integers(1, 12)) if kind == "members" else int(rng.integers(1, 28_000))
    text = "x" * int(rng.integers(0, 200_000)) + end
    body = full(f'{{"text":"{text}","values":[', LISTS[kind], "]}", num)
    cuts = sorted([0, *rng.integers(0, len(body), 9).tolist(), len(body) - 7, len(body)])
    parts = iter([body[cut:after] for cut, after in itertools.pairwise(cuts)])

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": next(parts)}

    held = HeldBytes(1 << 40, Telemetry())
    counted = CountedBody(receive, held)
    for _ in cuts[1:]:
        asyncio.run(counted.receive())
    gc.collect()
    tracemalloc.start()
    value = parse_object(body)
    num_kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert value and held.num_bytes >= len(body) + num_kept - 1000, (held.num_bytes, len(body), num_kept)
    counted.close()
    assert held.num_bytes == 0


def test_what_can_never_be_held_is_too_large() -> None:
    """Coming again would not help: the body alone takes more than all bodies together may."""
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 40_000_000}]})
    with running(max_body_bytes=64 << 20, max_held_bytes=64 << 20) as service, connect_client(service) as client:
        reply = client.post(CHAT, content=body, headers={"content-type": "application/json"}, timeout=WAIT_S)
        assert reply.status_code == 413 and error_of(reply)["code"] == "request_too_large"


def test_a_body_limit_beyond_what_all_may_hold_ends_the_start() -> None:
    with pytest.raises(StartupError, match=r"max_body_bytes = 67108865 is more than max_held_bytes = 67108864"):
        bind(Settings(port=0, max_body_bytes=(64 << 20) + 1, max_held_bytes=64 << 20))
