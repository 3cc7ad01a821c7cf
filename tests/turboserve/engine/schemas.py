"""JSON schemas to enforce: one for each supported keyword and combination, and random ones."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

# Each keyword and combination that JSON Schema's own test suite has a file for, as far as it is supported.
FIXED: tuple[Schema, ...] = (
    {},
    {"type": "object"},
    {"type": "null"},
    {"type": ["integer", "null", "boolean"]},
    {"const": {"foo": "bar", "baz": [1, None, True]}},
    {"const": 'quotes " and \\ and \u00e9\n'},
    {"const": 0},
    {"enum": [6, "foo", [], True, {"foo": 12}]},
    {"enum": ["hello\u0000there", "caf\u00e9", "\U0001f600"]},
    {"type": "integer", "minimum": -2, "maximum": 17},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    {"type": "number", "minimum": 1.1, "maximum": 1.5},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1.25},
    {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 1000},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": "^a*$", "maxLength": 5},
    {"type": "string", "pattern": "^[0-9]{3}-[a-f]+"},
    {"type": "string", "pattern": "^(foo|bar)[^x]{1,3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "email"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "date", "pattern": "^2"},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
    {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    {"type": "object", "properties": {"foo": {}, "bar": {"type": "integer"}}, "required": ["foo"]},
    {"type": "object", "properties": {"foo\nbar": {"const": 1}, 'foo"bar': {"const": 2}}, "required": ['foo"bar']},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^f": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": {"type": "null"}},
    {"type": "object", "required": ["x", "y"], "additionalProperties": {"type": "integer"}},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {"type": "number", "anyOf": [{"minimum": 10}, {"maximum": -10}]},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}, "required": ["kind"]},
            {"type": "object", "properties": {"kind": {"const": "b"}, "s": {"enum": ["x"]}}, "required": ["kind", "s"]},
        ]
    },
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {
        "allOf": [
            {"type": "object", "properties": {"bar": {"type": "integer"}}, "required": ["bar"]},
            {"properties": {"foo": {"type": "string", "maxLength": 2}}, "required": ["foo"]},
        ]
    },
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "integer"}}},
    {"$ref": "#/definitions/tilde~0field", "definitions": {"tilde~field": {"enum": ["t"]}}},
    {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    },
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 5}, "children": {"$ref": "#/$defs/list"}},
                "required": ["name", "children"],
                "additionalProperties": False,
            },
            "list": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
    },
    {"$ref": "#item", "$defs": {"i": {"$anchor": "item", "type": "integer"}}},
    {"title": "T", "description": "D", "default": 1, "examples": [2], "deprecated": True, "type": "integer"},
    {"x-order": 3, "type": "boolean"},
)


def random_schemas(seed: int, count: int) -> list[Schema]:
    """All different in kind and depth."""
    rng = random.Random(seed)
    return [hoisted(random_schema(rng)) for _ in range(count)]


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """A schema that something satisfies, nested up to `depth` deep, with definitions wherever they are needed."""
    simple: list[Callable[[random.Random], Schema]] = [_integer, _number, _string, _pattern, _format, _enum, _other]
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(simple)(rng)
    nested = [_object, _object, _open_object, _array, _tuple, _any_of, _tagged, _with_defs, _recursive]
    return rng.choice(nested)(rng, depth - 1)


def _integer(rng: random.Random) -> Schema:
    schema: Schema = {"type": "integer"}
    if rng.random() < 0.7:
        low = rng.randint(-1000, 1000)
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randint(2, 2000)
    elif rng.random() < 0.5:
        schema["multipleOf"] = rng.randint(2, 12)
    return schema


def _number(rng: random.Random) -> Schema:
    low = round(rng.uniform(-50, 50), rng.randint(0, 3))
    bounds = {rng.choice(["minimum", "exclusiveMinimum"]): low, "maximum": round(low + rng.uniform(1.1, 20), 2)}
    return {"type": "number", **(bounds if rng.random() < 0.7 else {})}


def _string(rng: random.Random) -> Schema:
    schema: Schema = {"type": "string"}
    if rng.random() < 0.8:
        schema["maxLength"] = rng.randint(1, 12)
        schema["minLength"] = rng.randint(0, schema["maxLength"])
    return schema


def _pattern(rng: random.Random) -> Schema:
    atoms = ["[a-z]", "[0-9]", r"\d", "x", "[^,]", "(ab|cd)", r"\.", "[A-F0-9]", "é", r"[\w-]"]
    counts = ["", "?", "{2}", "{1,3}", "+"]
    body = "".join(rng.choice(atoms) + rng.choice(counts) for _ in range(rng.randint(1, 4)))
    return {"type": "string", "pattern": rng.choice(["^{}$", "^{}$", "^{}"]).format(body)}


def _format(rng: random.Random) -> Schema:
    return {"type": "string", "format": rng.choice(["date", "date-time", "time", "email", "ipv4", "ipv6", "uuid"])}


def _enum(rng: random.Random) -> Schema:
    values = [rng.randint(-9, 9), word(rng), None, True, 1.5, [word(rng)], {word(rng): 1}, 'a "quoted" \\ é']
    return {"enum": rng.sample(values, rng.randint(1, len(values)))}


def _other(rng: random.Random) -> Schema:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"const": word(rng)}, {"const": [1, {"a": None}]}])


def _object(rng: random.Random, depth: int) -> Schema:
    names = [word(rng) for _ in range(rng.randint(1, 4))]
    schema: Schema = {"type": "object", "properties": {name: random_schema(rng, depth) for name in names}}
    schema["required"] = sorted({name for name in names if rng.random() < 0.6})
    return schema | {"additionalProperties": False}


def _open_object(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "object"}
    kind = rng.randrange(3)
    if kind == 0:
        schema["additionalProperties"] = random_schema(rng, depth)
    elif kind == 1:
        schema |= {"patternProperties": {"^a[0-9]": random_schema(rng, depth)}, "additionalProperties": False}
    else:
        name = word(rng)
        schema |= {"properties": {name: random_schema(rng, depth)}, "required": [name]}
        schema |= {"maxProperties": rng.randint(1, 3), "additionalProperties": _other(rng)}
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 2)
    return {"type": "array", "items": random_schema(rng, depth), "minItems": low, "maxItems": low + rng.randint(0, 3)}


def _tuple(rng: random.Random, depth: int) -> Schema:
    first = [random_schema(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": rng.randint(0, len(first))}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [random_schema(rng, depth) for _ in range(rng.randint(2, 3))]}


def _tagged(rng: random.Random, depth: int) -> Schema:
    """A union whose alternatives exclude each other."""
    tags = {word(rng) for _ in range(3)}
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"type": {"const": tag}, "value": random_schema(rng, depth)},
                "required": ["type"],
                "additionalProperties": False,
            }
            for tag in sorted(tags)
        ]
    }


def _with_defs(rng: random.Random, depth: int) -> Schema:
    name = "d" + word(rng)
    return {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{name}"}, "b": {"$ref": f"#/$defs/{name}"}}} | {
        "$defs": {name: random_schema(rng, depth)},
        "required": ["b"],
        "additionalProperties": False,
    }


def _recursive(rng: random.Random, depth: int) -> Schema:
    name = "n" + word(rng)
    node = {
        "type": "object",
        "properties": {"v": _integer(rng), "next": {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]}},
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    return {"$ref": f"#/$defs/{name}", "$defs": {name: node}}


def hoisted(schema: Schema) -> Schema:
    """The schema with all definitions at its top, where references look for them."""
    found: Schema = {}

    def visit(node: Any) -> Any:
        if isinstance(node, list):
            return [visit(item) for item in node]
        if not isinstance(node, dict):
            return node
        for name, definition in node.get("$defs", {}).items():
            found[name] = visit(definition)
        return {key: visit(value) for key, value in node.items() if key != "$defs"}

    rest = visit(schema)
    return {**rest, "$defs": found} if found else rest


def word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 6)))
