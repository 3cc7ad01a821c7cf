"""Constraints made to cost time, memory or stack: by size, by depth, by what they multiply to."""

from __future__ import annotations

import json
import random
import string
from typing import Any

from turboserve.messages import Constraint


def hard_constraints() -> dict[str, Constraint]:
    """By name. Each is either refused or compiled, in little time."""
    words = _words(20_000)
    schemas: dict[str, Any] = {
        "unions in unions, 2^10 objects": _unions(10),
        "unions in unions, 2^14 objects": _unions(14),
        "an enum of 20,000": {"enum": words},
        "an enum of 30,000 numbers": {"enum": list(range(30_000))},
        "1,000 optional properties": {
            "type": "object",
            "properties": {f"k{i}": {"type": "integer"} for i in range(1000)},
        },
        "9,000 properties": {
            "type": "object",
            "properties": {f"k{i}": {} for i in range(9_000)},
            "additionalProperties": False,
        },
        "1,000 patterns": {
            "type": "object",
            "properties": {f"k{i}": {"type": "string", "pattern": f"^[a-z]{{{i}}}x.*y.{{{i}}}$"} for i in range(1000)},
        },
        "300 patterns of names": {
            "type": "object",
            "patternProperties": {f"^{word}.*a.{{20}}$": {"type": "integer"} for word in words[:300]},
        },
        "3,000 constants": {"oneOf": [{"const": word} for word in words[:3000]]},
        "60 patterns of one text": {"allOf": [{"type": "string", "pattern": word} for word in words[:60]]},
        "3^12 combinations": {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"k{i}{j}": {"type": "integer"}}} for j in range(3)]}
                for i in range(12)
            ]
        },
        "300 definitions of each other": {
            "$ref": "#/$defs/d0",
            "$defs": {
                f"d{i}": {
                    "type": "object",
                    "properties": {f"p{j}": {"$ref": f"#/$defs/d{(i * 7 + j) % 300}"} for j in range(20)},
                }
                for i in range(300)
            },
        },
        "multiples of a large prime": {"type": "integer", "multipleOf": 99_991},
        "far bounds": {"type": "number", "minimum": -1e300, "maximum": 1.23456789e300},
        "10^10 items": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "string", "minLength": 1000}, "minItems": 10**6},
            "minItems": 10**4,
        },
        "a million characters": {"type": "string", "minLength": 500_000, "maxLength": 1_000_000},
        "nested counts": {"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}$"},
    }
    chain = "\n".join(f'r{i}: "a{i}" r{(i + 1) % 5000}?' for i in range(5000))
    together = " & ".join(f"/.*{word[:3]}.*/" for word in words[:40])
    texts = {
        "200 objects deep": Constraint("json_schema", json.dumps(_nested(200))),
        "5,000 arrays deep": Constraint("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
        "choice of 20,000": Constraint("choice", json.dumps(words)),
        "a regular expression of 20,000 words": Constraint("regex", "|".join(words)),
        "2^500 states": Constraint("regex", ".*a.{500}b"),
        "counts that catch up": Constraint("regex", "(a?){5000}a{5000}"),
        "nested repetitions": Constraint("regex", "(a|a)*(a+)+(.*a){30}b"),
        "letters of all scripts, counted": Constraint("regex", r"(\p{L}{1,50}\w{3,400}\d{1,30}){1,50}"),
        "an ambiguous grammar": Constraint("lark", 'start: e\ne: e e | "a" | "(" e ")" | e "+" e | '),
        "rules that call each other": Constraint("lark", f"start: r0\n{chain}"),
        "a token of 40 conditions": Constraint("lark", f"start: A\nA: {together}"),
    }
    return {name: Constraint("json_schema", json.dumps(schema)) for name, schema in schemas.items()} | texts


def _words(count: int) -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choices(string.ascii_letters, k=6)) for _ in range(count)]


def _unions(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"anyOf": [{"type": "object", "properties": {name: schema}} for name in ("a", "b")]}
    return schema


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema
