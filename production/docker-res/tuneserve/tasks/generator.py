"""A model that writes as a Model: prompts to token ids, these to the writer, and what it writes to texts."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tuneserve.artifact import Version, read_golden_writings, require_whole
from tuneserve.errors import (
    EngineError,
    InvalidInputError,
    NoModelError,
    OverloadedError,
    StoreError,
    TextError,
    TimeoutExceededError,
    TuneserveError,
)
from tuneserve.network.wishes import Wishes
from tuneserve.serving.engines.choice import require_torch
from tuneserve.serving.engines.writing import WritingEngine
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.model import Answer, Answers, Model, wait_for
from tuneserve.serving.writer import Order, Writer
from tuneserve.settings import Settings
from tuneserve.text import CHARACTERS_PER_TOKEN, has_surrogates, is_blank

Finish = Literal["", "end", "length", "stop"]

USUAL_NEW_TOKENS = 128
"""Tokens that are written at most where a prompt does not say."""

MOST_BEAMS = 8

CONTEXT_TOKENS = 8
"""Of the prompt, before which what is written is spelled: more than any character or word's beginning takes."""

INLINE_CHARACTERS = 8192
"""Texts up to so many characters are tokenized on the event loop."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be written on, and how.

    Args:
        text: the prompt.
        wishes: those that differ from the model's usual ones, by the names of `Wishes`.
        stops: strings before which a text ends.
        cut: whether a prompt that is too long is read in part.
        full: whether the prompt stands before what was written, where that is shown.
    """

    text: str
    wishes: Mapping[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    cut: bool = False
    full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated(Answer):
    """What was written, without the prompt; `finish` says why it ended, and is empty while it goes on."""

    text: str
    ids: tuple[int, ...]
    """Token ids of all that was written, of what stands behind a stop string and of special tokens too."""
    prompt_tokens: int
    device: str
    finish: Finish = ""
    prompt: str = ""
    """What is shown before it."""
    seed: int | None = None

    @property
    def shown(self) -> str:
        """The text, behind its prompt if that is wanted."""
        return self.prompt + self.text


class Generator(Model):
    """Tokenizer, writer and engine of one version.

    Args:
        version: in the store.
        engine: which belongs to the writer's thread from now on.
        usual: how texts are written where a prompt does not say.
        most_new_tokens: that a prompt may ask for.
        max_queue_tokens: that may wait for it.
    """

    def __init__(
        self,
        version: Version,
        engine: WritingEngine,
        *,
        usual: Wishes,
        most_new_tokens: int = 1024,
        max_queue_tokens: int = 32768,
    ) -> None:
        from tokenizers import Tokenizer

        self.device = engine.device
        self.version, self.id, self.metadata = version, version.id, version.metadata
        self.task = str(version.metadata["task"])
        about = version.metadata["writer"]
        self.max_tokens, self._pairs, self._prefix = about["max_tokens"], about["encoder_decoder"], about["prefix"]
        if self._pairs:  # else it depends on the prompt, which takes positions of the decoder, too
            most_new_tokens = min(most_new_tokens, about.get("max_new_tokens", most_new_tokens))
        self._usual = replace(usual, max_new_tokens=min(usual.max_new_tokens, most_new_tokens))
        self._most_new_tokens = most_new_tokens
        self._ends = frozenset(about["ends"])
        self._tokenizer = Tokenizer.from_file(str(Path(version.folder, "tokenizer.json")))
        self._tokenizer.no_padding()
        if self._pairs:
            self._tokenizer.enable_truncation(self.max_tokens)
        else:
            self._tokenizer.no_truncation()
        self._metrics = Metrics()
        self.writer = Writer(engine, self._metrics, max_queue_tokens=max_queue_tokens)

    @property
    def dead(self) -> bool:
        """See `Model`."""
        return self.writer.dead is not None

    @property
    def queue_tokens(self) -> int:
        """See `Model`."""
        return self.writer.tokens_waiting

    @property
    def drain_s(self) -> float:
        """See `Model`."""
        return self.writer.drain_s

    def room(self, wait_s: float = math.inf) -> OverloadedError | None:
        """See `Model`."""
        return self.writer.refusal(wait_s)

    async def answer(self, inputs: Sequence[Prompt], *, deadline: float = math.inf) -> Answers:
        """What is written on each prompt, whole; see `Model`."""
        readings = await self._read_all(inputs)
        texts = [Wanted(one) for one in readings if isinstance(one, Reading)]
        with self._ordered(texts):
            answers = iter(await asyncio.gather(*(self._whole(text, deadline) for text in texts)))
            return [one if isinstance(one, TextError) else next(answers) for one in readings]

    async def stream(self, wanted: Prompt, *, deadline: float = math.inf) -> AsyncGenerator[Generated]:
        """What has been written so far, again and again, until the one that says why it ended.

        Raises:
            TextError: the prompt cannot be read.
            OverloadedError: too much waits already.
            TimeoutExceededError: the deadline has passed.
            TuneserveError: the engine failed.
        """
        [reading] = await self._read_all([wanted])
        if isinstance(reading, TextError):
            raise reading
        text = Wanted(reading)
        with self._ordered([text]):
            async for found, done in text.written(deadline):
                answer = self._describe(reading, found, done=done)
                yield answer
                if answer.finish:
                    return

    async def _whole(self, text: "Wanted", deadline: float) -> Answer | TuneserveError:
        try:
            async for found, done in text.written(deadline):
                if done or text.reading.prompt.stops:
                    answer = self._describe(text.reading, found, done=done)
                    if answer.finish:
                        self.writer.cancel(text.order)  # after a stop string nobody wants more
                        return answer
        except EngineError as error:
            return error
        raise NoModelError("The engine has stopped.")

    @contextmanager
    def _ordered(self, texts: "Sequence[Wanted]") -> Iterator[None]:
        """Have these texts written; once nobody wants them any more, they leave.

        Raises:
            OverloadedError: too much waits already.
        """
        orders = [text.order for text in texts]
        if refusal := self.writer.refusal(coming=sum(order.tokens for order in orders)):
            raise refusal
        self.writer.submit(orders)
        try:
            yield
        finally:
            for order in orders:
                self.writer.cancel(order)

    def prove(self) -> None:
        """Write on the prompts that were stored with the model, and compare how the texts begin.

        Raises:
            StoreError: most begin with another token: the files are damaged, or the engine computes something else.
        """
        stored = read_golden_writings(self.version)
        found = wait_for(
            self._golden([(Prompt(text, cut=True), Wishes(max_new_tokens=len(ids))) for text, ids in stored])
        )
        right = sum(bool(ids) and ids[0] == wanted[0] for ids, (_, wanted) in zip(found, stored, strict=True))
        if 2 * right <= len(stored):
            raise StoreError(f"version {self.id} does not write as it did when it was saved.")

    async def _golden(self, prompts: Sequence[tuple[Prompt, Wishes]]) -> list[Sequence[int]]:
        texts = [Wanted(self._read(prompt, wishes)) for prompt, wishes in prompts]
        self.writer.submit([text.order for text in texts])
        return [await anext(ids async for ids, done in text.written() if done) for text in texts]

    def attach(self, metrics: Metrics, on_death: Callable[[BaseException], None]) -> None:
        """See `Model`."""
        self._metrics = self.writer.metrics = metrics
        self.writer.on_death = on_death

    def close(self) -> None:
        """See `Model`."""
        self.writer.close()

    def _wishes(self, prompt: Prompt) -> Wishes:
        """How this text is to be written.

        Raises:
            InvalidInputError: more is wanted than this server gives.
        """
        found = replace(self._usual, **prompt.wishes)
        for name, most in (("max_new_tokens", self._most_new_tokens), ("num_beams", MOST_BEAMS)):
            if getattr(found, name) > most:
                raise InvalidInputError((("body", name), f"should be at most {most} here", "value_error"))
        if found.min_new_tokens > found.max_new_tokens:
            raise InvalidInputError((("body", "min_new_tokens"), "should not be above max_new_tokens", "value_error"))
        return found

    async def _read_all(self, prompts: Sequence[Prompt]) -> "list[Reading | TextError]":
        """Each prompt's tokens, or why it cannot be read.

        Raises:
            InvalidInputError: more is wanted than this server gives.
        """

        def read(prompt: Prompt) -> Reading | TextError:
            try:
                return self._read(prompt, self._wishes(prompt))
            except TextError as error:
                return error

        if sum(len(prompt.text) for prompt in prompts) < INLINE_CHARACTERS:
            return [read(prompt) for prompt in prompts]
        return await asyncio.to_thread(lambda: [read(prompt) for prompt in prompts])

    def _read(self, prompt: Prompt, wishes: Wishes) -> "Reading":
        """The token ids of a prompt.

        Raises:
            TextError: it cannot be read.
        """
        text = prompt.text
        most = self.max_tokens * CHARACTERS_PER_TOKEN
        room = self.max_tokens - (0 if self._pairs else wishes.max_new_tokens)
        if is_blank(text[:most]):
            raise TextError("the text is empty")
        if has_surrogates(text):
            raise TextError("the text holds half a surrogate pair, which is not Unicode text")
        if room < 1:
            raise TextError(
                f"{wishes.max_new_tokens} tokens more leave no room for the text: this model reads and writes "
                f"{self.max_tokens} tokens"
            )
        encoding = self._tokenizer.encode(self._prefix + text[:most])
        ids: list[int] = encoding.ids
        truncated = len(text) > most or len(ids) > room or bool(encoding.overflowing)
        if truncated and not prompt.cut:
            raise TextError(f"the text has more than {room} tokens, the most there is room for")
        ids = ids[:room]
        context = () if self._pairs else tuple(ids[-CONTEXT_TOKENS:])
        return Reading(prompt, ids, wishes, truncated, context, self._spell(context).rstrip("\ufffd"))

    def _spell(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _describe(self, reading: "Reading", ids: Sequence[int], *, done: bool) -> Generated:
        prompt, written = reading.prompt, list(ids)
        finish: Finish = "" if not done else "length"
        if done and written and written[-1] in self._ends:
            finish = "end"
        # Alone, what goes on behind a word would lose the space before it with many tokenizers.
        text = self._spell((*reading.context, *written))[len(reading.before) :]
        stop = min((place for one in prompt.stops if (place := text.find(one)) >= 0), default=-1)
        if stop >= 0:
            text, finish = text[:stop], "stop"
        elif not done:
            text = _certain(text, prompt.stops)
        return Generated(
            model_version=self.id,
            truncated=reading.truncated,
            text=text,
            prompt_tokens=len(reading.ids),
            ids=tuple(written),
            device=self.device,
            finish=finish,
            prompt=prompt.text if prompt.full else "",
            seed=reading.wishes.seed,
        )


def _certain(text: str, stops: Sequence[str]) -> str:
    """What of a text that goes on will stay: no part of a character, nor what a stop string may begin with."""
    text = text.rstrip("\ufffd")
    for begin in range(max(0, len(text) - max(map(len, stops), default=0)), len(text)):
        if any(stop.startswith(text[begin:]) for stop in stops):
            return text[:begin]
    return text


@dataclass(frozen=True)
class Reading:
    """A prompt as the model reads it.

    Args:
        prompt: what was asked.
        ids: its token ids.
        wishes: how it is to be written on.
        truncated: whether only its beginning is read.
        context: its last token ids, if what is written goes on behind them.
        before: what these spell.
    """

    prompt: Prompt
    ids: Sequence[int]
    wishes: Wishes
    truncated: bool
    context: Sequence[int]
    before: str


class Wanted:
    """A text that is to be written on this event loop."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._news: asyncio.Queue[tuple[Sequence[int] | TuneserveError, bool]] = asyncio.Queue()
        self.order = Order(
            reading.ids, reading.wishes, lambda *one: self._news.put_nowait(one), asyncio.get_running_loop()
        )

    async def written(self, deadline: float = math.inf) -> AsyncGenerator[tuple[Sequence[int], bool]]:
        """The ids so far, whenever there are more, and whether that is all.

        Raises:
            TimeoutExceededError: the deadline has passed.
            TuneserveError: the engine failed.
        """
        done = False
        while not done:
            try:
                async with asyncio.timeout(deadline - time.monotonic() if deadline < math.inf else None):
                    found, done = await self._news.get()
            except TimeoutError:
                raise TimeoutExceededError("There was no answer in time.") from None
            while not self._news.empty():
                found, done = self._news.get_nowait()
            if isinstance(found, TuneserveError):
                raise found
            yield found, done


def load_generator(version: Version, settings: Settings, *, threads: int) -> Generator:
    """The version on the device that the settings want, after it has proved itself.

    Raises:
        StoreError: the version's files are damaged, or it does not write as it did when it was saved.
        DeviceError: the device asked for cannot be had.
    """
    require_torch(version)
    from tuneserve.serving.engines.torch_writer import load

    require_whole(version)
    engine = load(version, settings, threads=threads)
    about, summarizes = version.metadata["writer"], version.metadata["task"] == "summarization"
    usual = Wishes(
        max_new_tokens=min(USUAL_NEW_TOKENS, settings.max_new_tokens),
        num_beams=settings.num_beams if settings.num_beams != "auto" else 3 if summarizes else 1,
        early_stopping=settings.early_stopping,
        length_penalty=about["length_penalty"],
        no_repeat_ngram_size=(
            settings.no_repeat_ngram_size if settings.no_repeat_ngram_size != "auto" else 3 if summarizes else 0
        ),
    )
    model = Generator(
        version,
        engine,
        usual=usual,
        most_new_tokens=settings.max_new_tokens,
        max_queue_tokens=settings.max_queue_tokens,
    )
    try:
        model.prove()
    except BaseException:
        model.close()
        raise
    return model
