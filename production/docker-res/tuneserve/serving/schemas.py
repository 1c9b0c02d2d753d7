"""Requests and responses of the API, with the examples its documentation shows."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _require_words(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("the text holds half a surrogate pair, which is not Unicode text")
    return text


Text = Annotated[str, AfterValidator(_require_words)]


class InferenceRequest(BaseModel):
    """One text."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "A warm film, and never a dull one."}]})

    text: Text


class BatchRequest(BaseModel):
    """Several texts."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"texts": ["Worth every minute.", "We left at the interval."]}]}
    )

    texts: Annotated[list[Text], Field(min_length=1)]


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


class BatchResponse(BaseModel):
    """The answers, in the order of the texts."""

    predictions: list[PredictionResponse]


class Readiness(BaseModel):
    """Whether a model can answer, and what is going on otherwise."""

    phase: str
    model_version: str | None = None

    model_config = ConfigDict(protected_namespaces=())


class Problem(BaseModel):
    """What every error says."""

    detail: str
