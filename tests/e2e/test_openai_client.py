"""The official OpenAI client against the real server and model."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.e2e.server import Server

from turboserve import models

NAMES = ["Paula", "Tom", "Greta", "Omar", "Nina", "Felix", "Ruth", "Boris"]
CITIES = ["Lisbon", "Oslo", "Madrid", "Vienna", "Prague", "Athens", "Dublin", "Warsaw"]


def ask(server: Server, messages: list[Any], **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 60, **options}
    return server.client.chat.completions.create(model="turboserve-tiny", messages=messages, **options)


def say(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_an_answer(server: Server) -> None:
    reply = ask(server, [say("Hello!")])
    assert reply.choices[0].message.content == "Hello! How can I help you today?"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_streamed_answer_is_the_same_with_usage_at_the_end(server: Server) -> None:
    whole = ask(server, [say("What does textwrap.shorten do?")])
    chunks = list(
        ask(server, [say("What does textwrap.shorten do?")], stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content == "Collapse and truncate the given text to fit in the given width."
    assert len(chunks) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    extension = chunks[-1].usage.model_extra["turboserve"]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert extension["kv_format"] == "4/3"
    assert extension["kv_bytes"]["total"] == sum(v for k, v in extension["kv_bytes"].items() if k != "total")


def test_a_conversation_continues_from_its_cache(server: Server) -> None:
    messages: list[Any] = [say("My name is Paula and I live in Lisbon.")]
    for follow_up, expected in (
        ("What is 6 times 7?", "42"),
        ("What is my name?", "Paula"),
        ("Where do I live?", "Lisbon"),
    ):
        first = ask(server, messages).choices[0].message
        messages += [{"role": "assistant", "content": first.content}, say(follow_up)]
        reply = ask(server, messages)
        assert expected in reply.choices[0].message.content
        assert reply.usage.prompt_tokens_details.cached_tokens > 0


def filler(num_sentences: int, seed: int) -> str:
    things = ["river", "garden", "window", "train", "market", "bridge"]
    return " ".join(
        f"The {things[(i * 7 + seed) % 6]} near house {i + seed} was painted in the year {1900 + (i * 13 + seed) % 99}."
        for i in range(num_sentences)
    )


def conversation(i: int) -> list[Any]:
    """Of a length of its own, with a fact of its own in front of it."""
    return [
        say(f"My name is {NAMES[i]} and I live in {CITIES[i]}. {filler(2 + 3 * i, i)}"),
        {"role": "assistant", "content": f"Nice to meet you, {NAMES[i]}!"},
        say("What is my name?" if i % 2 else "Where do I live?"),
    ]


def test_eight_at_once_answer_as_one_at_a_time_and_see_only_their_own(server: Server) -> None:
    limits = [40, 3, 25, 60, 8, 40, 12, 50]  # some end early

    def run(i: int) -> str:
        reply = ask(server, conversation(i), max_tokens=limits[i])
        return str(reply.choices[0].message.content)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, range(8)))
    server.wait_until_idle()
    alone = [run(i) for i in range(8)]
    assert together == alone
    for i, text in enumerate(together):
        own = NAMES[i] if i % 2 else CITIES[i]
        if limits[i] > 12:
            assert own in text
        assert not any(other in text for other in (NAMES if i % 2 else CITIES) if other != own)


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(server: Server) -> None:
    def run(seed: int) -> str:
        reply = ask(server, [say("Tell me a short story about a cat named Misty.")], temperature=1.0, seed=seed)
        return str(reply.choices[0].message.content)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, [1, 2, 3, 1]))
    assert together[0] == together[3] == run(1)
    assert len(set(together)) == 3


def test_stop_strings_and_limits(server: Server) -> None:
    reply = ask(server, [say("Hello!")], stop=["help"])
    assert reply.choices[0].message.content == "Hello! How can I "
    cut = ask(server, [say("Tell me a short story about a cat named Misty.")], max_tokens=5)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 5)


def held_out(kind: str) -> Any:
    """The first held-out prompt of a kind, with its expected answer."""
    lines = (Path(models.__file__).parent / "tiny" / "heldout" / "prompts.jsonl").read_text("utf-8").splitlines()
    return next(item for item in map(json.loads, lines) if item["kind"] == kind)


def test_a_long_prompt_is_found_again_and_compressed(server: Server) -> None:
    needle = held_out("needle-2048")
    messages = needle["messages"]
    first = ask(server, messages)
    assert needle["check"]["value"] in first.choices[0].message.content
    kv = first.usage.model_extra["turboserve"]
    assert kv["tokens"] > 1500
    assert kv["ratio"] > 4.0
    again = ask(server, messages)
    assert again.choices[0].message.content == first.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0.9 * first.usage.prompt_tokens


def test_running_streams_go_on_while_a_long_prompt_is_read(server: Server) -> None:
    """The long prompt takes many steps; the short stream's tokens keep coming between them."""
    events: list[str] = []
    long_started = threading.Event()

    def long_prompt() -> None:
        long_started.set()
        ask(server, [say(filler(150, 11)), say("Hello!")], max_tokens=2)
        events.append("long")

    stream = ask(server, [say("Tell me a short story about a dog named Rex.")], max_tokens=120, stream=True)
    next(iter(stream))
    worker = threading.Thread(target=long_prompt)
    worker.start()
    long_started.wait()
    events += ["token" for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    worker.join()
    assert "long" in events
    assert events.count("token") > 20


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_everything(server: Server, stream: bool) -> None:
    before = server.wait_until_idle()
    body = {
        "messages": [say(f"{filler(40, 21 + stream)} Tell me a long story.")],
        "max_tokens": 10_000,
        "stream": stream,
    }
    body["logit_bias"] = {"8185": -100}  # never ends by itself
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=3) as client:
        if stream:
            with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                for _ in response.iter_lines():
                    if server.stats()["requests"]["running"]:
                        raise httpx.ReadTimeout("left on purpose")
        else:
            client.post(f"{server.url}/v1/chat/completions", json=body)
    after = server.wait_until_idle()
    assert after["tokens"] < before["tokens"] + 10_000, "it went on to the end"


def test_errors_are_the_clients_own_exceptions(server: Server) -> None:
    client = server.client
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="../../etc/passwd", messages=[{"role": "user", "content": "Hi"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(server, [say("word " * 20_000)])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as bad:
        ask(server, [say("Hi")], temperature=9)
    assert bad.value.param == "temperature"
    assert [m.id for m in client.models.list()] == ["turboserve-tiny"]
