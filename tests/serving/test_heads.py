"""One body, many heads: versions with a frozen body in one process, held against each of them alone."""

import asyncio
import gc
import json
import math
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from tuneserve.artifact import HEAD, METADATA, Version, describe_files, read_version
from tuneserve.errors import StoreError
from tuneserve.files import write_json
from tuneserve.lifecycle.store import Store
from tuneserve.network.numpy_head import NumpyHead
from tuneserve.serving import registry as registry_module
from tuneserve.serving.model import wait_for
from tuneserve.serving.registry import Registry
from tuneserve.serving.service import Service
from tuneserve.serving.sources import Sources
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import load_model
from tuneserve.tasks.classifier import Prediction
from tuneserve.tasks.heads import FILES, Bodies, Head
from tuneserve.training import features
from tuneserve.training.exporters import OpenVINOGraph
from tuneserve.training.publication import publish

FP32 = Settings.from_environ({"PRECISION": "fp32", "DEVICE": "cpu"})
TEXTS = ["a good film", "the food was not warm and it was very dull " * 5, "but", "one two three bad fine", "unseen?"]
LABELS = (["bad", "good"], ["a", "b", "c", "d"], ["x", "y", "z"])


def make_version(root: Path, labels: list[str], *, kind: str = "bert", graph: bool = True) -> Version:
    """Publish a head with random weights on a body that is the same for all of a kind."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.make_base_model(root / "base"))
    tokenizer.model_max_length = 32
    model = tiny.make_classifier(kind, labels=len(labels), words=len(tokenizer))
    torch.manual_seed(sum(map(ord, "".join(labels))))
    with torch.no_grad():
        for parameter in features.Head(model).parameters():
            parameter.add_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    model.config.id2label = dict(enumerate(labels))
    split = tiny.make_split([3, 9, 17, 30, 5], labels=len(labels), words=len(tokenizer))
    metadata = {
        "fingerprint": labels[0] * 8,
        "labels": labels,
        "settings": {"seed": 0, "num_max_positions": 32},
    }
    store = Store(root)
    store.prepare()
    return publish(
        *(store, model, tokenizer, {"valid": split, "test": split}, metadata),
        precision="fp32",
        exporters=[OpenVINOGraph()] if graph else [],
        began=time.perf_counter(),
        temperature=1.0,
        tested=False,
        shares=True,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    """Three versions on one body."""
    root = tmp_path_factory.mktemp("heads")
    return [make_version(root, labels) for labels in LABELS]


@pytest.fixture
def versions(made: list[Version], tmp_path: Path) -> list[Version]:
    """The same, to be changed."""
    return [
        read_version(shutil.copytree(one.folder, tmp_path / "models" / name))
        for name, one in zip("abc", made, strict=True)
    ]


@pytest.fixture
def bodies() -> Bodies:
    return Bodies(FP32, threads=1)


@pytest.fixture
def open_head(bodies: Bodies) -> Iterator[Callable[[Version], Head]]:
    opened: list[Head] = []

    def open_head(version: Version) -> Head:
        head = bodies.open(version)
        assert head is not None
        opened.append(head)
        return head

    yield open_head
    for head in opened:
        head.close()


def scores(answers: Any) -> list[dict[str, float]]:
    assert all(isinstance(one, Prediction) for one in answers), answers
    return [one.scores for one in answers]


def changed(version: Version, **metadata: Any) -> Version:
    """The version as if it had been saved as its files are now."""
    said = json.loads((version.folder / METADATA).read_text()) | metadata
    (version.folder / METADATA).unlink()
    write_json(version.folder / METADATA, said | describe_files(version.folder))
    return read_version(version.folder)


BF16 = Settings.from_environ({"DEVICE": "cpu"})
"""Where the CPU has it."""


@pytest.mark.parametrize(
    ("kind", "graph", "ways"),
    [
        ("bert", True, [(FP32, 1e-4), (BF16, 0.02)]),
        ("modernbert", True, [(FP32, 1e-4)]),
        ("deberta-v2", True, [(FP32, 1e-4)]),
        ("roberta", False, [(FP32, 1e-4)]),
    ],
)
def test_heads_on_one_body_answer_as_each_version_does_alone(
    kind: str, graph: bool, ways: list[tuple[Settings, float]], tmp_path: Path
) -> None:
    versions = [make_version(tmp_path, labels, kind=kind, graph=graph) for labels in LABELS[:2]]
    for settings, tolerance in ways:
        alone = []
        for version in versions:
            model = load_model(version, settings, threads=1)
            alone.append(scores(model.predict(TEXTS)))
            model.close()
        bodies = Bodies(settings, threads=1)
        heads = [bodies.open(version) for version in versions]
        assert len({id(head.body) for head in heads if head is not None}) == 1

        async def ask(heads: list[Any]) -> list[Any]:
            return await asyncio.gather(*(head.answer([text]) for text in TEXTS for head in heads))

        found = [scores(one)[0] for one in wait_for(ask(heads))]
        for index, head in enumerate(heads):
            assert head is not None
            mixed = found[index :: len(heads)]
            for wanted, one, other in zip(alone[index], mixed, scores(head.predict(TEXTS)), strict=True):
                assert one == pytest.approx(wanted, abs=tolerance)
                assert one == pytest.approx(other, abs=tolerance)
            head.close()


def test_texts_for_different_heads_go_through_the_body_together(
    versions: list[Version], open_head: Callable[[Version], Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = open_head(versions[0]), open_head(versions[1])
    prepare, batches = one.body.engine.prepare, list[list[int]]()

    def watched(texts: Any) -> Any:
        batches.append(sorted(map(len, texts)))
        return prepare(texts)

    monkeypatch.setattr(one.body.engine, "prepare", watched)

    async def ask() -> None:
        many = [head.answer([text]) for _ in range(20) for head, text in ((one, "good"), (other, "good film"))]
        await asyncio.gather(*many)

    asyncio.run(ask())
    assert any({3, 4} <= set(batch) for batch in batches), batches


def test_a_further_head_is_loaded_without_a_look_at_its_own_body(
    versions: list[Version], bodies: Bodies, open_head: Callable[[Version], Head]
) -> None:
    first, second, third = versions
    wanted = scores(load_model(second, FP32, threads=1).predict(TEXTS))
    assert bodies.size(second) is None
    open_head(first)
    for path in second.folder.iterdir():
        if path.name not in (*FILES, METADATA):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert bodies.size(second) == sum((second.folder / name).stat().st_size for name in FILES)
    assert scores(open_head(second).predict(TEXTS)) == [pytest.approx(one, abs=1e-4) for one in wanted]
    assert list(bodies._loaded) == [bodies._key(third)]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("whose", ["damaged", "another's", "none"])
def test_a_wrong_head_never_answers(
    versions: list[Version], open_head: Callable[[Version], Head], bodies: Bodies, first: bool, whose: str
) -> None:
    bad, other, _ = versions
    if not first:
        open_head(other)
    file = bad.folder / HEAD
    if whose == "damaged":
        content = bytearray(file.read_bytes())
        content[-1] ^= 64
        file.write_bytes(content)
    elif whose == "none":
        file.write_bytes(b"\x08" + bytes(20))
        bad = changed(bad)
    else:
        head = NumpyHead.read(file)
        head.layers[-1].bias[:] = [9, -9]  # type: ignore[index]
        file.unlink()
        head.write(file)
        bad = changed(bad)
    words = {"damaged": "SHA-256 differs", "none": "cannot be read", "another's": "does not answer as it did"}[whose]
    with pytest.raises(StoreError, match=words):
        bodies.open(bad)
    gc.collect()
    assert len(bodies._loaded) == (0 if first else 1)


def test_a_body_that_is_not_what_was_saved_is_not_loaded(versions: list[Version], bodies: Bodies) -> None:
    (versions[0].folder / "engine" / "model.bin").write_bytes(b"")
    with pytest.raises(StoreError, match=r"engine/model\.bin is not as large"):
        bodies.open(versions[0])
    head = bodies.open(versions[1])
    assert head is not None
    head.close()


@pytest.mark.parametrize("end", ["closed", "died"])
def test_a_body_ends_with_its_last_head_and_a_dead_one_gets_no_other(
    versions: list[Version], bodies: Bodies, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    heads = [bodies.open(version) for version in versions[:2]]
    one, other = (head for head in heads if head is not None)
    told: list[str] = []
    one.attach(one.body._metrics, lambda error: told.append("one"))
    other.attach(one.body._metrics, lambda error: told.append("other"))
    engine = weakref.ref(one.body.engine)
    if end == "died":
        one.body.batcher._die(MemoryError(), [])
        assert told == ["one", "other"]
        assert one.dead
        assert bodies.size(versions[2]) is None
    else:
        one.close()
        assert one.small
        assert scores(other.predict(TEXTS))
        other.close()
        assert not other.small
        assert told == []
    again = bodies.open(versions[2])
    assert again is not None
    assert again.body is not other.body
    assert scores(again.predict(TEXTS))
    again.close()
    one.close()
    other.close()
    del one, other, heads, again
    gc.collect()
    assert engine() is None
    assert not bodies._loaded


def test_what_is_not_the_same_shares_nothing(versions: list[Version], bodies: Bodies) -> None:
    first, second, _ = versions
    settings = first.metadata["settings"]
    others = [
        changed(second, settings=settings | {"num_max_positions": 16}),
        changed(second, body={"sha256": "another"}),
        changed(second, engine=second.metadata["engine"] | {"formats": ["fp32", "other"]}),
    ]
    assert len({bodies._key(one) for one in (first, *others)}) == 4
    int8 = Bodies(Settings.from_environ({"PRECISION": "int8"}), threads=1)
    assert int8.open(first) is None
    (first.folder / HEAD).unlink()
    assert bodies.open(changed(first)) is None  # as one that was saved before there were heads


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    settings = FP32.model_copy(update={"models": str(tmp_path / "models"), "data_path": tmp_path / "data"})
    return Sources(settings, threads=1, importing=["false"], environ={})


def test_a_server_of_many_models_counts_a_body_once_and_evicts_heads_without_a_search(
    versions: list[Version], sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [sum(path.stat().st_size for path in one.folder.rglob("*") if path.is_file()) for one in versions]
    small = [sum((one.folder / name).stat().st_size for name in FILES) for one in versions]
    searches: list[bool] = []
    collect = gc.collect

    def watched() -> int:
        searches.append(True)
        return collect()

    monkeypatch.setattr(registry_module.gc, "collect", watched)
    loaded: dict[str, int] = {}

    def used() -> int:
        return sum(loaded.values())

    class Measured(Registry):
        def _note(self, entry: Any, error: Any) -> None:
            loaded[entry.name] = entry.bytes
            super()._note(entry, error)

        def _close(self, entry: Any) -> None:
            super()._close(entry)
            loaded[entry.name] = 0

    models = Measured(sources.open, prepare=sources.prepare, size=sources.size, find=sources.find, used=used)
    models.limit = sizes[0] + small[1] + small[2] - 1  # a head too many
    service = Service({}, metrics=models.metrics, models=models)
    answers = [scores(service.predict(TEXTS, name=name)) for name in "abcba"]
    assert [sorted(one[0]) for one in answers] == [LABELS[index] for index in (0, 1, 2, 1, 0)]
    assert answers[0] == [pytest.approx(one, abs=1e-4) for one in answers[4]]
    assert models.evicted >= 1
    assert searches == []
    assert not any(one.reserved for one in models.entries())
    assert models.close(wait_s=60)
    assert searches == [True]  # for the body
    assert not sources._bodies._loaded


def test_the_test_of_a_head_is_read_when_it_is_wanted(
    versions: list[Version], open_head: Callable[[Version], Head]
) -> None:
    head = open_head(versions[0])
    assert "reference" not in vars(head)
    assert head.reference is not None
    assert head.reference.labels == LABELS[0]
