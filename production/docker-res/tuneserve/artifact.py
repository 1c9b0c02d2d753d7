"""A version's folder: a Hugging Face model and `metadata.json`, written atomically.

<version>/config.json, model.safetensors, tokenizer.json, tokenizer_config.json
<version>/engine/        the exported graph, if there is one
<version>/golden.json    a few texts and the answers that the model gave when it was saved
<version>/golden-int8.json   those of the int8 graph, if there is one
<version>/drift.json     five figures of its answer to each held-out text, and no text
<version>/report/        the test in full
<version>/metadata.json  written last: a folder without it is not a version
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneserve.errors import StoreError
from tuneserve.files import new_folder, write_json

METADATA = "metadata.json"
GOLDEN = "golden.json"
GOLDEN_INT8 = "golden-int8.json"
UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Version:
    """One finished model on disk."""

    folder: Path
    metadata: dict[str, Any]

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def labels(self) -> list[str]:
        """Label names; a label's index is its id in the model."""
        return list(self.metadata["labels"])


@dataclass(frozen=True)
class Golden:
    """Texts, and the probability of each label that a version gave them when it was saved, or that an export gave."""

    texts: list[str]
    scores: list[dict[str, float]]


def read_golden(version: Version, name: str = GOLDEN) -> Golden:
    """The answers that a version must reproduce before it serves.

    Raises:
        StoreError: the file is missing or damaged.
    """
    path = version.folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Golden([one["text"] for one in content], [one["scores"] for one in content])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read: {error!r}") from error


def write_golden(folder: Path, golden: Golden, name: str = GOLDEN) -> None:
    """Write it into a version's folder."""
    pairs = zip(golden.texts, golden.scores, strict=True)
    write_json(folder / name, [{"text": text, "scores": scores} for text, scores in pairs])


def is_whole(version: Version) -> bool:
    """Whether the files needed to answer exist in the size in which they were written."""
    return torn_file(version) is None


def torn_file(version: Version) -> str | None:
    """The first file that is missing or differs in size from what was written."""
    for name, size in version.metadata.get("files", {}).items():
        path = version.folder / name
        if not path.is_file() or path.stat().st_size != size:
            return str(name)
    return None


def read_version(folder: Path) -> Version:
    """Open a finished version.

    Raises:
        StoreError: the folder is no finished version, or its metadata cannot be read.
    """
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{folder} holds no finished model: there is no {METADATA} in it.") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder / METADATA} cannot be read: {error}") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("labels"), list):
        raise StoreError(f"{folder / METADATA} is no version's metadata: it has no labels.")
    return Version(folder, metadata)


@contextmanager
def new_version(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name after the block, once it is on disk.

    The block writes the files, `metadata.json` last. If the process dies before, readers ignore what it leaves, and
    the store removes it later.

    Raises:
        StoreError: the disk refuses (full, read-only, gone).
    """
    try:
        with new_folder(folder, prefix=UNFINISHED) as temporary:
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:  # readable for other users, who may serve them
                path.chmod(0o755 if path.is_dir() else 0o644)
    except Exception as error:
        if is_disk_error(error):
            raise StoreError(f"The model cannot be written to {folder}: {error}") from error
        raise


def is_disk_error(error: Exception) -> bool:
    """Whether an error is the disk's; libraries written in Rust raise exceptions of their own for it."""
    return isinstance(error, OSError) or "(os error " in str(error)
