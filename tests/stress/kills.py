"""A real server killed within moments of an answer, again and again: is its pinned session as it was, or as it became?

    python -m tests.stress.kills                100 kills; `--kills 10` takes a minute or two

Each round starts a server on the same store, looks at the session, continues it by one turn and kills the server within
`--window` seconds of the answer. The session must be there, pinned, with the tokens of its last turn or of the one
before, and must be continued from there without being computed again.
"""

from __future__ import annotations

import argparse
import random
import secrets
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.e2e.server import Server, running_server

SESSION = "killed"
QUESTIONS = ("What is my name?", "Where do I live?", "What is 6 times 7?", "Hello!", "Who are you?")
FILLER = "The harbour near house 12 was painted in the year 1950. The market near house 7 was red. "
MAX_TOKENS = 8
LONGEST = 1500  # tokens; then the session begins anew, over the old one


class LostError(AssertionError):
    """The session is neither as it was nor as it became."""


class Talk:
    """One session's messages and tokens after its last turn, and after the one before."""

    def __init__(self, moments: random.Random) -> None:
        self._moments = moments
        self.states: list[tuple[list[dict[str, str]], int]] = []

    def look(self, server: Server) -> str:
        """Which state was found: `old`, `new`, or `first` when there is none yet. Raises LostError."""
        if not self.states:
            return "first"
        reply = server.get(f"/v1/sessions/{SESSION}")
        if reply.status_code != 200:
            raise LostError(f"the session is gone: {reply.text}")
        found = reply.json()
        matching = [state for state in self.states if state[1] == found["tokens"]]
        if not matching or not found["pinned"]:
            raise LostError(
                f"{found['tokens']} tokens, pinned {found['pinned']}; known are {[n for _, n in self.states]}"
            )
        is_new = matching[-1] is self.states[-1]
        self.states = matching[-1:]
        return "new" if is_new else "old"

    def go_on(self, server: Server) -> None:
        """One more turn."""
        messages, num_tokens = self.states[-1] if self.states else ([], 0)
        is_begun = 0 < num_tokens < LONGEST
        if not is_begun:
            messages = [{"role": "user", "content": FILLER * self._moments.randint(1, 12) + "My name is Paula."}]
        else:
            messages = [*messages, {"role": "user", "content": self._moments.choice(QUESTIONS)}]
        reply: Any = server.client.chat.completions.create(
            model="turboserve-tiny",
            messages=messages,  # type: ignore[arg-type]
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"session_id": SESSION},
        )
        cached = reply.usage.prompt_tokens_details.cached_tokens
        if is_begun and cached < num_tokens - MAX_TOKENS:
            raise LostError(f"{cached} of {num_tokens} stored tokens were used")
        answer = {"role": "assistant", "content": reply.choices[0].message.content}
        num_tokens = reply.usage.model_extra["turboserve"]["tokens"]
        if not self.states:
            server.client.post(f"/sessions/{SESSION}/pin", cast_to=object, body={})
            _wait_until_written(server)
        self.states.append(([*messages, answer], num_tokens))


def _wait_until_written(server: Server) -> None:
    """Nothing was stored before: the first turn has no earlier one to go back to."""
    while server.stats()["disk"]["pending_bytes"]:
        time.sleep(0.02)


def kill_often(num_kills: int, window_s: float, cache_dir: Path, seed: int) -> Counter[str]:
    """How often each state was found. Raises LostError."""
    moments, found = random.Random(seed), Counter[str]()
    talk = Talk(moments)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--kv-store-dir", folder, "--kv-budget", "64MiB", "--kv-store-write-rate"]
        for number in range(num_kills):
            if number % 10 == 0:
                print(f"{number} kills: {dict(found)}", flush=True)
            rate = moments.choice(("1MiB", "4MiB", "64MiB"))  # so that kills find a write begun, half done and ended
            with running_server(cache_dir, *flags, rate) as server:
                found[talk.look(server)] += 1
                talk.go_on(server)
                time.sleep(moments.uniform(0.0, window_s))
                server.process.kill()
        with running_server(cache_dir, *flags, "64MiB") as server:
            found[talk.look(server)] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--window", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/turboserve").expanduser())
    args = parser.parse_args()
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    print(f"seed {seed}")
    started = time.monotonic()
    found = kill_often(args.kills, args.window, args.cache_dir, seed)
    print(f"{args.kills} kills in {time.monotonic() - started:.0f} s, none lost the session: {dict(found)}")


if __name__ == "__main__":
    main()
