"""The Open Inference Protocol, version 2 with its binary extension and version 1: KServe, Triton and MLServer speak it.

Sources: kserve.github.io's description of both versions, Triton's of the binary extension, and the clients themselves,
which read less than the descriptions say: Triton's sends no Content-Type, and shows errors only as `{"error"}`.

A model has one input, texts; what stands in a request is in `tensors.py`. Its outputs are those of its task; see
`OUTPUTS`. That both versions are here, with the schemas of their answers, makes the module long.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import tuneserve
from tuneserve.adapters.tensors import INPUT, LENGTH, InferRequest, join, read_infer, strings, wrong
from tuneserve.errors import InvalidInputError, NotFoundError, TooLargeError, TuneserveError
from tuneserve.serving.http.app import described
from tuneserve.serving.http.front import Handler
from tuneserve.serving.http.problems import headers_of
from tuneserve.serving.http.routes import (
    HEALTH,
    INFERENCE,
    MANY_ANSWERS,
    Direct,
    Worded,
    invalid,
    read_body,
    schema_of,
    wanted_s,
)
from tuneserve.serving.model import Answer, Answers, Model
from tuneserve.serving.service import Service
from tuneserve.tasks.catalog import TASKS
from tuneserve.tasks.classification import shown
from tuneserve.tasks.task import Asked, all_of, reading_headers

OCTETS = "application/octet-stream"
MOST_CHARACTERS = 500
"""Of what is said of an error."""


@dataclass(frozen=True)
class Output:
    """One tensor of a model's answers.

    Args:
        name: of the tensor.
        datatype: of its elements.
        values: of one answer; an element, or a row of the tensor.
        width: elements of a row; None where an answer has a single element, -1 where that is not known before.
        parameters: that the model's metadata show of it.
    """

    name: str
    datatype: Literal["BYTES", "FP32"]
    values: Callable[[Any], Any]
    width: Callable[[Model], int] | None = None
    parameters: Callable[[Model], Mapping[str, Any]] = lambda model: {}


OUTPUTS: Mapping[str, Sequence[Output]] = {
    "text-classification": [
        Output("label", "BYTES", lambda one: one.label),
        Output(
            "scores",
            "FP32",
            lambda one: list(one.scores.values()),
            lambda model: len(model.labels),
            lambda model: {"labels": list(model.labels)},
        ),
    ],
    "feature-extraction": [Output("embedding", "FP32", lambda one: one.vector, lambda model: -1)],
    "summarization": [Output("summary", "BYTES", lambda one: one.text.strip())],
    "text-generation": [Output("text", "BYTES", lambda one: one.shown)],
}
"""By the name of the task."""


class PredictRequest(BaseModel):
    """Texts, each a string or an object that has it as `text` or `inputs`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"instances": ["A warm film."]}]})

    instances: Annotated[list[Any], Field(min_length=1)]
    parameters: dict[str, Any] | None = None


class PredictResponse(BaseModel):
    """A prediction for each instance, in order; a bad text's is `{"error"}`."""

    predictions: list[Any]


class Failure(BaseModel):
    """What every error says."""

    error: str


class OutputTensor(BaseModel):
    """One output; its elements row by row."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class InferResponse(BaseModel):
    """The answers."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    """What is known of a tensor; -1 is a dimension of any size."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None


class ModelMetadata(BaseModel):
    """What may be asked of the model. The labels of `scores` stand in its parameters, in the order of its columns."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """Whether the process is worth keeping."""

    live: bool


class Ready(BaseModel):
    """Whether a model can answer."""

    ready: bool


class ModelReady(Ready):
    """Whether this model can answer."""

    name: str


class Models(BaseModel):
    """The names of the models."""

    models: list[str]


def failed(error: TuneserveError | RequestValidationError, *, close: bool = False) -> Response:
    """An error as the protocol has it: `{"error"}`, and 400 for a request that is not as it should be."""
    content = {"error": sentence(error)}
    status = 400 if isinstance(error, RequestValidationError) or error.status == 422 else error.status
    return Response(orjson.dumps(content), status, headers_of(error, close=close), "application/json")


def sentence(error: TuneserveError | RequestValidationError) -> str:
    """What is wrong, each fault behind the name of its place."""
    if not isinstance(error, RequestValidationError | InvalidInputError):
        return str(error)
    faults = error.faults if isinstance(error, InvalidInputError) else error.errors()
    words = "; ".join(f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in faults[:5])
    return words[:MOST_CHARACTERS]


class Said(Worded):
    """A route whose errors are the protocol's."""

    wording = staticmethod(failed)


class Inferred(Direct, Said):
    """One that reads the request itself."""


def routes(service: Service, *, name: str = "model") -> APIRouter:
    """Both versions of the protocol over a service with one model, which clients ask for by this name."""
    router = APIRouter(route_class=Said, tags=["open inference protocol"], responses=described(Failure))
    absent: dict[int | str, dict[str, Any]] = {404: {"model": Failure, "description": "There is no such model."}}
    down: dict[int | str, dict[str, Any]] = {503: {"model": Failure, "description": "Not now; see Retry-After."}}

    Name = Annotated[str, Path(examples=[name])]

    def require(asked: str, version: str | None = None, model: Model | None = None) -> None:
        if asked != name:
            raise NotFoundError(f"There is no model {asked[:100]!r} here, only {name!r}.")
        if version is not None and version != (now := (model or service.model()).id):
            raise NotFoundError(f"There is no version {version[:100]!r} of {name!r} here now, only {now!r}.")

    @router.get("/v2", name="server_metadata")
    async def server() -> ServerMetadata:
        """The server and what it can beyond the protocol."""
        return ServerMetadata(name="tuneserve", version=tuneserve.__version__, extensions=["binary_tensor_data"])

    @router.get("/v2/health/live", tags=[HEALTH], name="server_live", responses={503: {"model": Live}})
    async def live(response: Response) -> Live:
        """Whether the process is worth keeping."""
        response.status_code = 200 if (alive := service.is_alive()) else 503
        return Live(live=alive)

    @router.get("/v2/health/ready", tags=[HEALTH], name="server_ready", responses={503: {"model": Ready}})
    async def ready(response: Response) -> Ready:
        """Whether a model can answer."""
        response.status_code = 200 if (found := service.phase() == "ready") else 503
        return Ready(ready=found)

    @router.get("/v1/models", name="models_v1")
    @router.get("/v2/models", name="models")
    async def models() -> Models:
        """The name of the model."""
        return Models(models=[name])

    @router.get("/v2/models/{model_name}/versions/{version}/ready", name="version_ready", responses=absent | down)
    @router.get("/v2/models/{model_name}/ready", name="model_ready", responses=absent | down)
    @router.get("/v1/models/{model_name}", name="model_ready_v1", responses=absent | down)
    async def model_ready(model_name: Name, version: str | None = None) -> ModelReady:
        """Whether the model can answer; else 503."""
        require(model_name, version)
        service.model()
        return ModelReady(name=name, ready=True)

    @router.get(
        "/v2/models/{model_name}/versions/{version}",
        name="version_metadata",
        responses=absent | down,
        response_model_exclude_none=True,
    )
    @router.get(
        "/v2/models/{model_name}",
        name="model_metadata",
        responses=absent | down,
        response_model_exclude_none=True,
    )
    async def metadata(model_name: Name, version: str | None = None) -> ModelMetadata:
        """The model's input and outputs."""
        require(model_name, version)
        model = service.model()
        return ModelMetadata(
            name=name,
            versions=[model.id],
            platform="tuneserve",
            inputs=[TensorMetadata(name=INPUT, datatype="BYTES", shape=[-1])],
            outputs=[
                TensorMetadata(
                    name=one.name,
                    datatype=one.datatype,
                    shape=[-1] if one.width is None else [-1, one.width(model)],
                    parameters=dict(one.parameters(model)) or None,
                )
                for one in outputs_of(model)
            ],
        )

    async def infer(request: Request) -> Response:
        """Ask the model; inputs and outputs as JSON or, behind the JSON, in binary form."""
        version = request.path_params.get("version")
        require(request.path_params["model_name"], version)
        wanted, texts = read_infer(await request.body(), request.headers.get(LENGTH), service.max_inputs)
        model = service.model()
        said = wanted.parameters or {}
        outputs = chosen(outputs_of(model), wanted)
        inputs = ask(model, texts, {} if model.labels else said).inputs

        def of(model: Model) -> Sequence[Any]:
            require(name, version, model)
            return inputs

        timeout_s = wanted_s(request.scope["headers"], service.timeout_s)
        if type(limit := said.get("timeout")) is int and limit > 0:
            timeout_s = min(timeout_s, limit / 1e6)  # Triton counts microseconds
        request_id = request.scope["state"]["request_id"]
        answers = await service.answer(of, timeout_s=timeout_s, request_id=request_id)
        return await written(lambda: reply(answers, outputs, name=name, identity=wanted.id or request_id), answers)

    async def predict(request: Request) -> Response:
        """Ask the model in the form of version 1; a bad text's prediction is its error."""
        require(request.path_params["model_name"])
        return await predicted(service, request)

    ways: list[tuple[str, Handler, type[BaseModel], type[BaseModel]]] = [
        ("/v2/models/{model_name}/infer", infer, InferRequest, InferResponse),
        ("/v2/models/{model_name}/versions/{version}/infer", infer, InferRequest, InferResponse),
        ("/v1/models/{model_name}:predict", predict, PredictRequest, PredictResponse),
    ]
    for path, function, wanted, given in ways:
        router.add_api_route(
            path,
            function,
            methods=["POST"],
            tags=[INFERENCE],
            name="predict_v1" if wanted is PredictRequest else "infer_version" if "{version}" in path else "infer",
            responses={**described(Failure), **absent, 200: answer_of(given, binary=given is InferResponse)},
            openapi_extra={"parameters": named_in(path, name), **body_of(wanted, binary=wanted is InferRequest)},
            route_class_override=Inferred,
        )
    return router


def answer_of(model: type[BaseModel], *, binary: bool = False) -> dict[str, Any]:
    """How the description shows what is answered."""
    content = {OCTETS: {"schema": {"type": "string", "format": "binary"}}} if binary else {}
    return {"model": model, "content": content}


def body_of(model: type[BaseModel], *, binary: bool = False) -> dict[str, Any]:
    """How the description shows what a handler reads by itself."""
    content: dict[str, Any] = {"application/json": {"schema": schema_of(model)}}
    if binary:
        content[OCTETS] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content}}


def named_in(path: str, model_name: str) -> list[dict[str, Any]]:
    """How the description shows the names in a path."""
    string = {"type": "string"}
    schemas = {"model_name": {**string, "examples": [model_name]}, "version": string}
    names = re.findall(r"{(\w+)}", path)
    return [{"name": one, "in": "path", "required": True, "schema": schemas[one]} for one in names]


async def written(write: Callable[[], Response], answers: Answers) -> Response:
    """The response, made on a thread where it has many answers."""
    return await asyncio.to_thread(write) if len(answers) >= MANY_ANSWERS else write()


def outputs_of(model: Model) -> Sequence[Output]:
    """The outputs of a model.

    Raises:
        NotFoundError: its task has none in this protocol.
    """
    if model.task not in OUTPUTS:
        raise NotFoundError(f"A model for {model.task or 'this task'} is not asked in this protocol.")
    return OUTPUTS[model.task]


def ask(model: Model, texts: Sequence[str], parameters: Mapping[str, Any]) -> Asked:
    """Texts as the model's task wants them.

    Raises:
        InvalidInputError: the parameters are not for this model.
    """
    read = TASKS[model.task].ask
    assert read is not None
    shown = {} if model.labels else {"return_full_text": False}
    try:
        return read({"inputs": list(texts), "parameters": {**shown, **parameters}})
    except ValidationError as error:
        raise invalid(error) from None


def chosen(outputs: Sequence[Output], wanted: InferRequest) -> list[tuple[Output, bool]]:
    """The outputs that a request wants, and whether in binary form.

    Raises:
        InvalidInputError: there is no such output, or it is wanted in a form that there is not.
    """
    binary = bool((wanted.parameters or {}).get("binary_data_output"))
    if not wanted.outputs:
        return [(one, binary) for one in outputs]
    found, known = [], {one.name: one for one in outputs}
    for index, one in enumerate(wanted.outputs):
        said = one.parameters or {}
        if one.name not in known:
            raise wrong(("outputs", index, "name"), f"{one.name[:100]!r} should be one of {', '.join(known)}")
        if unknown := sorted({"classification", "shared_memory_region"} & said.keys()):
            raise wrong(("outputs", index, "parameters"), f"{unknown[0]} is not supported here")
        found.append((known[one.name], bool(said.get("binary_data", binary))))
    return found


def reply(answers: Answers, outputs: Sequence[tuple[Output, bool]], *, name: str, identity: str) -> Response:
    """The response: its JSON, and behind it the tensors that are wanted in binary form.

    Raises:
        InvalidInputError: texts cannot be read; a tensor has no place for that.
        TuneserveError: the engine failed on one.
    """
    found = all_of(answers, "inputs")
    tensors, blobs = [], []
    for output, binary in outputs:
        values: Any = [output.values(one) for one in found]
        tensor: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": [len(values)]}
        if output.datatype == "FP32":
            array = np.asarray(values, dtype="<f4")
            tensor["shape"], values = array.shape, array.ravel()
        if binary:
            blobs.append(values.tobytes() if output.datatype == "FP32" else join(values))
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            tensor["data"] = values
        tensors.append(tensor)
    about = {"model_name": name, "model_version": found[0].model_version, "id": identity, "outputs": tensors}
    head = orjson.dumps(about, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = dict(reading_headers(answers))
    if not blobs:
        return Response(head, headers=headers, media_type="application/json")
    return Response(b"".join([head, *blobs]), headers={**headers, LENGTH: str(len(head))}, media_type=OCTETS)


async def predicted(service: Service, request: Request) -> Response:
    """The response to `{"instances", "parameters"}`: a prediction for each, in order; a bad text's is its error.

    Raises:
        InvalidInputError: it has another form, or parameters that are not for this model.
        TuneserveError: see `Service.answer`.
    """
    wanted = read_body(PredictRequest, await request.body())
    assert isinstance(wanted, PredictRequest)
    if len(wanted.instances) > service.max_inputs:
        words = f"The request has {len(wanted.instances)} instances; {service.max_inputs} are the most."
        raise TooLargeError(words)
    found = [
        one.get("text", one.get("inputs")) if isinstance(one, dict) and len(one) == 1 else one
        for one in wanted.instances
    ]
    texts = strings(found, ("instances",))
    model = service.model()
    outputs = outputs_of(model)
    if model.labels and wanted.parameters:
        raise wrong(("parameters",), "this model takes none")
    answers = await service.answer(
        ask(model, texts, wanted.parameters or {}).inputs,
        timeout_s=wanted_s(request.scope["headers"], service.timeout_s),
        request_id=request.scope["state"]["request_id"],
    )

    def prediction(answer: Answer | TuneserveError) -> Any:
        return shown(answer) if model.labels or isinstance(answer, TuneserveError) else outputs[0].values(answer)

    def write() -> Response:
        content = orjson.dumps({"predictions": list(map(prediction, answers))}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, headers=dict(reading_headers(answers)), media_type="application/json")

    return await written(write, answers)
