"""What can be typed at the prompt of `turboserve chat` beside questions, and the loop around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from turboquant_kv.codec.format_name import FORMAT_NAMES, UnsupportedFormatError, parse_format_name
from turboserve.cli.chat import Chat
from turboserve.cli.client import ServerError
from turboserve.cli.config import UsageError, closest
from turboserve.cli.conversations import Conversation, check_name
from turboserve.cli.figures import session_line, session_lines, turn_line
from turboserve.errors import StartupError

PROMPT = "> "


@dataclass(frozen=True, slots=True)
class Command:
    """One that begins with a slash. `run` returns whether the chat goes on."""

    usage: str
    help: str
    run: Callable[[Chat, str], bool]


def talk(chat: Chat, read: Callable[[str], str]) -> None:
    """Questions and commands until the end of input or /exit. Ctrl-C at the prompt drops the line."""
    while True:
        try:
            text = read(PROMPT)
        except KeyboardInterrupt:
            chat.screen.line("\n(/exit or Ctrl-D ends the chat)")
            continue
        except EOFError:
            chat.screen.line("")
            return
        try:
            if text and not handle(chat, text):
                return
        except KeyboardInterrupt:
            chat.screen.line("")
        except (UsageError, StartupError) as exc:
            chat.screen.remark(str(exc))


def handle(chat: Chat, text: str) -> bool:
    """A question or a command; False at the end. Raises UsageError and ServerError, after which the chat can go on."""
    if not text.startswith("/"):
        if not chat.ask(text):
            kept = "nothing was said yet" if chat.unanswered else "what was said so far is kept"
            chat.screen.line(f"(stopped; {kept}, /retry asks again)")
        elif chat.last is not None and chat.last.finish_reason == "length":
            chat.screen.line("(cut at the limit of tokens)")
        return True
    name, _, rest = text.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = closest(name, COMMANDS)
        raise UsageError(f"{name}: no such command" + (f"; did you mean {near}?" if near else "; /help lists them"))
    return command.run(chat, rest.strip())


def _fork(chat: Chat, name: str) -> bool:
    check_name(name, "/fork")
    old = chat.conversation
    if old.messages:
        chat.client.fork(old.name, name)
    fork = old.forked(name)
    chat.kept.save(fork)
    chat.take(fork)
    chat.screen.line(f"now in {name}; {old.name} stays as it is" + ("" if old.is_kept else " until the chat ends"))
    return True


def _session(chat: Chat, name: str) -> bool:
    check_name(name, "/session")
    found = chat.kept.try_load(name)
    chat.take(found or Conversation(name, True, chat.conversation.system, chat.conversation.kv_format))
    chat.screen.line(f"now in {name}: " + (f"{len(found.messages)} messages" if found else "new"))
    return True


def _stats(chat: Chat, _: str) -> bool:
    if chat.last is not None:
        chat.screen.line(turn_line(chat.last))
    try:
        lines = session_lines(chat.client.session(chat.conversation.name))
    except ServerError as exc:
        if exc.status != 404:
            raise
        lines = ["the server holds nothing of this conversation" + (" any more" if chat.conversation.messages else "")]
    for line in lines:
        chat.screen.line(line)
    return True


def _format(chat: Chat, name: str) -> bool:
    if not name:
        chat.screen.line(chat.conversation.kv_format or "the server's own")
        return True
    try:
        chat.conversation.kv_format = parse_format_name(name)
    except UnsupportedFormatError as exc:
        raise UsageError(f"/format {name}: expected {FORMAT_NAMES}") from exc
    chat.screen.line(f"from the next answer on in {chat.conversation.kv_format}; the conversation is read again for it")
    return True


def _sessions(chat: Chat, _: str) -> bool:
    kept = chat.kept.names()
    for session in chat.client.sessions():
        if session["explicit"]:
            mark = "*" if session["id"] == chat.conversation.name else " "
            chat.screen.line(f"{mark} {session_line(session)}" + (", texts kept here" if session["id"] in kept else ""))
    return True


def _new(chat: Chat, _: str) -> bool:
    chat.take(Conversation.new(chat.conversation.system, chat.conversation.kv_format))
    chat.screen.line("a new conversation")
    return True


def _system(chat: Chat, text: str) -> bool:
    if text:
        chat.conversation.system = "" if text == "-" else text
        chat.screen.line("set" if chat.conversation.system else "taken away")
    else:
        chat.screen.line(chat.conversation.system or "none is set")
    return True


def _retry(chat: Chat, _: str) -> bool:
    if not chat.retry():
        chat.screen.line("(stopped)")
    return True


def _help(chat: Chat, _: str) -> bool:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        chat.screen.line(f"{command.usage:<{width}}  {command.help}")
    chat.screen.line('""" begins a text of several lines, """ ends it; Ctrl-C stops an answer')
    return True


COMMANDS = {
    "/fork": Command("/fork NAME", "go on in a copy of this conversation, which is kept under NAME", _fork),
    "/session": Command("/session NAME", "go on in the kept conversation NAME, or begin it", _session),
    "/sessions": Command("/sessions", "your conversations on the server", _sessions),
    "/stats": Command("/stats", "what the last answer and this conversation's cache took", _stats),
    "/format": Command("/format [F]", "KV format of this conversation: balanced, compact, tiny, 4/4, f16", _format),
    "/system": Command("/system [TEXT]", "show or set the system message; - takes it away", _system),
    "/retry": Command("/retry", "ask the last question again", _retry),
    "/new": Command("/new", "begin a new conversation", _new),
    "/help": Command("/help", "show this", _help),
    "/exit": Command("/exit", "end the chat; so does Ctrl-D", lambda chat, _: False),
}
