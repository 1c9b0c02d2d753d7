"""What Prometheus reads at `GET /metrics`."""

import math
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tuneserve.errors import UnavailableError
from tuneserve.lifecycle.drift import Report
from tuneserve.lifecycle.feedback import Feedback

Counted = TypeVar("Counted", Counter, Gauge)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The server's own registry."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("tuneserve_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "tuneserve_request_seconds",
            "Time from a request's first byte to its answer's last.",
            ["route"],
            registry=registry,
            buckets=SECONDS,
        )
        stages = Histogram(
            "tuneserve_stage_seconds",
            "Time of a request in the tokenizer and the queue, and of a batch in the engine.",
            ["stage"],
            registry=registry,
            buckets=SECONDS,
        )
        self.stages = {stage: stages.labels(stage) for stage in ("tokenize", "queue", "infer")}
        self.model = Gauge("tuneserve_model_info", "1 for the version that answers.", ["version"], registry=registry)
        self.swaps = Counter(
            "tuneserve_swaps", "Versions that came to be served, or were refused.", ["outcome"], registry=registry
        )
        self.feedback_labels = Gauge("tuneserve_feedback_labels", "Labels that people have given.", registry=registry)
        share = "Share of the newest labelled answers of this version that were right"
        self.feedback_accuracy = {
            "accuracy": Gauge("tuneserve_feedback_accuracy", f"{share}; NaN while there are none.", registry=registry),
            "low": Gauge("tuneserve_feedback_accuracy_low", f"{share}: lower end of 95%.", registry=registry),
            "high": Gauge("tuneserve_feedback_accuracy_high", f"{share}: upper end of 95%.", registry=registry),
        }
        self.feedback_dropped = Gauge(
            "tuneserve_feedback_dropped", "Answers that could not be remembered.", registry=registry
        )
        self.promise_kept = Gauge(
            "tuneserve_promise_kept",
            "0 if labelled answers show more errors than MAX_ERROR promises, else 1; NaN without a promise or labels.",
            registry=registry,
        )
        self.show_promise(None)
        self.queue_tokens = Gauge("tuneserve_queue_tokens", "Tokens that wait for the engine.", registry=registry)
        self.batch_texts = Histogram(
            "tuneserve_batch_texts",
            "Texts that went through the engine together.",
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        )
        self.tokens = Counter("tuneserve_tokens", "Tokens that went through the engine.", registry=registry)
        self.written = Counter(
            "tuneserve_written_tokens", "Tokens that a model which writes has written.", registry=registry
        )
        self.first_token = Histogram(
            "tuneserve_first_token_seconds",
            "Time from a prompt's queueing to the first token that is written on it.",
            registry=registry,
            buckets=SECONDS,
        )
        self.places = Counter(
            "tuneserve_places", "Places that went through the engine: tokens and padding.", registry=registry
        )
        self.texts = Counter("tuneserve_texts", "Texts answered.", registry=registry)
        self.truncated = Counter(
            "tuneserve_truncated_texts", "Texts of which only the beginning was read.", registry=registry
        )
        self.abstained = Counter(
            "tuneserve_abstained_texts", "Texts whose answer was too uncertain for MAX_ERROR.", registry=registry
        )
        self.labels = Counter("tuneserve_predicted", "Texts by predicted label.", ["label"], registry=registry)
        self.engine_failures = Counter(
            "tuneserve_engine_failures", "Texts on which the engine failed.", registry=registry
        )
        self.not_finite = Counter(
            "tuneserve_not_finite", "Texts for which the engine gave a figure that is not a number.", registry=registry
        )
        self.drift = Gauge(
            "tuneserve_drift",
            "How far the last texts are from the reference.",
            ["figure"],
            registry=registry,
        )
        self.drift_threshold = Gauge(
            "tuneserve_drift_threshold", "Smallest difference that is called drift.", ["figure"], registry=registry
        )
        self.drift_p_value = Gauge(
            "tuneserve_drift_p_value",
            "How likely chance makes such a difference, corrected for the number of figures.",
            ["figure"],
            registry=registry,
        )
        self.drift_detected = Gauge("tuneserve_drift_detected", "1 if any figure is called drift.", registry=registry)

    def show_drift(self, report: Report) -> None:
        """Let the gauges say what a report says; a report that judges nothing has no figures."""
        self.drift_detected.set(report.drifted)
        for gauge in (self.drift, self.drift_threshold, self.drift_p_value):
            gauge.clear()
        for figure in report.figures:
            self.drift.labels(figure.name).set(figure.value)
            self.drift_threshold.labels(figure.name).set(figure.threshold)
            self.drift_p_value.labels(figure.name).set(figure.p_value)

    def batch(self, texts: int, tokens: int, places: int) -> None:
        """Note a batch."""
        self.batch_texts.observe(texts)
        self.tokens.inc(tokens)
        self.places.inc(places)

    def show_feedback(self, feedback: Feedback, version: str) -> None:
        """Bring the figures of feedback up to date; without its database they stay as they are."""
        self.feedback_dropped.set(feedback.dropped)
        try:
            self.feedback_labels.set(feedback.counts()["labels"])
            accuracy = feedback.accuracy(version)
        except UnavailableError:
            return
        for name, gauge in self.feedback_accuracy.items():
            gauge.set(getattr(accuracy, name, math.nan))

    def show_promise(self, kept: bool | None) -> None:
        """Say whether the promise of the version that answers is kept; None where nobody knows."""
        self.promise_kept.set(math.nan if kept is None else kept)

    def totals(self, routes: Collection[str]) -> dict[str, Any]:
        """How requests to some routes ended since the start, and how many took at most so many seconds.

        Returns:
            `answered`, `refused` (429), `faulty` (other 4xx) and `failed` (5xx), and `seconds`: the upper bound of each
            bucket, None for the last, with the answers up to it.
        """
        ends = {"answered": 0, "refused": 0, "faulty": 0, "failed": 0}
        for sample in next(iter(self.requests.collect())).samples:
            if sample.name.endswith("_total") and sample.labels["route"] in routes:
                status = int(sample.labels["status"])
                kind = "refused" if status == 429 else "failed" if status >= 500 else "faulty" if status >= 400 else ""
                ends[kind or "answered"] += int(sample.value)
        buckets: dict[float, int] = {}
        for sample in next(iter(self.seconds.collect())).samples:
            if sample.name.endswith("_bucket") and sample.labels["route"] in routes:
                bound = float(sample.labels["le"])
                buckets[bound] = buckets.get(bound, 0) + int(sample.value)
        seconds = [(bound if math.isfinite(bound) else None, count) for bound, count in sorted(buckets.items())]
        return {**ends, "seconds": seconds}

    def render(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def add(self, kind: type[Counted], name: str, doc: str, labels: Sequence[str] = ()) -> Counted:
        """A figure that not every server has."""
        return kind(name, doc, labels, registry=self._registry)


class ModelFigures:
    """Of a server with many models."""

    def __init__(self, metrics: Metrics) -> None:
        self.loaded = metrics.add(Gauge, "tuneserve_models_loaded", "Models that are loaded.")
        self.hits = metrics.add(Counter, "tuneserve_model_hits", "Requests whose model was there.")
        self.loads = metrics.add(Counter, "tuneserve_model_loads", "Models loaded, or refused.", ["outcome"])
        self.evictions = metrics.add(Counter, "tuneserve_model_evictions", "Models unloaded for want of memory.")
