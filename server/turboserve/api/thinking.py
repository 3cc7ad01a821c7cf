"""How the APIs beside chat completions tell a chat template whether, and how hard, the model is to think."""

from __future__ import annotations


def thinking_kwargs(thinks: bool | None, effort: str | None) -> dict[str, object]:
    """Template variables; none for what is not given. An `effort` of "none" is not to think."""
    if thinks is None and effort is not None:
        thinks = effort != "none"
    kwargs: dict[str, object] = {}
    if thinks is not None:
        kwargs |= {"enable_thinking": thinks, "thinking": thinks}  # templates know one of the two names
    if effort not in (None, "none"):
        kwargs["reasoning_effort"] = effort
    return kwargs
