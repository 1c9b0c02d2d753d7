"""The Task seam: what a request and an answer of a kind of model look like, and how such a model is loaded."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from tuneserve.artifact import Version
from tuneserve.errors import InvalidInputError, TextError, TuneserveError
from tuneserve.serving.model import Answer, Answers, Model
from tuneserve.settings import Settings


class Load(Protocol):
    """Makes a model of a version."""

    def __call__(self, version: Version, settings: Settings, *, threads: int) -> Model:
        """The version, loaded, with CPU threads to compute with; it has proved itself.

        Raises:
            StoreError: the version's files are damaged, or it does not answer as it did when it was saved.
            DeviceError: the device asked for cannot be had.
        """
        ...


MOST_NAMED = 500
"""Indices that one header names at most."""


def no_headers(answers: Answers) -> Mapping[str, str]:
    """None."""
    return {}


def reading_headers(answers: Answers) -> Mapping[str, str]:
    """The version that answered, and the indices of the inputs of which only the beginning was read."""
    found = [(index, one) for index, one in enumerate(answers) if isinstance(one, Answer)]
    cut = [str(index) for index, one in found if one.truncated][:MOST_NAMED]
    versions = sorted({one.model_version for _, one in found})
    return {"X-Model-Version": ",".join(versions), **({"X-Truncated": ",".join(cut)} if cut else {})}


@dataclass(frozen=True)
class Route:
    """One path under which a task is asked.

    Args:
        path: below the server's address.
        request: the body, and how the API's description shows it.
        response: what is answered, for the description; `content` is what makes it.
        inputs: the model's inputs of a valid request.
        content: the JSON of their answers, or its bytes; raises the error where there is none.
        headers: of the response, beside those that all have.
        consult: what is done of a valid request with the model until a deadline of the monotonic clock, where that is
            not just its answer, and nothing that drift, feedback and shadow should hear of; see `Service.consult`.
        events: where a valid request wants its answer as it comes to be: what makes the JSON of an event of an answer
            and the text before it; None where it wants it whole.
        name: of the operation, for the description and clients that are generated from it.
        doc: a sentence for the description.
    """

    path: str
    request: type[BaseModel]
    response: type[BaseModel]
    inputs: Callable[[Any], Sequence[Any]]
    content: Callable[[Answers], Any]
    headers: Callable[[Answers], Mapping[str, str]] = no_headers
    consult: Callable[[Any, Model, float], Awaitable[Answers]] | None = None
    events: Callable[[Any], Callable[[Any, Any], Any] | None] = lambda request: None
    name: str = "answer"
    doc: str = ""


@dataclass(frozen=True)
class Asked:
    """A request as the model is asked: its inputs, and what makes JSON, or its bytes, of their answers.

    `event` and `headers` are as in `Route`: the former is None unless the only answer is wanted as it comes to be.
    """

    inputs: Sequence[Any]
    content: Callable[[Answers], Any]
    event: Callable[[Any, Any], Any] | None = None
    headers: Callable[[Answers], Mapping[str, str]] = no_headers


@dataclass(frozen=True)
class Task:
    """A kind of model, by Hugging Face's name.

    Args:
        name: of the task.
        routes: under which a server of one such model is asked.
        load: makes a model.
        labels: whether its answers are labels that people may correct.
        ask: reads `{"inputs", "parameters"}`, as Hugging Face's pipelines and SageMaker's toolkit have them, and
            `"stream"` where an answer can come bit by bit; raises pydantic's ValidationError or InvalidInputError.
    """

    name: str
    routes: Sequence[Route]
    load: Load
    labels: bool = False
    ask: Callable[[Mapping[str, Any]], Asked] | None = None


def asked_by(route: Route, **usual: Any) -> Callable[[Mapping[str, Any]], Asked]:
    """A task's `ask` by a route whose requests have that form; `usual` are parameters where a request has none."""

    def ask(wanted: Mapping[str, Any]) -> Asked:
        said = wanted.get("parameters")
        parameters = usual | said if isinstance(said, dict) else usual if said is None else said
        request = route.request.model_validate({**wanted, "parameters": parameters})
        return Asked(route.inputs(request), route.content, route.events(request), route.headers)

    return ask


def all_of(answers: Answers, field: str) -> list[Answer]:
    """The answers to inputs that stood in this field, if there is one to each.

    Raises:
        InvalidInputError: the model cannot read some inputs.
        TuneserveError: there is no answer.
    """
    if faults := [
        (("body", field, index), str(one), "value_error")
        for index, one in enumerate(answers)
        if isinstance(one, TextError)
    ]:
        raise InvalidInputError(*faults)
    for one in answers:
        if isinstance(one, TuneserveError):
            raise one
    return [one for one in answers if isinstance(one, Answer)]


def only(answers: Answers, field: str) -> Answer:
    """The answer to a request with a single input, which stood in this field.

    Raises:
        InvalidInputError: the model cannot read the input.
        TuneserveError: there is no answer.
    """
    [answer] = answers
    if isinstance(answer, TextError):
        raise InvalidInputError((("body", field), str(answer), "value_error"))
    if isinstance(answer, TuneserveError):
        raise answer
    return answer
