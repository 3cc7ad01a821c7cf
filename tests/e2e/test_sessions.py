"""Sessions with the official OpenAI client against real servers: named, forked, formatted, restarted, kept apart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.e2e.server import Server, running_server
from tests.e2e.test_openai_client import ask, filler, say


def extension(reply: Any) -> dict[str, Any]:
    shown: dict[str, Any] = reply.usage.model_extra["turboserve"]
    return shown


def call(client: openai.OpenAI, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """A route that OpenAI's client knows nothing of, with its headers, retries and errors."""
    if method == "GET":
        found: Any = client.get(path, cast_to=object)
    elif method == "DELETE":
        found = client.delete(path, cast_to=object)
    else:
        found = client.post(path, body=body or {}, cast_to=object)
    assert isinstance(found, dict)
    return found


def introduced(name: str, city: str, seed: int) -> list[Any]:
    """A conversation of several pages that ends with facts the model can repeat."""
    greeting = {"role": "assistant", "content": "Hello! How can I help you today?"}
    return [say(f"{filler(12, seed)} Hello!"), greeting, say(f"My name is {name} and I live in {city}.")]


def continued(messages: list[Any], reply: Any, question: str) -> list[Any]:
    return [*messages, {"role": "assistant", "content": reply.choices[0].message.content}, say(question)]


def test_a_named_session_from_first_message_to_deletion(server: Server) -> None:
    messages = introduced("Paula", "Lisbon", 3)
    first = ask(server, messages, extra_body={"session_id": "e2e-life"})
    assert extension(first)["session_id"] == "e2e-life"
    shown = call(server.client, "GET", "/sessions/e2e-life")
    assert (shown["explicit"], shown["tier"], shown["kv_format"]) == (True, "memory", "4/3")
    assert shown["tokens"] == extension(first)["tokens"] and shown["ratio"] > 1

    reply = ask(server, continued(messages, first, "What is my name?"), extra_headers={"X-Session-Id": "e2e-life"})
    assert "Paula" in reply.choices[0].message.content
    assert reply.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    assert call(server.client, "GET", "/sessions/e2e-life")["requests"] == 2

    assert call(server.client, "POST", "/sessions/e2e-life/pin")["pinned"] is True
    assert call(server.client, "POST", "/sessions/e2e-life", {"ttl_s": 3600, "pinned": False})["ttl_s"] == 3600
    page = call(server.client, "GET", "/sessions?limit=100")
    assert "e2e-life" in [entry["id"] for entry in page["data"]]
    assert call(server.client, "DELETE", "/sessions/e2e-life")["deleted"] is True
    with pytest.raises(openai.NotFoundError) as gone:
        call(server.client, "GET", "/sessions/e2e-life")
    assert gone.value.code == "session_not_found"


def test_a_fork_shares_everything_and_goes_its_own_way(server: Server) -> None:
    messages = introduced("Omar", "Oslo", 9)
    first = ask(server, messages, extra_body={"session_id": "e2e-root"})
    before = server.wait_until_idle()["kv_bytes"]
    fork = call(server.client, "POST", "/sessions/e2e-root/fork", {"id": "e2e-branch"})
    after = server.wait_until_idle()["kv_bytes"]
    assert fork["tokens"] == extension(first)["tokens"]
    assert after["compressed"] == before["compressed"], "pages are shared, not copied"
    answers = {}
    for name, question in (("e2e-root", "What is my name?"), ("e2e-branch", "Where do I live?")):
        reply = ask(server, continued(messages, first, question), extra_body={"session_id": name})
        assert reply.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
        assert extension(reply)["session_id"] == name
        answers[name] = reply.choices[0].message.content
    assert "Omar" in answers["e2e-root"] and "Oslo" in answers["e2e-branch"]
    with pytest.raises(openai.ConflictError) as taken:
        call(server.client, "POST", "/sessions/e2e-root/fork", {"id": "e2e-branch"})
    assert taken.value.code == "session_exists"


def test_formats_differ_by_session_and_are_accounted(server: Server) -> None:
    text = filler(75, 31)  # long enough that a newest page, of up to 128 exact tokens, decides nothing
    totals = {}
    for kv_format in ("f16", "8/4", "4/4", "4/3", "2"):
        name = "e2e-format-" + kv_format.replace("/", "-")
        reply = ask(
            server, [say(f"{kv_format}: {text}")], max_tokens=4, extra_body={"session_id": name, "kv_format": kv_format}
        )
        shown = extension(reply)
        assert shown["kv_format"] == ("2/2" if kv_format == "2" else kv_format)
        totals[kv_format] = shown["kv_bytes"]["total"] / shown["tokens"]
    assert totals["f16"] > totals["8/4"] > totals["4/4"] > totals["4/3"] > totals["2"]
    with pytest.raises(openai.BadRequestError) as bad:
        ask(server, [say("Hi")], extra_body={"kv_format": "5/5"})
    assert (bad.value.code, bad.value.param) == ("kv_format_not_supported", "kv_format")


def test_a_format_answers_the_same_alone_and_beside_others(server: Server) -> None:
    """Rows of several formats in one batch, then each alone on the emptied server."""

    def run(kv_format: str) -> str:
        messages = introduced("Ruth", "Prague", 51)
        return str(ask(server, messages, extra_body={"kv_format": kv_format}).choices[0].message.content)

    formats = ["f16", "8/4", "4/4", "4/3"]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, formats))
    assert together == [run(kv_format) for kv_format in formats]


def test_conversations_survive_a_restart(cache_dir: Path, tmp_path: Path) -> None:
    flags = ("--kv-format", "4/3", "--kv-store-dir", str(tmp_path / "store"))
    messages = introduced("Nina", "Dublin", 71)
    with running_server(cache_dir, *flags) as first_server:
        first = ask(first_server, messages, extra_body={"session_id": "kept"})
        follow_up = continued(messages, first, "Where do I live?")
        expected = ask(first_server, follow_up).choices[0].message.content
        assert call(first_server.client, "POST", "/sessions/kept/pin")["pinned"] is True
    with running_server(cache_dir, *flags) as second_server:
        shown = call(second_server.client, "GET", "/sessions/kept")
        assert (shown["tier"], shown["pinned"], shown["tokens"]) == ("disk", True, extension(first)["tokens"])
        assert shown["disk_bytes"] > 0 and second_server.stats()["disk"]["writable"] is True
        reply = ask(second_server, follow_up, extra_body={"session_id": "kept"})
        assert reply.choices[0].message.content == expected and "Dublin" in expected
        assert reply.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
        stats = second_server.wait_until_idle()
        assert sum(stats["events"]["restores"].values()) == 1 and stats["integrity_failures"] == 0


def test_keys_are_callers_that_never_meet(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same name and the same prompt under two keys: no shared prefix, no shared session."""
    monkeypatch.setenv("TURBOSERVE_API_KEYS", '["second"]')
    monkeypatch.setenv("TURBOSERVE_API_KEY", "first")
    messages: list[Any] = [{"role": "user", "content": f"{filler(20, 91)} Hello!"}]
    with running_server(cache_dir, "--kv-format", "4/3") as guarded:
        url = f"{guarded.url}/v1"
        one, two = (openai.OpenAI(base_url=url, api_key=key, max_retries=0) for key in ("first", "second"))

        def cached(client: openai.OpenAI, **options: Any) -> int:
            reply: Any = client.chat.completions.create(
                model="turboserve-tiny", messages=messages, max_tokens=2, temperature=0, **options
            )
            return int(reply.usage.prompt_tokens_details.cached_tokens)

        assert cached(one, extra_body={"session_id": "same"}) == 0
        assert cached(one) > 0
        assert cached(two, extra_body={"session_id": "same"}) == 0, "a hit would tell what others asked"
        call(one, "DELETE", "/sessions/same")
        assert call(two, "GET", "/sessions/same")["id"] == "same"
        with pytest.raises(openai.NotFoundError):
            call(one, "GET", "/sessions/same")
        for client in (one, two):
            client.close()


def test_quotas_say_which(cache_dir: Path) -> None:
    with running_server(cache_dir, "--kv-format", "4/3", "--max-sessions-per-caller", "2") as small:
        for name in ("a", "b"):
            ask(small, [say(f"Hello {name}!")], max_tokens=2, extra_body={"session_id": name})
            call(small.client, "POST", f"/sessions/{name}/pin")
        with pytest.raises(openai.RateLimitError) as full:
            call(small.client, "POST", "/sessions/a/fork", {"id": "c"})
        assert (full.value.code, full.value.param) == ("quota_exceeded", "max_sessions_per_caller")
