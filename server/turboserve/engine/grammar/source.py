"""From a constraint to the text of a grammar that llguidance reads, and from its complaints to ours. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from llguidance import LLMatcher, regex_to_lark

from turboserve.errors import InvalidRequestError
from turboserve.messages import Constraint

# Compiling takes time by length; these many bytes of an enum take about a tenth of a second.
MAX_TEXT_BYTES = 256 * 1024

# Between the parts of a JSON text: nothing, a space, or a line break and an indentation. Longer runs only ever come
# from a model that has lost its way, and would go on to the answer's limit.
WHITESPACE = r"\x20|\r?\n[\x20\t]{0,20}"

# llguidance reads them in the schema, where callers could otherwise ask for keywords to be ignored.
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}

_NAMES = {
    "json_object": "The JSON schema",
    "json_schema": "The JSON schema",
    "regex": "The regular expression",
    "lark": "The grammar",
    "choice": "The list of choices",
}

MAX_MESSAGE = 300

_VALUE_KEYWORDS = frozenset({"const", "enum", "default", "examples"})  # below them are values, not schemas


def grammar_text(constraint: Constraint) -> str:
    """What llguidance compiles. Raises InvalidRequestError for what is no schema, list or text at all."""
    text = constraint.text
    if len(text.encode(errors="surrogatepass")) > MAX_TEXT_BYTES:
        raise refusal(constraint, f"it is longer than {MAX_TEXT_BYTES:,} bytes")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refusal(constraint, "it has half a surrogate pair, which is no character") from None
    if constraint.kind == "json_object":
        return _of_schema({"type": "object"})
    if constraint.kind == "json_schema":
        schema = _json(constraint)
        if not isinstance(schema, (dict, bool)):
            raise refusal(constraint, "a schema is a JSON object")
        schema = schema if isinstance(schema, dict) else ({} if schema else {"anyOf": []})
        if reason := misread_bounds(schema):
            raise refusal(constraint, reason)
        return _of_schema(schema)
    if constraint.kind == "choice":
        return LLMatcher.grammar_from_lark(_choice(constraint))
    if constraint.kind == "regex":
        # As in a schema's patterns, digits and letters are ASCII: who asks for \d{4} does not mean other scripts'.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'dw')}/")
    return LLMatcher.grammar_from_lark(text)


def embedded_schema(schema: Mapping[str, Any], param: str) -> str:
    """`%json {...}` for a Lark grammar, enforced as strictly as a schema that stands alone.

    Raises InvalidRequestError with this `param` for what llguidance would not complain about itself.
    """
    if reason := misread_bounds(schema):
        raise InvalidRequestError(f"The JSON schema cannot be enforced: {reason}.", param=param)
    return "%json " + json.dumps(with_options(schema))


def with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with this server's way of enforcing it, in place of what it says about that itself."""
    return {**schema, "x-guidance": JSON_OPTIONS}


def misread_bounds(node: object) -> str:
    """Why llguidance (1.9) would let the bound itself pass, anywhere in the schema; "" if it would not.

    It does so where a number is bounded by a whole number, exclusively, and by another within 1 of it.
    """
    if isinstance(node, list):
        return next((reason for item in node if (reason := misread_bounds(item))), "")
    if not isinstance(node, Mapping):
        return ""
    for exclusive, others in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum")),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum")),
    ):
        bound = node.get(exclusive)
        if not _is_number(bound) or bound != round(bound) or node.get("type") == "integer":
            continue
        for other in others:
            if _is_number(node.get(other)) and abs(node[other] - bound) < 1:
                return f"{exclusive} {bound} with {other} {node[other]} is not supported, but an inclusive bound is"
    parts = (value for key, value in node.items() if key not in _VALUE_KEYWORDS)
    return next((reason for part in parts if (reason := misread_bounds(part))), "")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def refusal(constraint: Constraint, reason: str) -> InvalidRequestError:
    """The error for a constraint that cannot be enforced, with why."""
    return InvalidRequestError(f"{_NAMES[constraint.kind]} cannot be enforced: {reason}.", param=constraint.param)


def reason_of(complaint: str) -> str:
    """llguidance's complaint about a grammar, in the words of a caller who does not know llguidance."""
    if found := re.search(r"Unimplemented keys: (\[.*?\])", complaint):
        keys = ", ".join(found[1].strip("[]").replace('"', "").split(", "))
        return f"these keywords are not supported: {keys}"
    if found := re.search(r"Resource '(.*?)' is not present in a registry", complaint, re.DOTALL):
        return f"the reference {found[1][:100]!r} leads out of the schema, and nothing is fetched"
    if "oneOf constraints are not supported" in complaint:
        return "the keyword oneOf is supported only where its alternatives exclude each other visibly; use anyOf"
    if "too many digits" in complaint and "multipleOf" in complaint:
        return "the value of multipleOf has too many digits"
    if "NoExtension" in complaint:
        return "nothing can be an answer to it"
    if "regex is empty" in complaint:
        return "its conditions on one text cannot be combined"
    if any(word in complaint for word in ("panic", "too big", "too large", "fuel", "too many", "recursion limit")):
        return "it is too large or too deeply nested"
    shown = complaint.split("\n<state>")[0]
    shown = re.sub(r"\n\s*(\d+ )?[|^].*", "", shown)  # lines of the grammar, as llguidance quotes and marks them
    return re.sub(r"\s+", " ", shown).strip().rstrip(".")[:MAX_MESSAGE] or "it is not understood"


def _json(constraint: Constraint) -> object:
    try:
        return json.loads(constraint.text)
    except RecursionError:
        raise refusal(constraint, "it is too large or too deeply nested") from None
    except ValueError as exc:
        raise refusal(constraint, f"it is no JSON ({exc})") from None


def _of_schema(schema: Mapping[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(with_options(schema)))


def _choice(constraint: Constraint) -> str:
    """A Lark grammar of the given texts."""
    choices = _json(constraint)
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
        raise refusal(constraint, "expected at least one text")
    return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in choices)
