"""Requests and responses that are the same for every task, with the examples the API's documentation shows."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

import tuneserve
from tuneserve.text import has_surrogates, is_blank


class Readiness(BaseModel):
    """Whether a model can answer, and what is going on otherwise; during the first training, how far it is."""

    phase: str
    reason: Annotated[str | None, Field(description="Which models a server of many waits for.")] = None
    model_version: str | None = None
    epoch: Annotated[int | None, Field(description="Counted from 1.")] = None
    epochs: int | None = None
    progress: Annotated[float | None, Field(description="Share of the optimizer's steps that are done.")] = None
    loss: float | None = None
    eta_s: Annotated[float | None, Field(description="Seconds that the steps left will take.")] = None

    model_config = ConfigDict(protected_namespaces=())


class Health(BaseModel):
    """Whether the process is worth keeping."""

    status: Literal["alive", "failed"]


class Index(BaseModel):
    """What `GET /` says to programs: KServe's clients read `status`, older systems' `message`."""

    status: Literal["alive", "failed"]
    message: str
    name: str = "tuneserve"
    version: str = tuneserve.__version__
    docs: str = "/docs"
    model: str = "/model"


class FeedbackRequest(BaseModel):
    """The right label of an answer, named by its request's id, or of a text."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"request_id": "8d8ac610566d4ef09c22186b2a5ed793", "label": "negative"},
                {"text": "We left at the interval.", "label": "negative"},
            ],
            "oneOf": [
                {
                    "required": [given],
                    "properties": {given: {"type": "string"}, other: {"type": "null"}},
                }
                for given, other in (("request_id", "text"), ("text", "request_id"))
            ],
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
        if self.text is not None and is_blank(self.text):
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


class PromoteRequest(BaseModel):
    """The version that is to answer."""

    version: Annotated[str, Field(min_length=1, max_length=255)]


class RollbackRequest(BaseModel):
    """The version that is to be withdrawn, which must be the champion: asked twice, it is not done twice."""

    version: Annotated[str, Field(min_length=1, max_length=255)]


class ChampionResponse(BaseModel):
    """Which version is the champion now; servers of the store load it within a second, if it can answer."""

    champion: str
    withdrawn: str | None = None


class Examples(BaseModel):
    """Texts to try the model with."""

    texts: list[str]


class SuggestionResponse(BaseModel):
    """A text to label."""

    text: str
    scores: Annotated[dict[str, float], Field(description="The likeliest labels, nine at most, likeliest first.")]
    why: Annotated[
        list[str],
        Field(
            description="`unsure` of two labels, `common` (like many others), or rare in the test by its `length` or "
            "its `unknown` words."
        ),
    ]


class SuggestionsResponse(BaseModel):
    """Texts to label next, best first."""

    texts: list[SuggestionResponse]
    unlabelled: Annotated[int, Field(description="Texts that were looked through: the newest without a label.")]
