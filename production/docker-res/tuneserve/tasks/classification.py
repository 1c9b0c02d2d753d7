"""text-classification: a text in, a label and the probability of each label out. What is trained here serves it."""

from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from tuneserve.errors import MAX_FAULTS, InvalidInputError
from tuneserve.serving.model import Answers
from tuneserve.tasks.classifier import Prediction, load_classifier
from tuneserve.tasks.explanation import Explanation, explain
from tuneserve.tasks.task import Asked, Route, Task, all_of, only


def _string(value: Any) -> Any:
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "Input should be a valid string")
    return value


Text = Annotated[str, PlainValidator(_string), WithJsonSchema({"type": "string"})]
"""Any string, half a surrogate pair included: that is one text's fault and not its request's."""


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[
    list[Text],
    BeforeValidator(_listed),
    Field(min_length=1),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
    ),
]
"""One text or several; a list in any case."""


class InferenceRequest(BaseModel):
    """One text."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "A warm film, and never a dull one."}]})

    text: Text


class BatchRequest(BaseModel):
    """Several texts."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"texts": ["Worth every minute.", "We left at the interval."]}]}
    )

    texts: Annotated[list[Annotated[Any, WithJsonSchema({"type": "string"})]], Field(min_length=1)]
    """Strings, which `_texts` sees to: pydantic would describe each of a million faults."""


class PredictionResponse(BaseModel):
    """The answer to one text."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "label": "positive",
                    "scores": {"negative": 0.02, "positive": 0.98},
                    "tokens": 12,
                    "truncated": False,
                    "model_version": "20260102T030405Z-0a1b2c3d",
                }
            ]
        },
    )

    label: Annotated[str, Field(description="The likeliest label.")]
    scores: Annotated[dict[str, float], Field(description="Probability of each label; they sum to 1.")]
    tokens: Annotated[int, Field(description="Tokens that were read, special ones included.")]
    truncated: Annotated[bool, Field(description="Whether the text was longer than what was read.")]
    model_version: Annotated[str, Field(description="The version that answered.")]
    abstain: Annotated[
        bool | None,
        Field(
            description="Whether the label is too uncertain for what the version promises. Not there unless it was "
            "trained with MAX_ERROR."
        ),
    ] = None


class FailedText(BaseModel):
    """What stands in a batch for a text that could not be classified."""

    error: Annotated[str, Field(description="Why.")]


class BatchResponse(BaseModel):
    """The answers, in the order of the texts."""

    predictions: list[PredictionResponse | FailedText]


def _texts(request: BatchRequest) -> list[str]:
    faults = (index for index, text in enumerate(request.texts) if not isinstance(text, str))
    if listed := list(islice(faults, MAX_FAULTS)):
        raise InvalidInputError(
            *((("body", "texts", index), "Input should be a valid string", "string_type") for index in listed)
        )
    return request.texts


def shown(answer: Any) -> dict[str, Any]:
    """The JSON of an answer or of its error."""
    if not isinstance(answer, Prediction):
        return {"error": str(answer)}
    found = {
        "label": answer.label,
        "scores": answer.scores,
        "tokens": answer.tokens,
        "truncated": answer.truncated,
        "model_version": answer.model_version,
    }
    return found if answer.abstain is None else {**found, "abstain": answer.abstain}


def _batch(answers: Answers) -> dict[str, Any]:
    return {"predictions": [shown(one) for one in answers]}


class ExplanationRequest(BaseModel):
    """One text, and the label that is to be explained."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "A warm film, and never a dull one."}]})

    text: Text
    label: Annotated[str | None, Field(description="One of the model's; the likeliest, if there is none.")] = None


class SpanResponse(BaseModel):
    """A word, or of a long text several together."""

    start: Annotated[int, Field(description="Where it begins in the text, in characters.")]
    end: Annotated[int, Field(description="Where it has ended.")]
    weight: Annotated[float, Field(description="By how much the label's probability falls without it.")]


class ExplanationResponse(BaseModel):
    """Which words spoke for a label, and which against it."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "label": "positive",
                    "score": 0.98,
                    "spans": [{"start": 0, "end": 4, "weight": 0.21}, {"start": 5, "end": 9, "weight": -0.02}],
                    "read": 9,
                    "truncated": False,
                    "model_version": "20260102T030405Z-0a1b2c3d",
                }
            ]
        },
    )

    label: Annotated[str, Field(description="That is explained.")]
    score: Annotated[float, Field(description="Its probability.")]
    spans: Annotated[list[SpanResponse], Field(description="In the order of the text.")]
    read: Annotated[int, Field(description="Where the reading of the text ended, in characters.")]
    truncated: Annotated[bool, Field(description="Whether the text was longer than what was read.")]
    model_version: Annotated[str, Field(description="The version that answered.")]


def _explained(answers: Answers) -> dict[str, Any]:
    found = only(answers, "text")
    assert isinstance(found, Explanation)
    spans = [
        {"start": start, "end": end, "weight": weight}
        for (start, end), weight in zip(found.spans, found.weights, strict=True)
    ]
    return {
        "label": found.label,
        "score": found.score,
        "spans": spans,
        "read": found.read,
        "truncated": found.truncated,
        "model_version": found.model_version,
    }


class Parameters(BaseModel):
    """What a pipeline's caller may say of the answers."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[int, Field(ge=1)] | None = 1
    function_to_apply: Literal["softmax"] = "softmax"
    truncation: bool = True
    return_all_scores: bool = False
    """What older pipelines have for `top_k=None`."""


class PipelineRequest(BaseModel):
    """A text or several, as Hugging Face's pipelines take them."""

    inputs: Texts
    parameters: Parameters | None = None


def _asked(wanted: Mapping[str, Any]) -> Asked:
    """As the pipeline has it: an object for each text, or with `top_k` a list of them; a text alone has one list.

    With `return_all_scores` it is a list for each text always, in the order of the labels.
    """
    request = PipelineRequest.model_validate(wanted)
    how = request.parameters or Parameters()
    alone = isinstance(wanted["inputs"], str) and not how.return_all_scores
    top_k = None if how.return_all_scores else how.top_k

    def content(answers: Answers) -> list[Any]:
        found = []
        for one in all_of(answers, "inputs"):
            assert isinstance(one, Prediction)
            ranked = (
                one.scores.items() if how.return_all_scores else sorted(one.scores.items(), key=lambda pair: -pair[1])
            )
            found.append([{"label": label, "score": score} for label, score in islice(ranked, top_k)])
        if alone:
            return found[0]
        return found if how.return_all_scores or "top_k" in how.model_fields_set else [one for [one] in found]

    return Asked(request.inputs, content)


CLASSIFICATION = Task(
    "text-classification",
    routes=[
        Route(
            "/inference",
            InferenceRequest,
            PredictionResponse,
            inputs=lambda request: [request.text],
            content=lambda answers: shown(only(answers, "text")),
            name="one",
            doc="Classify one text.",
        ),
        Route(
            "/inference/batch",
            BatchRequest,
            BatchResponse,
            inputs=_texts,
            content=_batch,
            name="batch",
            doc="Classify several texts; the predictions come in their order, a bad text's being its error.",
        ),
        Route(
            "/explain",
            ExplanationRequest,
            ExplanationResponse,
            inputs=lambda request: [request.text],
            content=_explained,
            consult=lambda request, model, deadline: explain(model, request.text, request.label, deadline),
            name="explain",
            doc="Which words of a text speak for its label. It asks the model some ten times as much as /inference.",
        ),
    ],
    load=load_classifier,
    labels=True,
    ask=_asked,
)
