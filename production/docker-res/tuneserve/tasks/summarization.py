"""summarization: a text in, a shorter one out, by an encoder-decoder, at `POST /summary`."""

from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tuneserve.serving.model import Answers
from tuneserve.tasks import generation
from tuneserve.tasks.classification import FailedText, Text
from tuneserve.tasks.generation import event, prompts, written
from tuneserve.tasks.generator import Generated, Prompt, load_generator
from tuneserve.tasks.task import Route, Task, asked_by, only, reading_headers

START = 1
"""Tokens of a summary's length that the decoder does not write itself: lengths count the one that it begins with."""


class Lengths(BaseModel):
    """How long a summary is to be, in tokens."""

    min_length: Annotated[int, Field(ge=0)]
    max_length: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _fits(self) -> "Lengths":
        if self.min_length > self.max_length:
            raise ValueError("min_length should not be above max_length")
        return self

    def prompt(self, text: str) -> Prompt:
        """The prompt for a text of the request."""
        wishes = {"min_new_tokens": max(0, self.min_length - START), "max_new_tokens": self.max_length - START}
        return Prompt(text, wishes, cut=True)


class SummaryRequest(Lengths):
    """A text, and how long its summary is to be."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": "A long article …", "min_length": 30, "max_length": 130}]}
    )

    text: Text


class SummaryResponse(BaseModel):
    """The summary of one text."""

    summary: str
    Device: Annotated[str, Field(description="`cuda` or `cpu`.")]


class SummaryBatchRequest(Lengths):
    """Several texts."""

    texts: Annotated[list[Text], Field(min_length=1)]


class Summary(BaseModel):
    """One of several."""

    summary: str
    truncated: Annotated[bool, Field(description="Whether only the beginning of the text was read.")]


class SummaryBatchResponse(BaseModel):
    """The summaries, in the order of the texts."""

    summaries: list[Summary | FailedText]
    model_version: str
    Device: str


class SummaryText(BaseModel):
    """A summary, as Hugging Face's clients read it."""

    summary_text: str


class Parameters(generation.Parameters):
    """As for any text, with the lengths that pipelines know beside."""

    min_length: Annotated[int | None, Field(ge=0, description="As min_new_tokens, and 1.")] = None
    max_length: Annotated[int | None, Field(ge=2, description="As max_new_tokens, and 1.")] = None

    def wishes(self) -> dict[str, Any]:
        """See `generation.Parameters`."""
        found = super().wishes()
        for length, name in (("min_length", "min_new_tokens"), ("max_length", "max_new_tokens")):
            if (tokens := found.pop(length, None)) is not None:
                found.setdefault(name, max(0, tokens - START))
        return found


class GenerateRequest(generation.GenerateRequest):
    """A text to summarize or several."""

    parameters: Parameters = Parameters()


def _one(answers: Answers) -> dict[str, Any]:
    answer = only(answers, "text")
    assert isinstance(answer, Generated)
    return {"summary": answer.text.strip(), "Device": answer.device}


def _batch(answers: Answers) -> dict[str, Any]:
    found = [one for one in answers if isinstance(one, Generated)]
    return {
        "summaries": [
            {"summary": one.text.strip(), "truncated": one.truncated}
            if isinstance(one, Generated)
            else {"error": str(one)}
            for one in answers
        ],
        "model_version": found[0].model_version if found else "",
        "Device": found[0].device if found else "",
    }


GENERATE = Route(
    "/generate",
    GenerateRequest,
    SummaryText,
    inputs=partial(prompts, cut=True),
    content=lambda answers: [{"summary_text": one.text.strip()} for one in written(answers)],
    headers=reading_headers,
    events=lambda request: event if request.stream else None,
    name="generate",
    doc="The same in the words of Hugging Face's clients.",
)

SUMMARIZATION = Task(
    "summarization",
    routes=[
        Route(
            "/summary",
            SummaryRequest,
            SummaryResponse,
            inputs=lambda request: [request.prompt(request.text)],
            content=_one,
            headers=reading_headers,
            name="summary",
            doc="Summarize one text. `X-Truncated` says that only its beginning was read.",
        ),
        Route(
            "/summary/batch",
            SummaryBatchRequest,
            SummaryBatchResponse,
            inputs=lambda request: [request.prompt(text) for text in request.texts],
            content=_batch,
            name="summaries",
            doc="Summarize several texts; a bad text's summary is its error.",
        ),
        GENERATE,
    ],
    load=load_generator,
    ask=asked_by(GENERATE),
)
