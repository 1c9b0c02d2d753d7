"""The recipe, top to bottom: from settings to a version in the store that the gate has judged."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tuneserve
from tuneserve.artifact import Version
from tuneserve.code import code_hash
from tuneserve.files import CACHE_PARTS, in_use, remove_leftovers
from tuneserve.hardware import BESIDE, Precision, choose_device, choose_precision
from tuneserve.lifecycle import gate
from tuneserve.lifecycle.decision import read_decision
from tuneserve.lifecycle.evidence import MAX_TEXTS, Evidence, write_evidence
from tuneserve.lifecycle.feedback_database import FILE, labelled_texts
from tuneserve.lifecycle.label_issues import LabelIssue, write_label_issues
from tuneserve.lifecycle.secret import read_secret
from tuneserve.lifecycle.status import Lock, Status, hold
from tuneserve.lifecycle.store import Store
from tuneserve.redaction import redact_url
from tuneserve.report.writing import write_report
from tuneserve.settings import Settings
from tuneserve.signals import Stop
from tuneserve.tables.rows import Columns
from tuneserve.text import TextEncoder
from tuneserve.training import base_model, checks, data, features, feedback, label_issues
from tuneserve.training.checkpoint import Checkpoints
from tuneserve.training.dynamics import Dynamics
from tuneserve.training.exporters import Exporter, choose_exporters
from tuneserve.training.few import HeldOut, fit_few, read_features
from tuneserve.training.loop import Recipe, Run, fit_model
from tuneserve.training.model import build_model, load_tokenizer, rehearse, require_known_words, require_reloadable
from tuneserve.training.publication import publish
from tuneserve.training.slices import read_slices
from tuneserve.training.tokens import Array, TokenizedSplit, tokenize
from tuneserve.training.trackers import Trackers, open_trackers, require_extra
from tuneserve.training.world import World

logger = logging.getLogger(__name__)

DECISIVE = {
    *("num_train", "num_test", "valid_pct", "min_valid", "test_pct", "num_max_positions"),
    *("train_body", "n_epochs", "min_steps", "batch_size"),
    *("labels", "min_class_size", "rare_labels", "label_issues"),
    *("lr", "dropout", "max_norm", "class_weights", "label_smoothing", "patience", "select_by", "seed"),
    "max_error",
}
"""The settings that, with the data and the base model, decide what training ends with."""


def train(settings: Settings, stop: Stop, *, threads: int, environ: Mapping[str, str] | None = None) -> Version | None:
    """Train a version, and make it the champion if it passes the gate; what is trained already is not trained again.

    Args:
        settings: of the run.
        stop: asked whether to end early.
        threads: CPU threads to compute with.
        environ: where torchrun's variables stand if this is one of several processes, and BESIDE beside a server.

    Returns:
        The version; None in processes that only help.

    Raises:
        TuneserveError: with the reason, in the user's words.
        RefusedError: the version did not pass the gate.
        BusyError: another process trains for this store.
        SystemExit: a signal came; what was learned so far is in a checkpoint.
    """
    require_extra(settings.mlflow_tracking_uri.get_secret_value())
    exporters = choose_exporters(settings)
    device, precision = prepare_device(settings, threads)
    store = Store(settings.model_path)
    with World.joined(environ or {}, device) as world, ExitStack() as held:
        lock, status = None, Status(None)
        if world.leads:  # of several processes, this one alone writes
            store.prepare(new=BESIDE not in (environ or {}))
            lock = held.enter_context(hold(store.lock))
            status = held.enter_context(Status(store.status_file))
            if lock.exclusive:
                remove_leftovers(store.versions_folder, store.evidence_folder, *store.checkpoints_folder.glob("*"))
        held.enter_context(in_use(settings.data_path, *CACHE_PARTS))
        began = time.perf_counter()

        labelled = read_feedback(settings, world)
        with world.one_a_node_first():
            base, splits = gather(settings, labelled)
        status.found(checks.describe(splits.findings))

        fingerprint = fingerprint_run(settings, base, splits, exporters)
        known = store.find(fingerprint) if lock else None
        if world.any(known is not None):
            if lock and known:
                logger.info("nothing to train: version %s has these settings and data", known.id)
                judge(settings, store, known, splits, lock, status)
            return known

        with world.one_a_node_first():
            tokenizer, tokens = read_tokens(settings, base, splits)
        require_known_words(tokenizer, tokens["train"])
        build = partial(
            build_model,
            base.folder,
            splits.labels,
            dropout=settings.dropout,
            seed=settings.seed,
            device=device,
            pad_id=tokenizer.pad_token_id,
        )
        model = build(reads_mean=splits.cross_validates or not settings.train_body)
        require_reloadable(model)
        rehearse(model, tokens, max_tokens=settings.num_max_positions)

        checkpoints = Checkpoints(
            store.checkpoints_folder / fingerprint[:16], every_minutes=settings.checkpoint_minutes
        )
        if lock and lock.exclusive:
            checkpoints.forget_others()
        found: label_issues.Found | None = None
        dynamics: Dynamics | None = None
        if settings.label_issues == "report" and settings.train_body and not splits.cross_validates:
            dynamics = Dynamics(tokens["train"], len(splits.labels), settings.seed)
            checkpoints.more = dynamics.tensors()
        elif settings.label_issues != "off":
            found = judge_labels(settings, base, build, tokens, splits, checkpoints, world, precision=precision)
        judged = splits
        if found is not None and settings.label_issues == "drop":
            splits = label_issues.drop(splits, found)
            with world.one_a_node_first():
                tokens = {**tokens, "train": read_tokens(settings, base, splits)[1]["train"]}
            status.found(checks.describe(splits.findings))
        trackers = held.enter_context(_trackers(settings, fingerprint, checkpoints, world))
        trackers.start({**settings.public(), "device": device.type, "precision": precision, "processes": world.size})
        recipe = choose_recipe(settings, tokens["train"], splits.labels)
        steps = math.ceil(len(splits.train) / settings.batch_size)
        status.training(steps=steps * recipe.epochs, epochs=recipe.epochs)

        def record(step: int, figures: Mapping[str, float]) -> None:
            trackers.record(step, figures)
            status.step(step, figures)

        with stop.deferred():  # a signal that comes in here leaves a checkpoint
            run = Run(checkpoints, lambda: stop.requested, record, world, dynamics)
            held_out: HeldOut | None = None
            if splits.cross_validates:
                learns = settings.train_body
                seen, held_out = fit_few(
                    model, tokens["train"], splits.labels, recipe, run, precision=precision, body=learns
                )
            else:
                fit = (
                    fit_model
                    if settings.train_body
                    else partial(features.fit_head, body=base.content, cache=settings.data_path)
                )
                seen = fit(model, tokens, splits.labels, recipe, run, precision=precision)
        learned = dynamics.mean(world) if dynamics is not None else None
        if not lock:
            return None

        def describe(logits: Mapping[str, Array]) -> dict[str, Any]:
            nonlocal found
            if learned is not None:
                found = label_issues.judge_learned(learned, logits, tokens)
            return {} if found is None else {"label_issues": found.record}

        status.phase("testing")
        metadata = {
            "fingerprint": fingerprint,
            "labels": splits.labels,
            "settings": settings.public(),
            "base_model": base.record(),
            "data": describe_data(settings, splits, tokens),
            "device": device.type,
            "precision": precision,
            "processes": world.size,
            **seen.record(),
        }
        version = publish(
            store,
            model,
            tokenizer,
            tokens,
            metadata,
            precision=precision,
            exporters=exporters,
            began=began,
            shares=not settings.train_body,
            losses=status.losses,
            held_out=held_out,
            describe=describe,
        )
        trackers.finish(version)
        checkpoints.remove()

        issues = label_issues.quote(judged, found) if found is not None else None
        judge(settings, store, version, splits, lock, status, issues)
        return version


def prepare_device(settings: Settings, threads: int) -> tuple[torch.device, Precision]:
    """The device and the number format to compute with; libraries are told to be quiet and to use so many threads."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    device, reason = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    logger.info("device: %s (%s), %s, %d CPU threads", device.type, reason, precision, threads)
    return device, precision


def choose_recipe(settings: Settings, train: TokenizedSplit, labels: Sequence[str]) -> Recipe:
    """The settings as the training loop takes them."""
    weights = None
    if settings.class_weights == "balanced":
        sizes = np.bincount(train.label_ids, minlength=len(labels))
        weights = (len(train) / (len(labels) * sizes)).tolist()
    steps = math.ceil(len(train) / settings.batch_size)
    return Recipe(
        epochs=max(settings.n_epochs, math.ceil(settings.min_steps / steps)),
        batch_size=settings.batch_size,
        learning_rate=settings.lr,
        max_norm=settings.max_norm,
        seed=settings.seed,
        class_weights=weights,
        label_smoothing=settings.label_smoothing,
        patience=settings.patience,
        select_by=settings.select_by,
    )


def judge_labels(
    settings: Settings,
    base: base_model.BaseModel,
    build: Callable[..., PreTrainedModel],
    tokens: Mapping[str, TokenizedSplit],
    splits: checks.Splits,
    checkpoints: Checkpoints,
    world: World,
    *,
    precision: Precision,
) -> label_issues.Found | None:
    """The labels that are probably wrong, the same in all processes and after an interruption; None if unknown.

    The head alone is trained on the very features that labels are judged by.

    Raises:
        StoreError: they cannot be kept beside the checkpoints.
    """
    found: label_issues.Found | None = None
    if world.leads:
        memory = checkpoints.folder / "label-issues.json"
        found = label_issues.recall(memory)
        if found is None:
            reader = build(reads_mean=True)
            encoder = None if settings.train_body else features.separate(reader, precision)

            def read(split: TokenizedSplit, rows: Array) -> Array | None:
                if encoder is None:
                    return read_features(reader, split.select(rows))
                return features.encode_once(encoder, split, body=base.content, cache=settings.data_path)[rows]

            found = label_issues.look(read, tokens, len(splits.labels), seed=settings.seed)
            label_issues.remember(memory, found)
    return label_issues.share(found, world)


def judge(
    settings: Settings,
    store: Store,
    version: Version,
    splits: checks.Splits,
    lock: Lock,
    status: Status,
    issues: Sequence[LabelIssue] | None = None,
) -> None:
    """Keep the version's evidence, and let the gate decide about it, also about one that was trained before; report.

    Raises:
        RefusedError: it did not pass.
        StoreError: another process may hold the lock meanwhile.
    """
    status.phase("judging")
    keep_evidence(store, version, splits, seed=settings.seed, issues=issues)
    lock.require()
    before = read_decision(version)
    try:
        status.decided(gate.admit(store, version, settings), before=before)
    finally:  # a version that is refused is reported, too
        if settings.report and read_decision(version) != before:
            report(settings, store, version)


def report(settings: Settings, store: Store, version: Version) -> None:
    """Write the version's report; the version serves without one."""
    try:
        write_report(store, version, settings)
    except Exception as error:  # whatever goes wrong with a picture is no reason to fail
        logger.warning("no report of version %s (run.py report %s tries again): %s", version.id, version.id, error)


def keep_evidence(
    store: Store,
    version: Version,
    splits: checks.Splits,
    *,
    seed: int,
    issues: Sequence[LabelIssue] | None = None,
) -> None:
    """Put the test texts, and marks of those that were learned from, beside the version, if they are not there yet.

    So are labels that are probably wrong, if they were looked for.
    """
    folder = store.evidence_folder / version.id
    if folder.exists():
        return
    own, own_labels = _sample(splits.test, splits.labels, seed)
    texts, labels = _sample(splits.feedback, splits.labels, seed) if splits.feedback is not None else ([], [])
    slices = read_slices(splits.test_source, own)
    evidence = Evidence(own + texts, own_labels + labels, own=len(own), columns=slices)
    write_evidence(folder, evidence, chain(splits.train, splits.valid))
    if issues is not None:
        write_label_issues(folder, issues)


def _sample(split: checks.Split, names: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Texts and labels of a split, MAX_TEXTS at most."""
    rows = np.arange(len(split))
    if len(rows) > MAX_TEXTS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_TEXTS, replace=False))
    return list(split.texts.select(rows)["text"]), [names[label] for label in split.label_ids[rows]]


def describe_data(settings: Settings, splits: checks.Splits, tokens: Mapping[str, TokenizedSplit]) -> dict[str, Any]:
    """What a version's metadata says of its data."""
    return {
        "dataset": redact_url(settings.dataset),
        "fingerprints": splits.fingerprints,
        **splits.findings,
        "truncated_share": {name: one.truncated_share for name, one in tokens.items()},
    }


def _trackers(settings: Settings, fingerprint: str, checkpoints: Checkpoints, world: World) -> Trackers:
    """Those that are wanted; only the leading process talks to them."""
    if not world.leads:
        return Trackers()
    return open_trackers(
        log_path=settings.log_path,
        run_name=fingerprint[:16],
        mlflow_tracking_uri=settings.mlflow_tracking_uri.get_secret_value(),
        mlflow_experiment=settings.mlflow_experiment_name,
        memory=checkpoints.folder / "mlflow-run",
    )


def read_feedback(settings: Settings, world: World) -> list[feedback.Labelled]:
    """Texts that people have labelled; the same for all processes, for more may come in while they start.

    Raises:
        StoreError: the store's secret, which says what is held out, cannot be read.
    """
    found: list[feedback.Labelled] = []
    if settings.use_feedback and world.leads:
        labelled = labelled_texts(settings.model_path / FILE, logger.warning)
        if labelled:
            secret = read_secret(settings.model_path)
            found = feedback.draw_held_out(labelled, fraction=settings.test_pct, secret=secret)
    if world.size == 1:
        return found
    return [(text, label, held) for text, label, held in json.loads(world.broadcast_text(json.dumps(found)))]


def gather(
    settings: Settings, labelled: Sequence[feedback.Labelled] = ()
) -> tuple[base_model.BaseModel, checks.Splits]:
    """Find the base model, read the data, check them, and let feedback join them."""
    base = base_model.resolve(settings.base_model, revision=settings.base_model_revision, cache=settings.data_path)
    logger.info("base model: %s from the %s, SHA-256 %s…", base.name, base.source, base.sha256[:12])
    sources = data.read(
        settings.dataset, Columns(settings.text_column, settings.label_column), cache=settings.data_path
    )
    splits = checks.check(
        sources,
        num_train=settings.num_train,
        num_test=settings.num_test,
        valid_fraction=settings.valid_pct,
        min_valid=settings.min_valid,
        test_fraction=settings.test_pct,
        seed=settings.seed,
        merge_labels=settings.labels == "merge",
        min_class_size=settings.min_class_size,
        rare_labels=settings.rare_labels,
    )
    if labelled:
        splits = feedback.join(splits, labelled, cache=settings.data_path, merge_labels=settings.labels == "merge")
    for line in checks.describe(splits.findings):
        logger.info("%s", line)
    return base, splits


def read_tokens(
    settings: Settings, base: base_model.BaseModel, splits: checks.Splits
) -> tuple[PreTrainedTokenizerBase, dict[str, TokenizedSplit]]:
    """The base model's tokenizer, and all splits as tokens."""
    tokenizer = load_tokenizer(base.folder, max_tokens=settings.num_max_positions)
    encoder = TextEncoder.from_json(tokenizer.backend_tokenizer.to_str(), max_tokens=settings.num_max_positions)
    named = {"train": splits.train, "test": splits.test}
    if not splits.cross_validates:
        named["valid"] = splits.valid
    if splits.feedback is not None:
        named["feedback"] = splits.feedback
    tokens = {name: tokenize(split, encoder, cache=settings.data_path) for name, split in named.items()}
    shares = ", ".join(f"{one.truncated_share:.1%} of {name}" for name, one in tokens.items())
    logger.info("texts cut at %d tokens: %s", settings.num_max_positions, shares)
    return tokenizer, tokens


def fingerprint_run(
    settings: Settings, base: base_model.BaseModel, splits: checks.Splits, exporters: Sequence[Exporter]
) -> str:
    """What names a run: equal fingerprints mean equal settings, data, base model and code."""
    decisive = settings.model_dump(mode="json", include=DECISIVE)
    content = {
        "settings": decisive,
        "data": splits.fingerprints,
        "base_model": base.content,
        "recipe": tuneserve.__version__,
        "code": code_hash("text.py", "training", "network"),
        "exporters": [exporter.name for exporter in exporters],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
