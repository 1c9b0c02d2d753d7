"""Which files of a folder are its splits: `train.csv`, parts of it, folders of files, or one folder a class."""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from tuneserve.errors import DataError
from tuneserve.files import open_regular
from tuneserve.tables.formats import DESCRIPTIONS, OTHERS, file_type, is_data, is_hidden, is_text, known_endings
from tuneserve.tables.rows import enumerate_some, shorten

SAMPLE_FOLDER = Path(__file__).resolve().parents[2] / "data"

STEMS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("valid", "validation", "val", "dev", "eval"), "valid"
)
PART = re.compile(r"([a-z]+)(?:-.*|[_ ]?[0-9]+)?")
"""The name of a split's file or folder: `train`, and of parts `train-2026-11`, `train_2`, `train-00000-of-00002`."""

UNLABELLED = {"unsup", "unsupervised", "unlabeled", "unlabelled"}
"""Folders beside those of the classes whose texts have no label."""


def find_files(path: Path, shown: str, left_out: list[str]) -> dict[str, list[Path]]:
    """The files of each split, or folders that hold the texts of one class each; the rest is added to `left_out`.

    A split is a file, `train.csv` say, parts such as `train-1.csv` and whatever comes later, or a folder `train`. A
    folder without any is the training split if it holds one file of data or a folder for each class. A folder `train`
    that holds `train.csv` and `test.csv` is the data set itself, as a channel of SageMaker's may be.

    Raises:
        DataError: there is no training split, or two entries are one split, or an entry is in the folder of another.
    """
    if path.is_file():
        return {"train": [path]}
    listed = _list(path, shown)
    found: dict[str, list[Path]] = {}
    entries: dict[str, list[Path]] = {}
    for entry in listed:
        split = split_of(entry.name)
        parts = _parts(entry, shown, left_out) if split else []
        if split is None or not parts:
            left_out += [] if entry.name in DESCRIPTIONS else [entry.name]
            continue
        others = [part.name for part in parts if part.is_file() and split_of(part.name) not in (split, None)]
        if others and {split_of(one.name) for one in listed} - {None} == {"train"}:
            left_out[:] = [one.name for one in listed if one != entry]
            return find_files(entry, f"{shown}/{entry.name}", left_out)
        if others:
            raise DataError(f"{shown}/{entry.name}/{others[0]} is named as another split's; move it, or rename it.")
        stem = _stem(entry.name)
        for other in entries.setdefault(split, []):
            name = _stem(other.name)
            if name == stem or _base(name) != _base(stem):
                raise DataError(f"{shown}: {other.name} and {entry.name} are both the {split} split; keep one.")
        entries[split].append(entry)
        found.setdefault(split, []).extend(parts)
    if "train" in found:
        return found
    folders = [entry for entry in listed if entry.is_dir()]
    data = [entry for entry in listed if entry.is_file() and is_data(entry.name)]
    if not found:
        left_out.clear()
        parts = data if len(data) == 1 else [] if data else _class_folders(listed, left_out)
        if parts:
            left_out += [entry.name for entry in listed if entry not in parts and entry.name not in left_out]
            return {"train": parts}
        inner = [entry for entry in folders if entry.name == "data"] or folders
        inner = [entry for entry in inner if not split_of(entry.name)]
        if not data and len(inner) == 1:  # as a hub's repository or an unpacked archive has it
            left_out += [entry.name for entry in listed if entry not in inner]
            return find_files(inner[0], f"{shown}/{inner[0].name}", left_out)
    names = enumerate_some([shorten(entry.name) for entry in listed], 8) or "nothing"
    ways = [f"{shorten(one.name)}: {OTHERS[one.suffix.lower()]}" for one in listed if one.suffix.lower() in OTHERS]
    raise DataError(
        f"DATASET={shown} is a folder without a train file (train with one of {known_endings()}); it holds {names}. "
        f"{ways[0] if ways else 'Rename a file, or name a file or folder in DATASET'}."
    )


def open_files(path: Path) -> dict[str, int]:
    """Open each file of the splits, and of a class's folder the first; how many files and folders each split has.

    Raises:
        DataError: as `find_files`, or one of them cannot be opened, or is empty.
    """
    splits = find_files(path, str(path), [])
    for part in chain.from_iterable(splits.values()):
        for file in _list(part, str(part))[:1] if part.is_dir() else [part]:
            try:
                with open_regular(file) as opened:
                    empty = not part.is_dir() and not opened.read(1)
            except (OSError, ValueError) as error:
                said = getattr(error, "strerror", None) or error
                raise DataError(f"{file} cannot be opened: {said}. Give this user the right to read it.") from error
            if empty:
                raise DataError(f"{file} is empty. Fill it, or take it away.")
            if not part.is_dir():
                file_type(file.name, str(file))
    return {split: len(parts) for split, parts in splits.items()}


def _list(path: Path, shown: str) -> list[Path]:
    """What a folder holds, sorted, without hidden files."""
    try:
        return sorted(entry for entry in path.iterdir() if not is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}") from error


def _stem(name: str) -> str:
    return name.split(".")[0].casefold()


def _base(stem: str) -> str:
    match = PART.fullmatch(stem)
    return match[1] if match else stem


def split_of(name: str) -> str | None:
    """The split that a file, folder or split of the hub is or belongs to, by its name."""
    return STEMS.get(_base(_stem(name)))


def _parts(entry: Path, shown: str, left_out: list[str]) -> list[Path]:
    """The files of data that a split's file or folder is made of, or its folders of texts; empty if it has none."""
    if entry.is_file():
        return [entry] if is_data(entry.name) else []
    listed = _list(entry, shown)
    data = [file for file in listed if file.is_file() and is_data(file.name)]
    parts = data or _class_folders(listed, left_out)
    left_out += [f"{entry.name}/{one.name}" for one in listed if parts and not _is_read(one, parts)]
    return parts


def _is_read(entry: Path, parts: list[Path]) -> bool:
    """Whether an entry of a folder is one of its parts, or only describes them."""
    return entry in parts or entry.name in DESCRIPTIONS


def _class_folders(listed: Sequence[Path], left_out: list[str]) -> list[Path]:
    """The folders that hold the texts of one class each; empty if there are not two."""
    held = {
        entry: _list(entry, entry.name)
        for entry in listed
        if entry.is_dir() and entry.name.casefold() not in UNLABELLED
    }
    folders = [entry for entry, files in held.items() if any(file.is_file() and is_text(file.name) for file in files)]
    if len(folders) < 2:
        return []
    left_out += [f"{one.name}/{file.name}" for one in folders for file in held[one] if not is_text(file.name)]
    return folders
