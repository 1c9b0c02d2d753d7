"""Everything that a report says, computed once for both of its forms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tuneserve.artifact import Version
from tuneserve.lifecycle.answers import Answers, Words
from tuneserve.lifecycle.decision import Decision
from tuneserve.lifecycle.evidence import Evidence
from tuneserve.lifecycle.label_issues import LabelIssue
from tuneserve.lifecycle.statistics import Array, resampled_figures, wilson
from tuneserve.settings import Settings

BINS = 10
"""Of confidence, in the picture of its reliability."""
LENGTH_GROUPS = 5
MOST_MISTAKES = 20
MOST_DIFFERENCES = 20
MOST_CONFUSIONS = 20
MOST_ISSUES = 20
SHOWN_CHARACTERS = 1200
"""Of a text."""
WHERE_IT_RAN = {"model_path", "data_path", "log_path", "input", "output", "host", "port"}
"""Settings that say where a job ran, and nothing of what it learned."""


@dataclass(frozen=True)
class Group:
    """Texts that have something in common: how many, and the share of them that is answered rightly."""

    name: str
    texts: int
    accuracy: float
    low: float
    high: float
    """The ends of the accuracy's 95% interval."""


@dataclass(frozen=True)
class Piece:
    """A part of a text, and how strongly it spoke for the answer: -1 (against) to 1; 0 for hardly."""

    text: str
    weight: float = 0.0


@dataclass(frozen=True)
class Mistake:
    """A text that was answered wrongly."""

    pieces: list[Piece]
    label: str
    predicted: str
    confidence: float
    from_feedback: bool


@dataclass(frozen=True)
class Difference:
    """A text that this version and the champion answer differently."""

    text: str
    label: str
    predicted: str
    before: str


@dataclass(frozen=True)
class Comparison:
    """A version and the champion it was compared with, on the same texts."""

    champion: str
    both: int
    only_new: int
    only_old: int
    neither: int
    lost: list[Difference]
    """Texts that the champion has right and this version has wrong."""
    gained: list[Difference]


@dataclass(frozen=True)
class Bin:
    """Answers of about one confidence."""

    confidence: float
    accuracy: float
    texts: int


@dataclass(frozen=True)
class Step:
    """A version on the same data, and the labels of people that it was trained on."""

    version: str
    created_at: str
    labels: int
    accuracy: float
    per_hundred: float | None
    """Points of accuracy for each hundred labels more than the version before had; None where it had as many."""


@dataclass(frozen=True)
class Facts:
    """What a report says; fractions, not percentages."""

    version: Version
    decision: Decision | None
    labels: list[str]
    texts: int
    """Of the owner's test that were answered for this report."""
    interval: tuple[float, float] | None
    """The 95% interval of the accuracy on the whole test."""
    f1_interval: tuple[float, float] | None
    """That of its macro F1; None if only the shares of right answers are known."""
    findings: list[str]
    changed: dict[str, str]
    """Settings that are not the defaults, as environment variables."""
    steps: list[Step]
    losses: list[tuple[int, float]]
    """Of some of the training's steps, by their numbers."""
    issues: list[LabelIssue] = field(default_factory=list)
    """Texts whose labels are probably wrong, the first of them."""
    confusion: Array | None = None
    """Texts, int [true labels, predicted labels]."""
    confused: list[tuple[str, str, int]] = field(default_factory=list)
    """The most frequent pairs of a true and another, predicted label."""
    before: list[Bin] = field(default_factory=list)
    after: list[Bin] = field(default_factory=list)
    lengths: list[Group] = field(default_factory=list)
    slices: dict[str, list[Group]] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    mistaken: int = 0
    comparison: Comparison | None = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of the version."""
        return self.version.metadata

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Of its test."""
        return (self.metadata.get("metrics") or {}).get("test") or {}

    @property
    def abstention(self) -> Mapping[str, Any]:
        """Which answers are withheld; nothing without MAX_ERROR."""
        return self.metadata.get("abstention") or {}

    @property
    def answered(self) -> Group | None:
        """Of the test's texts, those whose answers do not abstain."""
        tested = self.abstention.get("test") or {}
        if not tested.get("answered"):
            return None
        right, count = tested["answered"] - tested["wrong"], tested["answered"]
        return Group("answered", count, right / count, *wilson(right, count))

    @property
    def label_issues(self) -> Mapping[str, Any]:
        """What is known of the data's wrong labels: how many texts were looked at and are suspected, by split."""
        return self.metadata.get("label_issues") or {}

    @property
    def classes(self) -> list[tuple[str, Mapping[str, float]]]:
        """Precision, recall, f1 and texts of each label, the weakest first."""
        found = self.metrics.get("per_class") or {}
        return sorted(found.items(), key=lambda pair: pair[1].get("f1", 0.0))


def gather(
    version: Version,
    decision: Decision | None,
    evidence: Evidence | None,
    answers: Answers | None,
    *,
    findings: Sequence[str],
    losses: Sequence[tuple[int, float]] = (),
    others: Sequence[Version] = (),
    matrix: Array | None = None,
    issues: Sequence[LabelIssue] = (),
) -> Facts:
    """The facts of a version.

    Args:
        version: that the report is of.
        decision: about it.
        evidence: the texts of its test; None if they are not kept.
        answers: to these texts; None if there are none.
        findings: what was found in its data, in sentences.
        losses: of some of its steps, by their numbers.
        others: versions of its store, the oldest first.
        matrix: the confusion matrix of the whole test, int [true labels, predicted labels].
        issues: texts whose labels are probably wrong.
    """
    test = (version.metadata.get("metrics") or {}).get("test") or {}
    tested = sum((version.metadata.get("data") or {}).get("counts", {}).get("test", {}).values())
    accuracy = test.get("accuracy")
    interval = wilson(round(accuracy * tested), tested) if accuracy is not None and tested else None
    f1_interval = None
    if matrix is not None and matrix.sum():
        drawn, f1_interval = resampled_figures(matrix)
        if 0 < np.trace(matrix) < matrix.sum():  # draws of a test that is all right never show a mistake
            interval = drawn
    facts = Facts(
        version,
        decision,
        labels=[clean(label) for label in version.labels],
        texts=0,
        interval=interval,
        f1_interval=f1_interval,
        findings=[clean(one) for one in findings],
        changed=changed_settings(version),
        steps=bought(version, others),
        losses=list(losses),
        issues=[_shown(issue) for issue in issues[:MOST_ISSUES]],
    )
    if evidence is None or answers is None or len(answers.scores) != len(evidence.texts):
        return facts
    return Facts(**{**facts.__dict__, **_answered(version, evidence, answers)})


def _answered(version: Version, evidence: Evidence, answers: Answers) -> dict[str, Any]:
    """What follows from answers to the texts of the test."""
    names = version.labels
    scores = np.array([row or [1 / len(names)] * len(names) for row in answers.scores], dtype=np.float64)
    readable = np.array([bool(row) for row in answers.scores])
    predicted = np.where(readable, scores.argmax(axis=1), -1)
    ids = {name: index for index, name in enumerate(names)}
    true = np.array([ids.get(label, -2) for label in evidence.labels])
    right, own = predicted == true, evidence.is_own
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    counted = own & readable & (true >= 0)
    np.add.at(confusion, (true[counted], predicted[counted]), 1)
    temperature = float((version.metadata.get("calibration") or {}).get("temperature") or 1.0)
    slices = {
        clean(name): _by_value(values, right[own])
        for name, values in evidence.columns.items()
        if len(values) == own.sum()
    }
    return {
        "texts": int(own.sum()),
        "confusion": confusion,
        "confused": _most_confused(confusion, [clean(name) for name in names]),
        "before": _reliability(_softened(scores[own], temperature), right[own]),
        "after": _reliability(scores[own], right[own]),
        "lengths": _by_length(np.array(answers.tokens)[own], np.array(answers.truncated, dtype=bool)[own], right[own]),
        "slices": {name: groups for name, groups in slices.items() if len(groups) > 1},
        "mistakes": _mistakes(evidence, answers, names, scores, predicted, right),
        "mistaken": int((~right).sum()),
        "comparison": _compare(evidence, answers, names, predicted, right),
    }


def _shown(issue: LabelIssue) -> LabelIssue:
    text = issue.text[:SHOWN_CHARACTERS] + ("…" if len(issue.text) > SHOWN_CHARACTERS else "")
    return replace(issue, text=clean(text), given=clean(issue.given), likely=clean(issue.likely))


def changed_settings(version: Version) -> dict[str, str]:
    """The settings of a version that are not the defaults, as environment variables."""
    defaults = Settings.from_environ({}).public()
    used = version.metadata.get("settings") or {}
    return {
        name.upper(): clean(str(int(value) if isinstance(value, bool) else value))
        for name, value in used.items()
        if name in defaults and value != defaults[name] and name not in WHERE_IT_RAN
    }


def bought(version: Version, others: Sequence[Version]) -> list[Step]:
    """What the labels of people brought: this version and those before it that had the same data without them."""

    def own_data(one: Version) -> Any:
        data = one.metadata.get("data") or {}
        prints = {name: value for name, value in (data.get("fingerprints") or {}).items() if name != "feedback"}
        return prints, one.labels, (one.metadata.get("base_model") or {}).get("sha256")

    def labels_of(one: Version) -> int:
        return int(((one.metadata.get("data") or {}).get("feedback") or {}).get("train", 0))

    until = version.metadata.get("created_at", "")
    same = [
        one
        for one in others
        if own_data(one) == own_data(version)
        and one.metadata.get("created_at", "") <= until
        and ((one.metadata.get("metrics") or {}).get("test") or {}).get("accuracy") is not None
    ]
    steps: list[Step] = []
    for one in same:
        labels, accuracy = labels_of(one), float(one.metadata["metrics"]["test"]["accuracy"])
        per_hundred = None
        if steps and labels > steps[-1].labels:
            per_hundred = 100 * (accuracy - steps[-1].accuracy) / (labels - steps[-1].labels)
        steps.append(Step(one.id, one.metadata.get("created_at", ""), labels, accuracy, per_hundred))
    return steps if any(step.labels for step in steps) and len(steps) > 1 else []


def clean(text: str) -> str:
    """A text for a page: control characters, which no page may hold or which turn lines around, become a sign."""
    return "".join(one if one.isprintable() or one in "\n\t " or _joins(one) else "�" for one in text)


def _joins(character: str) -> bool:
    """Whether it is one of the unseen characters that emoji and some writings are made with."""
    return character in "\u200c\u200d\u00ad\u00a0\u3000" or "\ufe00" <= character <= "\ufe0f"


def _softened(scores: Array, temperature: float) -> Array:
    """The probabilities that there would be without the temperature, float [texts, labels]."""
    logits = np.log(np.maximum(scores, 1e-12)) * temperature
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Array = odds / odds.sum(axis=1, keepdims=True)
    return found


def _reliability(scores: Array, right: Array) -> list[Bin]:
    confidence = scores.max(axis=1)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        Bin(float(confidence[bins == one].mean()), float(right[bins == one].mean()), int((bins == one).sum()))
        for one in np.unique(bins)
    ]


def _group(name: str, right: Array) -> Group:
    low, high = wilson(int(right.sum()), len(right))
    return Group(name, len(right), float(right.mean()), low, high)


def _by_value(values: Sequence[str], right: Array) -> list[Group]:
    """Accuracy by the value of a column, the largest group first."""
    found = np.array(values, dtype=object)
    groups = [_group(clean(value) or "(empty)", right[found == value]) for value in sorted(set(values))]
    return sorted(groups, key=lambda group: -group.texts)


def _by_length(tokens: Array, truncated: Array, right: Array) -> list[Group]:
    """Accuracy by tokens that were read, in groups of about as many texts; those that were cut are one of their own."""
    groups = []
    whole = ~truncated
    if whole.any():
        cuts = np.unique(np.quantile(tokens[whole], np.linspace(0, 1, LENGTH_GROUPS + 1)).round().astype(int))
        ends = cuts[1:] if len(cuts) > 1 else cuts
        begin = int(cuts[0])
        for end in ends.tolist():
            chosen = whole & (tokens >= begin) & (tokens <= end)
            if chosen.any():
                groups.append(_group(f"{begin} to {end}" if begin < end else f"{end}", right[chosen]))
            begin = end + 1
    if truncated.any():
        groups.append(_group("cut", right[truncated]))
    return groups


def _most_confused(confusion: Array, names: Sequence[str]) -> list[tuple[str, str, int]]:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [(int(true), int(other)) for true, other in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    return [(names[true], names[other], int(wrong[true, other])) for true, other in pairs if wrong[true, other]]


def _mistakes(
    evidence: Evidence, answers: Answers, names: Sequence[str], scores: Array, predicted: Array, right: Array
) -> list[Mistake]:
    words = {one.text: one for one in answers.words}
    confidence = np.where(predicted >= 0, scores.max(axis=1), 0.0)
    wrong = np.flatnonzero(~right)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:MOST_MISTAKES]
    own = evidence.is_own
    return [
        Mistake(
            cut_up(evidence.texts[index], words.get(index)),
            clean(evidence.labels[index]),
            clean(names[predicted[index]]) if predicted[index] >= 0 else "(not read)",
            float(confidence[index]),
            not own[index],
        )
        for index in order.tolist()
    ]


def cut_up(text: str, words: Words | None) -> list[Piece]:
    """A text in pieces, each word with how strongly it spoke for the answer, relative to the strongest."""
    most = max((abs(weight) for weight in words.weights), default=0.0) if words is not None else 0.0
    pieces, place = [], 0
    shown = text[:SHOWN_CHARACTERS]
    if words is not None and most > 0:
        for (start, end), weight in zip(words.spans, words.weights, strict=True):
            if not place <= start < end <= len(shown):
                break
            pieces += [Piece(clean(shown[place:start])), Piece(clean(shown[start:end]), weight / most)]
            place = end
    pieces.append(Piece(clean(shown[place:]) + ("…" if len(text) > len(shown) else "")))
    return [piece for piece in pieces if piece.text]


def _compare(
    evidence: Evidence, answers: Answers, names: Sequence[str], predicted: Array, right: Array
) -> Comparison | None:
    if answers.champion is None or answers.before is None or len(answers.before) != len(right):
        return None
    before, own = answers.before, evidence.is_own
    was_right = np.array([one == label for one, label in zip(before, evidence.labels, strict=True)])

    def differences(of: Array) -> list[Difference]:
        return [
            Difference(
                clean(evidence.texts[index][:SHOWN_CHARACTERS]),
                clean(evidence.labels[index]),
                clean(names[predicted[index]]) if predicted[index] >= 0 else "(not read)",
                clean(before[index] or "(not read)"),
            )
            for index in np.flatnonzero(of & own).tolist()[:MOST_DIFFERENCES]
        ]

    return Comparison(
        answers.champion,
        both=int((right & was_right & own).sum()),
        only_new=int((right & ~was_right & own).sum()),
        only_old=int((~right & was_right & own).sum()),
        neither=int((~right & ~was_right & own).sum()),
        lost=differences(~right & was_right),
        gained=differences(right & ~was_right),
    )
