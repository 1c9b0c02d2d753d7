"""Reports as they are written: a page and a card that nothing in the data can break, of a version that was trained."""

import logging
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
import yaml

from tuneserve.artifact import REPORT_LOSSES, Version, is_whole
from tuneserve.errors import RefusedError, StoreError
from tuneserve.files import replace_file
from tuneserve.lifecycle import gate
from tuneserve.lifecycle.answers import ANSWERS, Answers, Words, read_answers
from tuneserve.lifecycle.decision import Decision
from tuneserve.lifecycle.evidence import Evidence, read_evidence
from tuneserve.lifecycle.label_issues import LABEL_ISSUES, LabelIssue, read_label_issues
from tuneserve.lifecycle.store import Store
from tuneserve.report import writing
from tuneserve.report.facts import Facts, gather
from tuneserve.report.plots import draw
from tuneserve.report.writing import render_card, render_page, write_report
from tuneserve.settings import Settings
from tuneserve.training import job

EVIL = (
    "</td><script>alert(1)</script>{{ 7*7 }} \"'&amp; **b** [x](javascript:y) |$\\frac{a}{b}$\x00\u202e<svg onload=a>"
)
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Tags(HTMLParser):
    """The tags of a page, which must be closed in order, and all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def facts(labels: list[str], text: str = "a text") -> Facts:
    """Facts of a version with these labels that takes each for the next one, whatever its texts are."""
    count = len(labels)
    figures = {"accuracy": 0.0, "macro_f1": 0.0, "log_loss": 2.0, "ece": 0.9}
    one = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "texts": 1}
    metadata = {
        "labels": labels,
        "metrics": {"test": figures | {"per_class": dict.fromkeys(labels, one)}, "feedback": {"accuracy": 0.5}},
        "data": {"dataset": text, "counts": {"test": dict.fromkeys(labels, 1)}},
        "calibration": {"temperature": 1.5, "ece_before": {"test": 0.95}},
        "history": [{"train_loss": 1.0, "validation_loss": 1.0, "validation_accuracy": 0.0}] * 2,
        "settings": {"dataset": text, "lr": 3e-5},
        "base_model": {"name": text},
        "versions": {"tuneserve": "0"},
        "label_issues": {
            "texts": {"train": 9, "test": count},
            "suspected": {"train": 3, "test": 1},
            "test_label_error": 0.125,
        },
    }
    issues = [LabelIssue("test", f"{text} {number}", labels[0], labels[1], 0.1) for number in range(30)]
    scores = [
        [0.9 if other == (label + 1) % count else 0.1 / count for other in range(count)] for label in range(count)
    ]
    answers = Answers(
        scores * 2,
        list(range(2 * count)),
        [False] * (2 * count),
        words=[Words(0, [(0, 3), (4, len(text))], [0.9, -0.9])],
        champion="before",
        before=labels * 2,
    )
    evidence = Evidence(
        [f"{text} {number}" for number in range(2 * count)], labels * 2, columns={text: ["a", "b"] * count}
    )
    decision = Decision("one", "refused", "gate", text, None)
    losses = [(1, 1.0), (2, 0.9)]
    return gather(
        Version(Path("/x/one"), metadata),
        decision,
        evidence,
        answers,
        findings=[text],
        losses=losses,
        matrix=np.roll(np.eye(count, dtype=np.int64), 1, axis=1),
        issues=issues,
    )


def test_nothing_in_the_data_becomes_markup(tmp_path: Path) -> None:
    found = facts([f"{EVIL} one", f"{EVIL} two"], EVIL)
    pictures = draw(found, tmp_path)
    assert set(pictures) == {"curves", "confusion", "reliability", "lengths"}
    page = render_page(found, pictures)
    tags = parse(page)
    assert not {"script", "iframe", "img", "link", "object", "form"} & set(tags.tags)
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    links = [value for name, value in tags.attributes if name in ("href", "src") and not str(value).startswith("#")]
    assert links == ["label-issues.csv"]
    assert "49" not in re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)  # no template in a template
    assert "\x00" not in page
    assert "\u202e" not in page
    for svg in pictures.values():
        ElementTree.fromstring(svg)


def test_the_page_and_the_card_say_which_labels_are_suspected_and_how_many_of_the_tests() -> None:
    found = facts(["bad", "good"])
    page, card = render_page(found, {}), render_card(found, {})
    assert page.count("<td>test</td><td>bad</td><td>good</td>") == card.count(" | test | bad | good |") == 20
    for content in (page, card):
        assert "12.5% of the test" in content
        assert "3 of 9 train texts, 1 of 2 test texts" in content
        assert content.count("label-issues.csv") >= 2


def test_the_page_and_the_card_say_how_far_chance_moves_the_figures() -> None:
    metadata = {"labels": ["a", "b"], "metrics": {"test": {"accuracy": 0.88, "macro_f1": 0.88}}}
    metadata["data"] = {"counts": {"test": {"a": 500, "b": 500}}}
    matrix = np.array([[440, 60], [60, 440]])
    found = gather(Version(Path("/x"), metadata), None, None, None, findings=[], matrix=matrix)
    assert found.interval == pytest.approx((0.86, 0.90), abs=0.004)  # 0.88 ± 1.96 √(0.88 · 0.12 / 1000)
    assert found.f1_interval == pytest.approx(found.interval, abs=0.003)
    low, high = (f"{100 * one:.1f}%" for one in found.interval or ())
    for content in (render_page(found, {}), render_card(found, {})):
        assert f"Another test of this size would have given an accuracy of {low} to {high} and a macro F1 of" in content
        assert "suspected" not in content
        assert "probably wrong" not in content


def test_the_page_asks_nobody(tmp_path: Path) -> None:
    found = facts(["bad", "good"])
    page = render_page(found, draw(found, tmp_path))
    assert "default-src 'none'" in page
    outside = set(re.findall(r"(?:https?:)?//[\w.]+", page)) - {
        "http://www.w3.org"
    }  # names of XML's, which nobody loads
    assert outside == set()


def test_ids_stand_once_on_a_page_with_several_pictures(tmp_path: Path) -> None:
    found = facts(["bad", "good"])
    ids = [value for name, value in parse(render_page(found, draw(found, tmp_path))).attributes if name == "id"]
    clipped = [one for one in ids if one and re.fullmatch(r"[pm][0-9a-f]{10}", one)]
    assert clipped
    assert len(clipped) == len(set(clipped))


def test_a_promise_is_told_with_what_the_test_shows_of_it(tmp_path: Path) -> None:
    found = facts(["bad", "good"])
    said: dict[str, Any] = {"max_error": 0.02, "certainty": 0.95, "texts": 400, "reason": None, "threshold": 0.91}
    said["test"] = {"answered_share": 0.625, "answered": 250, "wrong": 3}
    found.version.metadata["abstention"] = said
    page, card = (" ".join(one(found, {}).split()) for one in (render_page, render_card))
    parse(page)
    for words in (
        "below 0.910 abstain",
        "at most 2.0% are wrong",
        "400 validation",
        "62.5% are answered",
        "and 1.2% of",
    ):
        assert words in page
    assert "(0.4% to 3.5% by chance)" in page  # Wilson's interval
    assert "| answers that do not abstain (MAX_ERROR=0.02) | 62.5%, from a confidence of 0.910 on; 1.2% of" in card
    said |= {"threshold": None, "reason": "there are 9 <texts>", "test": {"answered_share": 0.0}}
    page, card = (" ".join(one(found, {}).split()) for one in (render_page, render_card))
    parse(page)
    assert "cannot be promised: there are 9 &lt;texts&gt;." in page
    assert "| none: there are 9 " in card
    del found.version.metadata["abstention"]
    assert not any("abstain" in one(found, {}) for one in (render_page, render_card))


def front_matter(card: str) -> Any:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("\n---\n", 1)[0])


@pytest.mark.parametrize("text", ["a text", EVIL])
def test_the_card_has_the_hubs_front_matter_and_one_table_row_a_line(text: str, tmp_path: Path) -> None:
    found = facts([f"{text} one", f"{text} two"], text)
    card = render_card(found, draw(found, tmp_path))
    matter = front_matter(card)
    assert matter["pipeline_tag"] == "text-classification"
    assert "base_model" not in matter  # it is no name on the hub
    [result] = matter["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "accuracy", "value": 0.0}
    assert result["dataset"]["name"].startswith(text[:80])
    for line in card.splitlines():
        if line.startswith("| "):
            assert re.search(r"(?<!\\)\|$", line)
    card = card.split("\n---\n", 1)[1]
    assert not re.search(r"(?<!\\)<script", card)
    assert not re.search(r"(?<!\\)\]\(javascript", card)


@pytest.mark.parametrize("label", ["good", "bad"])
def test_groups_that_are_all_right_or_all_wrong_have_a_picture(label: str, tmp_path: Path) -> None:
    for count in range(20, 40):  # rounding differs
        tokens = [number % 7 for number in range(count)]
        evidence = Evidence([f"{number}" for number in range(count)], [label] * count)
        answers = Answers([[0.1, 0.9]] * count, tokens, [False] * count)
        found = gather(Version(Path("/x"), {"labels": ["bad", "good"]}), None, evidence, answers, findings=[])
        if count in (20, 39) or any(group.high < group.accuracy for group in found.lengths):
            assert "lengths" in draw(found, tmp_path)


def test_many_labels_are_told_by_tables_and_few_by_a_picture(tmp_path: Path) -> None:
    many, few = (facts([f"label {number}" for number in range(count)]) for count in (77, 20))
    pictures = draw(many, tmp_path)
    assert "confusion" not in pictures
    page = render_page(many, pictures)
    parse(page)
    assert "The other 57 labels" in page
    assert page.count('<th scope="col">labelled</th><th scope="col">answered</th>') == 1
    assert "confusion" in draw(few, tmp_path)


def test_a_version_of_which_little_is_known_has_a_report(tmp_path: Path) -> None:
    bare = gather(Version(tmp_path / "bare", {"labels": ["a", "b"]}), None, None, None, findings=[])
    assert draw(bare, tmp_path) == {}
    parse(page := render_page(bare, {}))
    assert "It has not been judged." in page
    assert front_matter(render_card(bare, {}))["model-index"][0]["results"][0]["metrics"] == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Version, Settings]:
    folder = tmp_path_factory.mktemp("report")
    rows = [(f"{text}", label) for text, label in tiny.sentences(160)]
    lines = [f"{text},{label},{('shop', 'phone')[index % 2]},{index}" for index, (text, label) in enumerate(rows)]
    (folder / "t.csv").write_text("\n".join(["text,label,channel,id", *lines]))
    version = tiny.train(folder / "t.csv", folder, REPORT="1", TEST_PCT="0.3", N_EPOCHS="2", LR="1e-4")
    return Store(folder / "MODEL"), version, Settings.from_environ(tiny.paths(folder))


def test_a_training_leaves_a_report_with_groups_curves_and_the_words_of_mistakes(
    trained: tuple[Store, Version, Settings],
) -> None:
    _, version, _ = trained
    folder = version.folder / "report"
    names = {path.name for path in folder.iterdir()} - {"losses.json"}  # which a training of some seconds has
    assert names == {
        *("index.html", "README.md", "test.json", "valid.json"),
        *("curves.svg", "confusion.svg", "reliability.svg", "lengths.svg"),
        "label-issues.csv",
    }
    page = (folder / "index.html").read_text()
    parse(page)
    assert f"Report of version {version.id}" in page
    assert "By the data&#39;s column channel" in page
    assert "column id" not in page
    assert re.search(r'<mark class="for\d">', page.split("<ol")[1])
    assert "N_EPOCHS=2" in page
    assert is_whole(version)
    issues = read_label_issues(folder)
    assert issues is not None
    assert issues == read_label_issues(trained[0].evidence_folder / version.id)
    assert len(issues) == sum(version.metadata["label_issues"]["suspected"].values())
    assert (folder / "index.html").stat().st_mode & 0o777 == 0o644
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_kept_answers_are_the_engines_and_fit_the_evidence(trained: tuple[Store, Version, Settings]) -> None:
    store, version, _ = trained
    evidence = read_evidence(store.evidence_folder / version.id)
    answers = read_answers(store.evidence_folder / version.id)
    assert answers is not None
    assert set(evidence.columns) == {"channel"}
    assert len(answers.scores) == len(answers.tokens) == len(evidence.texts)
    assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in answers.scores)
    wrong = {
        index
        for index, (row, label) in enumerate(zip(answers.scores, evidence.labels, strict=True))
        if version.labels[row.index(max(row))] != label
    }
    assert {one.text for one in answers.words} == set(sorted(wrong, key=lambda i: -max(answers.scores[i]))[:20])


def test_without_answers_the_texts_are_asked_again(trained: tuple[Store, Version, Settings]) -> None:
    store, version, settings = trained
    before = read_answers(store.evidence_folder / version.id)
    for content in (None, "[]"):
        (path := store.evidence_folder / version.id / ANSWERS).unlink()
        if content is not None:
            path.write_text(content)
        (version.folder / "report" / "index.html").unlink()
        assert write_report(store, version, settings).is_file()
        assert read_answers(store.evidence_folder / version.id) == before


def test_the_losses_of_steps_are_in_the_picture_and_damaged_ones_are_not(
    trained: tuple[Store, Version, Settings], caplog: pytest.LogCaptureFixture
) -> None:
    store, version, settings = trained
    (file := version.folder / REPORT_LOSSES).write_text("[[1, 0.9], [2, 0.8]]")
    try:
        assert "a step" in write_report(store, version, settings).read_text()
        file.write_text("[[1, null]]")
        assert "a step" not in write_report(store, version, settings).read_text()
        assert "losses.json cannot be read" in caplog.text
    finally:
        file.unlink()
        write_report(store, version, settings)


def test_without_evidence_there_is_a_report_of_what_is_known(
    trained: tuple[Store, Version, Settings], caplog: pytest.LogCaptureFixture
) -> None:
    store, version, settings = trained
    folder = store.evidence_folder / version.id
    folder.rename(folder.with_name("away"))
    try:
        page = write_report(store, version, settings).read_text()
    finally:
        folder.with_name("away").rename(folder)
    assert "confident mistakes" not in page
    assert "Figures of each label" in page
    assert "says nothing of single texts" in caplog.text
    write_report(store, version, settings)


def test_a_version_that_cannot_be_asked_says_why(
    trained: tuple[Store, Version, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, version, settings = trained
    monkeypatch.setattr(writing, "read_answers", lambda folder: None)
    monkeypatch.setattr(gate, "run_trial", lambda *about: {"candidate": {"error": "it fell over"}, "champion": None})
    with pytest.raises(StoreError, match="it fell over"):
        write_report(store, version, settings)


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"task": "feature-extraction", "labels": []}, "for TASK=feature-extraction"),
        ({"task": "summarization", "labels": []}, "for TASK=summarization"),
        ({"task": "text-generation", "labels": []}, "for TASK=text-generation"),
        ({"labels": []}, "without labels"),
    ],
)
def test_what_is_no_classifier_has_no_report(about: dict[str, Any], why: str, tmp_path: Path) -> None:
    (folder := tmp_path / "MODEL" / "versions" / "one").mkdir(parents=True)
    version = Version(folder, about)
    with pytest.raises(StoreError, match=f"version one: it is {why}, and a report tells how a classifier") as refusal:
        write_report(Store(tmp_path / "MODEL"), version, Settings.from_environ(tiny.paths(tmp_path)))
    assert "\n" not in str(refusal.value)
    assert list(folder.iterdir()) == []


def pictures_of(folder: Path) -> tuple[set[str], set[str]]:
    """The pictures that a report's card shows, and those that are in its folder."""
    card = (folder / "README.md").read_text() if (folder / "README.md").exists() else ""
    return set(re.findall(r"\((\w+\.svg)\)", card)), {path.name for path in folder.glob("*.svg")}


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write the report of a version of which little is known, with these pictures; its folder."""
    version = Version(tmp_path / "one", {"labels": ["bad", "good"]})
    version.folder.mkdir()

    def write(*names: str) -> Path:
        monkeypatch.setattr(writing, "draw", lambda *about: dict.fromkeys(names, "<svg ></svg>"))
        return write_report(Store(tmp_path), version, Settings.from_environ(tiny.paths(tmp_path))).parent

    return write


def test_a_report_written_anew_leaves_no_picture_of_the_one_before(drawn: Callable[..., Path]) -> None:
    folder = drawn("curves", "confusion", "lengths")
    (killed := folder / ".lengths.svg-0123abcd").write_text("half")
    os.utime(killed, (0, 0))
    for name in ("losses.json", "valid.json", "test.json"):
        (folder / name).write_text("[]")
    drawn("curves", "reliability")
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "index.html", "curves.svg", "reliability.svg"),
        *("losses.json", "valid.json", "test.json"),
    }


def test_wherever_a_report_ends_the_pictures_of_its_pages_are_there(
    drawn: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = ("curves", "confusion"), ("curves", "reliability")
    cards = []
    for last in range(4):
        folder = drawn(*before)
        left = iter([replace_file] * last)
        with monkeypatch.context() as patch:
            patch.setattr(writing, "replace_file", lambda *about, left=left: next(left, fail)(*about))
            with pytest.raises(StoreError, match="cannot be written"):
                drawn(*after)
        shown, found = pictures_of(folder)
        assert shown <= found
        cards.append(shown)
    assert cards[0] != cards[-1]  # and the pages were written in one of these


def fail(*about: object) -> None:
    raise OSError("no paper")


def test_a_report_that_fails_is_a_warning_and_the_version_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*about: object) -> None:
        raise MemoryError("no paper")

    monkeypatch.setattr(job, "write_report", fail)
    with caplog.at_level(logging.WARNING):
        version = tiny.train(tiny.write_csv(tmp_path / "t.csv", tiny.sentences(120)), tmp_path, REPORT="1")
    assert Store(tmp_path / "MODEL").champion_id() == version.id
    assert f"run.py report {version.id} tries again): no paper" in caplog.text


def test_a_refused_version_is_reported_with_what_it_lost(tmp_path: Path) -> None:
    data = tiny.write_csv(tmp_path / "t.csv", tiny.sentences(160))
    first = tiny.train(data, tmp_path, REPORT="1", TEST_PCT="0.3")
    with pytest.raises(RefusedError):
        tiny.train(data, tmp_path, REPORT="1", TEST_PCT="0.3", LR="1e-6", SEED="5", N_EPOCHS="1")
    [refused] = [one for one in Store(tmp_path / "MODEL").versions() if one.id != first.id]
    page = (refused.folder / "report" / "index.html").read_text()
    assert '<span class="refused">Refused</span>' in page
    assert f"Beside the champion, {first.id}" in page
    assert "Lost: the champion has them right" in page


def test_no_report_is_written_that_is_not_wanted(tmp_path: Path) -> None:
    version = tiny.train(tiny.write_csv(tmp_path / "t.csv", tiny.sentences(120)), tmp_path, REPORT="0")
    assert not (version.folder / "report" / "index.html").exists()
    assert not (version.folder / "report" / LABEL_ISSUES).exists()
    assert not (Store(tmp_path / "MODEL").evidence_folder / version.id / ANSWERS).exists()
