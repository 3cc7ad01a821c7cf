"""From whatever was raised inside the engine to the error its request ends with."""

from __future__ import annotations

from turboserve.errors import EngineFailureError, OverloadedError, TurboServeError

# How MLX and Metal word a failed allocation; they raise RuntimeError for it.
_MEMORY_WORDS = ("out of memory", "unable to allocate", "insufficient memory", "attempting to allocate")


def is_out_of_memory(cause: BaseException) -> bool:
    """Whether an allocation failed, on the host or on the device."""
    if isinstance(cause, MemoryError):
        return True
    return isinstance(cause, RuntimeError) and any(word in str(cause).lower() for word in _MEMORY_WORDS)


def as_failure(cause: Exception, retry_after_s: int) -> TurboServeError:
    """Our own errors pass; lack of memory may be tried again later; the rest is our failure.

    The message names the kind of exception only: details belong in the log, not in an answer.
    """
    if isinstance(cause, TurboServeError):
        return cause
    if is_out_of_memory(cause):
        return OverloadedError("Memory ran out while answering this request; try again.", retry_after_s=retry_after_s)
    return EngineFailureError(f"The engine failed on this request ({type(cause).__name__}).")
