"""Few texts: all are learned from, and cross-validation chooses and calibrates."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from jobs import train
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from tuneserve.errors import DataError
from tuneserve.training import few
from tuneserve.training.checkpoint import NoCheckpoints
from tuneserve.training.few import FOLDS, HeldOut, Start, choose, choose_start, draw_folds, fit_few, read_features
from tuneserve.training.loop import Recipe, Run

pytestmark = pytest.mark.usefixtures("brief")

FEW = {"MIN_VALID": "100", "N_EPOCHS": "2", "MIN_STEPS": "20"}
RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=1e-3, max_norm=1.0, seed=0)


def clouds(texts: int, *, labels: int = 3, channels: int = 8, seed: int = 0) -> tuple[Any, Any]:
    """Features of labels that lie apart."""
    rng = np.random.default_rng(seed)
    label_ids = np.arange(texts) % labels
    centers = rng.normal(size=(labels, channels))
    return centers[label_ids] + rng.normal(size=(texts, channels)), label_ids


def test_every_text_is_held_out_once_and_each_label_is_spread_over_the_folds() -> None:
    label_ids = np.array([0] * 9 + [1] * 5 + [2] * 2 + [3])
    folds = draw_folds(label_ids, seed=3)
    assert folds[-1] == -1  # the only text of its label is always learned from
    assert set(folds[:-1]) == set(range(FOLDS))
    assert [sorted(np.bincount(folds[label_ids == one], minlength=FOLDS)) for one in (0, 1, 2)] == [
        [2, 2, 2, 3],
        [1, 1, 1, 2],
        [0, 0, 1, 1],
    ]
    assert not np.array_equal(folds, draw_folds(label_ids, seed=4))


@pytest.mark.parametrize("labels", [2, 3])
def test_the_start_is_scikit_learns_regression(labels: int) -> None:
    features, label_ids = clouds(60, labels=labels)
    weights, bias = Start(features, label_ids, labels, 10.0).fit(np.arange(60))
    scale = np.sqrt((features**2).sum(1).mean())
    wanted = LogisticRegression(C=10.0, max_iter=500).fit(features / scale, label_ids).predict_proba(features / scale)
    assert np.allclose(softmax(features @ weights.T + bias, axis=1), wanted, atol=1e-6)


def test_a_label_that_no_text_of_the_fold_has_is_never_answered() -> None:
    features, label_ids = clouds(60)
    weights, bias = Start(features, label_ids, 3, 10.0).fit(np.flatnonzero(label_ids != 1))
    assert weights.shape == (3, 8)
    assert not weights[1].any()
    assert bias[1] == bias.min()


def test_class_weights_move_the_start() -> None:
    features, label_ids = clouds(60)
    rows = np.r_[np.flatnonzero(label_ids != 0), np.flatnonzero(label_ids == 0)[:3]]
    even = Start(features, label_ids, 3, 1.0).fit(rows)
    heavy = Start(features, label_ids, 3, 1.0, [20.0, 1.0, 1.0]).fit(rows)
    count = [int(((features @ w.T + b).argmax(1) == 0).sum()) for w, b in (even, heavy)]
    assert count[1] > count[0]


def test_noise_is_regularized_more_than_what_can_be_told_apart() -> None:
    clear, label_ids = clouds(60)
    noise = np.random.default_rng(1).normal(size=clear.shape)
    folds = draw_folds(label_ids, 0)
    strengths = [choose_start(one, label_ids, 3, folds, None).strength for one in (clear, noise)]
    assert strengths[0] > strengths[1] == few.STRENGTHS[0]


def test_the_simplest_model_that_is_not_surely_worse_is_chosen() -> None:
    rng = np.random.default_rng(0)
    label_ids = rng.integers(0, 2, 200)
    good = np.eye(2)[label_ids] * 4 + rng.normal(size=(200, 2))
    assert choose(np.stack([good, good, good]), label_ids) == 0
    assert choose(np.stack([rng.normal(size=(200, 2)), good]), label_ids) == 1


def test_a_model_that_is_a_little_better_than_chance_lets_one_tell_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(17)
    label_ids = rng.integers(0, 2, 200)
    simple = np.eye(2)[label_ids] + rng.normal(size=(200, 2))
    other = simple + rng.normal(scale=0.3, size=(200, 2))
    assert choose(np.stack([simple, other]), label_ids) == 0
    monkeypatch.setattr(few, "TOLERANCE", 0.0)
    assert choose(np.stack([simple, other]), label_ids) == 1  # it is the better of the two


def test_features_are_what_the_last_layer_reads() -> None:
    model = tiny.make_classifier().eval()
    split = tiny.make_split([5, 9, 3, 7])
    features = read_features(model, split)
    assert features is not None
    weights, bias = model.classifier.weight.detach().numpy(), model.classifier.bias.detach().numpy()
    logits = few.answer(model, split, 3, lambda: False, Run(NoCheckpoints()).world)
    assert np.allclose(features @ weights.T + bias, logits, atol=1e-5)


def fitted(
    *, body: bool, stopping: Any = lambda: False, texts: int = 24
) -> tuple[Any, Any, HeldOut | None, dict[str, Any]]:
    model = tiny.make_classifier()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    split = tiny.make_split([5 + number % 7 for number in range(texts)])
    run = Run(NoCheckpoints(), stopping)
    position, held = fit_few(model, split, ["a", "b", "c"], RECIPE, run, precision="fp32", body=body)
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    return model, position, held, {"changed": changed, "split": split}


def test_with_a_frozen_body_only_the_last_layer_is_set() -> None:
    _, position, held, seen = fitted(body=False)
    assert held is not None
    assert seen["changed"] == {"classifier.weight", "classifier.bias"}
    assert position.finished
    assert held.share == 0.0


def test_a_share_of_the_way_is_a_share_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {}
    for share in (0.0, 0.5, 1.0):
        monkeypatch.setattr(few, "SHARES", (share,))
        model, _, held, _ = fitted(body=True)
        assert held is not None
        assert held.share == share
        weights[share] = torch.cat([one.detach().flatten() for one in model.parameters()])
    assert not torch.equal(weights[0.0], weights[1.0])
    assert torch.allclose(weights[0.5], (weights[0.0] + weights[1.0]) / 2, atol=1e-6)


def test_no_more_folds_are_trained_than_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, held, _ = fitted(body=True)
    assert held is not None
    assert (held.folds, len(held.rows)) == (FOLDS, 24)
    monkeypatch.setattr(few, "ENOUGH_HELD_OUT", 10)
    _, _, held, _ = fitted(body=True)
    assert held is not None
    assert (held.folds, len(held.rows)) == (2, 12)
    assert np.array_equal(held.rows, np.unique(held.rows))


@pytest.mark.parametrize("patience", [0, 3, 20])
def test_a_run_that_is_asked_to_stop_stops_inside_a_fold(patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, usual, positions = iter(range(1000)), few.fit_model, list[Any]()

    def watched(*given: Any, **named: Any) -> Any:
        positions.append(usual(*given, **named))
        return positions[-1]

    monkeypatch.setattr(few, "fit_model", watched)
    _, position, held, _ = fitted(body=True, stopping=lambda: next(asked) >= patience)
    assert held is None
    assert not position.finished
    assert not positions[-1].finished  # its training was cut short, and not only what follows


def few_texts(folder: Path, count: int = 60) -> str:
    return str(tiny.write_csv(folder / "few.csv", tiny.sentences(count)))


def test_a_job_on_few_texts_holds_none_out_and_says_so(
    environment: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        version = train(environment, **FEW, DATASET=few_texts(tmp_path), TEST_PCT="0.2")
    counts = version.metadata["data"]["counts"]
    assert sum(counts["train"].values()) == 48
    assert sum(counts["valid"].values()) == 0
    found = version.metadata["cross_validation"]
    assert found["texts"] == 48
    assert found["folds"] == FOLDS
    assert sum(one["texts"] for one in version.metadata["metrics"]["valid"]["per_class"].values()) == 48
    said = [record.getMessage() for record in caplog.records]
    assert sum("texts are few" in line for line in said) == 1
    assert any("no texts" in line and "valid" in line for line in said)


def test_the_temperature_is_that_of_answers_to_texts_held_out(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    from tuneserve.training import calibration

    usual = calibration.fit_temperature

    def watched(logits: Any, label_ids: Any) -> float:
        seen.append((np.array(logits), np.array(label_ids), usual(logits, label_ids)))
        return float(seen[-1][2])

    monkeypatch.setattr(calibration, "fit_temperature", watched)
    version = train(environment, **FEW, DATASET=few_texts(tmp_path), TEST_PCT="0.2")
    logits, label_ids, temperature = seen[-1]
    assert version.metadata["calibration"]["temperature"] == temperature
    assert len(label_ids) == 48
    right = (logits.argmax(1) == label_ids).mean()
    assert version.metadata["metrics"]["valid"]["accuracy"] == pytest.approx(right)


def test_the_same_job_gives_the_same_weights_again(environment: dict[str, str], tmp_path: Path) -> None:
    again = environment | {"MODEL_PATH": str(tmp_path / "again"), "DATA_PATH": str(tmp_path / "others")}
    data = few_texts(tmp_path)
    folders = [train(one, **FEW, DATASET=data).folder for one in (environment, again)]
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()


def test_few_texts_are_passed_over_until_there_were_so_many_steps(environment: dict[str, str], tmp_path: Path) -> None:
    for least, epochs in (("0", 1), ("9", 3)):
        folder = {"MODEL_PATH": str(tmp_path / least)}
        version = train(environment | folder, DATASET=few_texts(tmp_path), N_EPOCHS="1", MIN_STEPS=least)
        assert len(version.metadata["history"]) == epochs  # 48 texts are three batches


def test_two_texts_of_a_label_are_enough(environment: dict[str, str], tmp_path: Path) -> None:
    rows = [*tiny.sentences(16), ("the plain dull one", "rare"), ("a plain fine two", "rare")]
    version = train(environment, **FEW, DATASET=str(tiny.write_csv(tmp_path / "rare.csv", rows)))
    assert version.labels == ["bad", "good", "rare"]
    with pytest.raises(DataError, match="2 of each class are the least"):
        train(environment, **FEW, DATASET=str(tiny.write_csv(tmp_path / "one.csv", rows[:-1])))


def test_the_head_alone_learns_from_few_texts_in_no_epoch(environment: dict[str, str], tmp_path: Path) -> None:
    version = train(environment, **FEW, DATASET=few_texts(tmp_path), TRAIN_BODY="0")
    assert version.metadata["cross_validation"]["share_of_fine_tuning"] == 0.0
    assert version.metadata["history"] == []
    assert "body" in version.metadata
    assert json.loads((version.folder / "metadata.json").read_text())["fit_s"] > 0


@pytest.mark.parametrize(("changed", "layers"), [({}, 2), ({"TRAIN_BODY": "0"}, 3), (FEW, 3)])
def test_the_mean_is_read_where_the_body_is_frozen_or_texts_are_few(
    environment: dict[str, str], tmp_path: Path, changed: dict[str, str], layers: int
) -> None:
    base = tiny.make_base_model(tmp_path / "base")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    version = train(environment, BASE_MODEL=str(base), DATASET=few_texts(tmp_path), **changed)
    assert json.loads((version.folder / "config.json").read_text())["num_hidden_layers"] == layers
