"""Splits preprocessed Metal text into tokens and keeps every character, so that joining them gives the text back.

Owns the token patterns and the walk over significant tokens. Leaves out what the tokens mean.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_PATTERN = re.compile(
    r"""
      (?P<marker>^\#[^\n]*$)
    | (?P<blank>\s+)
    | (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    | (?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
    | (?P<word>[A-Za-z_]\w*)
    | (?P<sign>::|->\*?|\+\+|--|<<=|>>=|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|<<|.)
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_MARKER = re.compile(r'#(?:line)? ?(\d+) "([^"]*)"')


@dataclass(slots=True)
class Token:
    """`kind` is a group name of the pattern; `text` may be replaced, `file` and `line` say where it stood."""

    kind: str
    text: str
    file: str
    line: int


@dataclass
class TokenText:
    """All tokens of a text, and the positions of those that are neither blank nor line markers."""

    tokens: list[Token]
    solid: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.solid = [i for i, token in enumerate(self.tokens) if token.kind not in ("blank", "marker")]
        self._solid_tokens = [self.tokens[i] for i in self.solid]

    def __len__(self) -> int:
        return len(self.solid)

    def __getitem__(self, index: int) -> Token:
        return self._solid_tokens[index]

    def word(self, index: int) -> str:
        """The text of significant token `index`, "" beyond either end."""
        return self._solid_tokens[index].text if 0 <= index < len(self._solid_tokens) else ""

    def join(self) -> str:
        return "".join(token.text for token in self.tokens)


def split(text: str) -> TokenText:
    return TokenText(list(_tokens(text)))


def _tokens(text: str) -> Iterator[Token]:
    file, line = "", 1
    for found in _PATTERN.finditer(text):
        kind, piece = str(found.lastgroup), found.group()
        yield Token(kind, piece, file, line)
        if kind == "marker" and (marker := _MARKER.match(piece)):
            # The marker names the line that follows its own line end.
            file, line = marker.group(2), int(marker.group(1)) - 1
        elif kind in ("blank", "text"):
            line += piece.count("\n")
