"""`turboserve ps`: what a running server works on and holds, as a table that follows it, a table, or JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from turboserve.cli.client import ServerClient
from turboserve.cli.figures import amount, duration, ratio_note

INTERVAL_S = 1.0
PIPE_WIDTH = 1000  # a pipe has no edge at which anything would have to be cut
SHOWN = 12  # conversations; the table must fit a screen


def run(client: ServerClient, *, once: bool, as_json: bool, interval_s: float = INTERVAL_S) -> None:
    """Until Ctrl-C, or once. Raises ServerError, when the server ends meanwhile too."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    if as_json:
        sys.stdout.write(json.dumps(client.stats(), indent=1) + "\n")
    elif once or not console.is_terminal:
        console.print(view(client.url, client.stats()))
    else:
        _follow(client, console, interval_s)


def _follow(client: ServerClient, console: Console, interval_s: float) -> None:
    with Live(view(client.url, client.stats()), console=console, screen=False, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval_s)
                live.update(view(client.url, client.stats()), refresh=True)
        except KeyboardInterrupt:
            return  # the way to end it; the last table stays


def view(url: str, stats: Mapping[str, Any]) -> RenderableType:
    """The server's models, then the conversations that take most."""
    models = list(_models(stats))
    served = [one for _, _, one in models if one is not None]
    running = sum(one["requests"]["running"] for one in served)
    waiting = sum(one["requests"]["waiting"] for one in served)
    head = Text(f"{url}: {running} running, {waiting} waiting", style="bold")
    shown = [c for one in served for c in one["conversations"]]
    total = sum(sum(one["num_conversations"].values()) for one in served)
    tables = [_model_table(models), *([_conversation_table(shown, total)] if shown else [])]
    dtypes = [one["model_dtype"] for one in served]
    return Group(head, *tables, *([Text(ratio_note(dtypes), style="dim")] if served else []))


def _models(stats: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any] | None]]:
    """Name, status and statistics of each model; these are None while it is not loaded."""
    if stats["object"] != "kv.stats.list":
        yield stats["model"], "loaded", stats
        return
    for one in stats["data"]:
        yield one["model"], one["status"], one["statistics"]


def _table(*columns: str) -> Table:
    """The first column to the left, figures to the right."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim", show_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _model_table(models: list[tuple[str, str, Mapping[str, Any] | None]]) -> Table:
    """A status is told where there are several models; 80 columns hold one."""
    several = ("STATUS",) if len(models) > 1 else ()
    table = _table("MODEL", *several, "FORMAT", "TOKENS", "KV MEMORY", "BUDGET", "RATIO", "HIT", "CONVERSATIONS")
    for name, status, one in models:
        if one is None:
            table.add_row(name, status)
            continue
        prefix = one["prefix_tokens"]
        share = f"{prefix['hit'] / prefix['queried']:.0%}" if prefix["queried"] else "-"
        held, budget = one["kv_bytes"]["total"], one["kv_budget_bytes"]
        used = f"{held / budget:.0%} of {amount(budget)}" if budget else "-"
        tiers = " + ".join(f"{count:,} {tier}" for tier, count in one["num_conversations"].items() if count) or "none"
        table.add_row(
            *((name, status) if several else (name,)),
            *(one["kv_format"], f"{one['tokens']:,}", amount(held), used),
            *(f"{one['ratio']:.2f}x", share, tiers),
        )
    return table


def _conversation_table(conversations: list[Mapping[str, Any]], total: int) -> Table:
    table = _table("CONVERSATION", "STATE", "FORMAT", "TOKENS", "KV MEMORY", "RATIO", "HITS", "IDLE")
    largest = sorted(conversations, key=lambda c: c["kv_bytes"]["total"] + c["disk_bytes"], reverse=True)[:SHOWN]
    for c in largest:
        state = c["tier"] + (", pinned" if c["pinned"] else "")
        idle = "" if c["tier"] == "running" else duration(c["idle_s"])
        figures = (f"{c['tokens']:,}", amount(c["kv_bytes"]["total"]), f"{c['ratio']:.2f}x", f"{c['hits']:,}", idle)
        table.add_row(c["id"], state, c["kv_format"], *figures)
    if total > len(largest):
        table.add_row(f"and {total - len(largest):,} more")
    return table
