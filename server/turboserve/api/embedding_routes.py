"""`/v1/embeddings`: the loaded model's pooled hidden states in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import math
import sys
from array import array
from functools import partial
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from turboserve.api.answering import wait_for_disconnect
from turboserve.api.body import read_as
from turboserve.api.chat_body import FirstError, OpenModel
from turboserve.api.completion_body import TokenIds, texts_or_ids
from turboserve.api.context import ApiContext, Context
from turboserve.api.kv_reply_models import Reply
from turboserve.api.openapi import failures, json_body
from turboserve.api.parameters import IGNORED_HEADER, ignored_header, not_declared
from turboserve.api.replies import JSON_TYPE
from turboserve.api.route_errors import OF_A_QUESTION
from turboserve.api.validation import validated
from turboserve.errors import ContextLengthError, InvalidRequestError
from turboserve.messages import Embed, Embeddings

MAX_INPUTS = 2048
MAX_DIMENSIONS = 1 << 20

embedding_router = APIRouter(redirect_slashes=False)


class EmbeddingBody(OpenModel):
    """One input or several, as text or as token ids."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    input: (
        str
        | TokenIds
        | Annotated[list[str], FirstError(), Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[TokenIds], FirstError(), Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Annotated[
        Literal["float", "base64"] | None, Field(description="base64: float32 in little-endian order.")
    ] = None
    dimensions: Annotated[
        int | None,
        Field(ge=1, le=MAX_DIMENSIONS, description="The first so many dimensions, scaled to unit length again."),
    ] = None
    user: str | None = None


class EmbeddingObject(Reply):
    """One input's vector, of unit length."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Reply):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingSource(Reply):
    """What the vectors are: a chat model's states, not those of a model trained to compare texts."""

    pooling: Literal["mean of the last hidden states"] = "mean of the last hidden states"


class EmbeddingList(Reply):
    """The inputs' vectors in their order."""

    object: Literal["list"] = "list"
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage
    turboserve: EmbeddingSource


@embedding_router.post(
    "/v1/embeddings",
    response_model=EmbeddingList,
    responses=failures(ContextLengthError, *OF_A_QUESTION),
    openapi_extra=json_body(EmbeddingBody),
)
async def embed(request: Request, context: Context) -> Response:
    """Vectors of texts: the mean of the loaded chat model's last hidden states, scaled to unit length."""
    context.admit()
    body, ignored = await read_as(request, context.max_body_bytes, partial(_parsed, context=context))
    adapter = context.names.adapter_of(body.model)
    answer = await embeddings_of(texts_or_ids(body.input), request, context, adapter)
    vectors = [shortened(vector, body.dimensions) for vector in answer.vectors]
    written = [_base64(vector) for vector in vectors] if body.encoding_format == "base64" else map(list, vectors)
    reply = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(written)],
        "model": context.names.name_of(adapter),
        "usage": {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens},
        "turboserve": EmbeddingSource().model_dump(),
    }
    headers = {IGNORED_HEADER: ignored_header(ignored)} if ignored else None
    return Response(orjson.dumps(reply), headers=headers, media_type=JSON_TYPE)


def _parsed(raw: dict[str, object], context: ApiContext) -> tuple[EmbeddingBody, list[str]]:
    body = validated(EmbeddingBody, raw, is_strict=context.chat_rules.is_strict)
    return body, not_declared(EmbeddingBody.model_fields, raw)


async def embeddings_of(
    inputs: tuple[str | tuple[int, ...], ...], request: Request, context: ApiContext, adapter: str = ""
) -> Embeddings:
    """The engine's answer, however long it takes. Raises ClientDisconnect when the caller leaves, and ends the work."""
    future = context.engine.ask(Embed(inputs, adapter))
    waiting = asyncio.wrap_future(future)
    departure = asyncio.create_task(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({waiting, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            context.telemetry.http_disconnect("whole")
            raise ClientDisconnect
        answer: Embeddings = waiting.result()
        return answer
    finally:
        waiting.cancel()
        departure.cancel()


def shortened(vector: array[float], dimensions: int | None) -> array[float]:
    """The first dimensions of a vector, of unit length. Raises InvalidRequestError when it has fewer."""
    if dimensions is None or dimensions == len(vector):
        return vector
    if dimensions > len(vector):
        raise InvalidRequestError(f"dimensions: this model's vectors have {len(vector)}.", param="dimensions")
    head = vector[:dimensions]
    length = math.hypot(*head)
    return array("f", [value / length for value in head]) if length > 0 else head


def _base64(vector: array[float]) -> str:
    if sys.byteorder == "big":
        vector = array("f", vector)
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode()
