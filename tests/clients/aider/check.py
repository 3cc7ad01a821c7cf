"""The program aider: `python -m tests.clients.aider.check URL MODEL KEY`.

The embedded model cannot edit files, so questions about code are asked; what an edit sends is the same kind of request.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.steps import Step, Target, run_steps

TIMEOUT_S = 180  # aider imports for seconds, and looks for prices in a network that may not be there


def ask(target: Target, text: str, *options: str, key: str | None = None) -> str:
    """What aider prints for one question in a folder of its own with a file of code."""
    with tempfile.TemporaryDirectory(prefix="aider-check-") as folder:
        Path(folder, "area.py").write_text("def area(width, height):\n    return width * height\n")
        command = [sys.executable, "-m", "aider", "--model", f"openai/{target.model}", "--message", text]
        command += ["--edit-format", "ask", "--yes-always", "--no-git", "--no-pretty", "--analytics-disable"]
        command += ["--no-check-update", "--no-show-model-warnings", "--no-show-release-notes", *options]
        access = {"OPENAI_API_BASE": f"{target.url}/v1", "OPENAI_API_KEY": key or target.key, "HOME": folder}
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **access},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        return done.stdout + done.stderr


def a_question_is_answered_in_a_stream(target: Target) -> None:
    shown = ask(target, "Who are you?")
    assert "demonstration model" in " ".join(shown.split()) and "received" in shown, shown


def a_question_is_answered_as_a_whole(target: Target) -> None:
    shown = ask(target, "Who are you?", "--no-stream")
    assert "demonstration model" in " ".join(shown.split()), shown


def a_file_of_the_chat_reaches_the_model(target: Target) -> None:
    """What the prompt has more tokens for than without it."""
    without, with_file = (prompt_tokens(ask(target, "Say hello.", *files)) for files in ((), ("area.py",)))
    assert with_file > without > 0, (without, with_file)


def prompt_tokens(shown: str) -> int:
    """Of the line `Tokens: 84 sent, 35 received.`"""
    (line,) = [line for line in shown.splitlines() if line.startswith("Tokens: ")]
    return int(float(line.split()[1].replace(",", "").replace("k", "e3")))


def a_wrong_key_is_told(target: Target) -> None:
    shown = ask(target, "Hello!", key="wrong")
    assert "AuthenticationError" in shown, shown


STEPS: list[Step] = [
    a_question_is_answered_in_a_stream,
    a_question_is_answered_as_a_whole,
    a_file_of_the_chat_reaches_the_model,
    a_wrong_key_is_told,
]

if __name__ == "__main__":
    run_steps(STEPS)
