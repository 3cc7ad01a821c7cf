"""`turboserve sessions`: list, show, fork, pin, delete, export and import conversations of a running server."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from typer import Argument, Option

from turboserve.cli import config
from turboserve.cli.client import ServerClient, ServerError, server_url
from turboserve.cli.config import UsageError
from turboserve.cli.conversations import Conversation, Conversations, check_name, parse_conversation
from turboserve.cli.figures import amount, duration, ratio_note, session_lines
from turboserve.cli.options import ApiKey, ConfigFile, Text, Url, commands_app, example
from turboserve.errors import StartupError
from turboserve.settings import Settings

app = commands_app(
    help="Your conversations on a running server.",
    epilog=example("turboserve sessions list", "turboserve sessions fork trip trip-2"),
)
MAX_TEXTS_BYTES = 64 << 20  # of a chat that comes through a pipe, which says no size
_PIECE_BYTES = 1 << 18
Name = Annotated[str, Argument(help="The session's id.", metavar="NAME")]
AsJson = Annotated[bool, Option("--json", help="The server's reply, as it is.")]


def _opened(url: str | None, api_key: str | None, config_file: Path | None) -> tuple[ServerClient, Settings]:
    settings = config.resolve({"api_key": api_key}, config_file)
    return ServerClient(server_url(url, settings), settings.api_key), settings


@app.command("list", epilog=example("turboserve sessions list --all"))
def list_command(
    show_all: Annotated[bool, Option("--all", help="Also those that nobody named.")] = False,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    config_file: ConfigFile = None,
) -> None:
    """List your sessions, those used last first."""
    client, settings = _opened(url, api_key, config_file)
    with client:
        found = [one for one in client.sessions() if show_all or one["explicit"]]
    if as_json:
        _print_json(found)
        return
    kept = Conversations(settings.cache_dir).names()
    for line in table(found, kept, time.time()):
        typer.echo(line)


def table(sessions: list[dict[str, Any]], kept: set[str], now_s: float) -> list[str]:
    """Lines with columns of one width, and what the ratios are beside."""
    rows = [["NAME", "STATE", "FORMAT", "TOKENS", "KV MEMORY", "RATIO", "DISK", "HITS", "USED", "TEXTS"]]
    for one in sessions:
        state = one["tier"] + (", pinned" if one["pinned"] else "")
        rows.append(
            [
                *(one["id"], state, one["kv_format"], f"{one['tokens']:,}", amount(one["kv_bytes"]["total"])),
                *(f"{one['ratio']:.2f}x", amount(one["disk_bytes"]) if one["disk_bytes"] else "-", f"{one['hits']:,}"),
                *(f"{duration(now_s - one['last_used_at'])} ago", "kept" if one["id"] in kept else "-"),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, *([ratio_note()] if sessions else [])]


@app.command("show", epilog=example("turboserve sessions show trip"))
def show_command(
    name: Name, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None, config_file: ConfigFile = None
) -> None:
    """Show what one session holds, takes and saves."""
    client, _ = _opened(url, api_key, config_file)
    with client:
        found = client.session(name)
    if as_json:
        _print_json(found)
        return
    for line in session_lines(found):
        typer.echo(line)


@app.command("fork", epilog=example("turboserve sessions fork trip trip-2"))
def fork_command(
    name: Name,
    new_name: Annotated[Text, Argument(help="The fork's id; none: the server chooses.", metavar="NEW")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    config_file: ConfigFile = None,
) -> None:
    """Begin a session that shares all that NAME holds; nothing is copied. Prints its id."""
    client, settings = _opened(url, api_key, config_file)
    with client:
        made = client.fork(name, None if new_name is None else check_name(new_name, "NEW"))
    kept = Conversations(settings.cache_dir)
    texts = kept.try_load(name)
    if texts is not None:
        kept.save(texts.forked(made["id"]))
    typer.echo(made["id"])


@app.command("pin", epilog=example("turboserve sessions pin trip"))
def pin_command(name: Name, url: Url = None, api_key: ApiKey = None, config_file: ConfigFile = None) -> None:
    """Keep a session from being dropped or shrunk for others."""
    client, _ = _opened(url, api_key, config_file)
    with client:
        client.pin(name, True)


@app.command("unpin", epilog=example("turboserve sessions unpin trip"))
def unpin_command(name: Name, url: Url = None, api_key: ApiKey = None, config_file: ConfigFile = None) -> None:
    """Let a pinned session make room again."""
    client, _ = _opened(url, api_key, config_file)
    with client:
        client.pin(name, False)


@app.command("rm", epilog=example("turboserve sessions rm trip trip-2"))
def rm_command(
    names: Annotated[list[str], Argument(help="Ids of sessions.", metavar="NAME")],
    url: Url = None,
    api_key: ApiKey = None,
    config_file: ConfigFile = None,
) -> None:
    """Delete sessions: the server's memory and files, and the texts kept here."""
    client, settings = _opened(url, api_key, config_file)
    kept, missing = Conversations(settings.cache_dir), []
    with client:
        for name in names:
            check_name(name, "NAME")
            try:
                client.delete(name)
            except ServerError as exc:
                if exc.status != 404:
                    raise
                if not kept.forget(name):
                    missing.append(name)
            else:
                kept.forget(name)
    if missing:
        raise StartupError(f"no such session: {', '.join(missing)}; `turboserve sessions list --all` shows all")


@app.command("export", epilog=example("turboserve sessions export trip trip.session"))
def export_command(
    name: Name,
    file: Annotated[Path | None, Argument(help="Where to; none: standard output.", metavar="FILE")] = None,
    texts: Annotated[bool, Option("--texts", help="Only what was said in a chat kept here, as JSON.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    config_file: ConfigFile = None,
) -> None:
    """Write a session with its compressed cache to FILE, so that another server can continue it."""
    check_name(name, "NAME")
    if texts:
        return _export_texts(name, file, config.resolve({}, config_file))
    if file is None and sys.stdout.isatty():
        raise UsageError("an exported cache is no text: name a FILE, redirect the output, or ask for --texts")
    client, _ = _opened(url, api_key, config_file)
    with client:
        if file is None:
            client.export(name, sys.stdout.buffer.write)
        else:
            with _written(file) as write:
                client.export(name, write)


def _export_texts(name: str, file: Path | None, settings: Settings) -> None:
    found = Conversations(settings.cache_dir).try_load(name)
    if found is None:
        raise StartupError(
            f"no texts of {name} are kept here: servers keep caches, not texts; `turboserve chat --session` keeps them"
        )
    text = json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n"
    if file is None:
        sys.stdout.write(text)
        return
    with _written(file) as write:
        write(text.encode())


@contextmanager
def _written(file: Path) -> Iterator[Callable[[bytes], object]]:
    """A file that is there when all of it was written, for its owner alone; what a link names; or a pipe or device.

    Raises StartupError.
    """
    try:
        kind = _kind(file)
        if stat.S_ISDIR(kind):
            raise StartupError(f"{file} is a folder: name a file in it")
        if not stat.S_ISREG(kind):  # nothing of the kind may be replaced by a file
            with file.open("wb") as out:
                yield out.write
            return
        target = Path(os.path.realpath(file))
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # 0600
        try:
            with open(handle, "wb") as out:
                yield out.write
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as exc:
        raise StartupError(f"{file} cannot be written: {exc.strerror or exc}") from exc


def _kind(file: Path) -> int:
    """Its mode, links followed; that of a plain file where there is nothing yet."""
    try:
        return file.stat().st_mode
    except FileNotFoundError:
        return stat.S_IFREG


@app.command("import", epilog=example("turboserve sessions import trip.session --as trip-home"))
def import_command(
    file: Annotated[Path, Argument(help="What `sessions export` wrote.", metavar="FILE")],
    new_name: Annotated[Text, Option("--as", help="Its name here [the exported one].", metavar="NAME")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    config_file: ConfigFile = None,
) -> None:
    """Have a server take an exported session in; of exported texts, keep the chat here. Prints its name."""
    name = None if new_name is None else check_name(new_name, "--as")
    with _read(file) as source:
        first = source.read(1)
        source.seek(0)
        if first in (b"{", b""):
            return _import_texts(source, file, name, config.resolve({}, config_file))
        client, _ = _opened(url, api_key, config_file)
        with client:
            typer.echo(client.take_in(source, os.fstat(source.fileno()).st_size, name)["id"])


@contextmanager
def _read(file: Path) -> Iterator[BinaryIO]:
    """The file, opened once and at its begin; a copy of what comes from a pipe or a device. Raises StartupError."""
    with ExitStack() as opened:
        try:
            source: BinaryIO = opened.enter_context(file.open("rb"))
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                copy = opened.enter_context(tempfile.TemporaryFile())
                _copy(source, copy, file)
                source = copy
        except OSError as exc:
            raise StartupError(f"{file} cannot be read: {exc.strerror or exc}") from exc
        yield source


def _copy(source: BinaryIO, copy: BinaryIO, file: Path) -> None:
    """As much as a chat may have, or as the head of an exported session says; `copy` is at its begin then.

    Raises StartupError for more and for anything else, OSError.
    """
    from turboserve.cache.disk.session_file import FIRST_BYTES, head_bytes, parse_head  # late: brings in NumPy

    first = source.read(FIRST_BYTES)
    copy.write(first)
    most = MAX_TEXTS_BYTES
    if first[:1] not in (b"{", b""):
        try:
            head = source.read(head_bytes(first) - FIRST_BYTES)
            most = parse_head(first + head).num_bytes
        except ValueError as exc:
            raise StartupError(f"{file} gives no exported session ({exc}): export it again") from exc
        copy.write(head)
    while copy.tell() <= most and (piece := source.read(min(most + 1 - copy.tell(), _PIECE_BYTES))):
        copy.write(piece)
    if copy.tell() > most:
        raise StartupError(f"{file} gives more than the {most:,} bytes that can belong to it: export it again")
    copy.flush()
    copy.seek(0)


def _import_texts(source: BinaryIO, file: Path, new_name: str | None, settings: Settings) -> None:
    found = parse_conversation(source.read, file)
    name = new_name or found.name
    kept = Conversations(settings.cache_dir)
    if kept.path(name).exists():
        raise UsageError(f"there is a chat named {name} here: choose another name by --as, or delete it first")
    kept.save(Conversation(name, True, found.system, found.kv_format, found.messages))
    typer.echo(name)


def _print_json(found: Any) -> None:
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
