"""text-generation, and what the two tasks that write have in common: `{"inputs", "parameters"}` at `POST /generate`."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tuneserve.serving.model import Answers
from tuneserve.tasks.classification import Texts
from tuneserve.tasks.generator import Generated, Prompt, load_generator
from tuneserve.tasks.task import Route, Task, all_of, asked_by, reading_headers

MOST_STOPS, MOST_STOP_CHARACTERS = 16, 256
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Parameters(BaseModel):
    """How a text is to be written; what is not said is as the server's variables have it. Others are passed over."""

    model_config = ConfigDict(extra="ignore")

    max_new_tokens: Annotated[int | None, Field(ge=1, description="Tokens to write at most.")] = None
    min_new_tokens: Annotated[int | None, Field(ge=0, description="Tokens before which a text does not end.")] = None
    do_sample: Annotated[bool | None, Field(description="Draw each token by its probability.")] = None
    temperature: Annotated[Finite | None, Field(gt=0, le=100, description="Above 1 flatter, below 1 sharper.")] = None
    top_k: Annotated[int | None, Field(ge=0, description="Draw from so many likeliest tokens; 0: from all.")] = None
    top_p: Annotated[Finite | None, Field(gt=0, le=1, description="Draw from the likeliest of this share.")] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="Equal seeds draw equal texts.")] = None
    num_beams: Annotated[int | None, Field(ge=1, description="Beams; 1: none.")] = None
    early_stopping: Annotated[bool | None, Field(description="End once as many beams have ended.")] = None
    length_penalty: Annotated[Finite | None, Field(ge=-10, le=10, description="Above 0 longer texts.")] = None
    no_repeat_ngram_size: Annotated[int | None, Field(ge=0, description="Never repeat so many tokens; 0: may.")] = None
    repetition_penalty: Annotated[Finite | None, Field(gt=0, le=10, description="Above 1 fewer repetitions.")] = None
    stop: Annotated[list[str], Field(max_length=MOST_STOPS, description="Strings before which a text ends.")] = []
    return_full_text: Annotated[bool, Field(description="Whether the prompt stands before what was written.")] = False
    truncate: Annotated[
        bool | None,
        Field(description="Whether a text that is too long is read in part; if not said, one to summarize is."),
    ] = None
    generate_parameters: Annotated[dict[str, Any] | None, Field(description="The same, one level down.")] = None

    @model_validator(mode="before")
    @classmethod
    def _one_level(cls, value: Any) -> Any:
        """Take in what `InferenceClient.summarization` sends in `generate_parameters`, and a single stop string."""
        if not isinstance(value, Mapping):
            return value
        found = {key: one for key, one in value.items() if one is not None}
        if isinstance(inner := found.pop("generate_parameters", None), Mapping):
            found = {**inner, **found}
        if isinstance(found.get("stop"), str):
            found["stop"] = [found["stop"]]
        if not isinstance(found.get("truncate", True), bool):
            found.pop("truncate")  # a number of tokens, in text-generation-inference
        return found

    @model_validator(mode="after")
    def _fits(self) -> "Parameters":
        if self.min_new_tokens and self.max_new_tokens and self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens should not be above max_new_tokens")
        if any(not one or len(one) > MOST_STOP_CHARACTERS for one in self.stop):
            raise ValueError(f"each stop should have 1 to {MOST_STOP_CHARACTERS} characters")
        return self

    def wishes(self) -> dict[str, Any]:
        """What is said of `Wishes`; who says how to draw wants to draw."""
        apart = {"stop", "return_full_text", "truncate", "generate_parameters"}
        found = {name: value for name, value in self.model_dump(exclude=apart).items() if value is not None}
        if {"temperature", "top_k", "top_p", "seed"} & set(found):
            found.setdefault("do_sample", True)
        return found


class GenerateRequest(BaseModel):
    """A prompt or several."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "Once upon a time"}]})

    inputs: Texts
    parameters: Parameters = Parameters()
    stream: Annotated[bool, Field(description="Send each token when it is written, as server-sent events.")] = False

    @model_validator(mode="after")
    def _one_stream(self) -> "GenerateRequest":
        if self.stream and len(self.inputs) > 1:
            raise ValueError("only one text can be streamed")
        return self


class GeneratedText(BaseModel):
    """What was written on a prompt."""

    generated_text: str


def prompts(request: GenerateRequest, *, cut: bool = False) -> list[Prompt]:
    """A prompt for each text; `cut` says whether those that are too long are read in part if the request does not."""
    asked = request.parameters
    cut = cut if asked.truncate is None else asked.truncate
    return [
        Prompt(text, asked.wishes(), tuple(asked.stop), cut=cut, full=asked.return_full_text) for text in request.inputs
    ]


def written(answers: Answers) -> Sequence[Generated]:
    """The answers, if all are there.

    Raises:
        InvalidInputError: texts cannot be read.
        TuneserveError: the engine failed on one.
    """
    return [one for one in all_of(answers, "inputs") if isinstance(one, Generated)]


def event(answer: Generated, before: Generated | None) -> dict[str, Any]:
    """What is sent of a text that goes on: what is new since the event before, and at the end all of it."""
    details = {"finish_reason": REASONS.get(answer.finish), "generated_tokens": len(answer.ids), "seed": answer.seed}
    return {
        "index": len(answer.ids),
        "token": {
            "id": answer.ids[-1],
            "text": answer.text.removeprefix(before.text if before is not None else ""),
            "logprob": None,
            "special": answer.finish == "end",
        },
        "generated_text": answer.shown if answer.finish else None,
        "details": details if answer.finish else None,
    }


REASONS = {"end": "eos_token", "length": "length", "stop": "stop_sequence"}
"""text-generation-inference's words."""

GENERATE = Route(
    "/generate",
    GenerateRequest,
    GeneratedText,
    inputs=prompts,
    content=lambda answers: [{"generated_text": one.shown} for one in written(answers)],
    headers=reading_headers,
    events=lambda request: event if request.stream else None,
    name="generate",
    doc="Write on one prompt or on several; `stream` sends each token as a server-sent event.",
)

TEXT_GENERATION = Task(
    "text-generation",
    routes=[GENERATE],
    load=load_generator,
    ask=asked_by(GENERATE, return_full_text=True),  # which pipelines do unless they are told not to
)
