"""Bodies and stream events of the routes beside chat completions and sessions, for `/openapi.json`."""

from __future__ import annotations

from turboserve.api.completion_body import CompletionBody
from turboserve.api.completion_models import CompletionChunk
from turboserve.api.embedding_routes import EmbeddingBody
from turboserve.api.ollama.bodies import GenerateBody, OllamaChatBody, ShowBody
from turboserve.api.openapi import Shape
from turboserve.api.text_bodies import DetokenizeBody, TokenizeBody

SHAPES: tuple[Shape, ...] = (
    (CompletionBody, "validation"),
    (CompletionChunk, "serialization"),
    (EmbeddingBody, "validation"),
    (OllamaChatBody, "validation"),
    (GenerateBody, "validation"),
    (ShowBody, "validation"),
    (TokenizeBody, "validation"),
    (DetokenizeBody, "validation"),
)
