"""From whatever was raised inside the engine to the error its request ends with."""

from __future__ import annotations

import shutil
import tempfile

from turboserve.errors import EngineFailureError, OverloadedError, TurboServeError

# How MLX and Metal word a failed allocation; they raise RuntimeError for it.
_MEMORY_WORDS = ("out of memory", "unable to allocate", "insufficient memory", "attempting to allocate")


def is_out_of_memory(cause: BaseException) -> bool:
    """Whether an allocation failed, on the host or on the device."""
    if isinstance(cause, MemoryError):
        return True
    return isinstance(cause, RuntimeError) and any(word in str(cause).lower() for word in _MEMORY_WORDS)


def known_cause(cause: BaseException | None) -> str | None:
    """What the machine lacks, and the cure, where MLX's exception or what it came from tells it."""
    while cause is not None:
        text = str(cause)
        if isinstance(cause, RuntimeError) and "Failed to compile function" in text:
            folder = tempfile.gettempdir()
            if "No space left on device" in text or "unable to write" in text.lower():
                return f"MLX compiles operations in {folder}, and no space is left there: free some, or set TMPDIR."
            if "g++: not found" in text or shutil.which("g++") is None:
                return "MLX compiles operations of this model with g++, which is not installed: install it."
            return f"MLX cannot compile an operation with g++ in {folder}: `turboserve doctor` looks at the compiler."
        cause = cause.__cause__ or cause.__context__
    return None


def as_failure(cause: Exception, retry_after_s: int) -> TurboServeError:
    """Our own errors pass; lack of memory may be tried again later; the rest is our failure.

    The message names the kind of exception only: details belong in the log, not in an answer.
    """
    if isinstance(cause, TurboServeError):
        return cause
    if is_out_of_memory(cause):
        return OverloadedError("Memory ran out while answering this request.", retry_after_s=retry_after_s)
    return EngineFailureError(f"The engine failed on this request ({type(cause).__name__}).")
