"""Reading labelled texts: a file, folder, URL or hub name becomes memory-mapped splits of rows, and feedback joins."""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
from datasets import ClassLabel, Dataset, concatenate_datasets, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from tuneserve.errors import DataError, StoreError
from tuneserve.lifecycle.evidence import key_of
from tuneserve.logs import in_one_line
from tuneserve.redaction import redact_url
from tuneserve.settings import SAMPLE
from tuneserve.tables.formats import file_type, is_known, known_endings
from tuneserve.tables.rows import (
    BATCH_ROWS,
    Columns,
    Row,
    format_label,
    format_value,
    in_batches,
    read_file,
    require_columns,
)
from tuneserve.text import is_blank
from tuneserve.training.base_model import connect_to_hub

logger = logging.getLogger(__name__)

SAMPLE_FOLDER = Path(__file__).resolve().parents[2] / "data"
STEMS = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
SCHEMA = pa.schema({"row": pa.int64(), "text": pa.string(), "label": pa.string()})


@dataclass(frozen=True)
class Source:
    """Rows as they were read: `row` (its number), `text`, `label`, memory-mapped; a missing label is empty."""

    rows: Dataset
    where: str
    more: tuple[tuple[int, str], ...] = ()
    """Where the rows from this index on are found, if they come from somewhere else."""

    def locate(self, index: int) -> str:
        """Where the author of the data finds a row; `index` counts from 0."""
        where = next((where for first, where in reversed(self.more) if first <= index), self.where)
        return f"{where}, row {self.rows[index]['row']}"

    def followed_by(self, other: "Source") -> "Source":
        """The rows of both."""
        more = (*self.more, (len(self.rows), other.where))
        return Source(concatenate_datasets([self.rows, other.rows]), self.where, more)


def read(dataset: str, columns: Columns, *, cache: Path) -> dict[str, Source]:
    """Read a data set into `train` and, where it has them, `valid` and `test`.

    Raises:
        DataError: naming the file, row and column at fault, or why the source cannot be reached.
        StoreError: the cache cannot be written.
    """
    disable_progress_bars()
    path = SAMPLE_FOLDER if dataset == SAMPLE else Path(dataset).expanduser()
    try:
        if "://" in dataset:
            shown = redact_url(dataset)
            files = _find_files(_fetch(dataset, shown, cache / "downloads"), shown)
        elif os.path.exists(path):  # noqa: PTH110  (Path.exists() raises when the name is too long)
            files, shown = _find_files(path, str(path)), ""
        elif dataset.startswith(("/", ".", "~")) or is_known(path.name):
            raise DataError(f"DATASET={redact_url(dataset)}: there is no such file or folder.")
        else:
            return _read_hub(dataset, columns, cache)
        return {split: _read_files(parts, columns, shown, cache) for split, parts in files.items()}
    except OSError as error:
        raise StoreError(f"DATA_PATH={cache} cannot be written to: {error}") from error


def join_feedback(
    sources: Mapping[str, Source], labelled: Sequence[tuple[str, str]], *, test_fraction: float, cache: Path
) -> tuple[dict[str, Source], dict[str, int]]:
    """The sources with feedback behind their rows, and what became of it.

    If the data bring test texts, a share of the feedback joins them, the same texts each time: a model that is trained
    after its world has changed must be tested on the new one too. Texts that the data hold out already stay where they
    are, those that they train with are never moved to the test, and labels that they do not know are left out.

    Args:
        sources: as read; `train` is among them.
        labelled: texts and labels, the newest last: of texts that differ in case or spaces alone it counts.
        test_fraction: share of the feedback that joins the test texts.
        cache: where rows are kept.
    """
    known = {label for source in sources.values() for label in source.rows.unique("label")}
    newest = {key_of(text): (text, format_label(label)) for text, label in labelled if not is_blank(text)}
    usable = {key: row for key, row in newest.items() if row[1] in known}
    keys_of = {split: _find_keys(source, usable.keys()) for split, source in sources.items()}
    held_out = {key for split, keys in keys_of.items() if split != "train" for key in keys}
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for key, row in usable.items():
        if key not in held_out:
            tests = "test" in sources and key not in keys_of["train"] and key % 2**32 < test_fraction * 2**32
            parts["test" if tests else "train"].append(row)
    joined = dict(sources)
    for split, rows in parts.items():
        if rows:
            more = memory_map(((row, text, label) for row, (text, label) in enumerate(rows, 1)), "feedback", cache)
            joined[split] = sources[split].followed_by(Source(more, "feedback"))
    found = {
        **{split: len(rows) for split, rows in parts.items()},
        "unknown_label": len(newest) - len(usable),
        "already_held_out": len(held_out),
    }
    logger.info(
        "feedback: %d texts join the training texts and %d the test texts; %d left out for labels that the data do not "
        "know, %d because the data hold them out already",
        *found.values(),
    )
    return joined, found


def _find_keys(source: Source, keys: Set[int]) -> set[int]:
    """Which of these keys are among a source's texts."""
    chunks = source.rows.data.to_batches(max_chunksize=BATCH_ROWS)
    return {key for chunk in chunks for text in chunk["text"].to_pylist() if (key := key_of(text)) in keys}


def _fetch(url: str, shown: str, folder: Path) -> Path:
    """Copy what a URL names to a folder of its own; always anew, since the data may have grown."""
    import fsspec

    local = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    incoming = folder / f".{local.name}-{uuid4().hex[:8]}"
    incoming.mkdir(parents=True)
    try:
        files, remote = fsspec.core.url_to_fs(url)
        is_folder = files.isdir(remote)
        found = files.ls(remote, detail=False) if is_folder else [remote]
        for name in found:
            target = incoming / Path(name.split("?")[0]).name
            if not is_folder:
                file_type(target.name, f"DATASET={shown}")
            if is_known(target.name):
                files.get_file(name, str(target))
    except DataError:
        raise
    except Exception as error:  # each file system of fsspec raises exceptions of its own library
        raise DataError(f"DATASET={shown} cannot be fetched: {type(error).__name__}: {in_one_line(error)}") from error
    else:
        shutil.rmtree(local, ignore_errors=True)
        incoming.rename(local)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return local if is_folder else next(local.iterdir())


def _find_files(path: Path, shown: str) -> dict[str, list[Path]]:
    """The files of each split: one, `train.csv` say, or parts, `train-1.csv` and whatever comes later."""
    if path.is_file():
        return {"train": [path]}
    try:
        listed = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}") from error
    found: dict[str, list[Path]] = {}
    for file in listed:
        stem = file.name.split(".")[0]
        split = STEMS.get(stem.split("-")[0])
        if split is None or not file.is_file():
            continue
        if not is_known(file.name):
            raise DataError(f"{shown}: {file.name} looks like the {split} split; use one of {known_endings()}.")
        for other in found.setdefault(split, []):
            name = other.name.split(".")[0]
            if name == stem or name.split("-")[0] != stem.split("-")[0]:
                raise DataError(f"{shown}: {other.name} and {file.name} are both the {split} split; keep one.")
        found[split].append(file)
    if "train" not in found:
        raise DataError(f"DATASET={shown} is a folder without a train file (train with one of {known_endings()}).")
    return found


def _read_files(files: list[Path], columns: Columns, shown: str, cache: Path) -> Source:
    names = [str(file) if not shown else shown if len(files) == 1 else f"{shown}/{file.name}" for file in files]
    sources = (_read_file(file, columns, name, cache) for file, name in zip(files, names, strict=True))
    return reduce(Source.followed_by, sources)


def _read_file(path: Path, columns: Columns, where: str, cache: Path) -> Source:
    rows = read_file(path, where, partial(require_columns, wanted=columns, where=where))
    return Source(memory_map(rows, where, cache), where)


def _read_hub(dataset: str, columns: Columns, cache: Path) -> dict[str, Source]:
    name, _, configuration = dataset.partition(":")
    reached = connect_to_hub()
    logger.info("reading %s from the Hugging Face hub%s", dataset, "" if reached else "'s copy on disk")
    try:
        found = load_dataset(name, configuration or None, cache_dir=str(cache / "arrow"), trust_remote_code=False)
    except (OSError, ValueError, DatasetNotFoundError, DatasetGenerationError) as error:
        if not reached:
            reason = "and the hub cannot be reached"
        elif isinstance(error, DatasetNotFoundError):
            reason = "and the hub has no data set of this name (a private one needs HF_TOKEN)"
        else:
            reason = f"and the hub does not give it: {_root_cause(error)}"
        raise DataError(f"DATASET={redact_url(dataset)} is not a file or folder here, {reason}.") from error
    sources = {}
    for split, data in found.items():
        if split in STEMS and not _is_unlabelled(data):
            where = f"{dataset}, split {split}"
            sources[STEMS[split]] = Source(memory_map(_hub_rows(data, columns, where), where, cache), where)
    if "train" not in sources:
        raise DataError(f"DATASET={redact_url(dataset)} has no labelled train split; it has {', '.join(found)}.")
    return sources


def _hub_rows(data: Dataset, columns: Columns, where: str) -> Iterator[Row]:
    columns = require_columns([(name, "") for name in data.column_names], columns, where)
    feature = data.features[columns.label]
    row = 0
    for batch in data.select_columns([columns.text, columns.label]).iter(batch_size=BATCH_ROWS):
        for text, label in zip(batch[columns.text], batch[columns.label], strict=True):
            row += 1
            if isinstance(feature, ClassLabel) and label is not None:
                label = None if label == -1 else feature.int2str(label)
            yield row, format_value(text), format_label(label)


def _is_unlabelled(data: Dataset) -> bool:
    """Whether this is a contest's test split, whose labels are withheld: every one of them is -1."""
    return any(
        isinstance(feature, ClassLabel) and set(data.unique(name)) == {-1} for name, feature in data.features.items()
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def memory_map(rows: Iterable[Row], where: str, cache: Path) -> Dataset:
    """Write rows to an Arrow file, named by its content, and map it into memory."""
    folder = cache / "arrow"
    folder.mkdir(parents=True, exist_ok=True)
    incoming = folder / f".{uuid4().hex}"
    content = hashlib.sha256()
    count = 0
    try:
        with pa.OSFile(str(incoming), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            for batch in in_batches(rows, lambda row: len(row[1])):
                content.update(repr(batch).encode())
                count += len(batch)
                arrays = [
                    pa.array(values, kind.type) for values, kind in zip(zip(*batch, strict=True), SCHEMA, strict=True)
                ]
                writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        if count == 0:
            raise DataError(f"{where} has no rows.")
        incoming.replace(folder / f"{content.hexdigest()[:32]}.arrow")
    finally:
        incoming.unlink(missing_ok=True)
    return Dataset.from_file(str(folder / f"{content.hexdigest()[:32]}.arrow"))
