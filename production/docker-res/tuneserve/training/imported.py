"""A model that was trained elsewhere made a version of the store, without training: `run.py import MODEL`."""

import hashlib
import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tuneserve.artifact import METADATA, Version, new_version, read_version, require_whole
from tuneserve.code import code_hash
from tuneserve.errors import BaseModelError, DataError
from tuneserve.files import in_use, new_folder
from tuneserve.lifecycle.decision import DECISION, Decision, read_decision, write_decision
from tuneserve.lifecycle.status import Status, hold
from tuneserve.lifecycle.store import Store
from tuneserve.logs import in_one_line
from tuneserve.network import head
from tuneserve.settings import SAMPLE, Settings
from tuneserve.training import base_model, embedding, job, writing
from tuneserve.training.exporters import choose_exporters
from tuneserve.training.labels import name_labels
from tuneserve.training.model import rehearse
from tuneserve.training.publication import publish

logger = logging.getLogger(__name__)

COPIED = {".json", ".txt", ".model"}
"""Endings of what belongs to a model besides its weights."""


def bring_in(name: str, settings: Settings, *, threads: int) -> Version:
    """Publish a model, by its Hugging Face folder or its name on the hub, for the task that TASK names.

    A version of another store is taken over as it is; any other model becomes one.

    Raises:
        BaseModelError: it is nowhere, or cannot be loaded for this task.
        TuneserveError: see `_bring_in_classifier` and `_take_over`.
    """
    if (folder := Path(name).expanduser()).joinpath(METADATA).is_file():
        return _take_over(read_version(folder.resolve()), settings)
    name = str(_unpickled(Path(name).expanduser(), settings.data_path / "unpickled") or name)
    settings = settings.model_copy(update={"base_model": name, "base_model_revision": settings.model_revision})
    if settings.task == "text-classification":
        return _bring_in_classifier(settings, threads=threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    store = Store(settings.model_path)
    store.prepare()
    with hold(store.lock) as lock, Status(store.status_file) as status:
        champion = store.champion() if store.champion_id() is not None else None
        if champion is not None and champion.metadata.get("task", "text-classification") != settings.task:
            raise DataError(f"{store.root} has a champion for another task; give {settings.task} another MODEL_PATH.")
        base = base_model.resolve(name, revision=settings.model_revision, cache=settings.data_path, variable="MODEL")
        publish_it = embedding.publish if settings.task == "feature-extraction" else writing.publish
        version = publish_it(base, settings, store, threads=threads)
        lock.require()
        if champion is None or champion.id != version.id:
            _accept(store, version, status, "imported by hand; nothing tests it but its own answers")
        return version


def _take_over(given: Version, settings: Settings) -> Version:
    """Copy a version of another store: with its calibration, graphs, golden answers and report.

    It is the champion where there is none; else it waits to be promoted.

    Raises:
        StoreError: it is damaged, or cannot be written.
        BaseModelError: it is for another task.
    """
    require_whole(given)
    if (task := given.metadata.get("task") or "text-classification") != settings.task:
        raise BaseModelError(f"{given.folder} is for TASK={task}, and TASK={settings.task} is asked for.")
    store = Store(settings.model_path)
    store.prepare()
    with hold(store.lock) as lock:
        version = store.find(given.metadata.get("fingerprint") or given.id)
        if version is None:
            folder = store.free_folder(given.id)
            with new_version(folder) as temporary:
                shutil.copytree(given.folder, temporary, ignore=_not_taken_over, dirs_exist_ok=True)
            version = read_version(folder)
        lock.require()
        if store.champion_id() is None:
            with Status(store.status_file) as status:
                _accept(store, version, status, "imported with its files, which are those of the store it comes from")
        elif store.champion_id() != version.id:
            logger.warning("version %s is in the store now: `run.py promote %s` lets it answer", version.id, version.id)
    return version


def _unpickled(folder: Path, cache: Path) -> Path | None:
    """A copy, with safetensors, of a model's folder that has a `pytorch_model.bin` only; None if it is no such folder.

    torch reads tensors out of it and nothing else, and runs nothing; this process ends when the model is imported.

    Raises:
        BaseModelError: it holds anything but tensors, or cannot be read.
    """
    try:
        pickles = sorted(folder.glob("pytorch_model*.bin"))
        if not pickles or any(folder.glob("*.safetensors")):
            return None
        known = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.suffix in COPIED or path in pickles):
            with path.open("rb") as file:
                known.update(f"{path.relative_to(folder)} ".encode() + hashlib.file_digest(file, "sha256").digest())
        found = cache / known.hexdigest()[:16]
        if found.is_dir():
            return found
        weights: dict[str, torch.Tensor] = {}
        for path in pickles:
            weights.update(torch.load(path, map_location="cpu", weights_only=True))
        with in_use(cache, "."), new_folder(found, overwrite=True) as temporary:
            shutil.copytree(folder, temporary, dirs_exist_ok=True, ignore=_not_copied)
            # Each tensor by itself: tied ones share memory, which safetensors does not have.
            whole = {name: one.clone().contiguous() for name, one in weights.items()}
            save_file(whole, temporary / "model.safetensors", metadata={"format": "pt"})
    except OSError as error:
        raise BaseModelError(f"{folder} cannot be read, or {cache} not be written: {in_one_line(error)}") from error
    except Exception as error:  # torch, pickle and zipfile raise whatever met them in a file of another kind
        raise BaseModelError(
            f"{folder}: pytorch_model.bin is damaged or holds more than tensors, and is not read. If you trust it, "
            f"save it as safetensors: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW). ({in_one_line(error)})"
        ) from error
    logger.info("%s: the weights of pytorch_model.bin, as safetensors, are in %s", folder, found)
    return found


def _not_taken_over(folder: str, names: list[str]) -> list[str]:
    """What is hidden, or another store's word on the version."""
    return [one for one in names if one.startswith(".") or one == DECISION]


def _not_copied(folder: str, names: list[str]) -> list[str]:
    return [one for one in names if not Path(folder, one).is_dir() and Path(one).suffix not in COPIED]


def _accept(store: Store, version: Version, status: Status, sentence: str) -> None:
    before = read_decision(version)
    decision = Decision(version.id, "accepted", "gate", sentence, None)
    write_decision(version, decision)
    store.set_champion(version)
    status.decided(decision, before=before)
    logger.warning("version %s is the champion: %s", version.id, sentence)


def _bring_in_classifier(settings: Settings, *, threads: int) -> Version:
    """Publish the classifier that BASE_MODEL names, and let the gate judge it on DATASET's test texts.

    Into a store without a champion it comes also where DATASET has other labels than the model: then nothing tests it
    but its own answers.

    Raises:
        BaseModelError: it is no classifier that can be loaded.
        DataError: there is a champion to compare with, and DATASET has other labels.
        TuneserveError: as `job.train`.
    """
    began = time.perf_counter()
    settings = settings.model_copy(update={"processes": 1})
    exporters = choose_exporters(settings)
    device, precision = job.prepare_device(settings, threads)
    store = Store(settings.model_path)
    store.prepare()
    with hold(store.lock) as lock, Status(store.status_file) as status:
        base, splits = job.gather(settings)
        model, labels = load_classifier(base.folder, device)
        tokenizer, tokens = job.read_tokens(settings, base, splits)
        tokens.setdefault("valid", tokens["train"])  # of few texts none is held out, and it has learned from none
        tested = set(splits.labels) <= set(labels)
        if not tested and (store.champion_id() is not None or settings.dataset != SAMPLE):
            raise DataError(
                f"DATASET has the labels {name_labels(splits.labels)} and the model in {base.folder} has "
                f"{name_labels(labels)}: name texts with the model's labels, to test it with."
            )
        ids = np.array([labels.index(label) for label in splits.labels] if tested else [0] * len(splits.labels))
        tokens = {name: replace(one, label_ids=ids[one.label_ids]) for name, one in tokens.items()}
        rehearse(model, tokens, max_tokens=settings.num_max_positions)
        content = [base.content, splits.fingerprints, settings.num_max_positions, [one.name for one in exporters]]
        content += [settings.max_error] if settings.max_error else []
        code = code_hash("text.py", "training", "network")
        fingerprint = hashlib.sha256(json.dumps(["imported", code, *content]).encode()).hexdigest()
        version = store.find(fingerprint)
        if version is None:
            data = job.describe_data(settings, splits, tokens) if tested else {"dataset": ""}
            metadata = {
                "fingerprint": fingerprint,
                "labels": labels,
                "settings": settings.public(),
                "base_model": base.record(),
                "data": data,
                "device": device.type,
                "precision": precision,
                "imported": True,
            }
            version = publish(
                store,
                model,
                tokenizer,
                tokens,
                metadata,
                precision=precision,
                exporters=exporters,
                began=began,
                temperature=1.0,
                tested=tested,
            )
        if tested:
            job.judge(settings, store, version, splits, lock, status)
        else:
            said = "imported into a store without a champion; DATASET has other labels, so that nothing tested it"
            _accept(store, version, status, said)
        return version


def load_classifier(folder: Path, device: torch.device) -> tuple[PreTrainedModel, list[str]]:
    """The fine-tuned model in fp32 on the device, and its label names by id.

    Raises:
        BaseModelError: it cannot be loaded, or some of its weights would have to be made up.
    """
    try:
        model, found = head.NETWORK.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        model = model.to(device).eval()
        names = dict(model.config.id2label)
        labels = [str(names[index]).strip() for index in range(int(model.config.num_labels))]
    except Exception as error:  # transformers raises whatever met it in files of another kind
        raise BaseModelError(f"{folder} cannot be loaded as a classifier: {in_one_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise BaseModelError(
            f"{folder} is no fine-tuned classifier: it has no weights {', '.join(missing[:4])}. To fine-tune it, "
            "name it in BASE_MODEL and run `train`."
        )
    if len(set(labels)) < max(2, len(labels)):
        raise BaseModelError(f"{folder} should name two labels or more, all different, in id2label of config.json.")
    return model, labels
