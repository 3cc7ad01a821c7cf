"""What may come next in an answer: rules that are asked before each draw and told of each token drawn.

A rule belongs to one answer, is called on the engine thread alone, and costs nobody else's answer anything: what it
raises ends its own request.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.uint32]
"""(ceil(V / 32),) uint32: bit i of word w allows token 32 w + i."""


class TokenRule(Protocol):
    """Which tokens may come next, for one answer."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but a token that ends the answer may follow."""
        ...

    def fill(self, mask: Mask) -> bool:
        """Write all words of `mask`; False: nothing is restricted now, and the mask is left alone.

        Tokens that end the answer are allowed where it may end. May be asked more than once between two tokens: it
        changes nothing. Not asked once the rule is complete.
        """
        ...

    def accept(self, token: int) -> None:
        """This token was drawn. Told of each token once, in the answer's order, but not of the one that ends it."""
        ...
