"""How one request's answer is read and ruled: its text with the markers that readers need, its reader, and its rule."""

from __future__ import annotations

from turboserve.engine.answer_reader import MarkupReader
from turboserve.engine.decoding import Decoding
from turboserve.engine.readers import AnswerReader, PlainReader
from turboserve.engine.template import Prompt
from turboserve.engine.text import Decoder
from turboserve.engine.token_rules import TokenRule
from turboserve.engine.tools.markup import Markup
from turboserve.engine.tools.thinking import LastCallRule, ThinkingRule
from turboserve.messages import Request


def reader_of(request: Request, prompt: Prompt, markup: Markup) -> AnswerReader:
    """Bare prompts are continued as they are; in conversations reasoning and calls are told apart."""
    tools = request.tools if request.tools is not None and request.tools.choice != "none" else None
    if request.prompt is not None or (tools is None and not markup.has_thinking):
        return PlainReader()
    return MarkupReader(markup, tools, is_thinking=prompt.is_thinking, shows_special=not request.skip_special_tokens)


def decoder_of(request: Request, reader: AnswerReader, decoding: Decoding, markup: Markup) -> Decoder:
    """Of the request's answer. Special tokens that are the reader's markers stay in it; the reader takes them out."""
    skips = request.skip_special_tokens
    if skips and isinstance(reader, MarkupReader) and markup.visible_ids:
        return decoding.decoder(skips_special=False, left_out=markup.special_ids - markup.visible_ids.keys())
    return decoding.decoder(skips_special=skips)


def ruled(
    request: Request, prompt: Prompt, markup: Markup, reader: AnswerReader, rule: TokenRule | None
) -> TokenRule | None:
    """The answer's rule, from `rule` on what follows its reasoning.

    A budget of thinking means nothing to a model that does none, or to an answer that begins behind it.
    """
    may_think = request.prompt is None and markup.has_thinking and not prompt.has_thought
    if may_think and (rule is not None or request.thinking_tokens is not None):
        rule = ThinkingRule(markup, is_thinking=prompt.is_thinking, budget=request.thinking_tokens, inner=rule)
    tools = request.tools
    if isinstance(reader, MarkupReader) and tools is not None and (not tools.is_parallel or tools.choice == "required"):
        return LastCallRule(lambda: reader.is_over, rule)
    return rule
