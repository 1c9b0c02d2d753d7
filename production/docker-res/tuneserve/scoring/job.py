"""Scoring files: every row of INPUT gets the champion's answer, chunk by chunk, in memory that does not grow.

A chunk that is finished is a part on disk, so a run that ends early goes on where it stood. Chunks are dealt to shards
by their numbers: shard 1 of 4 takes 1, 5, 9, …
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuneserve.errors import SettingsError, TextError, TuneserveError
from tuneserve.lifecycle.store import Store
from tuneserve.progress import Progress
from tuneserve.scoring.input import Input
from tuneserve.scoring.output import Output
from tuneserve.serving.classifier import Classifier, Prediction, load_classifier
from tuneserve.settings import Settings
from tuneserve.tables import Answer
from tuneserve.tables.rows import format_value
from tuneserve.text import has_surrogates

logger = logging.getLogger(__name__)

CHUNK_ROWS = 4096
"""Rows of a part: what is lost at most when a process is killed."""

Predict = Callable[[Sequence[str]], Sequence[Prediction | TextError]]


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
    source = Input(settings.input, text_column=settings.text_column, label_column=settings.label_column)
    parts = Output(settings.output, source, shard=shard, shards=settings.shards)
    loaded: list[Classifier] = []

    def predict(texts: Sequence[str]) -> Sequence[Prediction | TextError]:
        if not loaded:  # a run that has nothing left to score loads nothing
            loaded.append(load_classifier(version, settings, threads=threads))
        return loaded[0].predict(texts)

    how = {"long_text": settings.long_text, "precision": settings.precision}
    score_rows(source, parts, predict, model_version=version.id, how=how, shard=shard, shards=settings.shards)


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
    outcomes = iter(_predict_each(texts, predict))
    answers = []
    for problem in problems:
        outcome = problem or next(outcomes)
        if isinstance(outcome, str | TextError):
            answers.append(Answer(None, None, None, None, None, str(outcome), model_version))
        else:
            answers.append(
                Answer(
                    outcome.label,
                    outcome.scores[outcome.label],
                    outcome.scores,
                    outcome.tokens,
                    outcome.truncated,
                    None,
                    model_version,
                )
            )
    return answers


def _problem(value: Any) -> str:
    """Why a value cannot be classified; nothing, if it can."""
    if isinstance(value, dict | list):
        return "This is a list or record and no text."
    text = format_value(value)
    if has_surrogates(text):
        return "The text holds half a surrogate pair, which is not Unicode text."
    return "" if text.strip() else "The text is empty."


def _predict_each(texts: Sequence[str], predict: Predict) -> list[Prediction | TextError | str]:
    """Predictions in order; where the model fails, the halves are tried, down to the one text whose error it is."""
    try:
        return list(predict(texts)) if texts else []
    except TuneserveError as error:
        if error.exit_code != TuneserveError.exit_code:  # not the text's fault: a damaged model, a missing device
            raise
        if len(texts) == 1:
            return [str(error)]
        middle = len(texts) // 2
        return [*_predict_each(texts[:middle], predict), *_predict_each(texts[middle:], predict)]
