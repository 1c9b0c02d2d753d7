"""What a folder is that a server of many models is given, and how it becomes a model.

DATA_PATH/served/<hash>/     the store into which a Hugging Face model was imported, by its content
DATA_PATH/unpacked/<hash>/   what an archive held, by its content
"""

import hashlib
import json
import logging
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tuneserve.artifact import METADATA, Version, read_version, sha256_of
from tuneserve.code import code_hash
from tuneserve.errors import BaseModelError, LeavingError, NotFoundError, StoreError
from tuneserve.files import new_folder, read_json
from tuneserve.lifecycle.status import read_status
from tuneserve.lifecycle.store import Store
from tuneserve.serving.model import Model
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import TASKS, load_model

logger = logging.getLogger(__name__)

ARCHIVE = ".tar.gz"

ARCHITECTURES = {
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "summarization",
}
"""Ends of the names of architectures, and the task that each is for."""


def no_archives(archive: Path, folder: Path) -> None:
    """Refuse an archive."""
    raise StoreError(f"{archive.name} is an archive; unpack it into a folder of its own.")


class Sources:
    """Makes models of folders.

    Args:
        settings: of the server.
        threads: CPU threads to compute with.
        importing: the command that makes a version of a model trained elsewhere: run.py import.
        environ: its environment variables.
        unpack: fills a new folder with what an archive holds.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        threads: int,
        importing: Sequence[str],
        environ: Mapping[str, str],
        unpack: Callable[[Path, Path], None] = no_archives,
    ) -> None:
        self._settings, self._threads, self._importing, self._unpack = settings, threads, importing, unpack
        self._environ = {name: value for name, value in environ.items() if name not in ("MODEL", "MODELS", "HF_TASK")}
        self._turn = threading.Lock()
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
            StoreError: it holds no model.
            BaseModelError: it is one for no task that is known, or cannot be made a version.
        """
        if path.is_file():
            folder = self._settings.data_path / "unpacked" / sha256_of(path)[:16]
            if not folder.is_dir():
                with new_folder(folder) as temporary:
                    self._unpack(path, temporary)
            path = folder
        if not path.is_dir():
            raise NotFoundError(f"There is no folder {path}.")
        if (path / METADATA).is_file():
            return path
        if not (path / "config.json").is_file():
            raise StoreError(f"{path} holds no model: it has neither {METADATA} nor config.json.")
        return self._import(path, self._task_of(path)).folder

    def open(self, folder: Path) -> Model:
        """The model in a folder that `prepare` has returned, loaded and warm.

        Raises:
            StoreError: the files are damaged, or it does not answer as it did when it was saved.
            DeviceError: the device asked for cannot be had.
        """
        model = load_model(read_version(folder), self._settings, threads=self._threads)
        try:
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
