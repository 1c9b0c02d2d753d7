"""What names a run, setting by setting; and settings that reach the place where they have their effect."""

import json
import logging
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from jobs import train
from torch.nn import functional

from tuneserve.network.forward import Padded, choose_forward
from tuneserve.settings import PROJECT, Settings
from tuneserve.training import base_model, exporters, job, loop, publication
from tuneserve.training.checkpoint import Checkpoints
from tuneserve.training.loop import Learner, Recipe, Run, fit
from tuneserve.training.tokens import collate

pytestmark = pytest.mark.usefixtures("brief")

DECIDE = {
    **{"LABELS": "merge", "MIN_CLASS_SIZE": "6", "RARE_LABELS": "drop", "NUM_TRAIN": "9", "NUM_TEST": "9"},
    **{"VALID_PCT": "0.2", "TEST_PCT": "0.2", "NUM_MAX_POSITIONS": "64", "TRAIN_BODY": "0", "N_EPOCHS": "4"},
    **{"BATCH_SIZE": "16", "LR": "1e-3", "DROPOUT": "0.1", "MAX_NORM": "2", "CLASS_WEIGHTS": "balanced"},
    **{"MIN_VALID": "0", "MIN_STEPS": "99", "LABEL_ISSUES": "drop"},
    **{"LABEL_SMOOTHING": "0.1", "PATIENCE": "1", "SELECT_BY": "loss", "SEED": "1", "PRECISION": "int8"},
    **{"MAX_ERROR": "0.02"},
}
"""Settings that make another run of the same texts and the same base model; `int8` saves one graph more."""
BY_CONTENT = {"DATASET": "/x.csv", "TEXT_COLUMN": "x", "LABEL_COLUMN": "x", "BASE_MODEL": "x", "USE_FEEDBACK": "0"}
BY_CONTENT |= {"BASE_MODEL_REVISION": "x"}
"""These count by what they bring, not by their names."""
SERVE = {
    **{"HOST": "::1", "PORT": "9", "API_KEY": "x", "API_KEY_GUARDS": "everything", "MAX_BODY_KB": "9"},
    **{"CORS_ORIGINS": "https://a.example", "MAX_BATCH_TEXTS": "9", "LONG_TEXT": "error", "MAX_BATCH_TOKENS": "9"},
    **{"MAX_QUEUE_TOKENS": "9", "REQUEST_TIMEOUT_S": "9", "LOG_FORMAT": "json", "ACCESS_LOG": "1"},
    **{"MIN_ACCURACY": "0.1", "MIN_RECALL": "0.1", "MAX_ACCURACY_DROP": "0.1", "MAX_LATENCY_INCREASE": "0.1"},
    **{"REPORT": "0", "KEEP_VERSIONS": "9", "KEEP_TEXTS": "1", "FEEDBACK_MAX_ROWS": "9", "FEEDBACK_MAX_MB": "9"},
    **{"RETRAIN_SCHEDULE": "0 3 * * 1", "RETRAIN_TIME_ZONE": "Europe/Berlin", "RETRAIN_JITTER_S": "9"},
    **{"RETRAIN_NICE": "9", "RETRAIN_THREADS": "9", "RETRAIN_GPU_FRACTION": "0.1", "RETRAIN_ON_DRIFT": "1"},
    **{"DRIFT_WINDOW": "99", "DRIFT_WINDOW_HOURS": "9", "SHADOW_REQUESTS": "9", "INPUT": "x", "OUTPUT": "x"},
    **{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "SHARD": "1", "SHARDS": "2", "CHECKPOINT_MINUTES": "9"},
    **{"DEVICE": "cpu", "OMP_NUM_THREADS": "9", "PROCESSES": "2", "MODEL_PATH": "/x", "DATA_PATH": "/x"},
    **{"TASK": "feature-extraction", "MODEL": "x", "MODEL_REVISION": "x", "MAX_NEW_TOKENS": "9", "NUM_BEAMS": "2"},
    **{"NO_REPEAT_NGRAM_SIZE": "2", "EARLY_STOPPING": "0", "MODELS": "x", "MEMORY_LIMIT": "1GiB"},
    **{"PINNED_MODELS": "x", "PLATFORM": "sagemaker", "MODEL_NAME": "x", "INFERENCE_REPLY": "ancestor"},
    **{"SERVERLESS_ROUTE": "/log"},
    **{"AIP_HTTP_PORT": "9", "AIP_HEALTH_ROUTE": "/x", "AIP_PREDICT_ROUTE": "/x"},
    **{"LOG_PATH": "/x", "MLFLOW_TRACKING_URI": "http://a", "MLFLOW_EXPERIMENT_NAME": "x"},
}
"""These change how it is computed, judged, served or told of, not what is learned."""


def fingerprint(**environ: str) -> str:
    settings = Settings.from_environ(environ)
    base = base_model.BaseModel("x", "folder", "", "x", "content", Path())
    splits: Any = SimpleNamespace(fingerprints={"train": "x"})
    return job.fingerprint_run(settings, base, splits, exporters.choose_exporters(settings))


@pytest.mark.parametrize("name", [field.upper() for field in Settings.model_fields])
def test_a_setting_changes_the_fingerprint_or_does_not(name: str) -> None:
    tables = [table for table in (DECIDE, BY_CONTENT, SERVE) if name in table]
    assert len(tables) == 1, f"say in one of the tables above whether {name} makes another run"
    key = {"API_KEY": "x"} if name == "API_KEY_GUARDS" else {}
    assert (fingerprint(**{name: tables[0][name]} | key) != fingerprint()) == (tables[0] is DECIDE)


@pytest.mark.parametrize("part", ["content", "fingerprints"])
def test_texts_and_base_model_change_the_fingerprint(part: str) -> None:
    base, splits = SimpleNamespace(content="a"), SimpleNamespace(fingerprints={"train": "a"})
    before = job.fingerprint_run(Settings(), cast(Any, base), cast(Any, splits), [])
    setattr(base if part == "content" else splits, part, "b")
    assert job.fingerprint_run(Settings(), cast(Any, base), cast(Any, splits), []) != before


RECIPE = {
    "N_EPOCHS": ("epochs", 7),
    "BATCH_SIZE": ("batch_size", 7),
    "LR": ("learning_rate", 0.5),
    "MAX_NORM": ("max_norm", 7.0),
    "SEED": ("seed", 7),
    "LABEL_SMOOTHING": ("label_smoothing", 0.5),
    "PATIENCE": ("patience", 7),
    "SELECT_BY": ("select_by", "loss"),
}


@pytest.mark.parametrize("name", sorted(RECIPE))
def test_a_setting_reaches_the_recipe(name: str) -> None:
    field, value = RECIPE[name]
    recipe = job.choose_recipe(
        Settings.from_environ({"MIN_STEPS": "0", name: str(value)}), tiny.make_split([5, 6]), ["a", "b"]
    )
    assert getattr(recipe, field) == value


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing_is_in_the_loss_that_is_learned_from(smoothing: float) -> None:
    model, split = tiny.make_classifier(), tiny.make_split([5, 9, 7])
    recipe = Recipe(1, 3, 1e-3, 1.0, 0, label_smoothing=smoothing)
    batch = collate(split, range(3), torch.device("cpu"))
    found, seen = Learner(Padded(model), recipe, torch.device("cpu"))(batch, 3)
    logits = Padded(model)(batch).detach()
    assert torch.equal(seen, logits)
    assert float(found) == pytest.approx(
        float(functional.cross_entropy(logits, batch.label_ids, label_smoothing=smoothing)), rel=1e-5
    )
    assert float(found) != pytest.approx(
        float(functional.cross_entropy(logits, batch.label_ids, label_smoothing=0.9)), rel=1e-3
    )


def test_every_epoch_takes_all_texts_in_an_order_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[int]] = []
    of = loop.Gradient.of

    def noted(self: Any, rows: Any, step: int) -> Any:
        taken.append(rows.tolist())
        return of(self, rows, step)

    monkeypatch.setattr(loop.Gradient, "of", noted)
    orders: dict[int, Any] = {}
    for seed in (1, 1, 2):
        taken.clear()
        model, split = tiny.make_classifier(), tiny.make_split([5, 9, 7, 6, 8, 4, 5, 11] * 4)
        fit(
            model,
            choose_forward(model),
            {"train": split, "valid": split},
            ["a", "b", "c"],
            Recipe(3, 4, 1e-4, 1.0, seed),
            Run(Checkpoints(tmp_path / f"{len(orders)}-{seed}", every_minutes=99)),
            precision="fp32",
        )
        epochs = [list(chain.from_iterable(taken[start : start + 8])) for start in (0, 8, 16)]
        assert all(sorted(epoch) == list(range(32)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert orders.setdefault(seed, epochs) == epochs  # and the same ones again with the same seed
    assert orders[1] != orders[2]


def test_the_temperature_is_fitted_to_validation_texts(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    fit_temperature = publication.calibration.fit_temperature
    monkeypatch.setattr(
        publication.calibration,
        "fit_temperature",
        lambda logits, label_ids: seen.append(label_ids) or fit_temperature(logits, label_ids),
    )
    published: list[Any] = []
    publish = job.publish
    monkeypatch.setattr(job, "publish", lambda *a, **k: published.append(a[3]) or publish(*a, **k))
    train(environment, N_EPOCHS="1", VALID_PCT="0.2")
    [tokens], [label_ids] = published, seen
    assert len(tokens["valid"]) != len(tokens["test"])
    assert np.array_equal(label_ids, tokens["valid"].label_ids)


def test_the_revision_of_the_base_model_is_asked_for(
    environment: dict[str, str], tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        base_model, "_download", lambda name, said, *, revision, cache: asked.append(revision) or tiny_bert
    )
    environment |= {"BASE_MODEL": "owner/name", "BASE_MODEL_REVISION": "v2"}
    base, _ = job.gather(Settings.from_environ(environment))
    assert (asked, base.source) == (["v2"], "hub")


@pytest.mark.parametrize("kind", ["plain", "json"])
def test_the_log_has_the_format_that_is_asked_for(kind: str, tmp_path: Path, python: Callable[..., Any]) -> None:
    run = PROJECT / "production" / "docker-res" / "run.py"
    done = python(run, "predict", LOG_FORMAT=kind, LOG_PATH=str(tmp_path), MODEL_PATH=str(tmp_path), HF_TOKEN='"x"')
    [line] = (tmp_path / "tuneserve.log").read_text().splitlines()[:1]
    assert done.returncode == 2
    if kind == "json":
        assert json.loads(line)["level"] == logging.getLevelName(logging.WARNING)
    else:
        assert " WARNING taken without the quotes" in line
