"""What may be shown of URLs and texts; `processes/test_secrets.py` has the whole job."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneserve import redaction
from tuneserve.artifact import read_version
from tuneserve.errors import TuneserveError
from tuneserve.redaction import redact, redact_url, remember
from tuneserve.scoring.input import Input
from tuneserve.serving.http import traces
from tuneserve.settings import Settings
from tuneserve.tables.rows import Columns
from tuneserve.training import base_model, data, trackers

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", None)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://me:hunter2@host/reviews.csv", "ftp://host/reviews.csv"),
        ("https://me:hun/ter@2 x%20y@host:8/x.csv?sig=abc#part", "https://host:8/x.csv"),
        ("https://ghp_hunter2@host/x", "https://host/x"),
        ("https://host/x.csv?sig=hunter2", "https://host/x.csv"),
        ("https://host/x.csv#token=hunter2", "https://host/x.csv"),
        ("https:/me:hunter2@host/x", "https:/host/x"),
        ("me:hunter2@host/x", "host/x"),
        ("//me:hun/ter2@host/x", "//host/x"),
        ("https://me:hun?ter2@host/x", "https://…"),
        ("https://host:80/x?mail=a@b&sig=hunter2", "https://…"),
        ("https://host/x?mail=a@b&sig=hunter2", "https://host/x"),
        ("simplecache::s3://key:hunter2@bucket/x", "simplecache::s3://bucket/x"),
        ("zip://a.csv::https://me:hunter2@host/a.zip?sig=1", "zip://host/a.zip"),
        *[
            (same, same)
            for same in (
                "s3://bucket/a@b.csv",
                "hf://datasets/owner/name@main/x.csv",
                "http://host:8080/x.csv",
                "owner/name:configuration",
                "/data/what?.csv",
                "C:/x",
                "//share/a@b.csv",
            )
        ],
    ],
)
def test_a_url_is_shown_without_what_may_be_secret(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert Settings.from_environ({"DATASET": url}).public()["dataset"] == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("told http://me:p@ss@host:1 of a@b", "told http://host:1 of a@b"),
        ("no ftp://me:pass word@host/x: see 'https://a:b@c/d?x=1'", "no ftp://host/x: see 'https://c/d'"),
        ("Max retries exceeded with url: /path?sig=hunter2 (Caused by it)", "… url: /path (Caused by it)"),
        ("listening on http://0.0.0.0:8000 (docs at /docs)", "listening on http://0.0.0.0:8000 (docs at /docs)"),
        ("why? because a=b", "why? because a=b"),
    ],
)
def test_a_text_is_shown_without_the_secrets_of_its_urls(text: str, shown: str) -> None:
    assert redact(text).endswith(shown.removeprefix("…"))
    assert str(TuneserveError(text)) == redact(text)


def test_what_the_environment_holds_is_known_however_it_is_spelt() -> None:
    remember(
        {
            "DATASET": "ftp://me:a b/hunter2@host/x?sig=s%2Fhunter3",
            "HF_TOKEN": "hf_hunter4",
            "BASE_MODEL": "me:hunter5-long@host/x",
            "INPUT": "//me:hunter6-long@host/x",
            "API_KEY": "short",
            "API_KEY_GUARDS": "everything",
            "AWS_SHARED_CREDENTIALS_FILE": "/home/me/.aws",
        }
    )
    secrets = "a b/hunter2, a%20b/hunter2, a+b%2Fhunter2, s/hunter3, s%2Fhunter3, hf_hunter4, hunter5-long"
    secrets += ", hunter6-long"
    said = redact(f"{secrets}; short everything /home/me/.aws")
    assert "hunter" not in said
    assert said.endswith("; short everything /home/me/.aws")


def test_a_secret_that_is_not_utf8_is_known_too() -> None:
    secret = os.fsdecode(b"hunter\xe92")  # as Latin-1 wrote it, and as os.environ gives it
    remember({"SMTP_PASSWORD": secret, "DATASET": f"ftp://me:{secret}@host/x"})
    assert "hunter" not in redact(f"said {secret} and hunter%E92")


@pytest.mark.parametrize("piece", ["a", "://", "aa:/", "?", "@", "?=", "aa://b:", "aa://b:c ", "aa://b:c@ ", "a:a://'"])
def test_redaction_takes_linear_time(piece: str) -> None:
    text = piece * ((1 << 20) // len(piece))
    began = time.process_time()
    redact(text)
    redact_url(text)
    assert time.process_time() - began < 3


HARD = "hun/ter@2 %41"
"""A password with all that it should not hold."""


@pytest.mark.parametrize(
    "refuse",
    [
        lambda url, cache: data.read(f"{url}/x.csv?sig=hunter3", Columns("", ""), cache=cache),
        lambda url, cache: data.read(f"{url}/x.csv?sig=hunter3".replace("://", ":/"), Columns("", ""), cache=cache),
        lambda url, cache: base_model.resolve(f"{url}/owner/name?token=hunter3", revision="", cache=cache),
        lambda url, cache: trackers.require_extra(url.replace("http", "gopher")),
        lambda url, cache: traces.require_extra(url.replace("http", "gopher")),
        lambda url, cache: Input(f"{url}/x.csv?sig=hunter3"),
        lambda url, cache: Settings.from_environ({"LR": url, "PORT": f"{url}?sig=hunter3"}),
    ],
    ids=["DATASET", "a typo in DATASET", "BASE_MODEL", "MLFLOW", "OTEL", "INPUT", "in other variables"],
)
def test_no_refusal_repeats_a_secret(refuse: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(TuneserveError) as caught:
        refuse(f"http://me:{HARD}@127.0.0.1:9", tmp_path)
    assert "ter" not in str(caught.value).replace("character", "").replace("after", "").replace("Encoder", "")
    assert "127.0.0.1:9" in str(caught.value)


@pytest.mark.parametrize("part", ["settings", "data", "base_model"])
def test_what_an_older_release_wrote_of_urls_is_read_without_their_secrets(part: str, tmp_path: Path) -> None:
    named = {"dataset": "https://me:hunter2@host/x.csv?sig=hunter3", "model_path": "/m", "lr": 0.1}
    (tmp_path / "metadata.json").write_text(json.dumps({"labels": ["a:b@c", "https://x?y"], part: named}))
    found = read_version(tmp_path)
    assert found.metadata[part] == named | {"dataset": "https://host/x.csv"}
    assert found.labels == ["a:b@c", "https://x?y"]


def test_a_crash_that_nobody_foresaw_repeats_no_secret(python: Python, tmp_path: Path) -> None:
    crash = "import run, sys; run.VERBS['serve'] = lambda *_: open('http://me:hunter2@host/x?sig=hunter3'); "
    done = python("-c", f"{crash}sys.exit(run.main(['serve']))", LOG_PATH=str(tmp_path))
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr
    assert "http://host/x" in done.stderr
    assert "hunter" not in done.stderr.replace(crash, "")


def test_no_line_repeats_the_secret_of_a_url_whose_scheme_was_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(data, "connect_to_hub", lambda: False)
    with pytest.raises(TuneserveError), caplog.at_level("INFO"):
        data.read("me:hunter2@host/name", Columns("", ""), cache=tmp_path)
    assert "reading host/name from" in caplog.text
    assert "hunter" not in caplog.text
