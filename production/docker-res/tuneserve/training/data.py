"""Reading labelled texts: a file, folder, URL or hub name becomes memory-mapped splits of rows."""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
from datasets import ClassLabel, Dataset, concatenate_datasets, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from tuneserve.errors import DataError, StoreError
from tuneserve.logs import in_one_line
from tuneserve.redaction import redact_url
from tuneserve.settings import SAMPLE
from tuneserve.tables.formats import (
    file_type,
    is_hidden,
    is_known,
    is_text,
)
from tuneserve.tables.rows import (
    BATCH_ROWS,
    Columns,
    Row,
    Types,
    enumerate_some,
    format_label,
    format_value,
    in_batches,
    read_file,
    require_columns,
    shorten,
)
from tuneserve.tables.streams import read_text
from tuneserve.training.base_model import connect_to_hub
from tuneserve.training.folders import SAMPLE_FOLDER, find_files, split_of

logger = logging.getLogger(__name__)

ORDER = ("train", "valid", "test")

NO_LABELS = {"", "-1"}
"""What stands for the label where a contest withholds it."""
SCHEMA = pa.schema({"row": pa.int64(), "text": pa.string(), "label": pa.string()})


@dataclass(frozen=True)
class Source:
    """Rows as they were read: `row` (its number), `text`, `label`, memory-mapped; a missing label is empty."""

    rows: Dataset
    where: str
    more: tuple[tuple[int, str], ...] = ()
    """Where the rows from this index on are found, if they come from somewhere else."""
    files: tuple[Path, ...] = ()
    """That were read, where they have columns."""
    columns: Columns | None = None

    def locate(self, index: int) -> str:
        """Where the author of the data finds a row; `index` counts from 0."""
        where = next((where for first, where in reversed(self.more) if first <= index), self.where)
        return f"{where}, row {self.rows[index]['row']}"

    def followed_by(self, other: "Source") -> "Source":
        """The rows of both."""
        more = (*self.more, (len(self.rows), other.where))
        rows = concatenate_datasets([self.rows, other.rows])
        return Source(rows, self.where, more, self.files + other.files, self.columns)


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
            fetched, left_out = _fetch(dataset, shown, cache / "downloads")
            files = find_files(fetched, shown, left_out)
        elif os.path.exists(path):  # noqa: PTH110  (Path.exists() raises when the name is too long)
            left_out, shown = [], ""
            files = find_files(path, str(path), left_out)
        elif dataset.startswith(("/", ".", "~")) or is_known(path.name):
            raise DataError(f"DATASET={redact_url(dataset)}: there is no such file or folder.")
        else:
            return _read_hub(dataset, columns, cache)
        reader = _Reader(columns, cache)
        sources = {}
        for split, parts in sorted(files.items(), key=lambda item: item[0] != "train"):  # its columns hold for all
            names = [str(part) if not shown else shown if len(parts) == 1 else f"{shown}/{part.name}" for part in parts]
            try:
                sources[split] = reader.read(split, dict(zip(names, parts, strict=True)))
            except _UnlabelledError as error:
                left_out.append(str(error))
        return _report(sources, reader.columns, left_out)
    except OSError as error:
        raise StoreError(f"DATA_PATH={cache} cannot be written to: {error}") from error


class _UnlabelledError(Exception):
    """A validation or test file has no labels; the message is what the log says of it."""


class _Reader:
    """Reads the files of one data set; the columns found in the first training file hold for all."""

    def __init__(self, wanted: Columns, cache: Path) -> None:
        self.columns, self._found_in, self._wanted, self._cache = None, "", wanted, cache

    columns: Columns | None

    def read(self, split: str, files: Mapping[str, Path]) -> Source:
        """The rows of a split's files, by their names in messages."""
        sources = (self._read_one(file, where, split) for where, file in files.items())
        return reduce(Source.followed_by, sources)

    def _read_one(self, file: Path, where: str, split: str) -> Source:
        rows = memory_map(self._rows(file, where, split), where, self._cache)
        return Source(rows, where, files=() if file.is_dir() else (file,), columns=self.columns)

    def _rows(self, path: Path, where: str, split: str) -> Iterator[Row]:
        return _read_class(path, where) if path.is_dir() else read_file(path, where, partial(self.choose, where, split))

    def choose(self, where: str, split: str, types: Types) -> Columns:
        """The columns of a file: those of the first one.

        Raises:
            _UnlabelledError: a validation or test file lacks the label's column.
            DataError: another column is missing, or which they are cannot be determined.
        """
        if self.columns is None:
            self.columns, self._found_in = require_columns(types, self._wanted, where), where
        names = [name for name, _ in types]
        missing = [name for name in (self.columns.text, self.columns.label) if name not in names]
        if missing == [self.columns.label] and split != "train":
            raise _UnlabelledError(f"{where} (no column {shorten(missing[0])!r})")
        if missing:
            raise DataError(
                f"{where} has no column {shorten(missing[0])!r}, which {self._found_in} has; its columns are "
                f"{enumerate_some(map(shorten, names))}. All files must have the columns of the text and the label."
            )
        return require_columns(types, self.columns, where)


def _report(sources: dict[str, Source], columns: Columns | None, left_out: Sequence[str]) -> dict[str, Source]:
    """Say in one line what is read and what is left out, and leave out splits whose labels are withheld."""
    train = set(sources["train"].rows.unique("label")) - {""}
    withheld = [
        split
        for split, source in sources.items()
        if split != "train" and set(source.rows.unique("label")) <= NO_LABELS - train
    ]
    read = ", ".join(
        f"{split} from {enumerate_some([source.where, *(where for _, where in source.more)], 3)}"
        for split, source in sorted(sources.items(), key=lambda item: ORDER.index(item[0]))
        if split not in withheld
    )
    where = f"; text from column {columns.text!r}, label from {columns.label!r}" if columns else ""
    others = [*dict.fromkeys(left_out), *(f"{sources[split].where} (no labels)" for split in withheld)]
    logger.info("data: %s%s%s", read, where, f"; left out: {enumerate_some(others, 8)}" if others else "")
    return {split: source for split, source in sources.items() if split not in withheld}


def _fetch(url: str, shown: str, folder: Path) -> tuple[Path, list[str]]:
    """Copy what a URL names to a folder of its own; always anew, since the data may have grown.

    Returns:
        The copy, and the names of what was not copied from a folder.
    """
    import fsspec

    local = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    incoming = folder / f".{local.name}-{uuid4().hex[:8]}"
    incoming.mkdir(parents=True)
    left_out = []
    try:
        files, remote = fsspec.core.url_to_fs(url)
        is_folder = files.isdir(remote)
        found = files.ls(remote, detail=False) if is_folder else [remote]
        for name in found:
            target = incoming / Path(name.rstrip("/").split("?")[0]).name
            if not is_folder:
                file_type(target.name, f"DATASET={shown}")
            if is_known(target.name):
                files.get_file(name, str(target))
            elif not is_hidden(target.name):
                left_out.append(target.name)
    except DataError:
        raise
    except Exception as error:  # each file system of fsspec raises exceptions of its own library
        raise DataError(f"DATASET={shown} cannot be fetched: {type(error).__name__}: {in_one_line(error)}") from error
    else:
        shutil.rmtree(local, ignore_errors=True)
        incoming.rename(local)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return (local if is_folder else next(local.iterdir())), left_out


def _read_class(folder: Path, where: str) -> Iterator[Row]:
    """The texts of a folder, which its name labels; their rows are counted in the order of the files' names."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and is_text(file.name)]
    for row, file in enumerate(files, start=1):
        with file.open("rb") as raw:
            yield row, read_text(raw, f"{where}/{file.name}"), format_label(folder.name)


def _read_hub(dataset: str, columns: Columns, cache: Path) -> dict[str, Source]:
    name, _, configuration = dataset.partition(":")
    reached = connect_to_hub()
    shown = redact_url(dataset)
    logger.info("reading %s from the Hugging Face hub%s", shown, "" if reached else "'s copy on disk")
    try:
        found = load_dataset(name, configuration or None, cache_dir=str(cache / "arrow"), trust_remote_code=False)
    except (OSError, ValueError, DatasetNotFoundError, DatasetGenerationError) as error:
        if not reached:
            reason = "and the hub cannot be reached"
        elif isinstance(error, DatasetNotFoundError):
            reason = "and the hub has no data set of this name (a private one needs HF_TOKEN)"
        else:
            reason = f"and the hub does not give it: {_root_cause(error)}"
        raise DataError(f"DATASET={shown} is not a file or folder here, {reason}.") from error
    reader = _Reader(columns, cache)
    sources: dict[str, Source] = {}
    left_out = []
    for split, data in sorted(found.items(), key=lambda item: item[0] != "train"):
        kind, where = split_of(split), f"{shown}, split {split}"
        if kind is None or kind in sources or (kind != "train" and "train" not in sources):
            left_out.append(split)
            continue
        try:
            chosen = reader.choose(where, kind, [(column, "") for column in data.column_names])
            sources[kind] = Source(memory_map(_hub_rows(data, chosen), where, cache), where)
        except _UnlabelledError as error:
            left_out.append(str(error))
    if "train" not in sources:
        raise DataError(f"DATASET={shown} has no train split; it has {', '.join(found)}.")
    return _report(sources, reader.columns, left_out)


def _hub_rows(data: Dataset, columns: Columns) -> Iterator[Row]:
    feature = data.features[columns.label]
    row = 0
    for batch in data.select_columns([columns.text, columns.label]).iter(batch_size=BATCH_ROWS):
        for text, label in zip(batch[columns.text], batch[columns.label], strict=True):
            row += 1
            if isinstance(feature, ClassLabel) and label is not None:
                label = None if label == -1 else feature.int2str(label)
            yield row, format_value(text), format_label(label)


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
