"""Probabilities that mean something, in the artifact itself."""

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from scipy.special import softmax
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from tuneserve.settings import Settings
from tuneserve.signals import Stop
from tuneserve.training import calibration, job
from tuneserve.training.calibration import BOUNDS, fit_temperature, fold
from tuneserve.training.evaluation import expected_calibration_error

pytestmark = pytest.mark.usefixtures("brief")


def honest_logits(texts: int = 4000, labels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn with the very probabilities that they state."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (texts, labels))
    drawn = [rng.choice(labels, p=row) for row in softmax(logits, axis=1)]
    return logits, np.array(drawn)


@pytest.mark.parametrize("factor", [0.7, 1.0, 2.5, 6.0])
def test_a_model_that_is_too_sure_by_a_factor_gets_that_temperature(factor: float) -> None:
    logits, label_ids = honest_logits()
    temperature = fit_temperature(logits * factor, label_ids)
    assert temperature == pytest.approx(factor, rel=0.06)
    after = expected_calibration_error(softmax(logits * factor / temperature, axis=1), label_ids)
    assert after <= expected_calibration_error(softmax(logits * factor, axis=1), label_ids) + 1e-3
    assert after < 0.03


def test_texts_that_are_all_right_do_not_make_the_model_certain() -> None:
    def temperature(texts: int) -> float:
        return fit_temperature(np.array([[1.0, -1.0]] * texts), np.zeros(texts, dtype=np.int64))

    assert 0.7 < temperature(5) < 0.95
    assert temperature(5) > temperature(100) > temperature(1000) > 0.2


def test_a_model_that_hardly_learned_is_not_made_surer() -> None:
    rng = np.random.default_rng(0)
    label_ids = rng.integers(0, 2, 800)
    hint = rng.normal(0, 0.12, 800) + 0.06 * (2 * label_ids - 1)
    logits = np.stack([np.zeros(800), 0.25 + hint], axis=1)  # nearly always the second class
    assert 0.5 < (logits.argmax(axis=1) == label_ids).mean() < 0.6
    sharper = logits / BOUNDS[0]
    assert expected_calibration_error(softmax(sharper, axis=1), label_ids) > expected_calibration_error(
        softmax(logits, axis=1), label_ids
    )
    assert fit_temperature(logits, label_ids) == 1


@pytest.mark.parametrize("kind", sorted(tiny.KINDS))
def test_folding_divides_the_logits_of_every_encoder(kind: str, tmp_path: Path) -> None:
    base = tiny.make_base_model(tmp_path / kind, kind)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    before = copy.deepcopy(model)
    assert fold(model, 1.7)
    input_ids = torch.tensor([[2, 5, 6, 7, 3]])
    torch.testing.assert_close(model(input_ids).logits * 1.7, before(input_ids).logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", [32, 64])
@pytest.mark.parametrize("kind", sorted(tiny.KINDS))
def test_as_many_labels_as_channels_do_not_confuse_it(kind: str, labels: int) -> None:
    model = tiny.make_classifier(kind, labels=labels).eval()
    before = copy.deepcopy(model)
    assert fold(model, 1.7)
    input_ids = torch.tensor([[2, 5, 6, 7, 3]])
    torch.testing.assert_close(model(input_ids).logits * 1.7, before(input_ids).logits, rtol=1e-4, atol=1e-6)


def test_the_saved_model_gives_the_tempered_logits_of_the_trained_one(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[PreTrainedModel] = []

    def keeping(model: PreTrainedModel, temperature: float) -> bool:
        trained.append(copy.deepcopy(model).eval())
        return fold(model, temperature)

    monkeypatch.setattr(calibration, "fold", keeping)
    version = job.train(Settings.from_environ(environment), Stop(), threads=1)
    assert version is not None
    saved = AutoModelForSequenceClassification.from_pretrained(version.folder).eval()
    batch = AutoTokenizer.from_pretrained(version.folder)(["a warm film", "cold"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        tempered = trained[0](**batch).logits / version.metadata["calibration"]["temperature"]
        torch.testing.assert_close(saved(**batch).logits, tempered, rtol=1e-4, atol=1e-6)


def test_a_model_without_such_a_layer_stays_as_it_is(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny.make_base_model(tmp_path / "base"), num_labels=3)
    model.config.num_labels = 1000
    before = {name: one.clone() for name, one in model.state_dict().items()}
    assert not fold(model, 2.0)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_the_metadata_say_what_the_temperature_was_good_for(environment: dict[str, str]) -> None:
    version = job.train(Settings.from_environ(environment), Stop(), threads=1)
    assert version is not None
    seen = version.metadata["calibration"]
    assert BOUNDS[0] <= seen["temperature"] <= BOUNDS[1]
    assert seen["temperature"] != 1
    assert set(seen["ece_before"]) == {"valid", "test"}
    assert seen["ece_before"]["test"] != version.metadata["metrics"]["test"]["ece"]
    last = version.metadata["history"][version.metadata["best_epoch"] - 1]
    assert version.metadata["metrics"]["valid"]["log_loss"] <= last["validation_loss"] + 1e-6
    assert version.metadata["metrics"]["valid"]["accuracy"] == last["validation_accuracy"]
