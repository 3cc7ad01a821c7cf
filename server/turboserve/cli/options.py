"""What commands share: options that mean the same everywhere, how help is laid out, and how commands end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperCommand, TyperGroup

from turboserve.cli.config import UsageError

# Values arrive as text and are judged by Settings alone, so that a flag, a variable and a file get the same answer.
Text = str | None
Switch = bool | None
ConfigFile = Annotated[
    Path | None, Option("--config", help="TOML file with any of the settings, or a folder of such.", metavar="FILE")
]
Url = Annotated[Text, Option("--url", help="Where the server answers [http://127.0.0.1:8000].", metavar="URL")]
ApiKey = Annotated[Text, Option("--api-key", help="The server's key; better set TURBOSERVE_API_KEY.", metavar="KEY")]
Model = Annotated[Text, Argument(help="Folder or hub name; none: the embedded demonstration model.", metavar="MODEL")]
CacheDir = Annotated[Text, Option("--cache-dir", help="Our own files [~/.cache/turboserve].", metavar="DIR")]

HELP_COLUMNS = 100
EXAMPLE_HEADING = "Example:"


class Interrupted(Exception):
    """Ctrl-C, on its way past what would call it an abort; exit status 130."""


_WrongUsage: type[Any] = typer.BadParameter.__mro__[1]  # of the click that this typer brings or depends on


class Commands(TyperGroup):
    """A group of commands that tells Ctrl-C from a failure, and mistakes in one line."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Raises UsageError for what the group itself does not understand."""
        with _in_one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Raises Interrupted for KeyboardInterrupt, UsageError for what a command does not understand."""
        try:
            with _in_one_line():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except _WrongUsage as exc:
        if type(exc).__name__ == "NoArgsIsHelpError":  # the help text is what it says
            raise
        where = exc.ctx.command_path if exc.ctx is not None else "turboserve"
        raise UsageError(f"{exc.format_message().rstrip('.')} (`{where} --help` shows what there is)") from exc


def commands_app(**options: Any) -> typer.Typer:
    """A Typer application, or a part of one, as all of ours are."""
    return typer.Typer(
        cls=Commands,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"max_content_width": HELP_COLUMNS},
        **options,
    )


def example(*lines: str) -> str:
    """The end of a command's help: commands to copy, each on a line of its own."""
    return "\n".join(["\b", EXAMPLE_HEADING, *(f"  {line}" for line in lines)])


class BriefCommand(TyperCommand):
    """A command of many options: --help shows the usual ones, --help-all every one. Completion knows all of them."""

    usual: frozenset[str] = frozenset()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Hides what is not usual while the text is made."""
        hidden = [] if ctx.meta.get(_SHOWS_ALL) else [p for p in self.params if p.name not in self.usual]
        for param in hidden:
            param.hidden = True  # type: ignore[attr-defined]
        try:
            super().format_help(ctx, formatter)
        finally:
            for param in hidden:
                param.hidden = False  # type: ignore[attr-defined]


_SHOWS_ALL = "turboserve.help_all"


def brief(usual: Iterable[str]) -> type[BriefCommand]:
    """A command class whose --help shows these parameters, named as in Python."""
    names = frozenset({*usual, "help", "help_all"})
    return type("BriefCommand", (BriefCommand,), {"usual": names})


def _help_all(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        ctx.meta[_SHOWS_ALL] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


HelpAll = Annotated[bool, Option("--help-all", help="Show every option and exit.", callback=_help_all, is_eager=True)]
