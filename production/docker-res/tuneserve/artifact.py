"""A version's folder: a Hugging Face model and `metadata.json`, written atomically.

<version>/config.json, model.safetensors, tokenizer.json, tokenizer_config.json
<version>/engine/        the exported graph, if there is one
<version>/golden.json    a few texts and the answers that the model gave when it was saved
<version>/golden-int8.json   those of the int8 graph, if there is one
<version>/head.safetensors   the head alone, where the body was frozen: others on the same body may share it
<version>/drift.json     five figures of its answer to each held-out text, and no text
<version>/report/        the test in full
<version>/metadata.json  written last: a folder without it is not a version
"""

import hashlib
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tuneserve.errors import StoreError
from tuneserve.files import as_record, new_folder, open_regular, read_json, read_record, write_json
from tuneserve.redaction import redact_url

logger = logging.getLogger(__name__)

METADATA = "metadata.json"
GOLDEN = "golden.json"
GOLDEN_INT8 = "golden-int8.json"
HEAD = "head.safetensors"
REPORT_LOSSES = "report/losses.json"
UNFINISHED = ".unfinished-"
NEVER_ANSWER = ("report/", "drift.json")
"""Files that are looked into and that no answer depends on, by the beginnings of their names."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A part of `metadata.json`: what is read of it has these types, and it may have more."""

    model_config = ConfigDict(strict=True, extra="allow")


class UsedSettings(Part):
    """The settings that loading needs."""

    num_max_positions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


class Figures(Part):
    """The figures of a split."""

    accuracy: Share | None = None


class Findings(Part):
    """What is known of the data."""

    counts: dict[str, dict[str, Count]] = {}


class Quantized(Part):
    """Whether the int8 graph may serve."""

    accepted: bool
    reason: str = ""


class Exported(Part):
    """The graphs."""

    int8: Quantized | None = None


class Body(Part):
    """The frozen body that a version's head reads."""

    sha256: str


class Abstention(Part):
    """Which answers are withheld."""

    max_error: Share
    threshold: Share | None = None


class Metadata(Part):
    """What the store and the engines read of `metadata.json`."""

    labels: list[str]
    task: str = ""
    fingerprint: str = ""
    created_at: str = ""
    settings: UsedSettings | None = None
    metrics: dict[str, Figures] = {}
    data: Findings | None = None
    engine: Exported | None = None
    body: Body | None = None
    abstention: Abstention | None = None
    files: dict[str, Count] = {}
    sha256: dict[str, str] = {}


METADATA_SHAPE = TypeAdapter(Metadata)

MAY_HOLD_URLS = ("settings", "data", "base_model")
"""Parts of the metadata; earlier releases wrote passwords and signatures there too, which nobody reads any more."""


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

    @property
    def max_tokens(self) -> int:
        """Tokens that it reads of a text.

        Raises:
            StoreError: its metadata does not say.
        """
        found = (self.metadata.get("settings") or {}).get("num_max_positions")
        if not isinstance(found, int):
            raise StoreError(f"{self.folder / METADATA} does not say settings.num_max_positions.")
        return found

    @property
    def threshold(self) -> float | None:
        """The confidence below which its answers abstain; None if none does, infinite if all do.

        All do where MAX_ERROR was asked for and could not be promised.
        """
        if (said := self.metadata.get("abstention")) is None:
            return None
        return math.inf if said.get("threshold") is None else float(said["threshold"])


@dataclass(frozen=True)
class Golden:
    """Texts, and the probability of each label that a version gave them when it was saved, or that an export gave."""

    texts: list[str]
    scores: list[dict[str, float]]


class Pair(Part):
    """A golden text and its answer."""

    text: str
    scores: dict[str, float]


PAIRS = TypeAdapter(list[Pair])


def read_golden(version: Version, name: str = GOLDEN) -> Golden:
    """The answers that a version must reproduce before it serves.

    Raises:
        StoreError: the file is missing or damaged.
    """
    path = version.folder / name
    try:
        content = read_record(path, PAIRS)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if not content or any(set(one.scores) != set(version.labels) for one in content):
        raise StoreError(f"{path} cannot be read: it should have texts, with a score for each label.")
    return Golden([one.text for one in content], [one.scores for one in content])


class Embedded(Part):
    """A golden text and its vector."""

    text: str
    vector: Annotated[list[float], Field(min_length=1)]


VECTORS = TypeAdapter(Annotated[list[Embedded], Field(min_length=1)])


def read_golden_vectors(version: Version) -> tuple[list[str], list[list[float]]]:
    """Golden texts and their vectors, of a version that embeds; see `read_golden`."""
    path = version.folder / GOLDEN
    try:
        content = read_record(path, VECTORS)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    return [one.text for one in content], [one.vector for one in content]


def write_golden_vectors(folder: Path, texts: Sequence[str], vectors: Sequence[Sequence[float]]) -> None:
    """Write them into a version's folder."""
    pairs = zip(texts, vectors, strict=True)
    write_json(folder / GOLDEN, [{"text": text, "vector": list(vector)} for text, vector in pairs])


class Written(Part):
    """A golden prompt, and the ids that were written on it."""

    text: str
    ids: Annotated[list[int], Field(min_length=1)]


WRITINGS = TypeAdapter(Annotated[list[Written], Field(min_length=1)])


def read_golden_writings(version: Version) -> list[tuple[str, list[int]]]:
    """Golden prompts and what was written on them, of a version that writes; see `read_golden`."""
    path = version.folder / GOLDEN
    try:
        content = read_record(path, WRITINGS)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    return [(one.text, one.ids) for one in content]


def write_golden_writings(folder: Path, writings: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Write them into a version's folder."""
    write_json(folder / GOLDEN, [{"text": text, "ids": list(ids)} for text, ids in writings])


def write_golden(folder: Path, golden: Golden, name: str = GOLDEN) -> None:
    """Write it into a version's folder."""
    pairs = zip(golden.texts, golden.scores, strict=True)
    write_json(folder / name, [{"text": text, "scores": scores} for text, scores in pairs])


def describe_files(folder: Path) -> dict[str, Any]:
    """What metadata say of a version's files: the sizes of all, and the SHA-256 of those that answer."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        "files": {name: path.stat().st_size for name, path in files.items()},
        "sha256": {name: sha256_of(path) for name, path in files.items() if not name.startswith(NEVER_ANSWER)},
    }


def sha256_of(path: Path) -> str:
    """The hash of a file, which is not held in memory.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(version: Version) -> bool:
    """Whether the files that answer are those that were written."""
    return damage(version) is None


def damage(version: Version, names: Collection[str] | None = None) -> str | None:
    """What is wrong with the first file that answers and is not as it was written; None if all are.

    Versions from before the hashes are checked by the sizes of these files.

    Args:
        version: to look at.
        names: of files that alone are looked at; None for all.
    """
    sizes = {name: size for name, size in version.metadata.get("files", {}).items() if _answers(name)}
    hashes: dict[str, str] = version.metadata.get("sha256", {})
    if names is not None:
        sizes, hashes = ({name: of[name] for name in names if name in of} for of in (sizes, hashes))
    if not hashes and sizes:
        logger.info("version %s was saved without hashes; its files are checked by their sizes", version.id)
    for name in sizes | hashes:
        try:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                return f"{METADATA} names a file outside of its folder, {name!r}"
            with open_regular(version.folder / name) as file:
                if name in sizes and file.seek(0, 2) != sizes[name]:
                    return f"{name} is not as large as when it was saved"
        except (OSError, ValueError) as error:
            return f"{name} is missing or cannot be read ({getattr(error, 'strerror', None) or error})"
    for name, wanted in hashes.items():  # after all sizes, which take no time
        try:
            if sha256_of(version.folder / name) != wanted:
                return f"{name} is not what was saved: its SHA-256 differs"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
    return None


def _answers(name: str) -> bool:
    return not name.startswith(NEVER_ANSWER)


def require_whole(version: Version, names: Collection[str] | None = None) -> None:
    """Make sure that the files that answer, or those of these names, are those that were written.

    Raises:
        StoreError: one is not.
    """
    if wrong := damage(version, names):
        raise StoreError(
            f"version {version.id} is damaged: {wrong}. Restore the file, or choose another version: run.py versions."
        )


def read_version(folder: Path) -> Version:
    """Open a finished version.

    Raises:
        StoreError: the folder is no finished version, or its metadata cannot be read.
    """
    path = folder / METADATA
    try:
        metadata = read_json(path)
    except FileNotFoundError:
        raise StoreError(f"{folder} holds no finished model: there is no {METADATA} in it.") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    try:
        as_record(metadata, METADATA_SHAPE)
    except ValueError as error:
        raise StoreError(f"{path} is no version's metadata: {error}") from error
    for part in MAY_HOLD_URLS:
        if isinstance(found := metadata.get(part), dict):
            metadata[part] = {name: redact_url(one) if isinstance(one, str) else one for name, one in found.items()}
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
        # Were the store's disk gone, a folder of versions made anew would be taken for a new store.
        with new_folder(folder, prefix=UNFINISHED, parents=False) as temporary:
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
