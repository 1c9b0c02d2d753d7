"""A frozen body's features: made once, kept, found again, and the same as what the whole model sees."""

import copy
import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from jobs import train
from transformers import AutoModelForSequenceClassification

from tuneserve.errors import StoreError
from tuneserve.network.forward import choose_forward
from tuneserve.training import features
from tuneserve.training.tokens import TokenizedSplit

pytestmark = pytest.mark.usefixtures("brief")


@pytest.fixture
def head_only(environment: dict[str, str]) -> dict[str, str]:
    """Settings of a frozen body; nothing here is about which version is better."""
    return environment | {"TRAIN_BODY": "0", "N_EPOCHS": "1", "LR": "1e-2", "MAX_ACCURACY_DROP": "1"}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts went through the body, batch by batch; what `agree` tries aside."""
    seen: list[int] = []
    encode = features._encode

    def counting(encoder: Any, *arguments: Any) -> None:
        def count(batch: Any) -> Any:
            seen.append(len(batch.lengths))
            return encoder(batch)

        count.model = encoder.model  # type: ignore[attr-defined]
        encode(count, *arguments)

    monkeypatch.setattr(features, "_encode", counting)
    return seen


@pytest.mark.parametrize("kind", sorted(tiny.KINDS))
def test_body_and_head_one_after_the_other_are_the_whole_model(kind: str, tmp_path: Path) -> None:
    base = tiny.make_base_model(tmp_path / kind, kind)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    head = features.Head(model)
    encoder = features.Encoder(body := copy.deepcopy(model), choose_forward(body))
    assert features.agree(encoder, head)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    trained = {id(one) for one in head.parameters()}
    assert trained < {id(one) for one in model.parameters()}  # shared, and not all of them


def test_a_head_that_gives_other_logits_by_itself_is_found_out(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny.make_base_model(tmp_path / "base"), num_labels=3)
    encoder = features.Encoder(body := copy.deepcopy(model.eval()), choose_forward(body))
    head = features.Head(model)
    assert features.agree(encoder, head)
    with torch.no_grad():
        model.classifier.weight += 1
    assert not features.agree(encoder, head)


def test_another_rate_encodes_nothing_again(head_only: dict[str, str], encoded: list[int]) -> None:
    first = train(head_only)
    assert sum(encoded) > 150  # training and validation texts, and one more of each to see how wide a row is
    encoded.clear()
    other = train(head_only, LR="3e-3")
    assert encoded == []
    assert other.id != first.id
    train(head_only, SEED="7")  # other texts are held out, of the same ones
    assert encoded == []


def test_of_data_with_ten_texts_more_those_alone_are_encoded(
    head_only: dict[str, str], encoded: list[int], tmp_path: Path
) -> None:
    train(head_only)
    assert sum(encoded) > 150
    for more, first in (10, 240), (5, 300):
        encoded.clear()
        rows = [*tiny.sentences(240), *tiny.sentences(more, first=first)]
        train(head_only, DATASET=str(tiny.write_csv(tmp_path / f"{more}.csv", rows)))
        assert 0 < sum(encoded) <= more  # some are held out for the test
    encoded.clear()
    train(head_only, DATASET=str(tiny.write_csv(tmp_path / "fewer.csv", tiny.sentences(200))))
    assert encoded == []


def test_the_head_learns_and_the_body_does_not_move(head_only: dict[str, str], tmp_path: Path) -> None:
    base = tiny.make_base_model(tmp_path / "base", initializer_range=0.5)  # a random body that tells words apart
    version = train(head_only, BASE_MODEL=str(base))
    history = version.metadata["history"]
    assert len(history) > 1  # passes go on until it has converged, whatever N_EPOCHS says
    assert min(one["train_loss"] for one in history) < 0.7 * history[0]["train_loss"]
    before = AutoModelForSequenceClassification.from_pretrained(base).base_model.state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(version.folder).base_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "pooler" not in name)
    assert not torch.equal(before["pooler.dense.weight"], after["pooler.dense.weight"])


def test_an_encoding_that_was_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(features, "WINDOW_TEXTS", 10)
    monkeypatch.setattr(features, "ENCODING_TOKENS", 40)
    model = AutoModelForSequenceClassification.from_pretrained(tiny.make_base_model(tmp_path / "base"), num_labels=2)
    encoder = features.Encoder(model.eval(), choose_forward(model))
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, 35)
    split = TokenizedSplit(
        rng.integers(5, 20, lengths.sum()).astype(np.int32),
        np.r_[0, np.cumsum(lengths)],
        np.zeros(35, dtype=int),
        np.zeros(35, dtype=bool),
    )
    whole = features.encode(encoder, split, tmp_path / "whole", stopping=lambda: False)
    asked = 0

    def later() -> bool:
        nonlocal asked
        asked += 1
        return asked > 9

    features.encode(encoder, split, tmp_path / "parts", stopping=later)
    done = int((tmp_path / "parts" / "encoded.txt").read_text())
    assert 0 < done < 35
    caplog.clear()
    again = features.encode(encoder, split, tmp_path / "parts", stopping=lambda: False)
    assert np.array_equal(again, whole)
    assert f"{done} of 35 texts are encoded already" in caplog.text
    assert f"encoded {done} of 35 texts" not in caplog.text  # that part was not made again
    assert "encoded 35 of 35 texts" in caplog.text


@pytest.fixture
def frozen() -> Callable[..., features.Encoder]:
    def make(**changed: Any) -> features.Encoder:
        model = tiny.make_classifier(**changed).eval()
        return features.Encoder(model, choose_forward(model))

    return make


def test_a_note_that_a_killed_process_left_empty_counts_for_nothing(
    tmp_path: Path, frozen: Callable[..., features.Encoder]
) -> None:
    split = tiny.make_split([5, 9, 3])
    whole = np.array(features.encode(frozen(), split, tmp_path, stopping=lambda: False))
    (tmp_path / "encoded.txt").write_text("")
    assert np.array_equal(features.encode(frozen(), split, tmp_path, stopping=lambda: False), whole)


def test_a_table_that_is_gone_is_not_taken_for_the_one_that_is_made_anew(
    tmp_path: Path, frozen: Callable[..., features.Encoder]
) -> None:
    split = tiny.make_split([5, 9, 3])
    whole = np.array(features.encode(frozen(), split, tmp_path, stopping=lambda: False))
    (tmp_path / "features.npy").unlink()
    features.encode(frozen(), split, tmp_path, stopping=lambda: True)  # and ends before a text is encoded
    assert np.array_equal(features.encode(frozen(), split, tmp_path, stopping=lambda: False), whole)


class Counting(features.Encoder):
    """Counts the texts that are encoded."""

    texts = 0

    def __call__(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As the encoder."""
        self.texts += len(batch.lengths)
        return super().__call__(batch)


def part(split: TokenizedSplit, rows: list[int]) -> TokenizedSplit:
    lengths = split.lengths[rows]
    ids = np.concatenate([split.text_ids(row) for row in rows])
    return TokenizedSplit(ids, np.r_[0, np.cumsum(lengths)], split.label_ids[rows], split.truncated[rows])


KIND, OTHER_KIND = "0" * 16, "1" * 16


@pytest.fixture
def count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Encode some rows of thirty texts, and compare them with what the encoder says; how many went through it."""
    monkeypatch.setattr(features, "WINDOW_TEXTS", 8)
    whole = tiny.make_split([3 + number % 7 for number in range(30)])
    model = tiny.make_classifier().eval()
    encoder = Counting(model, choose_forward(model))
    expected = np.array(features.encode(encoder, whole, tmp_path / "expected", stopping=lambda: False))

    def count(name: str, rows: list[int], *, stops_after: int = 99) -> int:
        encoder.texts, asked = 0, itertools.count(1)
        folder = tmp_path / name
        found = features.encode(encoder, part(whole, rows), folder, stopping=lambda: next(asked) > stops_after)
        if stops_after == 99:
            assert np.allclose(found, expected[rows], atol=1e-5)
        return encoder.texts

    return count


def test_texts_that_other_tables_have_are_copied_and_the_rest_encoded(
    count: Callable[..., int], tmp_path: Path
) -> None:
    first, second, third = (f"{KIND}{number:016x}" for number in (1, 2, 3))
    assert count(first, [*range(12)]) == 12 + 1  # and one, to see how wide a row is
    assert count(second, [20, *range(11, 2, -1), 21]) == 2
    assert count(third, [*range(30)]) == 30 - 12 - 2
    assert count(third, [*range(30)]) == 0
    assert count(f"{KIND}{4:016x}", [29, 0, 20]) == 0
    assert count(f"{OTHER_KIND}{1:016x}", [1, 2]) == 2 + 1


def test_an_interrupted_table_gives_what_it_has_and_goes_on_where_it_was(count: Callable[..., int]) -> None:
    first, second = (f"{KIND}{number:016x}" for number in (1, 2))
    assert count(first, [*range(20)], stops_after=1) == 1 + 8
    assert count(second, [*range(5, 15)]) == 10 - 3
    assert count(first, [*range(20)]) == 20 - 8
    assert count(second, [*range(5, 15)]) == 0


@pytest.mark.parametrize("name", ["features.npy", "texts.npy", "order.npy", "encoded.txt"])
@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", None], ids=["empty", "cut", "gone"])
def test_a_damaged_table_is_no_source_and_is_made_again(
    count: Callable[..., int], tmp_path: Path, name: str, content: bytes | None
) -> None:
    damaged, second = (f"{KIND}{number:016x}" for number in (1, 2))
    count(damaged, [*range(9)])
    (tmp_path / damaged / name).unlink()
    if content is not None:
        (tmp_path / damaged / name).write_bytes(content)
    assert count(second, [1, 2, 3]) == 3 + 1
    assert count(damaged, [*range(9)]) == (0 if name == "texts.npy" else 9 - 3)


def test_a_full_disk_is_said_and_does_not_end_the_process(disk: Any, frozen: Callable[..., features.Encoder]) -> None:
    split = tiny.make_split([2] * 4000)  # half a megabyte of features, on a quarter
    with pytest.raises(StoreError, match=r"cannot be written to: .*No space left on device"):
        features.encode(frozen(), split, disk.path / "features", stopping=lambda: False)


def test_means_over_tokens_are_features_too(frozen: Callable[..., features.Encoder]) -> None:
    encoder = frozen(kind="modernbert", classifier_pooling="mean")
    assert features.agree(encoder, features.Head(encoder.model))


def test_a_head_that_cannot_stand_alone_is_trained_behind_its_body(
    head_only: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(features, "agree", lambda encoder, head: False)
    version = train(head_only)
    assert "cannot be trained by itself" in caplog.text
    before = AutoModelForSequenceClassification.from_pretrained(head_only["BASE_MODEL"]).base_model.state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(version.folder).base_model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }


def test_another_base_model_is_encoded_anew(head_only: dict[str, str], encoded: list[int], tmp_path: Path) -> None:
    train(head_only)
    encoded.clear()
    base = shutil.copytree(head_only["BASE_MODEL"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    train(head_only, BASE_MODEL=str(base))
    assert sum(encoded) > 150


def test_edited_code_encodes_anew(
    head_only: dict[str, str], encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"network", "training/features.py", "training/model.py"} < set(features.CODE)
    train(head_only)
    encoded.clear()
    monkeypatch.setattr(features, "code_hash", lambda *names: f"edited {names}")
    train(head_only, LR="3e-3")
    assert sum(encoded) > 150


def test_a_table_that_is_gone_is_made_again(head_only: dict[str, str], encoded: list[int]) -> None:
    train(head_only)
    for table in Path(head_only["DATA_PATH"]).glob("features/*/features.npy"):
        table.unlink()
    encoded.clear()
    train(head_only, LR="3e-3")
    assert sum(encoded) > 150
