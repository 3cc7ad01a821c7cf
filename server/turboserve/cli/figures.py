"""Figures of answers, sessions and servers as lines for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboserve.cli.chat import Turn


def mib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"


def amount(num_bytes: float) -> str:
    """In the largest unit of which there is one: `1.4 GiB`."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.1f} {name}"
    return f"{num_bytes:,.0f} B"


def uncompressed_in(dtypes: Iterable[str] = ()) -> str:
    """What the servers' compression ratios are beside. `dtypes` are those that the models run in, as far as known."""
    known = sorted(set(dtypes))
    if len(known) == 1:
        return f"uncompressed in {known[0]}"
    return f"uncompressed in {' or '.join(known)}{', ' if known else ''}the model's dtype"


def ratio_note(dtypes: Iterable[str] = ()) -> str:
    """The line below a table that has a column RATIO."""
    return f"RATIO: times smaller than {uncompressed_in(dtypes)}"


def duration(seconds: float) -> str:
    """Of an age: `12 s`, `3 min`, `5 h`, `2 d`."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def turn_line(turn: Turn) -> str:
    """The last answer: tokens, what was cached, and how fast it came."""
    if turn.usage is None:
        return f"last answer    stopped after {turn.elapsed_s:.1f} s"
    read, written = turn.usage["prompt_tokens"], turn.usage["completion_tokens"]
    cached = turn.usage["prompt_tokens_details"]["cached_tokens"]
    rest_s = turn.elapsed_s - turn.first_s
    speed = f", {(written - 1) / rest_s:,.1f} tokens/s" if written > 1 and rest_s > 0 else ""
    return (
        f"last answer    {read:,} tokens read ({cached:,} of them kept), {written:,} written, "
        f"first after {turn.first_s:.2f} s{speed}"
    )


def session_lines(session: Mapping[str, Any]) -> list[str]:
    """A session, in full."""
    kv = session["kv_bytes"]
    ttl = "the server's" if session["ttl_s"] is None else duration(session["ttl_s"]) if session["ttl_s"] else "none"
    return [
        f"session        {session['id']}{', pinned' if session['pinned'] else ''}, in {session['tier']}",
        f"KV format      {session['kv_format']}",
        f"tokens         {session['tokens']:,}",
        f"KV memory      {amount(kv['total'])}, {uncompressed_in()} {amount(session['raw_equivalent_bytes'])}: "
        f"{session['ratio']:.2f}x",
        f"on disk        {amount(session['disk_bytes']) if session['disk_bytes'] else 'nothing'}",
        f"used           answers: {session['requests']:,}, continued or forked: {session['hits']:,}",
        f"time limit     {ttl}",
    ]


def session_line(session: Mapping[str, Any]) -> str:
    """A session, in short."""
    state = session["tier"] + (", pinned" if session["pinned"] else "")
    held = f"{amount(session['kv_bytes']['total'])}, {session['ratio']:.2f}x smaller than uncompressed"
    return f"{session['id']}  {session['tokens']:,} tokens, {held}, {state}"
