"""Holds replies to what /openapi.json declares: the route's status codes, media types, headers and shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any

import httpx
from jsonschema import Draft202012Validator

Json = dict[str, Any]
ENVELOPE = {"$ref": "#/components/schemas/ErrorEnvelope"}


class Contract:
    """One application's document. Shapes are closed here: a field that is not declared is a fault of the server's."""

    def __init__(self, document: Json) -> None:
        self._paths: Json = document["paths"]
        self._components = deepcopy(document["components"])
        for schema in self._components["schemas"].values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)
        self._validator = cache(self._new_validator)

    def check(self, reply: httpx.Response) -> None:
        """Fails the test when a reply of a declared route is none that the document allows."""
        operation = self.operation(reply.request.method, reply.request.url.path)
        if operation is None:
            assert reply.status_code in (204, 400, 401, 404, 405, 431), "an undeclared route answers"
            assert reply.status_code != 204 or reply.request.method == "OPTIONS"
            return
        declared = operation["responses"].get(str(reply.status_code))
        assert declared is not None, f"{reply.request.method} {reply.request.url.path}: {reply.status_code} undeclared"
        expected = [name for name, header in declared.get("headers", {}).items() if header.get("required", True)]
        assert all(name.lower() in reply.headers for name in expected)
        if reply.request.method != "HEAD":
            self._check_content(declared["content"], reply)

    def operation(self, method: str, path: str) -> Json | None:
        """What the document says about a request; None when it names no such route."""
        for template, operations in self._paths.items():
            pattern = re.escape(template).replace(r"\{model_id\}", ".*")
            pattern = re.sub(r"\\{\w+\\}", "[^/]+", pattern).replace("/v1/", "(/v1)?/", 1) + "/?"
            if method.lower() in operations and re.fullmatch(pattern, path, re.DOTALL):
                operation: Json = operations[method.lower()]
                return operation
        return None

    def _check_content(self, content: Json, reply: httpx.Response) -> None:
        reply.read()
        media_type = reply.headers["content-type"].partition(";")[0]
        declared = content[media_type]
        if media_type == "application/json":
            self.validate(declared["schema"], reply.json())
        elif media_type == "application/x-ndjson":
            for line in reply.text.splitlines():
                schema = (
                    {"$ref": "#/components/schemas/OllamaError"} if '"error"' in line else declared["x-event-schema"]
                )
                self.validate(schema, json.loads(line))
        elif media_type == "text/event-stream":
            for sent in _sent_events(reply.text):
                self.validate(declared["schema"], sent)
                if "contentSchema" in declared["schema"]["properties"]["data"]:
                    json.loads(sent["data"])
            for event in _events(reply.text):
                is_envelope = "error" in event and "type" not in event  # other streams declare their error events
                self.validate(ENVELOPE if is_envelope else declared["x-event-schema"], event)

    def validate(self, schema: Json, value: object) -> None:
        """Raises jsonschema's ValidationError."""
        self._validator(json.dumps(schema)).validate(value)

    def _new_validator(self, schema: str) -> Draft202012Validator:
        return Draft202012Validator({**json.loads(schema), "components": self._components})


def _sent_events(text: str) -> Iterator[dict[str, str]]:
    """Their fields, as a reader of server-sent events has them; comments are none."""
    for block in text.split("\n\n"):
        fields = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
        if fields:
            yield {name: value for name, _, value in fields}


def _events(text: str) -> Iterator[Json]:
    for line in text.split("\n"):
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))
