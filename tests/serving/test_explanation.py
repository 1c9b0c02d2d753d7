import asyncio
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import tiny
from fastapi.testclient import TestClient
from serving.conftest import EchoEngine
from wire import app_of, wait_until

from tuneserve.artifact import Version
from tuneserve.errors import EngineError, OverloadedError, TimeoutExceededError
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.lifecycle.store import Store
from tuneserve.serving import service
from tuneserve.serving.model import wait_for
from tuneserve.serving.service import MOST_CONSULTING, Service
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier, load_classifier
from tuneserve.tasks.explanation import Explanation, explain, join_words

NEVER = float("inf")


def explained(classifier: Classifier, text: str, label: str | None = None) -> Explanation:
    [found] = wait_for(explain(classifier, text, label, NEVER))
    assert isinstance(found, Explanation)
    return found


@pytest.fixture
def client(settings: Settings, slot: Slot) -> Iterator[TestClient]:
    with TestClient(app_of(settings, slot), raise_server_exceptions=False) as client:
        yield client


def test_a_weight_is_by_how_much_the_probability_falls_without_the_word(client: TestClient) -> None:
    text = "a  great\nfilm"
    answer = client.post("/explain", json={"text": text}).json()
    assert [text[one["start"] : one["end"]] for one in answer["spans"]] == ["a", "great", "film"]
    texts = [text, "  great\nfilm", "a  \nfilm", "a  great\n"]
    whole, *without = client.post("/inference/batch", json={"texts": texts}).json()["predictions"]
    assert (answer["label"], answer["score"]) == ("good", whole["scores"]["good"])
    weights = [whole["scores"]["good"] - one["scores"]["good"] for one in without]
    assert [one["weight"] for one in answer["spans"]] == pytest.approx(weights)
    assert weights[1] == max(weights) > 0  # the echo's logits are sums of ids
    assert (answer["read"], answer["truncated"], answer["model_version"]) == (len(text), False, whole["model_version"])
    other = client.post("/explain/", json={"text": text, "label": "bad"}).json()
    assert other["score"] == whole["scores"]["bad"]
    assert [one["weight"] for one in other["spans"]] == pytest.approx([-weight for weight in weights])


def test_where_the_reading_ended_is_said(classifier: Classifier) -> None:
    found = explained(classifier, "film " * 30)
    assert found.truncated
    assert len(found.spans) == 14  # and two special tokens
    assert found.read == found.spans[-1][1] == len("film " * 14) - 1
    text = " ".join(["a"] * 14 + ["great"] * 3)
    weights = explained(classifier, text).weights
    whole, without = classifier.predict([text, " ".join(["a"] * 13)])  # what stands behind is not read instead
    assert weights == pytest.approx([whole.scores[whole.label] - without.scores[whole.label]] * 14)


@pytest.mark.parametrize(("text", "read"), [("x" * 2000, 16 * 64), ("a-" * 15 + " film", 14)])
def test_of_a_word_that_is_too_long_the_beginning_is_read(classifier: Classifier, text: str, read: int) -> None:
    found = explained(classifier, text)
    assert (found.truncated, found.read, found.spans) == (True, read, [(0, read)])


def test_the_words_of_a_long_text_are_taken_together(version: Version, engine: Any) -> None:
    classifier = Classifier(version, engine, long_text="window")
    text = " ".join(["film"] * 300)
    found = explained(classifier, text)
    classifier.close()
    assert len(found.spans) == 8  # 2,048 tokens would be fewer
    assert (found.spans[0][0], found.spans[-1][1], found.read) == (0, len(text), len(text))
    assert {len(text[start:end].split()) for start, end in found.spans} == {37, 38}


def test_many_characters_of_few_tokens_are_not_read_for_each_of_them(version: Version, engine: EchoEngine) -> None:
    classifier = Classifier(version, engine, long_text="window")
    text = "film " + "<br> " * 1600 + "film film"  # a tag is cleaned away, but looked at
    found = explained(classifier, text)
    classifier.close()
    assert len(text) > 8000
    assert len(found.spans) == 8  # not hundreds, each of which would have the whole read again
    assert (found.spans[0][0], found.spans[-1][1]) == (0, len(text))


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 11, 12, 100])
def test_every_word_is_in_one_span(count: int) -> None:
    words = [(3 * place, 3 * place + 2) for place in range(count)]
    spans = join_words(words, 6)
    assert len(spans) == min(count, 6)
    assert [word for start, end in spans for word in words if start <= word[0] < end] == words


def test_signs_without_spaces_between_are_words_each(classifier: Classifier) -> None:
    text = "とても良い film"
    assert [text[start:end] for start, end in explained(classifier, text).spans] == [*"とても良い", "film"]


@pytest.mark.parametrize("text", ["film", "<br> film <br/>"])
def test_a_text_of_which_nothing_is_left_is_as_likely_as_any(classifier: Classifier, text: str) -> None:
    found = explained(classifier, text)
    assert (found.score - 0.5) in found.weights


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ({"text": " "}, "text"),
        ({"text": "\ud800"}, "text"),
        ({"label": "good"}, "text"),
        ({"text": "film", "label": "ugly"}, "label"),
    ],
)
def test_what_cannot_be_explained_is_said(client: TestClient, asked: dict[str, Any], where: str) -> None:
    answer = client.post("/explain", content=str(asked).replace("'", '"'))
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", where])


def test_a_part_that_the_engine_fails_on_fails_the_whole(version: Version, make_engine: Any) -> None:
    wrong = make_engine(lambda engine: np.full((len(engine.running), 2), np.nan) if len(engine.running) > 1 else None)
    classifier = Classifier(version, wrong)
    [found] = wait_for(explain(classifier, "a film", None, NEVER))
    classifier.close()
    assert isinstance(found, EngineError)


def test_it_is_none_of_the_answers_that_are_counted(
    settings: Settings, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "WRITE_EVERY_S", 0.01)
    shadowed: list[Any] = []
    slot.shadow = lambda *one: shadowed.append(one)
    feedback = Feedback(tmp_path / FILE, max_rows=100, keep_texts=False)
    with TestClient(app_of(settings, slot, feedback=feedback)) as client:

        def ask(path: str) -> tuple[int, int, int, bool]:
            name = client.post(path, json={"text": "a film"}).headers["X-Request-Id"]
            known = client.post("/feedback", json={"request_id": name, "label": "good"}).status_code
            observed = len(client.get("/drift/window").text.splitlines()) - 1
            return known, observed, len(shadowed), "tuneserve_texts_total 1.0" in client.get("/metrics").text

        assert ask("/explain") == (404, 0, 0, False)
        assert ask("/inference") == (200, 1, 1, True)
    feedback.close()


def test_one_is_explained_at_a_time_and_few_wait(version: Version, held: Any) -> None:
    slot, go = held
    begun = []

    async def work(model: Any, deadline: float) -> None:
        begun.append(deadline)
        await asyncio.to_thread(go.wait)

    async def ask() -> list[Any]:
        service = Service.of(slot)
        works = [asyncio.create_task(service.consult(work)) for _ in range(MOST_CONSULTING)]
        await asyncio.to_thread(wait_until, lambda: begun)
        late = asyncio.create_task(service.consult(work, timeout_s=0))
        [refused] = await asyncio.gather(late, return_exceptions=True)
        works.pop().cancel()
        await asyncio.sleep(0)
        [timed] = await asyncio.gather(service.consult(work, timeout_s=0.01), return_exceptions=True)
        assert len(begun) == 1
        go.set()
        await asyncio.gather(*works)
        return [refused, timed]

    refused, timed = asyncio.run(ask())
    assert isinstance(refused, OverloadedError)
    assert isinstance(timed, TimeoutExceededError)
    assert len(begun) == MOST_CONSULTING - 1


def test_the_words_with_the_greatest_weights_move_the_probability_most(store: Path) -> None:
    settings = Settings.from_environ({"MODEL_PATH": str(store)})
    version = Store(store).champion()
    assert version is not None
    classifier = load_classifier(version, settings, threads=1)
    chance = random.Random(0)
    falls: dict[str, list[float]] = {"first": [], "any": []}
    for text, _ in itertools.islice(tiny.sentences(200), 160, 200):
        found = explained(classifier, text)
        first = max(zip(found.weights, found.spans, strict=True))[1]
        for which, (start, end) in (("first", first), ("any", chance.choice(found.spans))):
            [without] = classifier.predict([text[:start] + text[end:]])
            falls[which].append(found.score - without.scores[found.label])
    classifier.close()
    assert mean(falls["first"]) > 2 * abs(mean(falls["any"]))
