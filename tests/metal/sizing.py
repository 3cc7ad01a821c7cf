"""How much threadgroup memory and how many registers a kernel's text asks for, read from the text: nothing is compiled.

Owns a small reader of the C in src/: constants, arrays and the blocks in which they lie. Leaves out single variables,
what a compiler keeps from one statement to the next, and the arrays of functions before the kernel.
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
    **{"float2": 8, "float4": 16, "half2": 4, "half4": 8, "uint2": 8, "uint4": 16},
}
_COMMENT = re.compile(r"//[^\n]*")
_EVENT = re.compile(
    r"(?P<open>\{)|(?P<close>\})"
    r"|typedef (?P<alias_of>[\w<>, ]+) (?P<alias>\w+);"
    r"|TQ_SHARED_ARRAY\((?P<shared_type>\w+), (?P<shared>\w+), (?P<count>.*)\);"
    r"|const (?:int|bool|uint) (?P<constants>[^;{]+);"
    r"|(?<![\w.])(?P<type>float[24]?|u?int|half[24]?|simdgroup_matrix<\w+, 8, 8>) (?P<arrays>\w+\[[^;]*);"
)
_CONSTANTS = re.compile(r"(?:(?:const (?:int|bool) \w+ = -?\d+|typedef \w+ \w+);\n)*")
_FUNCTION = re.compile(r"constexpr int (\w+)\(int (\w+)\) \{ return ([^;]+); \}")


class Sizes(NamedTuple):
    threadgroup_bytes: int
    registers: int


class _Array(NamedTuple):
    is_shared: bool
    type: str
    extents: tuple[CodeType, ...]


_Step = tuple[str, Any]


def sizes(text: KernelText) -> Sizes:
    """Threadgroup arrays, each rounded up to 16 bytes; registers as the arrays that are declared at the same time."""
    names: dict[str, Any] = {"__builtins__": {}, "int": int, "uint": int}
    types = dict(_TYPE_BYTES)
    for name, argument, body in _FUNCTION.findall(text.header):
        names[name] = _function(argument, body, names)
    shared, scopes, most = 0, [0], 0
    constants = _CONSTANTS.match(text.source)
    first = constants.end() if constants else 0  # bodies are shared by many shapes, and read once
    for kind, what in (*_read(text.source[:first]), *_read(text.source[first:])):
        if kind == "open":
            scopes.append(0)
        elif kind == "close":
            scopes.pop()
        elif kind == "alias":
            types[what[0]] = _bytes_of(what[1], types)
        elif kind == "constant":
            try:
                names[what[0]] = eval(what[1], names)
            except (NameError, TypeError):
                names.pop(what[0], None)  # known when the kernel runs
        else:
            num_bytes = _bytes_of(what.type, types)
            for extent in what.extents:
                num_bytes *= eval(extent, names)
            if what.is_shared:
                shared += -(-num_bytes // 16) * 16
            else:
                scopes[-1] += num_bytes
                most = max(most, sum(scopes))
    return Sizes(shared, BASE_REGISTERS + -(-most // 4))


def _bytes_of(kind: str, types: dict[str, int]) -> int:
    vector = re.fullmatch(r"vec<(\w+), (\d)>", kind)
    if vector:
        return types[vector[1]] * int(vector[2])
    matrix = re.fullmatch(r"simdgroup_matrix<(\w+), 8, 8>", kind)
    return 2 * types[matrix[1]] if matrix else types[kind]  # a lane holds two of the 64


def _function(argument: str, body: str, names: dict[str, Any]) -> Any:
    code = _compiled(body)
    return lambda value: eval(code, {**names, argument: value})


@cache
def _read(text: str) -> tuple[_Step, ...]:
    return tuple(_steps(_COMMENT.sub("", expanded(text))))


def _steps(text: str) -> Iterator[_Step]:
    for found in _EVENT.finditer(text):
        if found["open"] or found["close"]:
            yield ("open" if found["open"] else "close"), None
        elif found["alias"]:
            yield "alias", (found["alias"], found["alias_of"])
        elif found["shared"]:
            yield "array", _Array(True, found["shared_type"], (_compiled(found["count"]),))
        elif found["constants"]:
            for one in _split(found["constants"]):
                name, _, value = one.partition("=")
                yield "constant", (name.strip(), _compiled(value))
        else:
            for one in _split(found["arrays"].partition(" = {")[0]):
                extents = re.findall(r"\[((?:[^\[\]])*)\]", one)
                if extents:
                    yield "array", _Array(False, found["type"], tuple(map(_compiled, extents)))


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
