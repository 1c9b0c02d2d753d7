"""A version's report, written as a page and as a model card."""

import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from tuneserve.artifact import REPORT_LOSSES, Part, Version
from tuneserve.errors import StoreError
from tuneserve.files import read_record, remove_leftovers, replace_file
from tuneserve.lifecycle import gate
from tuneserve.lifecycle.answers import Answers, read_answers
from tuneserve.lifecycle.decision import read_decision
from tuneserve.lifecycle.evidence import Evidence, read_evidence
from tuneserve.lifecycle.label_issues import LABEL_ISSUES, LabelIssue, read_label_issues, render_label_issues
from tuneserve.lifecycle.statistics import Array
from tuneserve.lifecycle.store import ABANDONED_S, Store
from tuneserve.report.facts import Facts, Piece, clean, gather
from tuneserve.report.plots import draw
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

FOLDER, PAGE, CARD = "report", "index.html", "README.md"
TEMPLATES = Path(__file__).parent
CLASSIFICATION = "text-classification"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HARDLY = 0.25
"""Weights below this share of the strongest are not shown."""
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")
CAPTIONS = {
    "curves": "Loss and validation figures by epoch",
    "confusion": "Confusion matrix",
    "reliability": "How often answers of a confidence are right, before and after calibration",
    "lengths": "Accuracy by the length of texts, with 95% intervals",
}


def write_report(store: Store, version: Version, settings: Settings) -> Path:
    """Write a version's report and return its page; a report that is there is replaced.

    The texts of its test are asked again where no answers to them are kept.

    Args:
        store: that holds the version.
        version: to report on.
        settings: `data_path` for what Matplotlib keeps; and of a trial, if one is needed.

    Raises:
        StoreError: the version is no classifier or cannot be asked, or the report cannot be written.
    """
    _require_classifier(version)
    began = time.perf_counter()
    decision = read_decision(version)
    evidence = answers = None
    try:
        evidence = read_evidence(store.evidence_folder / version.id)
    except StoreError as error:
        logger.warning("the report says nothing of single texts: %s", error)
    issues = _issues(store.evidence_folder / version.id)
    if evidence is not None:
        answers = _answers(store, version, evidence, settings)
    facts = gather(
        version,
        decision,
        evidence,
        answers,
        findings=_findings(version),
        losses=_losses(version),
        others=store.versions(),
        matrix=_matrix(version),
        issues=issues or [],
    )
    pictures = draw(facts, settings.data_path)
    beside = {f"{name}.svg": _alone(svg).encode() for name, svg in pictures.items()}
    if issues is not None:
        beside[LABEL_ISSUES] = render_label_issues(issues)
    pages = {CARD: render_card(facts, pictures).encode(), PAGE: render_page(facts, pictures).encode()}
    folder = version.folder / FOLDER
    try:
        _replace(folder, beside, pages)
    except OSError as error:
        raise StoreError(f"The report cannot be written to {folder}: {error}") from error
    logger.info("report: %s (%.1f s)", folder / PAGE, time.perf_counter() - began)
    return folder / PAGE


def _replace(folder: Path, beside: Mapping[str, bytes], pages: Mapping[str, bytes]) -> None:
    """Put a report in the place of the one before: at any time there are the files `beside` that a page shows.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir(exist_ok=True)
    for name, content in [*beside.items(), *pages.items()]:
        replace_file(folder / name, content)
        (folder / name).chmod(0o644)  # other users may serve it
    for path in folder.glob("*.svg"):
        if path.name not in beside:
            path.unlink(missing_ok=True)
    remove_leftovers(folder, older_than_s=ABANDONED_S)  # somebody else may write now


def _require_classifier(version: Version) -> None:
    task = version.metadata.get("task") or CLASSIFICATION
    if task != CLASSIFICATION or not version.labels:
        why = f"for TASK={task}" if task != CLASSIFICATION else "without labels"
        raise StoreError(f"No report of version {version.id}: it is {why}, and a report tells how a classifier did.")


def _answers(store: Store, version: Version, evidence: Evidence, settings: Settings) -> Answers | None:
    """The kept answers, or those of a trial."""
    folder = store.evidence_folder / version.id
    try:
        found = read_answers(folder)
    except StoreError as error:
        logger.warning("%s; the texts are asked again", error)
        found = None
    if found is not None and len(found.scores) == len(evidence.texts):
        return found
    decision = read_decision(version)
    champion = None
    if decision is not None and decision.champion is not None:
        champion = next((one for one in store.versions() if one.id == decision.champion), None)
    trial = gate.run_trial(version, champion, evidence, settings.model_copy(update={"report": True}))
    if (candidate := trial["candidate"]) is None or candidate["error"]:
        raise StoreError(f"version {version.id} cannot be asked: {candidate and candidate['error']}")
    gate.keep_answers(store, version, champion, trial)
    return read_answers(folder)


def _findings(version: Version) -> list[str]:
    """What was found in the data; of a version from elsewhere nothing is known."""
    from tuneserve.training.checks import describe

    data = version.metadata.get("data") or {}
    return describe(data) if {"counts", "empty_texts"} <= set(data) else []


def _issues(folder: Path) -> list[LabelIssue] | None:
    """The labels that are probably wrong; None if it is not known."""
    try:
        return read_label_issues(folder)
    except StoreError as error:
        logger.warning("the report names no labels that are probably wrong: %s", error)
        return None


def _matrix(version: Version) -> Array | None:
    """The confusion matrix of its whole test; None of a version that was not tested."""
    path = version.folder / FOLDER / "test.json"
    try:
        matrix = np.array(read_record(path, TESTED, max_bytes=MAX_BYTES).confusion_matrix, dtype=np.int64)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None
    return matrix if matrix.shape == (len(version.labels),) * 2 and (matrix >= 0).all() else None


def _losses(version: Version) -> list[tuple[int, float]]:
    """The losses of its steps; a short training, or an older release, has none."""
    try:
        return read_record(version.folder / REPORT_LOSSES, LOSSES)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", version.folder / REPORT_LOSSES, error)
        return []


LOSSES = TypeAdapter(list[tuple[int, float]])


class _Tested(Part):
    confusion_matrix: list[list[int]]


TESTED = TypeAdapter(_Tested)
MAX_BYTES = 64 << 20
"""Of a test's figures, whose matrix has as many cells as there are pairs of labels."""


def render_page(facts: Facts, pictures: Mapping[str, str]) -> str:
    """The report as HTML that needs nothing else; `pictures` are SVG elements by name."""
    from markupsafe import Markup

    safe = {name: Markup(svg) for name, svg in pictures.items()}
    return _render("report.html", facts, escape=True, pictures=safe)


def render_card(facts: Facts, pictures: Mapping[str, str]) -> str:
    """The report as a model card: Markdown with the front matter that the Hugging Face hub reads."""
    return _render("card.md", facts, escape=False, pictures=pictures)


def _render(template: str, facts: Facts, *, escape: bool, pictures: Mapping[str, str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"pct": _percent, "fig": _figure, "md": escape_markdown, "shade": shade, "json": _quoted}
    base = facts.metadata.get("base_model") or {}
    page = environment.get_template(template).render(
        facts=facts,
        pictures=pictures,
        captions=CAPTIONS,
        hub_name=base.get("name") if HUB_NAME.fullmatch(str(base.get("name", ""))) else None,
    )
    return clean(page)


def escape_markdown(text: object) -> str:
    """A text that no Markdown reader takes for markup, in one line."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def shade(piece: Piece) -> str:
    """How a word is shown: `for3` (strongest) to `for1`, `against1` to `against3`, or an empty text."""
    if abs(piece.weight) < HARDLY:
        return ""
    return f"{'for' if piece.weight > 0 else 'against'}{1 + min(2, int(abs(piece.weight) * 3))}"


def _quoted(text: object) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def _percent(share: Any) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _figure(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def _alone(svg: str) -> str:
    """A picture as a file of its own: on white, its ink dark."""
    return svg.replace("currentColor", "#1b2230").replace("<svg ", '<svg style="background: #fff" ', 1) + "\n"
