"""How much threadgroup memory and how many registers a kernel's text asks for, read from the text: nothing is compiled.

Owns a small reader of the C in src/: constants, structs, functions with their blocks and arrays, and who calls whom.
Leaves out single variables, what a compiler keeps from one statement to the next, and the arrays of helpers whose sizes
are template parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

from turboquant_kv.backends.gpu.source import KernelText, expanded

# Registers beside the arrays: positions, pointers, loops. As the emulator guesses.
BASE_REGISTERS = 24
_TYPE_BYTES = {
    **{"float": 4, "int": 4, "uint": 4, "half": 2, "bfloat16_t": 2, "ushort": 2, "uchar": 1, "bool": 1, "ulong": 8},
    **{"float2": 8, "float4": 16, "half2": 4, "half4": 8, "uint2": 8, "uint4": 16, "long": 8},
}
_MATRIX = r"simdgroup_matrix<\w+, 8, 8>"
_COMMENT = re.compile(r"//[^\n]*")
_CONSTANTS = re.compile(r"TQ_CONSTANT int ([^;]+);")
_ALIAS = re.compile(r"typedef ([\w<>, ]+) (\w+);")
_CONSTEXPR = re.compile(r"(?:TQ_FN )?constexpr (?:int|bool) (\w+)\(([^)]*)\) \{ return ([^;]+); \}")
_STRUCT = re.compile(r"struct (Tq\w+) \{(.*?)\};", re.DOTALL)
_FIELDS = re.compile(rf"(?:alignas\((\d+)\) )?({_MATRIX}|[A-Za-z]\w*) (\w+(?:\[[^;]*)?[^;*]*);")
_FUNCTION = re.compile(r"(template <int[^>]*>\n)?TQ_FN (?!constexpr)[^;{}()]*?(\w+)\([^{};]*\) \{")
_SHARED = re.compile(r"TQ_SHARED_VARIABLE\((\w+), \w+\);")
_CALL = re.compile(r"\b(tq_\w+)\(")
_EVENT = re.compile(
    r"(?P<open>\{)|(?P<close>\})"
    r"|(?:const )?(?P<struct>Tq\w+) \w+(?P<given> = [^;]*)?;"
    r"|const (?:int|bool|uint) (?P<constants>[^;{]+);"
    rf"|(?<![\w.])(?P<type>float[24]?|u?int|half[24]?|{_MATRIX}) (?P<arrays>\w+\[[^;]*);"
    r"|\b(?P<call>tq_\w+)\("
)


class Sizes(NamedTuple):
    threadgroup_bytes: int
    registers: int


class _Array(NamedTuple):
    """A local array or a struct's field."""

    type: str
    extents: tuple[CodeType, ...]
    alignment: int = 1


_Step = tuple[str, Any]


class _Code(NamedTuple):
    """What the text without its constants says: shared by many shapes, and read once."""

    constexprs: tuple[tuple[str, str, str], ...]
    constants: tuple[tuple[str, CodeType], ...]
    aliases: tuple[tuple[str, str], ...]
    structs: dict[str, tuple[_Array, ...]]
    functions: dict[str, tuple[_Step, ...]]


def sizes(text: KernelText) -> Sizes:
    """Threadgroup variables, each rounded up to 16 bytes; registers as the arrays that are held at the same time."""
    reader = _Reader(text)
    shared = sum(-(-reader.struct_bytes(name) // 16) * 16 for name in _SHARED.findall(text.source))
    entry = next(name for name in _CALL.findall(text.source) if name in reader.code.functions)
    return Sizes(shared, BASE_REGISTERS + -(-reader.most_bytes(entry) // 4))


class _Reader:
    """One text's values of the constants, and what they make of its code."""

    def __init__(self, text: KernelText) -> None:
        # the first line of constants and the types behind it are the shape's own
        first = _CONSTANTS.search(text.header)
        assert first is not None
        own_types = re.match(r"(?:\ntypedef \w+ \w+;)*", text.header[first.end() :])
        assert own_types is not None
        self.code = _code(text.header[first.end() + own_types.end() :])
        self._names: dict[str, Any] = {"__builtins__": {}, "int": int, "uint": int}
        self._types = dict(_TYPE_BYTES)
        for name, arguments, body in self.code.constexprs:
            self._names[name] = _function(arguments, body, self._names)
        for name, value in (*_constants(first[1]), *self.code.constants):
            self._names[name] = eval(value, self._names)
        for alias_of, alias in (*_ALIAS.findall(own_types[0]), *self.code.aliases):
            self._types[alias] = self._bytes_of(alias_of)
        self._most: dict[str, int] = {}

    def struct_bytes(self, name: str) -> int:
        """A struct's size with its padding."""
        end, widest = 0, 1
        for field in self.code.structs[name]:
            alignment = max(field.alignment, self._alignment_of(field.type))
            end = -(-end // alignment) * alignment + self._array_bytes(field)
            widest = max(widest, alignment)
        return -(-end // widest) * widest

    def most_bytes(self, function: str) -> int:
        """Bytes of the arrays that a function and what it calls hold at the same time, at most."""
        if function not in self._most:
            scopes, most = [0], 0
            locals_: dict[str, Any] = {}
            for kind, what in self.code.functions[function]:
                if kind == "open":
                    scopes.append(0)
                elif kind == "close":
                    scopes.pop()
                elif kind == "call":
                    if what in self.code.functions:
                        most = max(most, sum(scopes) + self.most_bytes(what))
                elif kind == "constant":
                    try:
                        locals_[what[0]] = eval(what[1], {**self._names, **locals_})
                    except (NameError, TypeError, AttributeError):
                        locals_.pop(what[0], None)  # known when the kernel runs
                else:
                    scopes[-1] += self._held(what) if kind == "struct" else self._array_bytes(what, locals_)
                    most = max(most, sum(scopes))
            self._most[function] = most
        return self._most[function]

    def _held(self, struct: str) -> int:
        """Of a struct's arrays: its single fields are single variables."""
        fields = self.code.structs.get(struct, ())
        nested = sum(self._held(field.type) for field in fields if field.type in self.code.structs)
        return nested + sum(self._array_bytes(field) for field in fields if field.extents)

    def _array_bytes(self, array: _Array, names: dict[str, Any] | None = None) -> int:
        num_bytes = self._bytes_of(array.type)
        for extent in array.extents:
            num_bytes *= eval(extent, {**self._names, **(names or {})})
        return num_bytes

    def _alignment_of(self, kind: str) -> int:
        fields = self.code.structs.get(kind)
        if fields is None:
            return self._bytes_of(kind)
        return max(max(field.alignment, self._alignment_of(field.type)) for field in fields)

    def _bytes_of(self, kind: str) -> int:
        if kind in self.code.structs:
            return self.struct_bytes(kind)
        vector = re.fullmatch(r"vec<(\w+), (\d)>", kind)
        if vector:
            return self._types[vector[1]] * int(vector[2])
        matrix = re.fullmatch(r"simdgroup_matrix<(\w+), 8, 8>", kind)
        return 2 * self._types[matrix[1]] if matrix else self._types[kind]  # a lane holds two of the 64


@cache
def _code(text: str) -> _Code:
    text = _COMMENT.sub("", expanded(text))
    structs = {name: tuple(_fields(body)) for name, body in _STRUCT.findall(text)}
    constants = tuple(pair for found in _CONSTANTS.findall(text) for pair in _constants(found))
    functions = dict(_functions(text))
    return _Code(tuple(_CONSTEXPR.findall(text)), constants, tuple(_ALIAS.findall(text)), structs, functions)


def _constants(text: str) -> Iterator[tuple[str, CodeType]]:
    for one in _split(text):
        name, _, value = one.partition("=")
        yield name.strip(), _compiled(value)


def _fields(body: str) -> Iterator[_Array]:
    """Pointers are single fields of no array, and left out."""
    for alignment, kind, names in _FIELDS.findall(body):
        for name in _split(names):
            yield _Array(kind, _extents(name), int(alignment or 1))


def _functions(text: str) -> Iterator[tuple[str, tuple[_Step, ...]]]:
    for found in _FUNCTION.finditer(text):
        if found[1]:
            continue
        end, depth = found.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield found[2], tuple(_steps(text[found.end() : end - 1]))


def _steps(text: str) -> Iterator[_Step]:
    for found in _EVENT.finditer(text):
        if found["open"] or found["close"]:
            yield ("open" if found["open"] else "close"), None
        elif found["struct"]:
            yield from (("call", name) for name in _CALL.findall(found["given"] or ""))
            yield "struct", found["struct"]
        elif found["constants"]:
            yield from (("call", name) for name in _CALL.findall(found["constants"]))
            yield from (("constant", pair) for pair in _constants(found["constants"]))
        elif found["call"]:
            yield "call", found["call"]
        else:
            for one in _split(found["arrays"].partition(" = {")[0]):
                if _extents(one):
                    yield "array", _Array(found["type"], _extents(one))


def _extents(declared: str) -> tuple[CodeType, ...]:
    return tuple(_compiled(one) for one in re.findall(r"\[((?:[^\[\]])*)\]", declared))


def _function(arguments: str, body: str, names: dict[str, Any]) -> Any:
    code, parameters = _compiled(body), [one.split()[-1] for one in arguments.split(",")]
    return lambda *values: eval(code, {**names, **dict(zip(parameters, values, strict=True))})


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    pieces, depth = [""], 0
    for letter in text:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces


@cache
def _compiled(expression: str) -> CodeType:
    """A C expression as Python's; one that Python cannot read is not known before the kernel runs."""
    text = re.sub(r"\b(0x[0-9a-fA-F]+|\d+)u\b", r"\1", expression).replace("/", "//")
    text = text.replace("&&", " and ").replace("||", " or ")
    try:
        return compile(_chosen(text).strip(), "<kernel>", "eval")
    except SyntaxError:
        return compile("unknown", "<kernel>", "eval")


def _chosen(text: str) -> str:
    """`a ? b : c`, also within brackets, as Python has it."""
    inner = re.compile(r"\(([^()]*\?[^()]*)\)")
    while inner.search(text):
        text = inner.sub(lambda found: f"({_ternary(found[1])})".replace("(", "⟨").replace(")", "⟩"), text)
    return _ternary(text).replace("⟨", "(").replace("⟩", ")")


def _ternary(text: str) -> str:
    condition, mark, rest = text.partition("?")
    if not mark:
        return text
    yes, _, no = rest.partition(":")
    return f"(({yes}) if ({condition}) else ({_ternary(no)}))"
