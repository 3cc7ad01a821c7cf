"""Turns preprocessed Metal text into C++ for g++, and refuses what Metal refuses but g++ would take.

Owns: address-space words, threadgroup variables (they become references into memory shared by the threadgroup's
fibres), swizzles, half literals, notes of local arrays for the register estimate, and Metal's extra rules:
no pointer or reference without an address space, threadgroup variables at the kernel's outermost level only and
without initialiser, no double, no std::, no lambda, no goto, new, exceptions. Leaves out mixing of address spaces,
which `spaces` leaves to clang.
"""

import re

from tests.metal.emulator.errors import MetalCompileError
from tests.metal.emulator.tokens import TokenText, split

SPACES = {"device", "constant", "threadgroup", "thread", "threadgroup_imageblock", "ray_data", "object_data"}
_SPECIFIERS = SPACES | {"const", "volatile", "static", "inline", "constexpr", "unsigned", "signed", "extern"}
_BANNED = {
    "double", "goto", "new", "delete", "throw", "try", "catch", "dynamic_cast", "typeid", "virtual", "thread_local",
    "register", "std", "asm", "__syncthreads", "__shared__",
}  # fmt: skip
_SCALARS = ("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "float", "bfloat")
_TYPES = (
    set(_SCALARS)
    | {f"{scalar}{n}" for scalar in _SCALARS for n in (2, 3, 4)}
    | {f"packed_{scalar}{n}" for scalar in _SCALARS for n in (2, 3, 4)}
    | {f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)}
    | {"float16_t", "bfloat16_t", "size_t", "ptrdiff_t", "vec", "atomic_uint", "atomic_int", "atomic", "void"}
)
_SWIZZLE = re.compile(r"[xyzw]{2,4}|[rgba]{2,4}")
_STATEMENT_ENDS = {";", "{", "}", ""}
_NOT_A_TYPE = {"return", "else", "case", "using", "typedef", "struct", "union", "enum", "class", "template", "operator"}


class Rewriter:
    """One text's way from Metal to C++; use `rewrite`."""

    def __init__(self, kernel: str, text: str, keep_spaces: bool) -> None:
        self.kernel = kernel
        self.keep_spaces = keep_spaces
        self.tokens: TokenText = split(text)
        self.types = set(_TYPES)
        self.num_notes = 0

    def run(self) -> str:
        self._find_types()
        depth = struct_depth = parens = 0
        for index in range(len(self.tokens)):
            word = self.tokens.word(index)
            self._refuse(index, word)
            if word in ("(", ")"):
                parens += 1 if word == "(" else -1
            elif word == "{":
                depth += 1
                struct_depth = struct_depth or (depth if self._opens_struct(index) else 0)
            elif word == "}":
                struct_depth = 0 if struct_depth == depth else struct_depth
                depth -= 1
            if parens == 0 and depth and self.tokens.word(index - 1) in _STATEMENT_ENDS and not struct_depth:
                self._statement(index, depth)
        self._plain_words()
        return self.tokens.join()

    def fail(self, index: int, message: str) -> MetalCompileError:
        token = self.tokens[index]
        return MetalCompileError(self.kernel, f"{token.file}:{token.line}: {message}")

    def _find_types(self) -> None:
        for index in range(len(self.tokens)):
            if self.tokens.word(index) in ("struct", "class", "typename", "using", "union", "enum"):
                self.types.add(self.tokens.word(index + 1))
            elif self.tokens.word(index) == "typedef":
                end = index
                while self.tokens.word(end) not in (";", ""):
                    end += 1
                self.types.add(self.tokens.word(end - 1))

    def _opens_struct(self, index: int) -> bool:
        for back in range(index - 1, max(index - 12, -1), -1):
            if self.tokens.word(back) in ("struct", "class", "union", "enum"):
                return True
            if self.tokens.word(back) in (";", "{", "}", ")"):
                return False
        return False

    def _refuse(self, index: int, word: str) -> None:
        if word in _BANNED and self.tokens[index].kind == "word":
            raise self.fail(index, f"`{word}` is not part of Metal")
        if word in ("*", "&", "&&"):
            self._check_pointer(index)
        closes = word == "[" and self.tokens.word(index - 1) in ("=", "(", ",", "return", "{", ";", "}")
        if closes and self.tokens.word(index + 1) in ("&", "=", "]"):
            raise self.fail(index, "lambdas are not part of Metal before 3.2")

    def _check_pointer(self, index: int) -> None:
        """Raises if `* & &&` at index declares a pointer or reference whose target has no address space."""
        if not (self.tokens.word(index + 1) in (")", ">", "const", "restrict") or self._is_name(index + 1)):
            return
        back, spaced, qualified = index - 1, False, False
        while self.tokens.word(back) in _SPECIFIERS - {"unsigned", "signed"}:
            spaced = spaced or self.tokens.word(back) in SPACES
            back -= 1
        if self.tokens.word(back) == ">":
            back = self._skip_back(back)
        name = self.tokens.word(back)
        back -= 1
        while self.tokens.word(back) in _SPECIFIERS | {"::", "metal", "typename"}:
            spaced = spaced or self.tokens.word(back) in SPACES
            qualified = qualified or self.tokens.word(back) in ("const", "unsigned")
            back -= 1
        begins = self.tokens.word(back) in ("(", ",", "<", ">", *_STATEMENT_ENDS)
        if begins and not spaced and name in self.types | {"unsigned"} and (name in _TYPES or self._declares(index)):
            raise self.fail(index, f"a pointer or reference to `{name}` needs an address space")

    def _declares(self, index: int) -> bool:
        """Whether a name and the end of a declarator follow; tells `Row* p = ` from the product `(a * b)`."""
        return self.tokens.word(index + 2) in ("=", ";", ",", ")", "[") or self.tokens.word(index + 1) in (")", ">")

    def _is_name(self, index: int) -> bool:
        return 0 <= index < len(self.tokens) and self.tokens[index].kind == "word"

    def _skip_back(self, index: int) -> int:
        """From a `>` to the word before its `<`."""
        depth = 0
        while index > 0:
            depth += {">": 1, "<": -1}.get(self.tokens.word(index), 0)
            index -= 1
            if depth == 0:
                return index
        return index

    def _statement(self, start: int, depth: int) -> None:
        end, words = start, []
        while self.tokens.word(end) not in (";", "{", "}", ""):
            words.append(self.tokens.word(end))
            end += 1
        if self.tokens.word(end) == "{" and "=" in words:
            level = 0
            while self.tokens.word(end) != ";" or level:
                level += {"{": 1, "}": -1}.get(self.tokens.word(end), 0)
                end += 1
        head = 0
        if words[:2] == ["alignas", "("]:
            head = words.index(")") + 1
        lead = head
        while lead < len(words) and words[lead] in _SPECIFIERS:
            lead += 1
        in_body = self.tokens[start].file == "source"
        if "threadgroup" in words[head:lead]:
            if not {"*", "&"} & set(_outside_brackets(words)):
                self._share(start, end, words[lead:], depth if in_body else 0)
        elif in_body and not {"constant", "constexpr", "static"} & set(words[:lead]):
            self._note_local(start, end, words[lead:])

    def _share(self, start: int, end: int, words: list[str], depth: int) -> None:
        """Rewrites `threadgroup T a[n], b;` into references to memory of the whole threadgroup."""
        if depth != 1:
            raise self.fail(start, "threadgroup variables belong at the outermost level of the kernel's body")
        if "=" in words:
            raise self.fail(start, "a threadgroup variable cannot have an initialiser")
        kind, declarators = _declarators(words)
        written = ""
        for name, extents in declarators:
            self.num_notes += 1
            shape = "".join(f"[({extent})]" for extent in extents)
            if self.keep_spaces:
                written += f"auto& {name} = emu_variable<threadgroup {kind}{shape}>();"
            else:
                written += f'auto& {name} = *emu::threadgroup_variable<{kind}{shape}>({self.num_notes}, "{name}");'
        first, last = self.tokens.solid[start], self.tokens.solid[end]
        for token in self.tokens.tokens[first : last + 1]:
            token.text = "\n" * token.text.count("\n") if token.kind != "marker" else token.text
        self.tokens.tokens[first].text = written

    def _note_local(self, start: int, end: int, words: list[str]) -> None:
        if self.keep_spaces:
            return
        if len(words) < 3 or words[0] in _NOT_A_TYPE or "[" not in words or not words[0].isidentifier():
            return
        bracket = words.index("[")
        name, before = words[bracket - 1], words[bracket - 2] if bracket > 1 else ""
        if name.isidentifier() and (before == ">" or (before.isidentifier() and bracket == 2)):
            self.num_notes += 1
            self.tokens[end].text += f" emu::note_local({self.num_notes}, sizeof({name}));"

    def _plain_words(self) -> None:
        for index in range(len(self.tokens)):
            token = self.tokens[index]
            if token.text == "constant":
                token.text = "" if self._const_beside(index) else "const"
                token.text += " constant" if self.keep_spaces else ""
            elif token.text in SPACES and not self.keep_spaces:
                token.text = ""
            elif token.kind == "number" and re.fullmatch(r"[\d.]+(?:[eE][+-]?\d+)?[hH]", token.text):
                token.text = f"half({token.text[:-1]}{'f' if re.search('[.eE]', token.text) else ''})"
            elif self.keep_spaces or token.kind != "word" or self.tokens.word(index - 1) not in (".", "->"):
                continue
            elif _SWIZZLE.fullmatch(token.text):
                lanes = ",".join(str(("xyzw" if token.text[0] in "xyzw" else "rgba").index(c)) for c in token.text)
                assigned = self.tokens.word(index + 1) in ("=", "+=", "-=", "*=")
                token.text = f"template {'swizzle' if assigned else 'lanes'}<{lanes}>()"

    def _const_beside(self, index: int) -> bool:
        for step in (-1, 1):
            at = index + step
            while self.tokens.word(at) in _SPECIFIERS or self.tokens.word(at) in self.types:
                if self.tokens.word(at) == "const":
                    return True
                at += step
        return False


def _outside_brackets(words: list[str]) -> list[str]:
    depth, found = 0, []
    for word in words:
        depth += {"[": 1, "]": -1}.get(word, 0)
        if depth == 0:
            found.append(word)
    return found


def _declarators(words: list[str]) -> tuple[str, list[tuple[str, list[str]]]]:
    """("float", [("a", ["4", "N"]), ("b", [])]) from the words of `float a[4][N], b`."""
    pieces: list[list[str]] = [[]]
    depth = 0
    for word in words:
        depth += {"[": 1, "(": 1, "<": 1, "]": -1, ")": -1, ">": -1}.get(word, 0)
        if word == "," and depth == 0:
            pieces.append([])
        else:
            pieces[-1].append(word)
    first = pieces[0]
    split_at = (first.index("[") if "[" in first else len(first)) - 1
    # `vec<float, 4> a[2]` has its first bracket after the name; a bracket inside the type does not occur.
    kind, pieces[0] = " ".join(first[:split_at]), first[split_at:]
    found = []
    for piece in pieces:
        extents = " ".join(piece[1:]).removeprefix("[ ").removesuffix(" ]")
        found.append((piece[0], extents.split(" ] [ ") if extents else []))
    return kind, found


def rewrite(kernel: str, text: str, keep_spaces: bool = False) -> str:
    """C++ text of preprocessed Metal `text`; raises MetalCompileError where Metal would refuse it.

    keep_spaces: for clang, which knows address spaces and swizzles by itself (see `spaces`).
    """
    return Rewriter(kernel, text, keep_spaces).run()
