"""What Hugging Face's clients ask.

`InferenceClient(url)` posts to that very URL; text-embeddings-inference and OpenAI have paths of their own.

Sources: huggingface_hub's inference client; text-embeddings-inference's description; OpenAI's of `/v1/embeddings`.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import tuneserve
from tuneserve.adapters.openinference import body_of, sentence, written
from tuneserve.errors import EngineError, InvalidInputError, NotFoundError, TextError, TooLargeError, TuneserveError
from tuneserve.serving.http.app import described
from tuneserve.serving.http.front import Handler
from tuneserve.serving.http.problems import headers_of
from tuneserve.serving.http.routes import (
    HEALTH,
    INFERENCE,
    Direct,
    Worded,
    invalid,
    read_body,
    streamed,
    to_json,
    wanted_s,
)
from tuneserve.serving.model import Answers, Model
from tuneserve.serving.service import Service
from tuneserve.tasks.catalog import TASKS
from tuneserve.tasks.classification import Text, Texts
from tuneserve.tasks.classifier import Prediction
from tuneserve.tasks.embedder import Embedding, Wanted
from tuneserve.tasks.task import all_of, reading_headers

JSON = "application/json"
FAILED = 424
"""The status by which text-embeddings-inference says that the engine failed."""

KINDS = {400: "Empty", 413: "Validation", 422: "Validation", FAILED: "Backend", 429: "Overloaded", 503: "Unhealthy"}
"""text-embeddings-inference's names of errors, by status."""


class HubRequest(BaseModel):
    """What `InferenceClient` sends; embeddings' parameters stand beside `inputs`."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [{"inputs": "A warm film."}]})

    inputs: Texts
    parameters: dict[str, Any] | None = None
    stream: bool | None = None


class Score(BaseModel):
    """A label and its probability."""

    label: str
    score: float


class PredictRequest(BaseModel):
    """A text, or a batch of lists of one text each; a list of two strings is a pair, which is not read here."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "A warm film."}]})

    inputs: Text | Annotated[list[Annotated[list[Text], Field(min_length=1, max_length=1)]], Field(min_length=1)]
    truncate: bool | None = None
    raw_scores: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _no_pair(cls, value: Any) -> Any:
        inputs = value.get("inputs") if isinstance(value, Mapping) else None
        if isinstance(inputs, list) and any(isinstance(one, str) for one in inputs[:1]):
            if len(inputs) == 1:
                return {**value, "inputs": inputs[0]}
            raise ValueError('a list of strings is a pair, which this model does not read; several are [["a"], ["b"]]')
        if isinstance(inputs, list) and any(isinstance(one, list) and len(one) == 2 for one in inputs):
            raise ValueError("inputs holds a pair, which this model does not read")
        return value


class EmbeddingsRequest(BaseModel):
    """A text or several, as OpenAI has them."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": "Where is the station?"}]})

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class OneEmbedding(BaseModel):
    """A vector, as a list or as base64 of its float32 values, of which the lowest byte comes first."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """The tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """A vector for each text, in order."""

    object: Literal["list"]
    data: list[OneEmbedding]
    model: str
    usage: Usage


class Info(BaseModel):
    """What answers."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str
    model_type: dict[str, Any]
    max_client_batch_size: int
    version: str


class Failure(BaseModel):
    """What text-embeddings-inference says of an error."""

    error: str
    error_type: str


class OpenAIError(BaseModel):
    """What OpenAI says of an error."""

    message: str
    type: str
    code: int


class OpenAIFailure(BaseModel):
    """The same, one level down."""

    error: OpenAIError


def failed(error: TuneserveError | RequestValidationError, *, close: bool = False) -> Response:
    """An error as text-embeddings-inference has it: `{"error", "error_type"}`; see `Wording`."""
    status = status_of(error)
    content = {"error": sentence(error), "error_type": KINDS.get(status, "Backend" if status >= 500 else "Validation")}
    return Response(orjson.dumps(content), status, headers_of(error, close=close), JSON)


def failed_as_openai(error: TuneserveError | RequestValidationError, *, close: bool = False) -> Response:
    """An error as OpenAI has it: `{"error": {"message", "type", "code"}}`; see `Wording`."""
    status = status_of(error)
    kind = "server_error" if status >= 500 or status == FAILED else "invalid_request_error"
    content = {"error": {"message": sentence(error), "type": kind, "code": status}}
    return Response(orjson.dumps(content), status, headers_of(error, close=close), JSON)


def status_of(error: TuneserveError | RequestValidationError) -> int:
    """Its HTTP status, which for an engine that failed is text-embeddings-inference's own."""
    if isinstance(error, RequestValidationError):
        return 422
    return FAILED if isinstance(error, EngineError) else error.status


class Said(Worded):
    """A route whose errors are text-embeddings-inference's."""

    wording = staticmethod(failed)


class Asked(Direct, Said):
    """One that reads the request itself."""


class AskedAsOpenAI(Direct, Worded):
    """The same, whose errors are OpenAI's."""

    wording = staticmethod(failed_as_openai)


def routes(service: Service, *, name: str = "model") -> APIRouter:
    """The routes over a service with one model of this name."""
    router = APIRouter(route_class=Said, tags=["hugging face"], responses=described(Failure))
    engine: dict[int | str, dict[str, Any]] = {
        FAILED: {"model": Failure, "description": "The engine failed on a text."}
    }
    absent: dict[int | str, dict[str, Any]] = {404: {"model": Failure, "description": "The model has another task."}}

    @router.get("/health", tags=[HEALTH], response_class=Response, responses={200: {"content": {}}})
    async def health() -> Response:
        """Whether a model can answer; nothing is said then."""
        service.model()
        return Response()

    @router.get("/info")
    async def info() -> Info:
        """What answers."""
        model = service.model()
        ids = dict(enumerate(model.labels))
        kind = {"classifier": {"id2label": ids, "label2id": {label: one for one, label in ids.items()}}}
        return Info(
            model_id=name,
            model_sha=model.id,
            model_type=kind if model.labels else {model.task: {}},
            max_client_batch_size=service.max_inputs,
            version=tuneserve.__version__,
        )

    def how(request: Request) -> dict[str, Any]:
        return {
            "timeout_s": wanted_s(request.scope["headers"], service.timeout_s),
            "request_id": request.scope["state"]["request_id"],
        }

    def bounded(inputs: Sequence[Any]) -> Sequence[Any]:
        if len(inputs) > service.max_inputs:
            raise TooLargeError(f"The request has {len(inputs)} texts; {service.max_inputs} are the most.")
        return inputs

    async def hub(request: Request) -> Response:
        """Ask the model as `InferenceClient` does; `stream` sends what is written as server-sent events."""
        wanted = read_body(HubRequest, await request.body())
        assert isinstance(wanted, HubRequest)
        asked = ask(service.model(), wanted)
        inputs = bounded(asked.inputs)
        if asked.event is not None:
            timeout_s = wanted_s(request.scope["headers"], service.timeout_s)
            return await streamed(service.stream(inputs[0], timeout_s=timeout_s), asked.event, asked.headers)
        answers = await service.answer(inputs, **how(request))

        def write() -> Response:
            content = asked.content(answers)
            content = content if isinstance(content, bytes) else to_json(content)
            return Response(content, headers=dict(reading_headers(answers)), media_type=JSON)

        return await written(write, answers)

    async def predict(request: Request) -> Response:
        """Classify one text, answered by a flat list of its labels, or several, answered by a list of such lists."""
        require(service.model(), "text-classification")
        wanted = read_body(PredictRequest, await request.body())
        assert isinstance(wanted, PredictRequest)
        inputs = [wanted.inputs] if isinstance(wanted.inputs, str) else [one for [one] in wanted.inputs]
        answers = await service.answer(bounded(inputs), **how(request))

        def write() -> Response:
            found = [one for one in all_of(answers, "inputs") if isinstance(one, Prediction)]
            if wanted.truncate is False and any(one.truncated for one in found):
                raise TextError("a text is longer than this model reads, and `truncate` is false")
            lists = [
                [{"score": score, "label": label} for label, score in sorted(one.scores.items(), key=lambda it: -it[1])]
                for one in found
            ]
            content = to_json(lists[0] if isinstance(wanted.inputs, str) else lists)
            return Response(content, headers=dict(reading_headers(answers)), media_type=JSON)

        return await written(write, answers)

    async def embeddings(request: Request) -> Response:
        """Embed one text or several, as OpenAI's clients ask for it."""
        require(service.model(), "feature-extraction")
        wanted = read_body(EmbeddingsRequest, await request.body())
        assert isinstance(wanted, EmbeddingsRequest)
        inputs = bounded([Wanted(text) for text in wanted.input])
        answers = await service.answer(inputs, **how(request))
        return await written(lambda: as_openai(answers, wanted, name), answers)

    ways: list[tuple[str, Handler, type[BaseModel], Any, type[Direct]]] = [
        ("/", hub, HubRequest, None, Asked),
        ("/predict", predict, PredictRequest, list[Score] | list[list[Score]], Asked),
        ("/v1/embeddings", embeddings, EmbeddingsRequest, EmbeddingsResponse, AskedAsOpenAI),
    ]
    for path, function, body, reply, kind in ways:
        failure = OpenAIFailure if kind is AskedAsOpenAI else Failure
        errors = {
            status: {**one, "model": failure} for status, one in {**described(failure), **engine, **absent}.items()
        }
        router.add_api_route(
            path,
            function,
            methods=["POST"],
            tags=[INFERENCE],
            name={"/": "hub", "/predict": "tei_predict"}.get(path, "openai_embeddings"),
            responses={**errors, 200: {"model": reply} if reply is not None else {"content": HUB_CONTENT}},
            openapi_extra=body_of(body),
            route_class_override=kind,
        )
    return router


HUB_CONTENT = {
    JSON: {"schema": {"type": "array", "description": "For each text as the task's pipeline has it."}},
    "text/event-stream": {"schema": {"type": "string"}},
}


def require(model: Model, task: str) -> None:
    """Refuse a route that is another task's.

    Raises:
        NotFoundError: the model has another task.
    """
    if model.task != task:
        raise NotFoundError(f"This route is for {task}; the model here is for {model.task}.")


def ask(model: Model, wanted: HubRequest) -> Any:
    """A request as the model's task reads it; a classifier answers a list of labels for each text.

    Raises:
        InvalidInputError: the task has it otherwise.
    """
    task = TASKS.get(model.task)
    if task is None or task.ask is None:
        raise NotFoundError("This model is not asked in this form.")
    said = {key: value for key, value in (wanted.parameters or {}).items() if value is not None}
    usual: dict[str, Any] = {"top_k": None} if model.labels else {"return_full_text": False}
    beside = {key: value for key, value in (wanted.model_extra or {}).items() if value is not None}
    stream = {"stream": True} if wanted.stream else {}
    try:
        return task.ask({**beside, **stream, "inputs": wanted.inputs, "parameters": {**usual, **said}})
    except ValidationError as error:
        raise invalid(error) from None


def as_openai(answers: Answers, wanted: EmbeddingsRequest, name: str) -> Response:
    """The vectors as OpenAI has them.

    Raises:
        InvalidInputError: texts cannot be read, or vectors of another length are wanted.
    """
    found = [one for one in all_of(answers, "input") if isinstance(one, Embedding)]
    channels = len(found[0].vector)
    if wanted.dimensions not in (None, channels):
        raise InvalidInputError((("body", "dimensions"), f"should be {channels}, or not there", "value_error"))

    def shown(one: Embedding) -> Any:
        vector = np.ascontiguousarray(one.vector, dtype="<f4")
        return base64.b64encode(vector.tobytes()).decode() if wanted.encoding_format == "base64" else vector

    tokens = sum(one.tokens for one in found)
    content = {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": shown(one)} for index, one in enumerate(found)],
        "model": name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, headers=dict(reading_headers(answers)), media_type=JSON)
