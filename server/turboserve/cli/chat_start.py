"""From the options of `turboserve chat` to a conversation: one answer for a pipe, or a prompt for a person."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from turboquant_kv.codec.format_name import FORMAT_NAMES, UnsupportedFormatError, parse_format_name
from turboserve.cli.chat import Chat, Sampling, Screen, answer_once, choose_model, read_question, wait_until_ready
from turboserve.cli.chat_commands import COMMANDS, talk
from turboserve.cli.client import ServerClient
from turboserve.cli.config import UsageError
from turboserve.cli.conversations import Conversation, Conversations, check_name
from turboserve.cli.line_reader import line_editing, read_text
from turboserve.settings import Settings


@dataclass(frozen=True, slots=True)
class Wanted:
    """The command's options. None: not given."""

    text: str | None = None
    session: str | None = None
    system: str | None = None
    model: str = ""
    kv_format: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None


def run(url: str, settings: Settings, wanted: Wanted) -> int:
    """Talk; the exit status. Raises UsageError, and ServerError where nobody answers."""
    kept = Conversations(settings.cache_dir)
    conversation = _conversation(wanted, kept)
    question = read_question(wanted.text, sys.stdin)
    screen = Screen()
    if not question and not (sys.stdin is not None and sys.stdin.isatty() and screen.is_terminal):
        raise UsageError("there is no question: give it as TEXT, or pipe it in")
    with ServerClient(url, settings.api_key) as client:
        wait_until_ready(client, screen)
        model = choose_model(client, wanted.model)
        sampling = Sampling(wanted.temperature, wanted.max_tokens)
        chat = Chat(client, model["id"], conversation, kept, screen, sampling)
        try:
            if question:
                return answer_once(chat, question)
            screen.line(f"{model['id']} at {url}, {model['kv_format']}, {model['context_length']:,} tokens; /help")
            if conversation.messages:
                screen.line(f"continuing {conversation.name} with {len(conversation.messages)} messages")
            with line_editing(settings.cache_dir.expanduser() / "chat-history", tuple(COMMANDS)):
                talk(chat, read_text)
        finally:
            chat.close()
    return 0


def _conversation(wanted: Wanted, kept: Conversations) -> Conversation:
    """The one to continue, or a new one, as the options say."""
    kv_format = ""
    if wanted.kv_format is not None:
        try:
            kv_format = parse_format_name(wanted.kv_format)
        except UnsupportedFormatError as exc:
            raise UsageError(f"--format {wanted.kv_format!r}: expected {FORMAT_NAMES}") from exc
    if wanted.session is None:
        return Conversation.new(wanted.system or "", kv_format)
    found = kept.try_load(check_name(wanted.session, "--session")) or Conversation(wanted.session, True)
    found.system = found.system if wanted.system is None else wanted.system
    found.kv_format = kv_format or found.kv_format
    return found
