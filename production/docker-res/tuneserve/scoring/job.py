"""Scoring files: every row of INPUT gets the champion's answer, chunk by chunk, in memory that does not grow.

A chunk that is finished is a part on disk, so a run that ends early goes on where it stood. Chunks are dealt to shards
by their numbers: shard 1 of 4 takes 1, 5, 9, …
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuneserve.errors import SettingsError
from tuneserve.lifecycle.store import Store
from tuneserve.progress import Progress
from tuneserve.scoring.input import Input
from tuneserve.scoring.output import Output
from tuneserve.serving.model import Answers
from tuneserve.serving.service import Service
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tables import Answer
from tuneserve.tables.rows import format_value
from tuneserve.tasks.catalog import load_model, task_of
from tuneserve.tasks.classification import CLASSIFICATION
from tuneserve.tasks.classifier import Prediction
from tuneserve.text import has_surrogates, is_blank

logger = logging.getLogger(__name__)

CHUNK_ROWS = 4096
"""Rows of a part: what is lost at most when a process is killed."""

Predict = Callable[[Sequence[str]], Answers]


def score(settings: Settings, *, threads: int, environ: Mapping[str, str]) -> None:
    """Score INPUT into OUTPUT, this process's share of it, with the model that the store calls its champion.

    Raises:
        SettingsError: INPUT, OUTPUT, SHARD and SHARDS do not make a job.
        DataError: INPUT cannot be read.
        StoreError: OUTPUT cannot be written, or holds parts of another job.
        NoModelError: the store holds no model.
    """
    shard = choose_shard(settings, environ)
    missing = [name for name in ("INPUT", "OUTPUT") if not getattr(settings, name.lower())]
    if missing:
        raise SettingsError(f"`predict` wants {' and '.join(missing)}: the rows to score, and where to write them.")
    version = Store(settings.model_path).champion()
    if (task := task_of(version)) is not CLASSIFICATION:
        raise SettingsError(f"`predict` writes labels, and the champion {version.id} is for the task {task.name!r}.")
    source = Input(settings.input, text_column=settings.text_column, label_column=settings.label_column)
    parts = Output(settings.output, source, shard=shard, shards=settings.shards)
    slot = Slot()
    service = Service.of(slot)

    def predict(texts: Sequence[str]) -> Answers:
        if slot.empty:  # a run that has nothing left to score loads nothing
            slot.take(load_model(version, settings, threads=threads))
        return service.predict(texts)

    how = {"long_text": settings.long_text, "precision": settings.precision}
    try:
        score_rows(source, parts, predict, model_version=version.id, how=how, shard=shard, shards=settings.shards)
    finally:
        slot.close()


def choose_shard(settings: Settings, environ: Mapping[str, str]) -> int:
    """The shard that this process is: SHARD, or what Kubernetes says in JOB_COMPLETION_INDEX, or 0.

    Raises:
        SettingsError: there is no such shard.
    """
    name, value = "SHARD", str(settings.shard)
    if settings.shard == "auto":
        name, value = "JOB_COMPLETION_INDEX", environ.get("JOB_COMPLETION_INDEX", "").strip() or "0"
    if not re.fullmatch("[0-9]+", value) or int(value) >= settings.shards:
        last = settings.shards - 1
        raise SettingsError(f"{name}={value} is no shard of SHARDS={settings.shards}: a number from 0 to {last}.")
    return int(value)


def score_rows(
    source: Input,
    parts: Output,
    predict: Predict,
    *,
    model_version: str,
    how: Mapping[str, str] | None = None,
    shard: int = 0,
    shards: int = 1,
    chunk_rows: int = CHUNK_ROWS,
) -> None:
    """Write the part of every chunk of this shard that is not there yet; then join them, if one file is wanted.

    Args:
        source: the rows.
        parts: where the answers go.
        predict: the model.
        model_version: its version.
        how: settings that its answers depend on; parts of others are not mixed with these.
        shard: this process's.
        shards: of the job.
        chunk_rows: rows of a part.

    Raises:
        DataError: a row cannot be read.
        StoreError: a part cannot be written, or there are parts of another job.
    """
    parts.claim(
        {
            "model_version": model_version,
            **(how or {}),
            "input": source.identity,
            "text_column": source.text_column,
            "shards": shards,
            "chunk_rows": chunk_rows,
        }
    )
    rows = errors = kept = count = 0
    with Progress("scoring", total=None, unit="row") as progress:
        for chunk in source.chunks(
            chunk_rows=chunk_rows, wanted=lambda number: number % shards == shard and not parts.has(number)
        ):
            if chunk.rows is not None:
                answers = answer(source.texts(chunk.rows), predict, model_version)
                parts.write(chunk.number, source.write(chunk.rows, answers))
                rows += len(answers)
                errors += sum(one.error is not None for one in answers)
            elif chunk.number % shards == shard:
                kept += 1
            count += 1
            progress.advance(rows - progress.done, share=chunk.share_read)
    if parts.is_file:
        parts.join(count)
    again = f"; {kept} parts were there already" if kept else ""
    logger.info("scored %d rows with version %s, %d of them with an error%s", rows, model_version, errors, again)
    logger.info("they are in %s", parts.where)


def answer(values: Sequence[Any], predict: Predict, model_version: str) -> list[Answer]:
    """The answer to each value of the text column; one that is no text, or that the model fails on, gets its error."""
    problems = [_problem(value) for value in values]
    texts = [format_value(value) for value, problem in zip(values, problems, strict=True) if not problem]
    outcomes = iter(predict(texts) if texts else [])
    answers = []
    for problem in problems:
        outcome = problem or next(outcomes)
        if isinstance(outcome, Prediction):
            score = outcome.scores[outcome.label]
            read = outcome.tokens, outcome.truncated
            answers.append(Answer(outcome.label, score, outcome.scores, *read, None, model_version, outcome.abstain))
        else:
            answers.append(Answer(None, None, None, None, None, str(outcome), model_version))
    return answers


def _problem(value: Any) -> str:
    """Why a value cannot be classified; nothing, if it can."""
    if isinstance(value, dict | list):
        return "This is a list or record and no text."
    text = format_value(value)
    if has_surrogates(text):
        return "The text holds half a surrogate pair, which is not Unicode text."
    return "The text is empty." if is_blank(text) else ""
