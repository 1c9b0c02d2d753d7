"""feature-extraction: a text in, one vector out, as text-embeddings-inference and `InferenceClient` have it."""

from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, RootModel

from tuneserve.serving.model import Answers
from tuneserve.tasks.classification import Texts
from tuneserve.tasks.embedder import Embedding, Wanted, load_embedder
from tuneserve.tasks.task import Asked, Route, Task, all_of, reading_headers


class EmbedRequest(BaseModel):
    """A text or several, and how their vectors are wanted."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": ["Where is the station?"], "normalize": True}]}
    )

    inputs: Texts
    normalize: Annotated[bool, Field(description="Whether each vector has length 1.")] = True
    truncate: Annotated[
        bool, Field(description="Whether a text that is too long is read in part; else it is refused.")
    ] = True


class EmbedResponse(RootModel[list[list[float]]]):
    """A vector for each text, in order."""


def _inputs(request: EmbedRequest) -> list[Wanted]:
    return [Wanted(text, request.normalize, request.truncate) for text in request.inputs]


def _vectors(answers: Answers) -> bytes:
    vectors = [one.vector for one in all_of(answers, "inputs") if isinstance(one, Embedding)]
    return orjson.dumps(vectors, option=orjson.OPT_SERIALIZE_NUMPY)


def _asked(wanted: Mapping[str, Any]) -> Asked:
    how = {**wanted, **(wanted.get("parameters") or {})}
    return Asked(_inputs(EmbedRequest.model_validate(how)), _vectors)


FEATURE_EXTRACTION = Task(
    "feature-extraction",
    routes=[
        Route(
            "/embed",
            EmbedRequest,
            EmbedResponse,
            inputs=_inputs,
            content=_vectors,
            headers=reading_headers,
            name="embed",
            doc="Embed one text or several: a vector each. `X-Truncated` names those that were read in part.",
        ),
    ],
    load=load_embedder,
    ask=_asked,
)
