"""The comparison of servers: what is sent, what is read from wrk, and a short run against this project's server."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import embed
import generate
import pytest
from load import press, read_figures, run_wrk, share_equal, write_bodies
from serve import describe, join_reviews
from servers import CONTENDERS, OURS, BenchError, Contender, Server, family, held_bytes, last_line
from tiny import sentences, write_csv

from tuneserve.settings import PROJECT

LINE = {"answers": 300, "duration_us": 2_000_000, "p50_us": 1500, "p99_us": 9000, "refused": 100, "unanswered": 2}
needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")


def bench(*arguments: str | Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(PROJECT / "benchmarks" / "serve.py"), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def test_refused_requests_are_errors_and_no_throughput() -> None:
    figures = read_figures(LINE | {"late": 1})
    assert figures == {"requests_per_s": 100, "p50_ms": 1.5, "p99_ms": 9, "errors": 103}


def test_a_server_that_answers_nothing_has_no_latency() -> None:
    nothing = {"answers": 0, "p50_us": 0, "p99_us": 0, "refused": 0, "late": 0}
    figures = read_figures(LINE | nothing)
    assert figures == {"requests_per_s": 0, "p50_ms": None, "p99_ms": None, "errors": 2}


@needs_wrk
def test_wrk_without_figures_is_said_in_its_words() -> None:
    with pytest.raises(BenchError, match="unable to connect"):
        run_wrk("post.lua", "http://127.0.0.1:1/", "bodies.jsonl", connections=1, seconds=1)


@pytest.mark.parametrize("contender", CONTENDERS.values(), ids=CONTENDERS)
def test_every_text_is_one_line_of_json_that_holds_it(contender: Contender, tmp_path: Path) -> None:
    texts = ['with "quotes"', "two\nlines", "\u2028 a line of its own \u00e9", "back\\slash"]
    lines = write_bodies(contender, texts, tmp_path / "bodies").read_bytes().split(b"\n")
    assert lines.pop() == b""
    for line, text in zip(lines, texts, strict=True):
        values = json.loads(line).values()
        assert [value for value in values if value in (text, [text])]


def test_every_peer_has_its_files_and_pins() -> None:
    folder = PROJECT / "benchmarks" / "peers"
    names = (CONTENDERS.keys() | generate.contenders("text").keys() | embed.CONTENDERS.keys()) - {OURS}
    for name in names:
        pins = (folder / f"requirements-{name}.txt").read_text().splitlines()
        assert all("==" in pin or pin.startswith("#") for pin in pins)
    assert len(list(folder.glob("requirements-*.txt"))) == len(names)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("tuneserve", {"label": "good", "scores": {"bad": 0.1, "good": 0.9}}),
        ("fastapi-pipeline", {"label": "good", "score": 0.9}),
        ("litserve", {"label": "good", "score": 0.9}),
        ("litserve-openvino", {"label": "good", "score": 0.9}),
        ("mosec", {"label": "good", "score": 0.9}),
        ("bentoml", [{"label": "good", "score": 0.9}]),
        ("infinity", {"data": [[{"label": "bad", "score": 0.1}, {"label": "good", "score": 0.9}]]}),
        ("infinity-onnx", {"data": [[{"label": "bad", "score": 0.1}, {"label": "good", "score": 0.9}]]}),
    ],
)
def test_the_label_is_found_in_every_answer(name: str, answer: object) -> None:
    assert CONTENDERS[name].label(answer) == "good"


def test_reviews_are_joined_with_those_of_their_label_and_always_alike() -> None:
    rows = [("good film", "good"), ("great food", "good"), ("bad film", "bad")]
    joined = join_reviews(rows, 30)
    assert joined == join_reviews(rows, 30)
    assert {label for _, label in joined} == {"good", "bad"}
    for text, label in joined:
        assert 150 <= len(text.split()) <= 151
        assert ("bad" in text) == (label == "bad")


def test_no_answer_is_a_wrong_answer() -> None:
    assert share_equal(["good", None, "bad", "bad"], ["good", "good", "bad", "good"]) == 0.5


def test_memory_is_that_of_the_whole_family() -> None:
    child = "import time; kept = b'x' * (64 << 20); print(flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        members = family(process.pid)
        assert members[0] == process.pid
        assert len(members) == 2
        assert held_bytes(members[0]) < 64 << 20 < sum(map(held_bytes, members)) < 128 << 20
        os.kill(members[1], 9)
    assert held_bytes(process.pid) == 0


def test_a_server_that_ends_is_a_reason_and_not_the_end(tmp_path: Path) -> None:
    words = "import sys; sys.exit('no | such model')"
    broken = Contender("broken", (sys.executable, "-c", words), "/", lambda text: {}, lambda answer: "", tmp_path)
    place = {"store": tmp_path, "checkpoint": tmp_path, "folder": tmp_path}
    with (
        pytest.raises(BenchError, match="ended with 1: no / such model"),
        Server(broken, **place, base=dict(os.environ)) as server,
    ):
        server.wait_until_right(["a"], ["good"])
    absent = Contender("absent", (str(tmp_path / "absent"),), "/", lambda text: {}, lambda answer: "", tmp_path)
    with pytest.raises(BenchError, match="cannot be started"):
        Server(absent, **place, base={})
    assert last_line("one\ntwo  \n\n") == "two"


def test_a_checkpoint_is_converted_once_and_before_the_server_starts(tmp_path: Path) -> None:
    write = "import os, sys; open(sys.argv[1] + '/model', 'a').write(os.environ['CHECKPOINT'] + ' ')"
    serve = "import os, sys; sys.exit(open(os.environ['EXPORT'] + '/model').read() + sys.argv[1][-10:])"
    nothing = (lambda text: {}, lambda answer: "", tmp_path)
    command = (sys.executable, "-c", serve, "{made}")
    contender = Contender("some", command, "/", *nothing, export=(sys.executable, "-c", write, "{made}"))
    place = {"store": tmp_path, "checkpoint": Path("a-model"), "folder": tmp_path}
    for _ in range(2):
        with (
            pytest.raises(BenchError, match=r"ended with 1: a-model some-model$"),
            Server(contender, **place, base=dict(os.environ)) as server,
        ):
            server.wait_until_right(["a"], ["good"])
    failing = Contender("bad", command, "/", *nothing, export=(sys.executable, "-c", "import sys; sys.exit('no')"))
    for _ in range(2):  # what it left is no model
        with pytest.raises(BenchError, match="cannot convert the checkpoint: no"):
            Server(failing, **place, base=dict(os.environ))


def test_a_server_that_failed_keeps_its_row() -> None:
    cell = {"texts": "short", "connections": 4, "requests_per_s": 10.0, "p50_ms": 1.0, "p99_ms": 2.0, "errors": 3}
    examined = {"accuracy": 0.9, "agreement": 1.0, "unanswered": 0}
    good = {"server": "a", "failure": None, "ready_s": 1.0, "memory_bytes": 2**30, "short": examined, "long": examined}
    record = {
        "checkpoint": "v1",
        "machine": {"body": 1_000_000, "flops": 1e12, "precision": "bf16", "threads": 2},
        "options": {"seconds": 1, "rounds": 2},
        "texts": {kind: {"count": 5, "words": 3.0, "accuracy": 0.8} for kind in ("short", "long")},
        "engine": [],
        "runs": [
            good | {"cells": [cell]},
            {"server": "b", "failure": "ended with 1", "cells": []},
            {"server": "b", "failure": "ended with 1", "cells": []},
            good | {"cells": [cell | {"requests_per_s": 30.0}], "ready_s": 3.0},
        ],
    }
    lines = describe(record).splitlines()
    assert "| a | 2.0 ± 1.4 | 1024 ± 0 | 90.0 ± 0.0 | 90.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 | 0 | - |" in lines
    assert "| b | - | - | - | - | - | - | 0 | ended with 1 |" in lines
    assert "| a | 4 | 20.0 ± 14.1 | 1.0 ± 0.0 | 2.0 ± 0.0 | 6 |" in lines


def test_what_cannot_be_run_is_refused_in_words(tmp_path: Path) -> None:
    unknown = bench("--peers", "mosec,triton")
    assert unknown.returncode == 2
    peers = "fastapi-pipeline, litserve, litserve-openvino, infinity, infinity-onnx, bentoml, mosec"
    assert f"there is no peer triton; use {peers}" in unknown.stderr
    zero = bench("--connections", "1,0")
    assert zero.returncode == 2
    assert "0 is no whole number from 1 up" in zero.stderr
    without = bench("--peers", "none", PATH=str(tmp_path))
    assert without.returncode == 2
    assert "apt-get install wrk" in without.stderr


@needs_wrk
def test_a_short_run_measures_this_server_and_the_engine(store: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "sst2" / "train.csv", sentences(160))
    write_csv(tmp_path / "sst2" / "test.csv", sentences(40, first=160))
    write_csv(tmp_path / "imdb" / "train.csv", [(f"{text} {'the ' * 200}", label) for text, label in sentences(200)])
    done = bench(
        *("--data", tmp_path, "--store", store, "--peers", "none", "--texts", "20"),
        *("--connections", "1,4", "--seconds", "1", "--rounds", "1", "--json", tmp_path / "figures.json"),
        MAX_WAITING="0",  # the server would refuse it; what stands in the caller's environment must not reach it
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "figures.json").read_text())
    [run] = record["runs"]
    assert run["failure"] is None
    assert run["ready_s"] > 0
    assert run["memory_bytes"] > 100 << 20
    assert run["short"]["accuracy"] == record["texts"]["short"]["accuracy"] > 0.9
    assert run["short"]["agreement"] == run["long"]["agreement"] == 1
    assert [(cell["texts"], cell["connections"]) for cell in run["cells"]] == [
        (kind, count) for kind in ("short", "long") for count in (1, 4)
    ]
    for cell in run["cells"]:
        assert cell["requests_per_s"] > 0
        assert 0 < cell["p50_ms"] <= cell["p99_ms"]
        assert cell["errors"] == 0
    assert record["texts"]["long"]["words"] == 180
    assert all(0 < one["rate_share"] < 1 and one["texts_per_s"] > 0 for one in record["engine"])
    assert {(one["texts"], one["at_once"]) for one in record["engine"]} >= {("short", 1), ("long", 32)}
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| tuneserve")] == [
        "tuneserve"
    ] * 5


@needs_wrk
def test_requests_that_are_refused_are_counted(store: Path, tmp_path: Path) -> None:
    champion = (store / "champion").read_text().strip()
    wrong = Contender(
        OURS,
        CONTENDERS[OURS].command,
        "/inference",
        lambda text: {"words": text},
        CONTENDERS[OURS].label,
        CONTENDERS[OURS].folder,
    )
    place = {"store": store, "checkpoint": store / "versions" / champion, "folder": tmp_path}
    with Server(CONTENDERS[OURS], **place, base=dict(os.environ)) as server:
        texts, labels = zip(*sentences(8), strict=True)
        server.wait_until_right(texts, labels)
        figures = press(wrong, server.port, write_bodies(wrong, texts, tmp_path / "b"), connections=2, seconds=1)
        with pytest.raises(BenchError, match="answered 422"):
            wrong.ask(server.port, "a film")
    assert figures["requests_per_s"] == 0
    assert figures["errors"] > 10
    with pytest.raises(BenchError, match="did not answer"):
        wrong.ask(server.port, "a film")
    with pytest.raises(BenchError, match="wrk"):
        press(wrong, server.port, tmp_path / "b", connections=2, seconds=1)
