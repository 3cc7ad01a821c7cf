"""Answers to questions about text: what a prompt's tokens are, and what text tokens are. On the engine thread."""

from __future__ import annotations

from turboserve.engine.fill_in_middle import MiddleFiller
from turboserve.engine.loaded_model import LoadedModel
from turboserve.engine.prepare import Preparer
from turboserve.errors import UnsupportedParameterError
from turboserve.messages import Detokenize, FillInMiddle, TextQuestion, Tokenize


class Questions:
    """Answers for one loaded model."""

    def __init__(self, loaded: LoadedModel, preparer: Preparer) -> None:
        self._loaded, self._preparer = loaded, preparer
        self._middle = MiddleFiller(loaded.tokenizer)

    def answer(self, question: TextQuestion) -> object:
        """What the question's docstring promises. Raises InvalidRequestError, of whatever kind."""
        if isinstance(question, Tokenize):
            return tuple(self._preparer.prompt_of(question.request))
        if isinstance(question, Detokenize):
            return self._loaded.tokenizer.decode(list(question.tokens), clean_up_tokenization_spaces=False)
        if isinstance(question, FillInMiddle):
            return self._middle.prompt(question)
        raise UnsupportedParameterError(f"{type(question).__name__} is not supported.")
