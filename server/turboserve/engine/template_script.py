"""A process that renders one chat template after another. Run as a script; see template_process.py.

A template is a program that came with a model. Here its loops and its memory cost this process alone, which can be
ended. It imports nothing of the server.

A line in: {"template", "messages", "tools", "kwargs", "add_generation_prompt", "max_chars"}. A line out: {"text"},
{"error"} or {"too_long": true}; the first one is "ready".
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any

MAX_MEMORY_BYTES = 2 << 30


def main() -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy is imported and not used: each thread would take memory
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(ImportError, ValueError, OSError):  # where the system knows such a limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), render_jinja_template)), flush=True)


def _answer(asked: dict[str, Any], render: Any) -> dict[str, object]:
    try:
        (text,), _ = render(
            conversations=[asked["messages"]],
            tools=asked["tools"],
            chat_template=asked["template"],
            add_generation_prompt=asked["add_generation_prompt"],
            **asked["kwargs"],
        )
    except Exception as exc:  # templates are programs: anything can come out of one
        return {"error": str(exc).strip()[:1000] or type(exc).__name__}
    return {"too_long": True} if len(text) > asked["max_chars"] else {"text": text}


if __name__ == "__main__":
    main()
