"""What a folder is that a server of many models is given, and how it becomes a model.

DATA_PATH/served/<hash>/     the store into which a Hugging Face model was imported, by its content
DATA_PATH/unpacked/<hash>/   what an archive held, by its content
"""

import hashlib
import json
import logging
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneserve.archives import find_program, unpack
from tuneserve.artifact import METADATA, Version, read_version, sha256_of
from tuneserve.code import code_hash
from tuneserve.errors import BaseModelError, LeavingError, NotFoundError, StoreError
from tuneserve.files import read_json
from tuneserve.lifecycle.status import read_status
from tuneserve.lifecycle.store import Store
from tuneserve.serving.model import Model
from tuneserve.serving.registry import size_of
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import TASKS, load_model
from tuneserve.tasks.handler import Handler
from tuneserve.tasks.heads import Bodies

logger = logging.getLogger(__name__)

ARCHIVE = ".tar.gz"
PROCESS = 14 << 20
"""Bytes of memory of an interpreter that waits for a model's own code (measured with Python 3.11)."""

ARCHITECTURES = {
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "summarization",
}
"""Ends of the names of architectures, and the task that each is for."""


class Sources:
    """Makes models of folders.

    Args:
        settings: of the server.
        threads: CPU threads to compute with.
        importing: the command that makes a version of a model trained elsewhere: run.py import.
        environ: its environment variables, and those of code that models bring.
    """

    def __init__(
        self, settings: Settings, *, threads: int, importing: Sequence[str], environ: Mapping[str, str]
    ) -> None:
        self._settings, self._threads, self._importing = settings, threads, importing
        self._environ = {name: value for name, value in environ.items() if name not in ("MODEL", "MODELS", "HF_TASK")}
        self._bodies = Bodies(settings, threads=threads)
        self._read: dict[Path, Version] = {}  # between `size` and `open`
        self._turn, self._unpacking = threading.Lock(), threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._known: dict[tuple[tuple[str, int, int], ...], str] = {}

    def find(self, name: str) -> Path:
        """What is in MODELS under this name: a folder, or an archive, the end of whose name may be left out.

        Raises:
            NotFoundError: nothing is.
        """
        root = Path(self._settings.models).expanduser().absolute()
        if name and not name.startswith(".") and "/" not in name and "\0" not in name and len(name) < 200:
            for path in (root / name, root / f"{name}{ARCHIVE}"):
                if path.is_dir() or (path.name.endswith(ARCHIVE) and path.is_file()):
                    return path
        raise NotFoundError(f"There is no model {name[:200]!r} here.")

    def prepare(self, path: Path) -> Path:
        """A version's folder, or one with code of its own; made now, or before.

        Raises:
            NotFoundError: there is nothing at this path.
            ArchiveError: it is an archive that cannot be unpacked.
            StoreError: it holds no model.
            BaseModelError: it is one for no task that is known, or cannot be made a version.
        """
        if path.is_file():
            folder = self._settings.data_path / "unpacked" / sha256_of(path)[:16]
            with self._unpacking:
                if not folder.is_dir():
                    unpack(path, folder)
            path = folder
        if not path.is_dir():
            raise NotFoundError(f"There is no folder {path}.")
        if (path / METADATA).is_file() or self._program(path) is not None:
            return path
        if not (path / "config.json").is_file():
            raise StoreError(f"{path} holds no model: it has neither {METADATA} nor config.json nor code/inference.py.")
        return self._import(path, self._task_of(path)).folder

    def size(self, folder: Path) -> int:
        """Bytes of the files that `open` will read; of a version on a body that is loaded already, those of its head.

        A model with code of its own takes a process, too.

        Raises:
            StoreError: its metadata cannot be read.
        """
        size = None
        if (folder / METADATA).is_file():
            version = self._read[folder] = read_version(folder)
            size = self._bodies.size(version)
        elif self._program(folder) is not None:
            size = size_of(folder) + PROCESS
        return size_of(folder) if size is None else size

    def open(self, folder: Path, name: str) -> Model:
        """The model in a folder that `prepare` has returned, loaded and warm.

        Raises:
            HandlerError: the code that it brings cannot be loaded.
            StoreError: the files are damaged, or it does not answer as it did when it was saved.
            DeviceError: the device asked for cannot be had.
        """
        model: Model
        if (program := self._program(folder)) is None:
            version = self._read.pop(folder, None) or read_version(folder)
            model = self._bodies.open(version) or load_model(version, self._settings, threads=self._threads)
        else:
            task = self._settings.task if "task" in self._settings.model_fields_set else ""
            timeout_s = self._settings.request_timeout_s
            options: dict[str, Any] = {"task": task, "threads": self._threads, "timeout_s": timeout_s}
            model = Handler(folder, name=name, program=program, environ=self._environ, **options)
        try:
            if isinstance(model, Handler):
                model.wait()
            model.warm_up()
        except BaseException:
            model.close()
            raise
        return model

    def close(self) -> None:
        """End an import that runs, and begin no other."""
        self._closed = True
        if (child := self._child) is not None:
            child.kill()

    def _program(self, folder: Path) -> Path | None:
        """The code that a model brings; a version brings none."""
        if (folder / METADATA).is_file():
            return None
        return find_program(folder, self._environ.get("SAGEMAKER_PROGRAM") or "inference.py")

    def _task_of(self, folder: Path) -> str:
        if "task" in self._settings.model_fields_set:
            return self._settings.task
        try:
            config = read_json(folder / "config.json")
            architecture = str(config["architectures"][0])
        except (OSError, ValueError, LookupError, TypeError):
            architecture = ""
        task = next((task for end, task in ARCHITECTURES.items() if architecture.endswith(end)), "")
        if task not in TASKS:
            raise BaseModelError(
                f"{folder} has the architecture {architecture[:100]!r}, "
                + (f"which is for {task}; " if task else "which does not say what it is for; ")
                + f"this server knows {', '.join(TASKS)}. TASK says which is meant."
            )
        return task

    def _import(self, folder: Path, task: str) -> Version:
        """The version of a Hugging Face model, made by a child process unless it is there; one at a time."""
        store = Store(self._settings.data_path / "served" / self._key(folder, task))
        with self._turn:
            if store.champion_id() is None:
                logger.info("importing %s for %s", folder, task)
                environ = {**self._environ, "MODEL_PATH": str(store.root), "TASK": task}
                if self._closed:
                    raise LeavingError
                # The kernel ends the child when the thread that started it ends, so this thread waits.
                self._child = subprocess.Popen([*self._importing, str(folder), "--child"], env=environ)
                code = self._child.wait()
                self._child = None
                if code != 0:
                    said = read_status(store.status_file).get("reason") or f"its import ended with exit code {code}"
                    raise BaseModelError(str(said))
        return store.champion()

    def _key(self, folder: Path, task: str) -> str:
        """The hash of all that makes a version of this folder; its files are read again only when they have changed."""
        files = sorted(path for path in folder.iterdir() if path.is_file())
        looks = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        if looks not in self._known:
            self._known[looks] = hashlib.sha256(
                json.dumps([(path.name, sha256_of(path)) for path in files]).encode()
            ).hexdigest()
        used = {name: self._settings.public()[name] for name in ("num_max_positions", "precision")}
        content = [self._known[looks], task, used, code_hash("text.py", "training", "network")]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
