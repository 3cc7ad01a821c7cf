"""Three real servers with one shared store behind a real gateway: affinity, cache hits, a kill, and a drained server.

    python -m tests.stress.replicas                      every gateway that is installed, at full size
    python -m tests.stress.replicas --gateways haproxy --sessions 24

For each gateway it measures

    affinity     share of requests that went where their session's first one did: more than 99%
    hit rate     cached tokens over prompt tokens, beside one server's on the same requests: within 2%
    kill         one server gets SIGKILL while every session streams: only streams of that server may break off, and
                 every session continues from its last stored turn
    drain        one server gets SIGTERM while a stream runs there: that ends whole, and no request fails

The gateways' files are those of config/gateways, with other addresses. LiteLLM is found by `--litellm PROGRAM`, and
stands in front of one of the others. Every server computes a beginning that all sessions share once for itself, which
is what the hit rate loses; it loses the less, the more sessions there are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.e2e.server import Server, running_server

CONFIG = Path(__file__).resolve().parents[2] / "config" / "gateways"
KEY = "sk-a-key-of-the-replicas"
MODEL = "turboserve-tiny"
NUM_REPLICAS = 3
SERVED_BY = "x-served-by"
RULES = "You answer in one short sentence. The harbour is painted red, and the market opens at nine. " * 3
MAX_TOKENS = 12
STREAM_TOKENS = 150  # of a stream that is to be running when something happens
PAGE_TOKENS, TAIL_TOKENS = 96, 16  # a text's last tokens may be others once more follows; caches are cut at pages
MIN_AFFINITY, MAX_HIT_RATE_LOSS = 0.99, 0.02


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def program(name: str) -> str | None:
    """Where a gateway is installed; administrators' programs are often not on the path."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


GATEWAYS = ("nginx", "haproxy")


@contextmanager
def gateway(name: str, servers: list[Server], folder: Path) -> Iterator[str]:
    """The gateway's URL, its shipped file used with these servers' addresses."""
    file = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}[name]
    port, text = free_port(), (CONFIG / file).read_text()
    for number, server in enumerate(servers, 1):
        text = text.replace(f"turboserve-{number}:8000", server.url.removeprefix("http://"))
    text = re.sub(
        r"(listen |bind \S*:|bind :)8080", lambda m: f"{m[1]}{port}".replace("bind :", "bind 127.0.0.1:"), text
    )
    text = text.replace(f"listen {port}", f"listen 127.0.0.1:{port}")
    path = folder / file
    path.write_text(text)
    found = program(name)
    assert found is not None, f"{name} is not installed"
    with ExitStack() as stack:
        log = stack.enter_context((folder / f"{name}.log").open("w"))
        if name == "nginx":
            (folder / "logs").mkdir(exist_ok=True)
            command = [found, "-p", str(folder), "-c", str(path), "-e", str(folder / "error.log")]
            command += ["-g", f"daemon off; pid {folder / 'nginx.pid'};"]
        else:
            command = [found, "-f", str(path), "-db"]
        environment = {**os.environ, "TURBOSERVE_API_KEY": KEY}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(_end, process)
        url = f"http://127.0.0.1:{port}"
        _wait_until_up(url, process, folder / f"{name}.log")
        yield url


@contextmanager
def litellm(executable: str, behind: str, folder: Path) -> Iterator[str]:
    """LiteLLM's proxy with the shipped file, in front of another gateway."""
    port = free_port()
    text = (CONFIG / "litellm.yaml").read_text().replace("http://gateway:8080", behind)
    (folder / "litellm.yaml").write_text(text)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"TURBOSERVE_API_KEY": KEY, "LITELLM_MASTER_KEY": KEY}
    command = [executable, "--config", str(folder / "litellm.yaml"), "--port", str(port), "--host", "127.0.0.1"]
    with (folder / "litellm.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_up(url, process, folder / "litellm.log", "/health/liveliness", 120)
            yield url
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_up(url: str, process: Any, log: Path, path: str = "/health", timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}{path}", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the gateway did not come up:\n{log.read_text()[-2000:]}")


@contextmanager
def replicas(cache_dir: Path, store: Path | None, num: int = NUM_REPLICAS) -> Iterator[list[Server]]:
    """Servers of one model with one key, all on one folder."""
    shared = () if store is None else ("--kv-store-dir", str(store), "--kv-store-shared")
    flags = ("--api-key", KEY, *shared)
    with ExitStack() as stack:
        yield [stack.enter_context(running_server(cache_dir, *flags)) for _ in range(num)]


@dataclass
class Talk:
    """One session: what was said, who answered, and how many tokens it held after its last whole turn."""

    name: str
    messages: list[dict[str, str]]
    served_by: list[str] = field(default_factory=list)
    held: int = 0

    def ask(self, words: str) -> list[dict[str, str]]:
        return [*self.messages, {"role": "user", "content": words}]


@dataclass
class Outcome:
    """Of one request. `error`: it broke off, or was refused."""

    talk: Talk = field(repr=False)
    served_by: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


class Client:
    """Asks one URL, as any client of the API would, with the session's id in the header that gateways see."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=256)
        headers = {"Authorization": f"Bearer {KEY}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=120, limits=limits)

    def close(self) -> None:
        self._http.close()

    def say(
        self, talk: Talk, words: str, max_tokens: int = MAX_TOKENS, started: threading.Event | None = None
    ) -> Outcome:
        """One turn as a stream; a whole one is added to the talk."""
        outcome, text, is_whole = Outcome(talk), "", False
        usage: dict[str, Any] = {}
        messages = talk.ask(words)
        body = {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "ignore_eos": max_tokens > MAX_TOKENS}
        try:
            with self._http.stream(
                "POST", "/v1/chat/completions", json=body, headers={"X-Session-Id": talk.name}
            ) as reply:
                outcome.served_by = reply.headers.get(SERVED_BY, reply.headers.get(f"llm_provider-{SERVED_BY}", ""))
                if reply.status_code != 200:
                    outcome.error = f"{reply.status_code} {reply.read()[:200]!r}"
                    return outcome
                for line in reply.iter_lines():
                    if line == "data: [DONE]":
                        is_whole = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        if "error" in event:
                            outcome.error = str(event["error"])
                            continue
                        usage = event.get("usage") or usage
                        for choice in event.get("choices") or ():
                            text += choice["delta"].get("content") or ""
                            if started is not None:
                                started.set()
        except httpx.HTTPError as exc:
            outcome.error = repr(exc)
        finally:
            if started is not None:
                started.set()
        if not is_whole and not outcome.error:
            outcome.error = "it ended without [DONE]"
        if not outcome.error:
            outcome.prompt_tokens = usage["prompt_tokens"]
            outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            talk.messages = [*messages, {"role": "assistant", "content": text}]
            talk.served_by.append(outcome.served_by)
            talk.held = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        return outcome


def talks(num: int) -> list[Talk]:
    return [
        Talk(
            f"talk-{i}", [{"role": "system", "content": RULES}, {"role": "user", "content": f"I am visitor {i}. " * 8}]
        )
        for i in range(num)
    ]


def turns(client: Client, everyone: list[Talk], num_turns: int, num_at_once: int = 4) -> list[Outcome]:
    """All sessions take turns, some of them at a time."""
    found: list[Outcome] = []
    with ThreadPoolExecutor(num_at_once) as pool:
        for turn in range(num_turns):
            found += pool.map(lambda talk, turn=turn: client.say(talk, f"Question {turn}: who am I?"), everyone)
    return found


def hit_rate(outcomes: list[Outcome]) -> float:
    return sum(o.cached_tokens for o in outcomes) / sum(o.prompt_tokens for o in outcomes)


def affinity(everyone: list[Talk]) -> float:
    """Of requests after each session's first."""
    later = [(talk.served_by[0], by) for talk in everyone for by in talk.served_by[1:]]
    return sum(first == by for first, by in later) / len(later)


@dataclass
class Report:
    """What was measured behind one gateway."""

    gateway: str
    affinity: float
    spread: list[int]
    hit_rate: float
    one_server: float
    num_streams: int
    num_of_killed: int
    broken: list[Outcome]
    broken_elsewhere: int
    num_lost: int  # sessions of which less is found than was stored before the kill
    num_continued: int
    most_missing: int  # tokens of a stored turn that its next one had to compute again
    drain_errors: list[str]

    def check(self) -> None:
        """Raises AssertionError for what misses its target."""
        assert self.affinity > MIN_AFFINITY, self
        assert self.hit_rate >= self.one_server - MAX_HIT_RATE_LOSS, self
        assert not self.broken_elsewhere, self
        assert len(self.broken) <= self.num_of_killed, self
        assert not self.num_lost, self
        assert self.most_missing < PAGE_TOKENS + TAIL_TOKENS, self
        assert not self.drain_errors, self

    def lines(self) -> list[str]:
        return [
            f"{self.gateway}",
            f"  affinity      {self.affinity:.2%} of requests, sessions over servers {self.spread}",
            f"  hit rate      {self.hit_rate:.2%}, one server {self.one_server:.2%}",
            f"  kill          {len(self.broken)} of {self.num_streams} streams broke off; {self.num_of_killed} "
            f"sessions were the killed server's, {self.broken_elsewhere} broken streams were not",
            f"  stored        {self.num_lost} of {self.num_continued} conversations lost",
            f"  continued     {self.num_continued} sessions, "
            f"{max(0, self.most_missing)} stored tokens computed again at most",
            f"  drain         {len(self.drain_errors)} failures",
        ]


def one_server(cache_dir: Path, num_sessions: int, num_turns: int) -> float:
    """Its hit rate on the same requests."""
    with replicas(cache_dir, None, 1) as (server,):
        client = Client(server.url)
        try:
            return hit_rate(turns(client, talks(num_sessions), num_turns))
        finally:
            client.close()


def measure(url: str, name: str, servers: list[Server], num_sessions: int, num_turns: int, baseline: float) -> Report:
    """Everything behind one gateway; a server is killed and another one stopped on the way."""
    client = Client(url)
    try:
        everyone = talks(num_sessions)
        outcomes = turns(client, everyone, num_turns)
        errors = [o.error for o in outcomes if o.error]
        assert not errors, errors[:3]
        share, rate = affinity(everyone), hit_rate(outcomes)
        by_server = Counter(talk.served_by[0] for talk in everyone)
        for server in servers:
            _wait_until_stored(server)
        victim, _ = by_server.most_common(1)[0]
        stored = {talk.name: talk.held for talk in everyone}
        streamed, num_of_killed = _kill(client, everyone, servers[_number(victim, servers)], victim)
        broken = [o for o in streamed if o.error]
        survivor = next(server for server in servers if server.process.poll() is None)
        held = {talk.name: _held(survivor, talk) for talk in everyone}
        continued = [client.say(talk, "And now?") for talk in everyone]
        errors = [o.error for o in continued if o.error]
        assert not errors, errors[:3]
        return Report(
            name,
            share,
            sorted(by_server.values()),
            rate,
            baseline,
            len(everyone),
            num_of_killed,
            broken,
            broken_elsewhere=sum(o.served_by not in (victim, "") for o in broken),
            num_lost=sum(held[name] < num_tokens for name, num_tokens in stored.items()),
            num_continued=len(continued),
            most_missing=max(stored[o.talk.name] - o.cached_tokens for o in continued),
            drain_errors=_drain(client, everyone, servers, victim),
        )
    finally:
        client.close()


def _kill(client: Client, everyone: list[Talk], server: Server, victim: str) -> tuple[list[Outcome], int]:
    """Every session streams, then one server dies: how the streams ended, and how many had begun on that server."""
    before = {talk.name: talk.served_by[-1] for talk in everyone}
    started = [threading.Event() for _ in everyone]
    with ThreadPoolExecutor(len(everyone)) as pool:
        streams = [
            pool.submit(client.say, talk, "Tell me a long story.", STREAM_TOKENS, event)
            for talk, event in zip(everyone, started, strict=True)
        ]
        for event in started:
            event.wait(60)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        outcomes = [stream.result() for stream in streams]
    return outcomes, sum(by == victim for by in before.values())


def _held(server: Server, talk: Talk) -> int:
    """Tokens of the session's last stored turn, by what another server finds."""
    headers = {"Authorization": f"Bearer {KEY}"}
    reply = httpx.get(f"{server.url}/v1/sessions/{talk.name}", headers=headers, timeout=60)
    return int(reply.json()["tokens"]) if reply.status_code == 200 else 0


def _drain(client: Client, everyone: list[Talk], servers: list[Server], dead: str) -> list[str]:
    """A server is told to stop while a stream runs there and others go on asking: what failed."""
    leaving = next(talk for talk in everyone if talk.served_by[-1] != dead)
    server = servers[_number(leaving.served_by[-1], servers)]
    begun, others = threading.Event(), [talk for talk in everyone if talk is not leaving]
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(client.say, leaving, "Tell me a long story.", STREAM_TOKENS, begun)
        begun.wait(60)
        server.process.terminate()
        asked = [client.say(talk, "Are you still there?") for talk in others]
        outcomes = [stream.result(), *asked]
    server.process.wait(60)
    outcomes += [client.say(talk, "Who is there?") for talk in everyone]
    return [o.error for o in outcomes if o.error]


def _number(served_by: str, servers: list[Server]) -> int:
    """Which server a gateway names: by its number, or by its address."""
    if match := re.fullmatch(r"turboserve-(\d)", served_by):
        return int(match[1]) - 1
    return next(i for i, server in enumerate(servers) if server.url.endswith(served_by.rpartition(",")[2].strip()))


def _wait_until_stored(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    while httpx.get(f"{server.url}/v1/kv/stats", headers=headers, timeout=30).json()["disk"]["pending_bytes"]:
        time.sleep(0.05)


def run(name: str, cache_dir: Path, num_sessions: int, num_turns: int, baseline: float, executable: str = "") -> Report:
    """One gateway with three servers of its own. Of LiteLLM, `executable` is the proxy, which stands before another."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = stack.enter_context(replicas(cache_dir, folder / "store"))
        behind = next(one for one in GATEWAYS if program(one)) if name == "litellm" else name
        url = stack.enter_context(gateway(behind, servers, folder))
        if name == "litellm":
            url = stack.enter_context(litellm(executable, url, folder))
        return measure(url, name, servers, num_sessions, num_turns, baseline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateways", nargs="+", choices=(*GATEWAYS, "litellm"), default=None)
    parser.add_argument("--sessions", type=int, default=30)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument(
        "--litellm", default="", metavar="PROGRAM", help="LiteLLM's proxy, in an environment of its own"
    )
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/turboserve").expanduser())
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    installed = [name for name in GATEWAYS if program(name)]
    wanted = args.gateways or [*installed, *(["litellm"] if args.litellm else [])]
    if missing := [name for name in wanted if name not in (*installed, *(["litellm"] if args.litellm else []))]:
        parser.error(f"not installed: {', '.join(missing)}")
    if not wanted:
        parser.error("no gateway is installed: apt-get install nginx-light haproxy")
    baseline = one_server(args.cache_dir, args.sessions, args.turns)
    rows: list[dict[str, Any]] = []
    for name in wanted:
        report = run(name, args.cache_dir, args.sessions, args.turns, baseline, args.litellm)
        print("\n".join(report.lines()), flush=True)
        report.check()
        rows += _rows(report)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


def _rows(report: Report) -> list[dict[str, Any]]:
    """In the form of bench/_rows.py."""
    name, loss = report.gateway, report.one_server - report.hit_rate
    return [
        row(f"{name} affinity", report.affinity, "share", None, "above 0.99", met=report.affinity > MIN_AFFINITY),
        row(
            f"{name} hit rate",
            report.hit_rate,
            "share",
            report.one_server,
            "at most 0.02 less",
            met=loss <= MAX_HIT_RATE_LOSS,
        ),
        row(f"{name} lost", report.num_lost, "conversations", None, "0", met=not report.num_lost),
        row(f"{name} broken elsewhere", report.broken_elsewhere, "streams", None, "0", met=not report.broken_elsewhere),
    ]


def row(name: str, value: float, unit: str, baseline: float | None, target: str, *, met: bool) -> dict[str, Any]:
    ratio = value / baseline if baseline else None
    return {
        "name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio, "target": target, "met": met
    }  # fmt: skip


if __name__ == "__main__":
    main()
