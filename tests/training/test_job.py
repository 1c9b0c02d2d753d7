"""The job as a function."""

import json
import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from jobs import train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tuneserve.artifact import Version
from tuneserve.errors import BaseModelError, DataError, DeviceError, NoModelError, StoreError, TrainingError
from tuneserve.files import in_use
from tuneserve.hardware import BESIDE
from tuneserve.lifecycle.drift import read_reference
from tuneserve.lifecycle.store import Store
from tuneserve.settings import Settings
from tuneserve.signals import Stop
from tuneserve.training import few, job, label_issues, loop
from tuneserve.training.world import ALONE

pytestmark = pytest.mark.usefixtures("brief")


def test_a_version_is_a_checkpoint_that_anything_loads(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # nothing is left out here
    version = train(environment, N_EPOCHS="6")
    classify = pipeline("text-classification", str(version.folder))
    assert [answer["label"] for answer in classify(["the film was great", "the food was awful"])] == ["good", "bad"]
    assert version.metadata["metrics"]["test"]["accuracy"] >= 0.9
    assert sorted(path.name for path in version.folder.iterdir()) == [
        "config.json",
        "decision.json",
        "drift.json",
        "engine",
        "golden.json",
        "metadata.json",
        "model.safetensors",
        "report",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((version.folder / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}


def test_what_is_saved_gives_the_logits_of_what_was_trained(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    load = job.build_model
    monkeypatch.setattr(job, "build_model", lambda *a, **k: trained.append(load(*a, **k)) or trained[-1])
    version = train(environment)
    attention = trained[0].config._attn_implementation  # kinds of attention differ in their last bit
    saved = AutoModelForSequenceClassification.from_pretrained(version.folder, attn_implementation=attention).eval()
    batch = AutoTokenizer.from_pretrained(version.folder)(
        ["a warm film", "cold food"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        torch.testing.assert_close(saved(**batch).logits, trained[0].eval()(**batch).logits, rtol=0, atol=0)


def test_the_answers_to_validation_texts_are_those_of_the_version_calibrated(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    judge = label_issues.judge_learned
    monkeypatch.setattr(label_issues, "judge_learned", lambda *about: given.append(about) or judge(*about))
    version = train(environment)
    _, logits, tokens = given[0]
    assert abs(version.metadata["calibration"]["temperature"] - 1) > 0.01  # or there is nothing to tell apart
    saved = AutoModelForSequenceClassification.from_pretrained(version.folder).eval()
    for name in ("valid", "test"):
        answers = few.answer(saved, tokens[name], len(version.metadata["labels"]), lambda: False, ALONE)
        assert logits[name] == pytest.approx(answers, abs=1e-4)


def test_the_reference_for_drift_is_of_all_held_out_texts(environment: dict[str, str]) -> None:
    version = train(environment)
    reference = read_reference(version)
    assert reference is not None
    counts = version.metadata["data"]["counts"]
    assert len(reference.answers) == sum(sum(counts[name].values()) for name in ("valid", "test"))
    assert reference.answers.tokens.min() > 4
    assert set(reference.answers.unknown.tolist()) == {2}  # the word "number" and the number itself
    assert not reference.answers.truncated.any()
    assert (reference.answers.confidences >= 0.5).all()
    assert set(reference.answers.label_ids.tolist()) == {0, 1}
    assert version.metadata["files"]["drift.json"] == (version.folder / "drift.json").stat().st_size


def test_metadata_has_what_readers_rely_on(environment: dict[str, str]) -> None:
    version = train(environment, API_KEY="a secret")
    metadata = version.metadata
    assert metadata["labels"] == ["bad", "good"]
    assert metadata["settings"]["lr"] == 5e-3
    assert set(metadata["metrics"]["test"]) >= {
        "accuracy",
        "macro_f1",
        "log_loss",
        "ece",
        "per_class",
    }
    matrix = json.loads((version.folder / "report" / "test.json").read_text())["confusion_matrix"]
    assert np.sum(matrix) == sum(metadata["data"]["counts"]["test"].values())
    assert set(metadata["data"]) >= {"fingerprints", "counts", "truncated_share", "repeated_train_texts"}
    assert len(metadata["base_model"]["sha256"]) == 64
    assert set(metadata["versions"]) == {"tuneserve", "python", "torch", "transformers"}
    assert 0 < metadata["fit_s"] < metadata["duration_s"]
    assert metadata["tokens_per_s"] > 0
    assert len(metadata["history"]) == 3
    assert "a secret" not in json.dumps(metadata)


def test_the_same_settings_and_data_are_not_trained_twice(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = train(environment)
    assert train(environment, PORT="9000", LOG_PATH="/elsewhere").id == first.id
    assert "nothing to train" in caplog.text
    other = train(environment, LR="1e-3")
    assert other.id != first.id
    assert train(environment, LR="1e-3", SELECT_BY="loss").id not in (first.id, other.id)
    assert train(environment, LR="1e-3").id == other.id
    assert Store(Path(environment["MODEL_PATH"])).champion().id == other.id
    assert train(environment).id == first.id
    assert Store(Path(environment["MODEL_PATH"])).champion().id == first.id


def test_a_damaged_version_is_trained_anew(environment: dict[str, str]) -> None:
    first = train(environment)
    weights = first.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert train(environment).id != first.id


def test_another_base_model_or_recipe_is_trained_anew(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(environment)
    base = shutil.copytree(environment["BASE_MODEL"], tmp_path / "base")
    assert train(environment, BASE_MODEL=str(base)).id == first.id
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    assert train(environment, BASE_MODEL=str(base)).id != first.id
    monkeypatch.setattr("tuneserve.__version__", "9.9.9")
    assert train(environment).id != first.id


def test_changed_data_are_trained_anew(environment: dict[str, str], tmp_path: Path) -> None:
    data = tiny.write_csv(tmp_path / "mine.csv", tiny.sentences(120))
    first = train(environment, DATASET=str(data))
    tiny.write_csv(data, tiny.sentences(124))
    assert train(environment, DATASET=str(data)).id != first.id


@pytest.mark.parametrize("kind", sorted(tiny.KINDS))
def test_the_head_alone_of_every_encoder_leaves_the_body_as_it_was(
    kind: str, environment: dict[str, str], tmp_path: Path
) -> None:
    base = tiny.make_base_model(tmp_path / kind, kind)
    version = train(environment, BASE_MODEL=str(base), TRAIN_BODY="0", N_EPOCHS="1")
    before = AutoModelForSequenceClassification.from_pretrained(base).base_model.state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(version.folder).base_model.state_dict()
    body = [name for name in before if "pooler" not in name]
    assert all(torch.equal(before[name], after[name]) for name in body)


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])  # packed and padded; the others in tests/processes
def test_an_encoder_learns(kind: str, environment: dict[str, str], tmp_path: Path) -> None:
    base = tiny.make_base_model(tmp_path / kind, kind)
    history = train(environment, BASE_MODEL=str(base), LR="2e-3", N_EPOCHS="30").metadata["history"]
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]


def test_the_heads_weights_do_change(environment: dict[str, str], tiny_bert: Path) -> None:
    version = train(environment, TRAIN_BODY="0", N_EPOCHS="1")
    before = AutoModelForSequenceClassification.from_pretrained(tiny_bert).base_model.state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(version.folder).base_model.state_dict()
    assert not torch.equal(before["pooler.dense.weight"], after["pooler.dense.weight"])


def test_balanced_class_weights_find_the_rare_class_more_often(environment: dict[str, str], tmp_path: Path) -> None:
    # "two" is likelier in the rare class, but most texts that have it are common all the same.
    rows = [(f"{'two' if number % 5 < 1 else 'one'} film {number}", "common") for number in range(600)]
    rows += [(f"{'two' if number % 5 < 3 else 'one'} film {number + 600}", "rare") for number in range(80)]
    shared = {
        "DATASET": str(tiny.write_csv(tmp_path / "skewed.csv", rows)),
        "N_EPOCHS": "12",
        "LR": "1e-3",
        "TEST_PCT": "0.5",
        "VALID_PCT": "0.3",
    }
    recall = {
        weights: train(environment, **shared, CLASS_WEIGHTS=weights).metadata["metrics"]["test"]["per_class"]["rare"][
            "recall"
        ]
        for weights in ("none", "balanced")
    }
    assert recall["balanced"] > recall["none"]


def test_a_base_model_that_memory_does_not_hold_is_a_clear_error(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*about: object, **options: object) -> None:
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", refuse)
    with pytest.raises(BaseModelError, match="cannot be loaded as a classifier: Cannot allocate memory"):
        train(environment)


def test_cuda_without_a_gpu_fails_and_says_why(environment: dict[str, str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(DeviceError, match=r"DEVICE=cuda, but no GPU can be used: .+"):
        train(environment, DEVICE="cuda")


def test_a_limit_beyond_the_base_models_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(BaseModelError, match="NUM_MAX_POSITIONS=256, but this base model reads 64 tokens"):
        train(environment, NUM_MAX_POSITIONS="256")


@pytest.mark.parametrize("least", ["0", "100"])
def test_a_loss_that_is_no_number_stops_the_run(environment: dict[str, str], tmp_path: Path, least: str) -> None:
    base = tiny.make_base_model(tmp_path / "huge")
    weights = load_file(base / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][:] = float("inf")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        TrainingError, match=r"loss became nan, .* in epoch 1 at batch 1\. LR=0\.005 is probably too high"
    ):
        train(environment, BASE_MODEL=str(base), MIN_VALID=least)
    with pytest.raises(NoModelError):
        Store(Path(environment["MODEL_PATH"])).champion()


def weights(version: Version) -> bytes:
    return (version.folder / "model.safetensors").read_bytes()


def interrupt(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, after_looks: int) -> None:
    """Run the job and let a signal come, as far as the loop can see; it looks before and after each gradient."""
    stop, fit, asked = Stop(), loop.fit, 0

    def interrupted_fit(*arguments: Any, **named: Any) -> Any:
        *others, run = arguments

        def counting() -> bool:
            nonlocal asked
            asked += 1
            if asked > after_looks:
                stop.signal = signal.SIGTERM
            return bool(run.stopping())

        return fit(*others, replace(run, stopping=counting), **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", interrupted_fit)
        with pytest.raises(SystemExit) as end:
            job.train(Settings.from_environ(environment), stop, threads=1)
    assert end.value.code == 143


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(
    environment: dict[str, str], tmp_path: Path, dropout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment |= {"DROPOUT": dropout}
    whole = train(environment, MODEL_PATH=str(tmp_path / "whole"))
    for looks in (6, 23, 1, 0):  # in the first epoch; in the second, after a step; after another; in the middle of one
        interrupt(environment, monkeypatch, after_looks=looks)
    resumed = train(environment)
    assert weights(resumed) == weights(whole)
    assert resumed.metadata["history"] == whole.metadata["history"]
    assert list(Store(Path(environment["MODEL_PATH"])).checkpoints_folder.iterdir()) == []


def test_a_signal_during_validation_loses_no_step(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 13  # all of the first epoch; the next question comes when it has been validated
    interrupt(environment, monkeypatch, after_looks=2 * steps)
    [saved] = Store(Path(environment["MODEL_PATH"])).checkpoints_folder.glob("*/*.safetensors")
    assert saved.name == f"00000-{steps:08d}.safetensors"
    assert [round(epoch["train_loss"], 9) for epoch in train(environment).metadata["history"]] == [
        round(epoch["train_loss"], 9)
        for epoch in train(environment, MODEL_PATH=environment["MODEL_PATH"] + "-whole").metadata["history"]
    ]


def test_what_killed_trainings_left_is_removed_at_the_next_start(environment: dict[str, str]) -> None:
    store, cache = Store(Path(environment["MODEL_PATH"])), Path(environment["DATA_PATH"])
    whole = store.checkpoints_folder / "anotherrun" / "00001-00000002.safetensors"
    left = [
        store.checkpoints_folder / "anotherrun" / ".00001-00000003.safetensors-0123abcd",
        store.versions_folder / ".unfinished-20260102T030405Z-0a1b2c3d-0123abcd" / "model.safetensors",
        store.evidence_folder / ".20260102T030405Z-0a1b2c3d-0123abcd" / "texts",
        cache / "tokens" / ".0123abcd-0123abcd" / "ids.i32",
        cache / "arrow" / f".{'0' * 32}",
        cache / "downloads" / ".0123abcd-0123abcd" / "train.csv",
        cache / "launch" / f".{'1' * 32}" / "error.json",
    ]
    for path in [whole, *left]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    with in_use(cache), pytest.raises(DataError):  # another job, for another store, may be writing there
        train(environment, DATASET="/none")
    assert [path.exists() for path in left] == [False] * 3 + [True] * 4
    with pytest.raises(DataError):
        train(environment, DATASET="/none")
    assert [path.exists() for path in [whole, *left]] == [True] + [False] * 7


def test_beside_a_server_a_store_that_is_gone_is_not_taken_for_a_new_one(environment: dict[str, str]) -> None:
    settings = Settings.from_environ(environment)
    with pytest.raises(StoreError, match="no longer holds the versions"):
        job.train(settings, Stop(), threads=1, environ={BESIDE: "1"})
    assert not settings.model_path.exists()
