"""`run.py doctor`: each check seen fine and failing, on real files, ports, servers and processes."""

import io
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import PACKAGE, Disk, serving

from tuneserve import doctor, hardware
from tuneserve.artifact import METADATA, describe_files
from tuneserve.files import write_json
from tuneserve.lifecycle.status import hold
from tuneserve.lifecycle.store import Store
from tuneserve.settings import PROJECT, Settings
from tuneserve.training import base_model

Python = Callable[..., "subprocess.CompletedProcess[str]"]
LINE = re.compile(r"(ok  |warn|fail)  (\S.{8,}?)  (\S.*\.)")
NAMES = ["settings", *doctor.CHECKS]


def look(name: str, **variables: str | Path) -> doctor.Finding:
    """One check, as `examine` makes it, with a minute for a busy machine."""
    environ = {name: str(value) for name, value in variables.items()}
    settings = Settings.from_environ(environ)
    return doctor.within(60, lambda: doctor.CHECKS[name](settings, environ))


def lines(text: str) -> list[tuple[str, str, str]]:
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(found), text
    return [(one[1].strip(), one[2].strip(), one[3]) for one in found if one]


def paths(folder: Path) -> dict[str, str]:
    return {f"{name}_PATH": str(folder / name.lower()) for name in ("MODEL", "DATA", "LOG")}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Names of all that is in a folder, when it was changed, and its size."""
    found = [folder, *folder.rglob("*")]
    return {str(path): ((stat := path.lstat()).st_mtime_ns, stat.st_size) for path in found}


def make_version(store: Path, name: str = "20260102T030405Z-0a1b2c3d") -> Path:
    folder = store / "versions" / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    write_json(folder / METADATA, {"labels": ["bad", "good"], **describe_files(folder)})
    (store / "champion").write_text(f"{name}\n")
    return folder


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens, who never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers get less time."""
    monkeypatch.setattr(doctor, "ANSWER_S", 0.3)


class Endless(BaseHTTPRequestHandler):
    """Answers with a head, and with a body that never ends."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        time.sleep(30)

    def log_message(self, *arguments: Any) -> None:
        pass


# --- the whole


def test_nothing_is_changed_and_all_is_well(python: Python, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    make_version(work / "model")
    (work / "model" / "trainer.lock").write_text("")
    tiny.write_csv(work / "reviews.csv", tiny.sentences(20))
    before = snapshot(work)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {
        "DATASET": str(work / "reviews.csv"),
        "HOST": "127.0.0.1",
        "PORT": port,
        "DEVICE": "cpu",
        **paths(work),
    }
    done = python(PACKAGE / "run.py", "doctor", **variables)
    found = lines(done.stdout)
    assert [name for _, name, _ in found] == NAMES
    assert {name: said for level, name, said in found if level == "fail"} == {}
    assert (done.returncode, done.stderr) == (0, "")
    assert "DATASET" in found[0][2]
    assert snapshot(work) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"work", "hf", ".cache"}


def test_a_failure_is_exit_code_2_and_the_other_checks_are_made(tmp_path: Path) -> None:
    out = io.StringIO()
    environ = {**paths(tmp_path), "DATASET": "/nowhere/reviews.csv", "DEVICE": "cpu"}
    assert doctor.report(environ, out) == 2
    found = {name: (level, said) for level, name, said in lines(out.getvalue())}
    assert list(found) == NAMES
    level, said = found["dataset"]
    assert level == "fail"
    assert "/nowhere/reviews.csv" in said
    assert list(tmp_path.iterdir()) == []


def test_all_bad_settings_are_named_in_one_line_without_secrets(python: Python) -> None:
    done = python(PACKAGE / "run.py", "doctor", LR="abc", N_EPOCH="3", DATASET="https://me:geheim@host/ #x")
    [(level, name, said)] = lines(done.stdout)
    assert (level, name, done.returncode) == ("fail", "settings", 2)
    assert "LR='abc'" in said
    assert "did you mean N_EPOCHS" in said
    assert "geheim" not in done.stdout + done.stderr


def test_no_secret_of_a_url_is_printed(python: Python, tmp_path: Path, taken: int) -> None:
    secret = f"http://me:geheim@127.0.0.1:{taken}"
    variables = {"MLFLOW_TRACKING_URI": secret, "DATASET": f"{secret}/data.csv?sig=verborgen", "API_KEY": "sehr-geheim"}
    done = python(PACKAGE / "run.py", "doctor", DEVICE="cpu", **variables, **paths(tmp_path / "work"))
    found = {name: (level, said) for level, name, said in lines(done.stdout)}
    assert found["dataset"][0] == "fail"
    assert f"http://127.0.0.1:{taken}/data.csv does not answer" in found["dataset"][1]
    assert done.returncode == 2
    for word in ("geheim", "verborgen"):
        assert word not in done.stdout + done.stderr


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("", True), ("1", False)])
def test_a_terminal_gets_colours_unless_it_wants_none(
    no_color: str | None, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {})
    environ = {} if no_color is None else {"NO_COLOR": no_color}
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        assert doctor.report(environ, terminal) == 0
        said = os.read(ours, 4096).decode()
    os.close(ours)
    assert ("\x1b[32mok" in said) == ("\x1b[0m" in said) == coloured
    assert "ok" in said


def test_what_takes_too_long_or_was_not_foreseen_is_said_and_fails_nothing() -> None:
    def wait() -> doctor.Finding:
        time.sleep(30)
        return doctor.Finding("ok", "waited.")

    def stumble() -> doctor.Finding:
        raise RuntimeError("some library")

    assert doctor.within(0.05, wait).level == "warn"
    assert "not known after 0.05 s" in doctor.within(0.05, wait).said
    assert doctor.within(9, stumble) == doctor.Finding(
        "warn", "cannot be checked: RuntimeError: some library.", "See what the job itself says."
    )


def test_the_example_in_the_docs_has_the_form_of_the_output() -> None:
    page = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.partition("## Before a training")[2].partition("\n## ")[0]
    example = section.partition("```text\n")[2].partition("```")[0]
    found = lines(example)
    assert [name for _, name, _ in found] == NAMES
    assert {level for level, _, _ in found} == {"ok", "warn", "fail"}


# --- the machine


def test_without_torch_this_place_serves_and_what_only_a_training_reads_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = dict(doctor.examine({"DATASET": "/nowhere.csv", "DEVICE": "cpu", **paths(tmp_path)}))
    assert found["training"].level == "warn"
    assert "torch is not installed" in found["training"].said
    assert set(NAMES) - set(found) == {"base model", "dataset", "tracker"}
    assert found["champion"].level == "warn"  # nobody here will make one


def test_what_is_only_served_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look("training").level == "ok"
    for variables in ({"TASK": "summarization"}, {"MODEL": "a/b"}, {"MODELS": "/models"}):
        assert look("training", **variables).level == "warn"
    monkeypatch.setattr("tuneserve.extras.importlib.util.find_spec", lambda name: None if name == "nncf" else object())
    assert "requirements-int8.txt" in look("training", PRECISION="int8").said


def test_more_threads_than_cores_are_warned_of() -> None:
    assert look("cpu", OMP_NUM_THREADS="1").level == "ok"
    found = look("cpu", OMP_NUM_THREADS="1024")
    assert found.level == "warn"
    assert "1024 threads" in found.said


@pytest.mark.parametrize(
    ("native", "precision", "level", "computes"),
    [
        (True, "auto", "ok", "in bf16"),
        (False, "auto", "ok", "in fp32"),
        (True, "fp32", "ok", "in fp32"),
        (False, "bf16", "warn", "in bf16"),
    ],
)
def test_the_number_format_is_named(
    native: bool, precision: str, level: str, computes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: native)
    found = look("cpu", PRECISION=precision, OMP_NUM_THREADS="1")
    assert found.level == level
    assert computes in found.said


def write_program(folder: Path, script: str) -> Path:
    """`nvidia-smi` as a shell script, in a folder for PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return folder


def test_without_a_gpu_the_cpu_computes_unless_one_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(hardware, "gpu_may_be_there", lambda: False)
    monkeypatch.setattr(doctor, "LIMIT_S", 60)
    assert look("gpu", DEVICE="cpu").level == "ok"
    assert look("gpu", PATH=tmp_path) == doctor.Finding("ok", "none is visible; the CPU computes.")
    found = look("gpu", PATH=tmp_path, DEVICE="cuda")
    assert found.level == "fail"
    assert "torch cannot use one" in found.said


@pytest.mark.parametrize(("device", "level"), [("auto", "warn"), ("cuda", "fail")])
def test_a_gpu_that_the_driver_shows_and_torch_cannot_use_is_said(
    device: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(doctor, "LIMIT_S", 60)
    found = look("gpu", PATH=write_program(tmp_path, "echo 'NVIDIA T4, 470.82'"), DEVICE=device)
    assert found.level == level
    assert "nvidia-smi shows NVIDIA T4, 470.82, but torch cannot use one: " in found.said
    assert "DEVICE=cpu" in found.advice


def test_a_driver_that_fails_or_hangs_shows_nothing(tmp_path: Path) -> None:
    for script in ("echo 'NVIDIA-SMI has failed'; exit 9", "exec sleep 30"):
        assert hardware.ask_driver({"PATH": str(write_program(tmp_path, script))}, timeout_s=0.3) == ""


def test_a_torch_that_hangs_or_dies_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.01 s"):
        hardware.ask_torch(timeout_s=0.01)
    monkeypatch.setattr(doctor, "LIMIT_S", doctor.ANSWER_S + 0.01)
    found = look("gpu", DEVICE="cuda", PATH="/nowhere")
    assert (found.level, "did not answer" in found.said) == ("warn", True)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert hardware.ask_torch(timeout_s=60) == {"obstacle": "its process ended with code 1"}


@pytest.mark.parametrize(
    ("answer", "variables", "level"),
    [
        ({"free": 8 << 30, "bf16": True}, {}, "ok"),
        ({"free": 8 << 30, "bf16": False}, {"PRECISION": "bf16"}, "fail"),
        ({"free": 64 << 20, "bf16": True}, {}, "fail"),
    ],
)
def test_a_gpus_memory_and_number_format_are_held_against_what_is_wanted(
    answer: dict[str, Any], variables: dict[str, str], level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "ask_torch", lambda *, timeout_s: {"name": "NVIDIA L4"} | answer)
    found = look("gpu", PATH=write_program(tmp_path, "echo 'NVIDIA L4, 580.10'"), **variables)
    assert found.level == level
    assert "NVIDIA L4" in found.said


@pytest.mark.gpu
def test_a_gpu_that_is_there_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch: Any = pytest.importorskip("torch")
    monkeypatch.setattr(doctor, "LIMIT_S", 60)
    assert torch.cuda.get_device_name() in look("gpu", PATH="/usr/bin").said


def make_huge(folder: Path) -> Path:
    """A base model of 200 billion weights, whose file is nearly all hole."""
    tiny.make_base_model(folder)
    size = 8 * 10**11
    head = b'{"w":{"dtype":"F32","shape":[200000,1000000],"data_offsets":[0,%d]}}' % size
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + size)
    return folder


def test_memory_is_held_against_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "very roughly" in look("memory", DEVICE="cpu").said
    huge = make_huge(tmp_path / "huge")
    assert look("memory", DEVICE="cpu", BASE_MODEL=huge).level == "fail"
    assert "TRAIN_BODY=0" in look("memory", DEVICE="cpu", BASE_MODEL=huge).advice
    monkeypatch.setattr(hardware, "memory_free", lambda: 1800 << 20)
    assert look("memory", DEVICE="cpu").level == "warn"
    assert look("memory", DEVICE="cpu", TRAIN_BODY="0").level == "ok"
    unknown = look("memory", DEVICE="cpu", BASE_MODEL=tmp_path / "nowhere")
    assert unknown == doctor.Finding("ok", "1.8 GiB are free; what is needed is not known.")


def test_free_memory_is_the_kernels_guess_within_the_limit(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       8 kB\nMemAvailable:       4 kB\n")
    assert hardware.memory_free(tmp_path) == 4096
    (tmp_path / "meminfo").unlink()
    assert hardware.memory_free(tmp_path) == hardware.memory_limit(tmp_path)


# --- folders


@pytest.mark.parametrize("name", ["MODEL_PATH", "DATA_PATH", "LOG_PATH"])
def test_a_folder_must_be_one_and_is_not_made(name: str, tmp_path: Path) -> None:
    found = look(name, **{name: tmp_path / "deep" / "down"})
    assert found.level == "ok"
    assert "can be made" in found.said
    assert "can be written to" in look(name, **{name: tmp_path}).said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inner"):
        found = look(name, **{name: path})
        assert found.level == "fail"
        assert "Not a directory" in found.said
        assert name in found.advice


def test_a_disk_that_is_read_only_or_full_is_seen(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look("LOG_PATH", LOG_PATH=disk.path).level == "fail"  # 256 KiB are too few
    assert "may be needed" in look("LOG_PATH", LOG_PATH=disk.path).advice
    disk.fill()
    assert "No space left" in look("DATA_PATH", DATA_PATH=disk.path).said
    disk.empty()
    disk.make_read_only()
    assert "Read-only" in look("MODEL_PATH", MODEL_PATH=disk.path / "models").said
    assert look("MODEL_PATH", MODEL_PATH=disk.path).level == "fail"
    assert look("MODEL_PATH", MODEL_PATH=disk.path, TASK="summarization").level == "warn"  # a server only reads


def test_what_this_user_may_not_write_or_read_is_said(python: Python, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    tiny.write_csv(tmp_path / "reviews.csv", tiny.sentences(4)).chmod(0o000)
    (tmp_path / "closed").chmod(0o555)
    folders = {f"{name}_PATH": str(tmp_path / "closed" / inner) for name, inner in (("MODEL", ""), ("DATA", "deep"))}
    variables = {"DATASET": str(tmp_path / "reviews.csv"), "DEVICE": "cpu", **folders}
    command = [sys.executable, PACKAGE / "run.py", "doctor"]
    if os.geteuid() == 0:  # may do all, unless it gives these rights away
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]
    code = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    done = python("-c", code, *command, **variables, LOG_PATH=str(tmp_path))
    found = {name: (level, said) for level, name, said in lines(done.stdout)}
    assert {name for name, (level, _) in found.items() if level == "fail"} >= {"MODEL_PATH", "DATA_PATH", "dataset"}
    for name in ("MODEL_PATH", "DATA_PATH", "dataset"):
        assert "Permission denied" in found[name][1]
    assert found["LOG_PATH"][0] == "ok"
    assert done.returncode == 2


def test_a_disk_that_does_not_say_its_size_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: (0, 0, 0))
    assert look("DATA_PATH", DATA_PATH=tmp_path).level == "ok"
    assert "not known" in look("DATA_PATH", DATA_PATH=tmp_path).said


def test_the_store_must_have_room_for_the_base_model(tmp_path: Path) -> None:
    huge = make_huge(tmp_path / "huge")
    assert look("MODEL_PATH", MODEL_PATH=tmp_path, BASE_MODEL=huge).level == "fail"
    small = tiny.make_base_model(tmp_path / "small")
    assert look("MODEL_PATH", MODEL_PATH=tmp_path, BASE_MODEL=small).level == "ok"


# --- the store


def test_a_champion_is_whole_damaged_or_not_there(tmp_path: Path) -> None:
    assert look("champion", MODEL_PATH=tmp_path / "none").level == "ok"
    folder = make_version(tmp_path)
    found = look("champion", MODEL_PATH=tmp_path)
    assert (found.level, folder.name in found.said, "SHA-256" in found.said) == ("ok", True, True)
    (folder / "model.safetensors").write_bytes(b"weighty")
    found = look("champion", MODEL_PATH=tmp_path)
    assert found.level == "fail"
    assert "its SHA-256 differs" in found.said
    assert "promote" in found.advice
    (tmp_path / "champion").write_text("gone\n")
    assert look("champion", MODEL_PATH=tmp_path).level == "fail"
    (tmp_path / "champion").unlink()
    (tmp_path / "config.json").write_text("{}")
    assert "no store of versions" in look("champion", MODEL_PATH=tmp_path).said


def test_versions_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert look("versions", MODEL_PATH=tmp_path).level == "ok"
    make_version(tmp_path)
    (tmp_path / "versions" / ".unfinished-x").mkdir()
    assert look("versions", MODEL_PATH=tmp_path) == doctor.Finding("ok", "1 in the store can be read.")
    (make_version(tmp_path, "20260103T000000Z-b") / METADATA).write_text("{")
    found = look("versions", MODEL_PATH=tmp_path)
    assert found.level == "warn"
    assert "1 of 2" in found.said
    assert "20260103T000000Z-b" in found.said


HOLD = "import sys, time; from pathlib import Path; from tuneserve.lifecycle.status import hold\n"
HOLD += "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_lock_that_is_held_is_said_and_stays_its_owners(tmp_path: Path) -> None:
    lock = Store(tmp_path).lock
    assert look("lock", MODEL_PATH=tmp_path).level == "ok"
    assert not lock.exists()
    environ = os.environ | {"PYTHONPATH": str(PACKAGE)}
    owner = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE, env=environ, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    before = lock.read_bytes()
    found = look("lock", MODEL_PATH=tmp_path)
    assert found.level == "warn"
    assert f"process {owner.pid} on" in found.said
    assert lock.read_bytes() == before
    owner.kill()
    owner.communicate()
    assert look("lock", MODEL_PATH=tmp_path).level == "ok"
    with hold(lock):  # nobody has kept it
        pass
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    assert look("lock", MODEL_PATH=tmp_path).level == "fail"


# --- what is read


def test_a_base_model_is_found_in_the_package_or_a_folder_and_must_be_whole(tmp_path: Path) -> None:
    assert "in the package" in look("base model").said
    folder = tiny.make_base_model(tmp_path / "base")
    assert "in the folder" in look("base model", BASE_MODEL=folder).said
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    damages = {"not whole": content[:-1], "its head": b"short", "git lfs pull": b"version https://git-lfs.example/v1\n"}
    for said, damaged in damages.items():
        weights.write_bytes(damaged)
        found = look("base model", BASE_MODEL=folder)
        assert found.level == "fail"
        assert said in found.said
    weights.rename(folder / "pytorch_model.bin")
    assert "weights in pickles" in look("base model", BASE_MODEL=folder).said
    assert "no such folder" in look("base model", BASE_MODEL=tmp_path / "none").said
    assert look("base model", BASE_MODEL="a//b").level == "fail"


def test_weights_are_counted_as_torch_counts_them(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = tiny.make_base_model(tmp_path / "base")
    model = AutoModel.from_pretrained(folder, trust_remote_code=False)
    counted = base_model.count_weights(base_model.find_weights(folder))
    assert counted == sum(weight.numel() for weight in model.parameters())


def test_a_base_model_of_the_hub_is_asked_for_and_not_fetched(
    tmp_path: Path, hub: tuple[str, Path], ask_hub: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = hub
    ask_hub(address)
    tiny.make_base_model(folder / "models" / "someone" / "base")
    variables = {"BASE_MODEL": "someone/base", "DATA_PATH": tmp_path / "data"}
    found = look("base model", **variables)
    assert found == doctor.Finding("ok", "someone/base is not here; the hub has it, and it will be fetched.")
    assert not (tmp_path / "data").exists()
    found = look("base model", BASE_MODEL="someone/else", DATA_PATH=tmp_path / "data")
    assert found.level == "fail"
    assert "HF_TOKEN" in found.said
    base_model.resolve("someone/base", revision="", cache=tmp_path / "data")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "in the hub's copy" in look("base model", **variables).said
    assert "HF_HUB_OFFLINE" in look("base model", BASE_MODEL="someone/else", DATA_PATH=tmp_path / "data").said


@pytest.mark.usefixtures("hurried")
def test_a_hub_that_does_not_answer_is_said(tmp_path: Path, unreachable: str, ask_hub: Callable[..., None]) -> None:
    ask_hub(unreachable)
    for name, variable in (("base model", "BASE_MODEL"), ("dataset", "DATASET")):
        found = look(name, DATA_PATH=tmp_path, **{variable: "someone/thing"})
        assert found.level == "fail"
        assert "does not answer: " in found.said
    (tmp_path / "arrow" / "someone___thing").mkdir(parents=True)
    assert look("dataset", DATA_PATH=tmp_path, DATASET="someone/thing").level == "warn"


def test_files_of_the_data_are_there_and_can_be_opened(tmp_path: Path) -> None:
    assert look("dataset").said == "DATASET=sample can be opened: test (1), train (1)."
    data = tmp_path / "data"
    data.mkdir()
    tiny.write_csv(data / "train.csv", tiny.sentences(4))
    assert look("dataset", DATASET=data).level == "ok"
    assert look("dataset", DATASET=data / "train.csv").level == "ok"
    (data / "test.csv").write_text("")
    assert "test.csv is empty" in look("dataset", DATASET=data).said
    (data / "train.csv").rename(data / "reviews.xlsx")
    found = look("dataset", DATASET=data / "reviews.xlsx")
    assert (found.level, "CSV UTF-8" in found.said) == ("fail", True)
    for label in ("bad", "good"):
        (tmp_path / "classes" / label).mkdir(parents=True)
        (tmp_path / "classes" / label / "1.txt").write_text("A text.")
    assert look("dataset", DATASET=tmp_path / "classes").level == "ok"
    for missing in (tmp_path / "none", "none.csv"):
        assert "no such file or folder" in look("dataset", DATASET=missing).said


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for label in ("bad", "good"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "2.txt").write_text("A text.")
    os.mkfifo(tmp_path / "bad" / "1.txt")  # whoever opened it would wait for ever
    found = look("dataset", DATASET=tmp_path)
    assert found.level == "fail"
    assert "1.txt cannot be opened" in found.said


def test_data_at_a_url_are_asked_for_and_not_read(
    web: tuple[str, Path], hub: tuple[str, Path], ask_hub: Callable[..., None], tmp_path: Path
) -> None:
    address, folder = web
    tiny.write_csv(folder / "reviews.csv", tiny.sentences(4))
    assert look("dataset", DATASET=f"{address}/reviews.csv").level == "ok"
    found = look("dataset", DATASET=f"{address}/none.csv")
    assert (found.level, "status 404" in found.said) == ("fail", True)
    with serving(Endless) as endless:
        assert look("dataset", DATASET=f"{endless}/reviews.csv").level == "ok"
    assert "cannot be found" in look("dataset", DATASET="memory://nowhere.csv").said
    assert look("dataset", DATASET="nosuch://bucket/reviews.csv").level == "fail"
    ask_hub(hub[0])
    (hub[1] / "datasets" / "someone" / "reviews").mkdir(parents=True)
    assert look("dataset", DATASET="someone/reviews:small", DATA_PATH=tmp_path).level == "ok"


@pytest.mark.usefixtures("hurried")
def test_a_server_that_accepts_and_says_nothing_is_given_up(unreachable: str) -> None:
    found = look("dataset", DATASET=f"{unreachable}/reviews.csv")
    assert found.level == "fail"
    assert "does not answer: " in found.said


@contextmanager
def answering(status: int, seen: list[Mapping[str, str]]) -> Iterator[str]:
    class Answer(Endless):
        def do_GET(self) -> None:
            seen.append(dict(self.headers) | {"path": self.path})
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

    with serving(Answer) as address:
        yield address


@pytest.mark.usefixtures("hurried")
def test_a_tracker_is_asked_and_fails_nothing(unreachable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneserve.training.trackers.require", lambda *_, **__: None)  # its client need not be here
    assert look("tracker").level == "ok"
    assert look("tracker", MLFLOW_TRACKING_URI="databricks").level == "ok"
    assert look("tracker", MLFLOW_TRACKING_URI="mlflow:5000").level == "fail"
    assert look("tracker", MLFLOW_TRACKING_URI=unreachable).level == "warn"
    seen: list[Mapping[str, str]] = []
    with answering(200, seen) as address:
        assert look("tracker", MLFLOW_TRACKING_URI=address.replace("//", "//me:geheim@")).level == "ok"
    assert seen[0]["path"] == "/health"
    assert seen[0]["Authorization"] == "Basic bWU6Z2VoZWlt"
    with answering(302, seen) as address:  # to where nobody answers
        assert look("tracker", MLFLOW_TRACKING_URI=address).level == "ok"
    with answering(401, seen) as address:
        assert look("tracker", MLFLOW_TRACKING_URI=address).level == "warn"


def test_a_tracker_whose_client_is_missing_ends_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tuneserve.extras.importlib.util.find_spec", lambda name: None if name == "mlflow" else object()
    )
    found = look("tracker", MLFLOW_TRACKING_URI="http://mlflow:5000")
    assert found.level == "fail"
    assert "requirements-trackers.txt" in found.said


def test_a_port_is_free_or_taken(taken: int) -> None:
    found = look("port", HOST="127.0.0.1", PORT=str(taken))
    assert found.level == "fail"
    assert f"PORT={taken} cannot be listened on" in found.said
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert look("port", HOST="127.0.0.1", PORT=str(port)).level == "ok"
    with socket.socket() as free:  # nor does the check keep it
        free.bind(("127.0.0.1", port))
