"""Requests and responses of the API, with the examples its documentation shows."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from tuneserve.text import has_surrogates


def _string(value: Any) -> Any:
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "Input should be a valid string")
    return value


Text = Annotated[str, PlainValidator(_string), WithJsonSchema({"type": "string"})]
"""Any string, half a surrogate pair included: that is one text's fault and not its request's."""


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
    """Strings, which whoever reads the request must see to: pydantic would describe each of a million faults."""


class PredictionResponse(BaseModel):
    """The answer to one text."""

    model_config = ConfigDict(
        from_attributes=True,
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


class FailedText(BaseModel):
    """What stands in a batch for a text that could not be classified."""

    error: Annotated[str, Field(description="Why.")]


class BatchResponse(BaseModel):
    """The answers, in the order of the texts."""

    predictions: list[PredictionResponse | FailedText]


class Readiness(BaseModel):
    """Whether a model can answer, and what is going on otherwise; during the first training, how far it is."""

    phase: str
    model_version: str | None = None
    epoch: Annotated[int | None, Field(description="Counted from 1.")] = None
    epochs: int | None = None
    progress: Annotated[float | None, Field(description="Share of the optimizer's steps that are done.")] = None
    loss: float | None = None
    eta_s: Annotated[float | None, Field(description="Seconds that the steps left will take.")] = None

    model_config = ConfigDict(protected_namespaces=())


class FeedbackRequest(BaseModel):
    """The right label of an answer, named by its request's id, or of a text."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"request_id": "8d8ac610566d4ef09c22186b2a5ed793", "label": "negative"},
                {"text": "We left at the interval.", "label": "negative"},
            ]
        }
    )

    label: Annotated[str, Field(min_length=1)]
    request_id: Annotated[str | None, Field(max_length=128, description="The answer's X-Request-Id.")] = None
    index: Annotated[int, Field(ge=0, lt=2**31, description="Which text of a batch, from 0.")] = 0
    text: str | None = None

    @model_validator(mode="after")
    def _names_one(self) -> "FeedbackRequest":
        if (self.request_id is None) == (self.text is None):
            raise ValueError("should have either request_id or text")
        if self.text is not None and not self.text.strip():
            raise ValueError("the text is empty")
        if self.text is not None and has_surrogates(self.text):
            raise ValueError("the text holds half a surrogate pair, which is not Unicode text")
        return self


class Problem(BaseModel):
    """What every error says."""

    detail: str


class Fault(BaseModel):
    """One fault of a request: where it is, in words, and its kind."""

    loc: list[str | int]
    msg: str
    type: str


class Problems(BaseModel):
    """What a request that is not as it should be is answered."""

    detail: list[Fault]
