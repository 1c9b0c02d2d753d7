"""The check of a GPU: its sections' time, what becomes of one that fails, its table, and a section on the CPU."""

import csv
import json
import statistics
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import gpu
import gpu_sections
import made_up
import pytest
import torch
import train
from conftest import serving
from gpu import About, Section, conduct, status, tabulate
from load import press_without_wrk, write_bodies
from servers import CONTENDERS, held_bytes

from tuneserve import hardware

FAKE = """
import json, subprocess, sys, time
def row(what, measured, holds=None):
    print(json.dumps({"what": what, "measured": measured, "wanted": "", "holds": holds}), flush=True)
verb, about = sys.argv[1], json.loads(sys.argv[2])
if verb == "good":
    row("one", "1 | 2", True)
    row("two", about["device"])
elif verb == "over":
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    row("child", str(child.pid))
    time.sleep(600)
elif verb in ("fails", "machine"):
    row("before", "it failed")
    sys.exit("no | such thing")
elif verb == "slow":
    row("slow", "0.9 times", False)
"""


@pytest.fixture
def about(tmp_path: Path) -> About:
    (tmp_path / "work").mkdir()
    return About(device="cpu", quick=True, data=None, work=str(tmp_path / "work"))


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    return program


def test_a_section_that_fails_or_takes_too_long_is_a_row_and_the_rest_goes_on(about: About, fake: Path) -> None:
    sections = [Section("over", 1, fake), Section("fails", 9, fake), Section("good", 9, fake)]
    over, fails, good = conduct(sections, about, minutes=2)
    child, stopped = over["rows"]
    assert held_bytes(int(child["measured"])) == 0  # it is gone too, though it had a session of its own
    assert stopped["measured"] == "stopped after 6 s, its share of the time"
    assert stopped["holds"] is False
    assert [row["measured"] for row in fails["rows"]] == ["it failed", "ended with 1: no / such thing"]
    assert [row["measured"] for row in good["rows"]] == ["1 | 2", "cpu"]
    assert (good["failure"], over["failure"]) == (None, stopped["measured"])


def test_the_last_section_has_what_the_others_left(about: About, fake: Path) -> None:
    good, over = conduct([Section("good", 1, fake), Section("over", 1, fake)], about, minutes=0.1)
    assert good["failure"] is None
    limit_s = int(over["failure"].split()[2])
    assert limit_s == round(6 - good["seconds"])


@pytest.mark.parametrize(
    ("verbs", "device", "code"),
    [
        (["good"], "cuda", 0),
        (["good", "fails"], "cuda", 1),
        (["good", "fails"], "cpu", 0),
        (["good", "slow"], "cuda", 1),
        (["good", "slow"], "cpu", 1),
        (["machine", "good"], "cuda", 2),
    ],
)
def test_the_exit_status(verbs: list[str], device: str, code: int, about: About, fake: Path) -> None:
    done = conduct([Section(verb, 1, fake) for verb in verbs], about, minutes=2)
    assert status(done, device) == code
    assert len(done) == (1 if code == 2 else len(verbs))  # without the device nothing else is tried


def test_it_prints_one_table_and_writes_the_same_as_json(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "SECTIONS", [Section("good", 1, fake), Section("slow", 1, fake)])
    file = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--output", str(file)], gpu.SECTIONS) == 1
    said = capsys.readouterr().out
    assert said.startswith(
        "| what | measured | wanted | holds |\n| --- | --- | --- | --- |\n"
        "| one | 1 / 2 | - | yes |\n| two | cpu | - | - |\n| slow | 0.9 times | - | **no** |\n"
    )
    assert "the GPU's rows are empty" in said
    record = json.loads(file.read_text())
    assert record["device"] == "cpu"
    assert tabulate([row for one in record["sections"] for row in one["rows"]]) in said


def test_memory_that_runs_out_is_seen_to_halve_and_go_on(about: About, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setitem(made_up.SHAPES, "MiniLM", small)
    monkeypatch.setitem(made_up.SHAPES, "BERT-base", small)
    bases = Path(about.work, "bases")
    bases.mkdir()
    made_up.write_bases(bases, layers=2)
    made_up.draw_base("MiniLM", bases / "small", None, layers=None)
    (bases / "bases.json").write_text(json.dumps({"MiniLM": {"folder": str(bases / "small"), "shown": "small"}}))
    fraction, serves, trains = gpu_sections.memory(about)
    assert (fraction["measured"], fraction["holds"]) == ("", None)  # only a GPU can tell
    assert serves["holds"]
    assert serves["measured"].startswith("2 halvings, 2048 to 512 tokens a batch; logits")
    assert trains["holds"]
    assert trains["measured"].startswith("1 halvings, 2 of 2 steps, losses 0.")


def test_ratios_and_padding_are_judged_on_a_gpu(about: About, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = Path(about.work, "bases")
    bases.mkdir()
    (bases / "bases.json").write_text(json.dumps({name: {"folder": "", "shown": name} for name in made_up.SHAPES}))
    speeds = {"tuneserve": 300.0, "trainer": 100.0, "trainer-tuned": 250.0}
    asked = []

    def compete(bench: train.Bench, name: str, base: dict[str, Any]) -> dict[str, Any]:
        asked.append((name, base["shown"], bench.options.num_train_imdb))
        if name == "imdb":
            raise SystemExit("contenders.py ended with 1:\nno accelerate")
        return {"runs": [{"contender": key, "texts_per_s": speeds[key], "padding_share": 0.01} for key in speeds]}

    monkeypatch.setattr(train.Bench, "compete", compete)
    monkeypatch.setattr(hardware, "choose_device", lambda setting: (torch.device("cpu"), ""))
    by_default, by_tuned, padding, failed = gpu_sections.training(replace(about, device="cuda"))
    assert asked == [("sst2", "MiniLM", train.QUICK_TEXTS), ("imdb", "BERT-base", train.QUICK_TEXTS)]
    assert (by_default["measured"], by_default["holds"]) == ("3.00 times (300 by 100 texts/s)", True)
    assert (by_tuned["measured"], by_tuned["holds"]) == ("1.20 times (300 by 250 texts/s)", False)
    assert (padding["measured"], padding["holds"]) == ("1.0%", True)
    assert (failed["measured"], failed["holds"]) == ("no accelerate", False)
    on_cpu = [row["holds"] for row in gpu_sections.training(about)]
    assert on_cpu == [None, None, True, None]  # a CPU's speed is not judged


def test_without_bases_a_section_says_what_it_lacks(about: About) -> None:
    [done] = conduct([Section("memory", 1)], about, minutes=5)
    assert done["rows"][-1]["measured"].endswith("the section `materials` did not make them")


def test_made_up_texts_have_the_lengths_and_tell_their_labels(tmp_path: Path) -> None:
    for kind, median in (("sst2", 17), ("imdb", 176)):
        folder = made_up.write_texts(tmp_path / kind, kind, train=400, test=100)
        with (folder / "train.csv").open(newline="") as file:
            rows = [(row["text"].split(), row["label"]) for row in csv.DictReader(file)]
        assert statistics.median(len(words) for words, _ in rows) == pytest.approx(median, rel=0.1)
        assert {label for _, label in rows} == set(made_up.TELLING)
        for words, label in rows:
            assert {name for name, told in made_up.TELLING.items() if set(told) & set(words)} == {label}
        assert len(made_up.read_texts(folder / "test.csv", 1000)) == 100


def test_a_base_model_is_made_where_no_wheel_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from tuneserve.training import base_model

    monkeypatch.setattr(base_model, "locate", lambda *_, **__: None)
    base = made_up.find_base("MiniLM", tmp_path / "base", layers=1)
    assert base["shown"] == "MiniLM (random weights, 1 layers)"
    assert AutoConfig.from_pretrained(base["folder"]).hidden_size == 384
    ids = AutoTokenizer.from_pretrained(base["folder"])("a Great film").input_ids
    assert ids[0] == made_up.SPECIAL.index("[CLS]")
    assert made_up.SPECIAL.index("[UNK]") not in ids


class Sparing(BaseHTTPRequestHandler):
    """Answers every other request, and refuses the others."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_POST(self) -> None:
        """Read it all first."""
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked += 1
        self.send_response(200 if self.asked % 2 else 429)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Be quiet."""


def test_load_can_be_made_without_wrk(tmp_path: Path) -> None:
    contender = CONTENDERS["fastapi-pipeline"]
    bodies = write_bodies(contender, ["one", "two"], tmp_path / "bodies")
    with serving(Sparing) as address:
        port = int(address.rpartition(":")[2])
        figures = press_without_wrk(contender, port, bodies, connections=3, seconds=0.5)
    answered = Sparing.asked - figures["errors"]
    assert abs(answered - figures["errors"]) <= 3  # one on each connection may be under way at the end
    assert 0 < figures["requests_per_s"] <= answered / 0.5
    assert 0 < figures["p50_ms"] <= figures["p99_ms"]
