"""A process that compiles one grammar after another, to see whether that ends well. Run as a script; see check.py.

llguidance is native code: some grammars overflow its stack, and compiling cannot be stopped from outside. Here both
cost this process alone. It imports nothing of the server, so that it starts at once.

First line in: {"vocab_len", "control_tokens": {text: id}, "end_tokens", "limits"}; then a JSON string, a grammar, per
line. Out: a line "ready", then per grammar a JSON string: what is wrong with it, or "".
"""

from __future__ import annotations

import json
import sys
import threading
from contextlib import suppress
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MAX_MEMORY_BYTES = 1 << 30
STACK_BYTES = 4 << 20  # half of what the server's threads have on Linux, and less on macOS: what fits here fits there


class Bytes:
    """A tokenizer of single bytes and control tokens, as llguidance wants one: grammars compile alike with any."""

    def __init__(self, vocab_len: int, control_tokens: dict[str, int], end_tokens: list[int]) -> None:
        self.eos_token_id = end_tokens[0] if end_tokens else vocab_len - 1
        self.bos_token_id = None
        self.special_token_ids = sorted({*control_tokens.values(), *end_tokens, self.eos_token_id})
        texts = {i: text.encode() for text, i in control_tokens.items()}
        others = (i for i in range(vocab_len) if i not in set(self.special_token_ids))
        self._ids = dict(zip(range(256), others, strict=False))
        texts |= {i: bytes([byte]) for byte, i in self._ids.items()}
        texts = {i: f"<|{i}|>".encode() for i in self.special_token_ids} | texts
        self.tokens = [texts.get(i, b"") for i in range(vocab_len)]

    def __call__(self, text: bytes) -> list[int]:
        return [self._ids[byte] for byte in text]


def main() -> None:
    with suppress(ImportError, ValueError, OSError):  # where the system knows such a limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup: dict[str, Any] = json.loads(sys.stdin.readline())
    end_tokens = setup["end_tokens"]
    one = Bytes(setup["vocab_len"], setup["control_tokens"], end_tokens)
    tokens = LLTokenizer(TokenizerWrapper(one), eos_token=end_tokens or None, slices=[])
    limits = LLParserLimits(**setup["limits"])
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(trouble_with(json.loads(line), tokens, limits)), flush=True)


def trouble_with(grammar: str, tokens: LLTokenizer, limits: LLParserLimits) -> str:
    """What is wrong with the grammar, or ""."""
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits)
    warnings = [] if matcher.is_error() else matcher.get_grammar_warnings()
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error() or "\n".join(warnings)


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=main).start()
