"""Answers to questions about text: what a prompt's tokens are, and what text tokens are. One at a time."""

from __future__ import annotations

from turboserve.engine.fill_in_middle import MiddleFiller
from turboserve.engine.loaded_model import LoadedModel
from turboserve.engine.prepare import Preparer
from turboserve.engine.template_process import Patience
from turboserve.errors import InvalidRequestError, UnsupportedParameterError
from turboserve.messages import Detokenize, FillInMiddle, RenderTemplate, TextQuestion, Tokenize


class Questions:
    """Answers for one loaded model."""

    def __init__(self, loaded: LoadedModel, preparer: Preparer) -> None:
        self._loaded, self._preparer = loaded, preparer
        self._middle = MiddleFiller(loaded.tokenizer)

    def answer(self, question: TextQuestion, patience: Patience | None = None) -> object:
        """What the question's docstring promises. Raises InvalidRequestError, of whatever kind, and as `patience`."""
        if isinstance(question, Tokenize):
            return tuple(self._preparer.prompt_of(question.request, patience).ids)
        if isinstance(question, RenderTemplate):
            return self._preparer.prompt_of(question.request, patience).text
        if isinstance(question, Detokenize):
            return self._text_of(question.tokens)
        if isinstance(question, FillInMiddle):
            return self._middle.prompt(question)
        raise UnsupportedParameterError(f"{type(question).__name__} is not supported.")

    def _text_of(self, tokens: tuple[int, ...]) -> str:
        limit = self._preparer.vocab_len
        if wrong := [token for token in tokens if not 0 <= token < limit]:
            raise InvalidRequestError(
                f"{wrong[0]} is no token of this model: ids go from 0 to {limit - 1}.", param="tokens"
            )
        text: str = self._loaded.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text
