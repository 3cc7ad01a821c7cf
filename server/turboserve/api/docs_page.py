"""The page at `/docs`: an OpenAPI document as plain HTML. No script, nothing from other hosts, one style sheet inside.

Rendered on the server, so that it can be saved and read anywhere, and so that its content security policy
forbids everything but that style sheet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; font-size: 0.9em; }
h2 { border-top: 1px solid; padding-top: 1rem; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid #8884; padding: 0.2rem 0.6rem 0.2rem 0; text-align: left; vertical-align: top; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

BOUND_WORDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
    "minLength": "at least",
    "maxLength": "at most",
}

Json = Mapping[str, Any]


def docs_page(document: Json) -> str:
    """HTML of a whole OpenAPI document whose references are all to its own components."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1><p>{_text(info.get('description', ''))}</p>",
            "<h2>Routes</h2>",
            *_routes(document),
            "<h2>Objects</h2>",
            *_objects(document),
            "</body></html>",
        ]
    )


def _routes(document: Json) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"<h3><code>{escape(method.upper())} {escape(path)}</code></h3>"
            yield f"<p>{_text(operation.get('description') or operation.get('summary', ''))}</p>"
            rows = [*_parameters(operation), *_body(operation), *_responses(operation)]
            yield from _table(("part", "type", ""), rows)


def _parameters(operation: Json) -> Iterator[tuple[str, str, str]]:
    for parameter in operation.get("parameters", ()):
        yield (
            f"{parameter['in']} <code>{escape(parameter['name'])}</code>",
            _type(parameter["schema"]),
            _text(parameter.get("description", "")),
        )


def _body(operation: Json) -> Iterator[tuple[str, str, str]]:
    body = operation.get("requestBody", {})
    for media_type, content in body.get("content", {}).items():
        yield "body", _type(content["schema"]), escape(media_type) + ("" if body["required"] else ", or empty")


def _responses(operation: Json) -> Iterator[tuple[str, str, str]]:
    for status, response in sorted(operation["responses"].items()):
        shapes = [_content(media_type, content) for media_type, content in response.get("content", {}).items()]
        yield escape(status), "<br>".join(shapes), _text(response["description"])


def _content(media_type: str, content: Json) -> str:
    if "x-event-schema" in content:
        return f"{escape(media_type)}: events of {_type(content['x-event-schema'])}"
    return f"{escape(media_type)}: {_type(content.get('schema', {}))}"


def _objects(document: Json) -> Iterator[str]:
    for name, schema in document["components"]["schemas"].items():
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{_text(schema.get("description", ""))}</p>'
        required = schema.get("required", ())
        rows = [
            (
                f"<code>{escape(field)}</code>" + (" (required)" if field in required else ""),
                _type(shape),
                _text(shape.get("description", "")),
            )
            for field, shape in schema.get("properties", {}).items()
        ]
        yield from _table(("field", "type", ""), rows)


def _table(heads: tuple[str, ...], rows: list[tuple[str, str, str]]) -> Iterator[str]:
    if rows:
        yield "<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
        yield from ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        yield "</table>"


def _type(schema: Json) -> str:
    """HTML of a schema in a few words: `string`, `list of Message`, `integer (from 1, to 100)`."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            return " or ".join(_type(part) for part in schema[union])
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(schema.get("type", "anything")) + _bounds(schema)


def _bounds(schema: Json) -> str:
    """` (at least 1, at most 16 characters)`, or nothing where there are none."""
    said = [f"{word} {_number(schema[key])}" for key, word in BOUND_WORDS.items() if key in schema]
    unit = " characters" if said and schema.get("type") == "string" else ""
    return f" ({', '.join(said)}{unit})" if said else ""


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else str(value)


def _text(text: str) -> str:
    """HTML of a description, whose backticks mark code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
