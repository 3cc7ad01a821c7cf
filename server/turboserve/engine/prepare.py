"""From a request to a generation ready for admission: tokens, limits, sampling and text stream.

All refusals that depend on the request alone happen here, before any memory or compute is spent.
"""

from __future__ import annotations

from turboserve.cache.memory import Memory
from turboserve.engine.answers import decoder_of, reader_of, ruled
from turboserve.engine.decoding import Decoding
from turboserve.engine.generation import Generation
from turboserve.engine.loaded_model import LoadedModel
from turboserve.engine.prompt_texts import beginning
from turboserve.engine.sampling import row_sampling
from turboserve.engine.template import USUAL_TIMEOUT_S, ChatTemplate, Prompt
from turboserve.engine.template_process import Patience, TemplateProcess
from turboserve.engine.text import TextStream
from turboserve.errors import ContextLengthError, InvalidRequestError
from turboserve.messages import Request

# Without max_tokens an answer could take the whole context; room for it is reserved in blocks of
# this many tokens as it grows, so that a few open-ended chats do not shut everyone else out.
OPEN_ANSWER_BLOCK = 1024
PIECE_CHARS = 1 << 15
CHARS_PER_TOKEN = 16  # of text, runs of blanks aside, far fewer


class Preparer:
    """Prepares requests for one loaded model."""

    def __init__(
        self,
        loaded: LoadedModel,
        memory: Memory,
        decoding: Decoding,
        vocab_len: int,
        default_max_tokens: int = 0,
        process: TemplateProcess | None = None,
    ) -> None:
        """`default_max_tokens`: of an answer where a request asks for none; 0: up to the context.

        `process`: where chat templates are rendered; None: on the calling thread.
        """
        self._default_max_tokens = default_max_tokens
        self._loaded, self._memory, self.vocab_len = loaded, memory, vocab_len
        self._template = ChatTemplate(loaded.tokenizer, process)
        self._decoding = decoding

    def warm_up(self) -> None:
        """Try out what the template expects, before the first request."""
        self._template.try_out()

    def prepare(self, generation: Generation) -> None:
        """Fills in prompt, limits, sampling and text. Raises InvalidRequestError, of whatever kind."""
        request = generation.request
        generation.adapter = self._loaded.adapters.get(request.adapter)
        read = generation.read or self.prompt_of(request)
        prompt, markup = read.ids, self._template.markup
        limit = answer_limit(len(prompt), request.max_tokens, self._loaded.max_context)
        kv_format = self._memory.format_for(request.tenant, request.session_id, request.kv_format)
        if request.max_tokens is None:
            self._memory.check_can_fit(len(prompt) + 1, kv_format)
            limit = min(limit, self._memory.largest_sequence(self._loaded.max_context, kv_format) - len(prompt))
            limit = min(limit, self._default_max_tokens or limit)
        else:
            self._memory.check_can_fit(len(prompt) + limit, kv_format)
        generation.eos_ids = self._loaded.eos_ids
        generation.sampling = row_sampling(
            request.sampling,
            self.vocab_len,
            num_top=request.num_top_logprobs,
            barred=self._checked_end_ids(generation),
            barred_until=request.min_tokens,
        )
        reader = reader_of(request, read, markup)
        decoder = decoder_of(request, reader, self._decoding, markup)
        generation.text = TextStream(decoder, request.stop, include_stop=request.include_stop)
        generation.reader = reader
        generation.rule = ruled(request, read, markup, reader, generation.rule)
        generation.max_answer_len = limit
        generation.prompt = prompt

    def prompt_of(self, request: Request, patience: Patience | None = None) -> Prompt:
        """What the model reads for this request: any thread, one at a time, since it does not touch the memory.

        Raises InvalidRequestError when there is nothing to read or too much, and what `patience` raises.
        """
        patience = patience or Patience(USUAL_TIMEOUT_S)
        self._refuse_early(request, patience)
        return self._template.prompt_of(request, self.vocab_len, patience=patience)

    def _refuse_early(self, request: Request, patience: Patience) -> None:
        """A prompt far beyond the context is told by its beginning, which is tokenised in pieces that take moments.

        Raises ContextLengthError, and what `patience` raises.
        """
        limit = self._loaded.max_context
        text = beginning((request.prompt, request.messages, request.tools), limit * CHARS_PER_TOKEN)
        if text is None:
            return
        num_tokens = 0
        for start in range(0, len(text), PIECE_CHARS):
            patience.check()
            piece = text[start : start + PIECE_CHARS]
            ids = self._loaded.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
            num_tokens += max(0, len(ids) - 1)  # the cut may have made one more
            if num_tokens > limit:
                raise _too_long(f"more than {limit:,}", limit)

    def _checked_end_ids(self, generation: Generation) -> list[int]:
        """Tokens that end its answer. Raises InvalidRequestError when the request names one that the model lacks."""
        for token in generation.request.stop_token_ids:
            if not 0 <= token < self.vocab_len:
                raise InvalidRequestError(
                    f"stop_token_ids names token {token}, but this model's tokens go from 0 to {self.vocab_len - 1}.",
                    param="stop_token_ids",
                )
        return sorted(token for token in generation.end_ids if token < self.vocab_len)


def answer_limit(prompt_len: int, max_tokens: int | None, max_context: int) -> int:
    """Most tokens the answer may have. Raises ContextLengthError when not one fits behind the prompt."""
    room = max_context - prompt_len
    if room < 1:
        # LiteLLM, coding agents and others know this error by OpenAI's and Anthropic's words in it.
        raise _too_long(f"{prompt_len:,}", max_context)
    return room if max_tokens is None else min(max_tokens, room)


def _too_long(num_tokens: str, max_context: int) -> ContextLengthError:
    return ContextLengthError(
        f"The prompt is too long: this model's maximum context length is {max_context:,} tokens including the "
        f"answer, and the prompt has {num_tokens}. Shorten the messages.",
        param="messages",
    )


def tokens_to_reserve(generation: Generation) -> int:
    """Tokens a generation needs room for before it may run on: all of them, or the next block."""
    most = len(generation.prompt) + generation.max_answer_len
    if generation.request.max_tokens is not None:
        return most
    return min(most, generation.num_tokens + OPEN_ANSWER_BLOCK)
