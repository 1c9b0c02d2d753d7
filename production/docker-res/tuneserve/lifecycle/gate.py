"""The gate: a candidate becomes champion only after it was loaded in a fresh process, tested and compared there.

A candidate passes if it answers as it did at training, reaches the floors, is not worse than the champion on the same
texts (neither was trained on them), and is not much larger or slower. The texts are those of the owner's test. What was
held out of the feedback is a second test: a candidate that is shown to be worse there is refused too. The decision is
written beside its weights.
"""

import json
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuneserve.artifact import Version
from tuneserve.errors import NoModelError, RefusedError, StoreError
from tuneserve.lifecycle.answers import SHAPE as ANSWERS_SHAPE
from tuneserve.lifecycle.answers import write_answers
from tuneserve.lifecycle.decision import Check, Decision, read_decision, write_decision
from tuneserve.lifecycle.evidence import Evidence, read_evidence, unseen
from tuneserve.lifecycle.statistics import CONFIDENCE, Array, paired_bootstrap, sign_test
from tuneserve.lifecycle.store import Store
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

ENGINE_POINTS = 0.01
"""How far the engine's accuracy may differ from torch's on the same texts."""
BORDERLINE = 0.05
"""Share of texts so near the decision boundary that rounding decides: their variance is that of a fair coin."""
TRIAL_TIMEOUT_S = 1800.0

PROGRAM = Path(__file__).resolve().parents[2]
TRIAL = "tuneserve.serving.probe"
"""The module that tries versions, run as a process: nothing here may import the serving half."""


@dataclass(frozen=True)
class Bounds:
    """What a candidate must reach; fractions, not percentages."""

    min_accuracy: float
    min_recall: float
    max_accuracy_drop: float
    max_latency_increase: float

    @classmethod
    def of(cls, settings: Settings) -> "Bounds":
        """The bounds that the settings give."""
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})


def admit(store: Store, candidate: Version, settings: Settings) -> Decision:
    """Judge a candidate, store the decision, and make it the champion if it passed.

    A refused version stays refused. A person's later choice of another version stands until settings or data change.

    Raises:
        RefusedError: it did not pass, now or before.
        StoreError: the store cannot be read or written.
    """
    champion = _champion(store)
    known = read_decision(candidate)
    if champion is not None and champion.id == candidate.id:
        if not _is_pointed_at(store, candidate):
            store.set_champion(candidate)
        return known or Decision.unknown(candidate.id)
    if known is not None and not known.stands:
        why = "people rolled it back" if known.withdrawn_at else known.sentence
        raise RefusedError(
            f"version {candidate.id} has these settings and data, and may not serve: {why}. "
            f"Change either, or run.py promote {candidate.id}."
        )
    if known is not None and candidate.id == store.challenger_id():
        return known
    chosen = read_decision(champion) if champion is not None else None
    if known is not None and chosen is not None and chosen.overrides(known):
        logger.info("version %s has these settings and data; people chose %s after it", candidate.id, chosen.version)
        return known
    evidence = read_evidence(store.evidence_folder / candidate.id)
    found = run_trial(candidate, champion, evidence, settings)
    keep_answers(store, candidate, champion, found)
    clean = unseen(store.evidence_folder / champion.id, evidence.texts) if champion else None
    decision = judge(candidate, champion, evidence, found, clean, Bounds.of(settings))
    write_decision(candidate, decision)
    for check in decision.checks:
        logger.info("gate: %s: %s", check.name, check.sentence)
    if not decision.stands:
        with suppress(StoreError):  # an unreadable pointer, which is in the log already
            store.forget_old(settings.keep_versions)
        raise RefusedError(f"version {candidate.id} is refused: {decision.sentence}. The champion stays.")
    if champion is not None and settings.shadow_requests:
        store.set_challenger(candidate)
        logger.info("version %s answers in the champion's shadow first: %s", candidate.id, decision.sentence)
        return decision
    store.set_champion(candidate)
    logger.info("version %s is the champion: %s", candidate.id, decision.sentence)
    if gone := store.forget_old(settings.keep_versions):
        logger.info("removed old versions: %s (KEEP_VERSIONS=%d)", ", ".join(gone), settings.keep_versions)
    return decision


def _champion(store: Store) -> Version | None:
    try:
        return store.champion()
    except NoModelError:
        return None
    except StoreError as error:
        instead = next(iter(store.last_good()), None)
        logger.warning("%s; compared with %s instead", error, instead.id if instead else "nothing")
        return instead


def _is_pointed_at(store: Store, version: Version) -> bool:
    try:
        return store.champion_id() == version.id
    except StoreError:
        return False


def run_trial(
    candidate: Version, champion: Version | None, evidence: Evidence, settings: Settings
) -> dict[str, dict[str, Any] | None]:
    """Load both in a fresh process and let them answer the same texts; `serving/probe.py` documents the result.

    If the process dies, the champion may be the cause, so the candidate is tried again alone.
    """
    versions = [candidate] if champion is None else [candidate, champion]
    trials, ended = _in_fresh_process(versions, evidence, settings)
    if trials is None and champion is not None:
        trials, ended = _in_fresh_process([candidate], evidence, settings)
        trials = trials and [*trials, {"error": "the champion cannot be loaded"}]
    if trials is None:
        trials = [{"error": f"the process that tried it {ended}"}, None]
    return {"candidate": trials[0], "champion": trials[1] if champion is not None else None}


def keep_answers(store: Store, candidate: Version, champion: Version | None, found: Mapping[str, Any]) -> None:
    """Put what a trial answered beside the evidence, for the version's report; a full disk is no reason to fail."""
    trial, other = found["candidate"], found["champion"]
    if "answers" not in trial:
        return
    before = other["predicted"] if champion is not None and other is not None and not other["error"] else None
    compared = {"champion": champion.id, "before": before} if champion is not None and before is not None else {}
    try:
        write_answers(store.evidence_folder / candidate.id, ANSWERS_SHAPE.validate_python(trial["answers"] | compared))
    except (OSError, ValueError) as error:
        logger.warning("the answers of version %s cannot be kept for its report: %s", candidate.id, error)


def _in_fresh_process(
    versions: Sequence[Version], evidence: Evidence, settings: Settings
) -> tuple[list[dict[str, Any] | None] | None, str]:
    asked = {
        "versions": [str(one.folder) for one in versions],
        "texts": evidence.texts,
        "labels": evidence.labels if settings.report else None,
        "settings": settings.public() | {"long_text": "truncate"},
    }
    with tempfile.TemporaryFile() as question, tempfile.TemporaryFile() as answer:  # nameless: a kill leaves nothing
        question.write(json.dumps(asked).encode())
        question.seek(0)
        command = [sys.executable, "-m", TRIAL]
        try:
            code = subprocess.run(
                command, stdin=question, stdout=answer, cwd=PROGRAM, timeout=TRIAL_TIMEOUT_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return None, f"took more than {TRIAL_TIMEOUT_S:.0f} s"
        if code:
            return None, f"ended with exit code {code}"
        answer.seek(0)
        return json.loads(answer.read()), ""


def judge(
    candidate: Version,
    champion: Version | None,
    evidence: Evidence,
    found: dict[str, Any],
    clean: Array | None,
    bounds: Bounds,
) -> Decision:
    """The decision on the results of a trial.

    Args:
        candidate: the version to be judged.
        champion: the one that serves, if there is one.
        evidence: the texts to judge by.
        found: of each version `{"error": str | None, "predicted": [label], "latency_ms": float, "bytes": int}`.
        clean: which of the texts the champion was not trained on, bool [texts].
        bounds: what the candidate must reach.
    """
    trial, other = found["candidate"], found["champion"]
    before = champion.id if champion is not None else None
    if trial["error"]:
        checks = [Check("loads", False, None, None, trial["error"])]
        return Decision(candidate.id, "refused", "gate", trial["error"], before, checks)
    own = evidence.is_own
    all_labels = np.array(evidence.labels)
    all_right = np.array(trial["predicted"]) == all_labels
    labels, right = all_labels[own], all_right[own]
    figures: dict[str, Any] = {
        "texts": len(labels),
        "accuracy": _rounded(right.mean()),
        "recall": {label: _rounded(right[labels == label].mean()) for label in sorted(set(labels.tolist()))},
        "latency_ms": trial["latency_ms"],
        "bytes": trial["bytes"],
    }
    if not own.all():
        figures["feedback"] = {"texts": int((~own).sum()), "accuracy": _rounded(all_right[~own].mean())}
    compared = False
    checks = [
        Check("loads", True, None, None, "loads in a fresh process and gives its golden answers"),
        _same_as_torch(candidate, right),
        *_floors(figures, bounds),
    ]
    if champion is not None and other is not None and clean is not None:
        if other["error"]:
            checks.append(Check("champion", True, None, None, f"nothing to compare with: {other['error']}"))
        else:
            compared = True
            all_right_before = np.array(other["predicted"]) == all_labels
            figures["champion"] = {
                "version": champion.id,
                "accuracy": _rounded(all_right_before[own].mean()),
                "latency_ms": other["latency_ms"],
                "bytes": other["bytes"],
            }
            max_drop = bounds.max_accuracy_drop
            checks.append(_not_worse(right, all_right_before[own], clean[own], max_drop, figures))
            if not own.all():
                rest = clean & ~own
                figures["feedback"]["champion_accuracy"] = _rounded(all_right_before[~own].mean())
                checks.append(_not_shown_worse(all_right[rest], all_right_before[rest], max_drop, figures["feedback"]))
            increase = bounds.max_latency_increase
            checks.append(_not_above("latency", "ms", trial["latency_ms"], other["latency_ms"], increase))
            checks.append(_not_above("size", "MB", trial["bytes"] / 1e6, other["bytes"] / 1e6, increase))
    if not own.all() and not compared:
        share, count = figures["feedback"]["accuracy"], figures["feedback"]["texts"]
        said = f"feedback: {share:.2%} of {count} texts right, with no champion to compare with"
        checks.append(Check("feedback", True, share, None, said))
    failed = [check.sentence for check in checks if not check.passed]
    comparison = [check.sentence for check in checks if check.name in ("comparison", "feedback")]
    sentence = "; ".join(failed or comparison or ["passed, with no champion before it"])
    verdict: Any = "refused" if failed else "accepted"
    return Decision(candidate.id, verdict, "gate", sentence, before, checks, figures)


def _same_as_torch(candidate: Version, right: Array) -> Check:
    """The exported engine against what torch measured on the whole test when the version was saved."""
    try:
        accuracy, torch_accuracy = float(right.mean()), float(candidate.metadata["metrics"]["test"]["accuracy"])
        tested = sum(candidate.metadata["data"]["counts"]["test"].values())
    except (KeyError, TypeError):
        return Check(
            "engine", False, None, None, "its metadata.json does not say what torch measured on how many texts"
        )
    # A sample of a larger test varies by chance; on the same texts only those near the boundary differ.
    variance = BORDERLINE if tested <= len(right) else torch_accuracy * (1 - torch_accuracy)
    bound = ENGINE_POINTS + 3 * math.sqrt(variance / len(right))
    difference = abs(accuracy - torch_accuracy)
    return Check(
        "engine",
        difference <= bound,
        _rounded(difference),
        _rounded(bound),
        f"the engine has {accuracy:.2%} right where torch had {torch_accuracy:.2%}",
    )


def _floors(figures: dict[str, Any], bounds: Bounds) -> list[Check]:
    accuracy = figures["accuracy"]
    label, recall = min(figures["recall"].items(), key=lambda pair: pair[1])
    return [
        _floor("accuracy", accuracy, bounds.min_accuracy, f"accuracy {accuracy:.2%}"),
        _floor("recall", recall, bounds.min_recall, f"the lowest recall, {recall:.2%} of {label!r},"),
    ]


def _floor(name: str, value: float, bound: float, words: str) -> Check:
    passed = value >= bound
    verdict = "reaches" if passed else "is below"
    return Check(name, passed, value, bound, f"{words} {verdict} MIN_{name.upper()}={bound:g}")


def _not_worse(right: Array, right_before: Array, clean: Array, max_drop: float, figures: dict[str, Any]) -> Check:
    """Non-inferiority: the lower bound of the paired bootstrap must not be below the allowed drop."""
    learned = int((~clean).sum())
    figures["champion"] |= {"texts_it_learned_from": learned, "clean_texts": int(clean.sum())}
    said = f"; {learned} texts that the champion has learned from are left out" if learned else ""
    if not clean.any():
        return Check(
            "comparison", True, None, None, f"no comparison: the champion has learned from all {len(clean)} test texts"
        )
    difference = float(right[clean].mean() - right_before[clean].mean())
    low, high = paired_bootstrap(right[clean], right_before[clean])
    figures["champion"] |= {"difference": _rounded(difference), "low": _rounded(low), "high": _rounded(high)}
    passed = low >= -max_drop
    verdict = "not worse than" if passed else "may be worse than"
    return Check(
        "comparison",
        passed,
        _rounded(low),
        -max_drop,
        f"{verdict} the champion: {100 * difference:+.2f} points on {clean.sum()} texts, with 95% confidence at least "
        f"{100 * low:+.2f} where {-100 * max_drop:+g} is allowed (MAX_ACCURACY_DROP){said}",
    )


def _not_shown_worse(right: Array, right_before: Array, max_drop: float, figures: dict[str, Any]) -> Check:
    """On feedback: refused is what is worse by more than the allowed drop and by more than chance explains.

    People send few labels, and mostly of answers that were wrong: to ask for a proof that a candidate is not worse
    would let a handful of texts hold up every version, so here the proof is asked for the other way round.
    """
    count = len(right)
    figures["clean_texts"] = count
    if not count:
        return Check("feedback", True, None, None, "feedback: the champion has learned from all texts held out of it")
    gained, lost = int((right & ~right_before).sum()), int((~right & right_before).sum())
    difference, chance = (gained - lost) / count, sign_test(gained, lost)
    figures |= {"difference": _rounded(difference), "p_value": _rounded(chance)}
    failed = difference < -max_drop and chance <= 1 - CONFIDENCE
    verdict = "worse than the champion" if failed else "not shown to be worse than the champion"
    return Check(
        "feedback",
        not failed,
        _rounded(difference),
        -max_drop,
        f"on feedback {verdict}: {100 * difference:+.2f} points on {count} texts ({gained} gained, {lost} lost; chance "
        f"explains that with p = {chance:.2g})",
    )


def _not_above(name: str, unit: str, value: float, before: float, max_increase: float) -> Check:
    bound = before * (1 + max_increase)
    passed = value <= bound
    more = "" if passed else f", more than MAX_LATENCY_INCREASE={max_increase:g} allows"
    sentence = f"{name} {value:.3g} {unit}, the champion's {before:.3g}{more}"
    return Check(name, passed, _rounded(value), _rounded(bound), sentence)


def _rounded(value: Any) -> float:
    return round(float(value), 6)
