"""What a job is about to do, in some lines of the log: they show a wrong variable before the training has begun."""

import os

import tuneserve
from tuneserve.errors import StoreError
from tuneserve.hardware import cpu_quota
from tuneserve.lifecycle.store import Store
from tuneserve.redaction import redact_url
from tuneserve.settings import Settings


def summarize(settings: Settings, verb: str, *, threads: int) -> list[str]:
    """The job in lines of a name and a sentence each; what is found out later, such as the device, is said then.

    Args:
        settings: of the job.
        verb: of `run.py`.
        threads: CPU threads to compute with.
    """
    trains, serves = verb in ("train", "train-serve"), verb in ("serve", "train-serve")
    lines = [f"tuneserve {tuneserve.__version__}: {verb}"]
    lines.append(f"machine: DEVICE={settings.device}, {threads} threads on {cpu_quota():g} of {os.cpu_count()} cores")
    if trains:
        lines.append(f"data: {redact_url(settings.dataset)}; a cache in {settings.data_path}")
        body = "whole" if settings.train_body else "its head alone (TRAIN_BODY=0)"
        lines.append(f"base model: {redact_url(settings.base_model)}, {body}")
        lines.append(
            f"training: {settings.n_epochs} epochs in batches of {settings.batch_size}, LR={settings.lr:g}, "
            f"SEED={settings.seed}"
        )
    lines.append(f"store: {settings.model_path}, {_say_store(Store(settings.model_path))}")
    if trains and serves:
        again = [f"at {settings.retrain_schedule!r}"] if settings.retrain_schedule else []
        again += ["on drift"] if settings.retrain_on_drift else []
        lines.append(f"later trainings: {' and '.join(['when asked (POST /retrain)', *again])}")
    if serves:
        texts = "with" if settings.keep_texts else "without"
        lines.append(f"feedback: answers are remembered, {texts} their texts")
        guarded = "is set" if settings.api_key.get_secret_value() else "is not set"
        lines.append(f"serving: http://{settings.host}:{settings.port} (page at /, API at /docs); API_KEY {guarded}")
    return lines


def _say_store(store: Store) -> str:
    """What is in a store."""
    try:
        champion = store.champion_id()
    except StoreError as error:
        return f"which has a fault: {error}"
    if champion is None:
        return "which has no model yet"
    count = len(store.versions())
    return f"{count} version{'s' * (count != 1)}, of which {champion} answers"
