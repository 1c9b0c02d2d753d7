"""The shell blocks of README and docs/, run from the first to the last in a copy of the project; and their links.

A comment above a block says when it is not run here: `<!-- needs Docker -->`. `<!-- background -->` starts a server
that the blocks after it talk to.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from loop import free_port
from tree import copy_project

from tuneserve.artifact import read_version
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE, open_database
from tuneserve.lifecycle.store import Store
from tuneserve.settings import PROJECT, Settings
from tuneserve.signals import end_with_parent

README, DOCS = PROJECT / "README.md", PROJECT / "docs"
LINK = re.compile(r"\]\(([^()\s]+)\)")
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```sh\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```(?P<language>\S*)\n.*?^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(
    r"needs (Docker|Docker and a GPU|a GPU|a network|a trained store|a model of one's own|a server|that server"
    r"|the edits of this page|the data of this page)"
)
SHORTER = {"make run": {"N_EPOCHS": "1"}, "TRAIN_BODY=0": {"NUM_TRAIN": "1200", "NUM_TEST": "100"}}
"""How blocks begin that train for long, and the variables that make them shorter here."""
OTHERS = {"sh", "text", "json", "yaml", "ini", "python", "js", "java", "mermaid"}


def linked(page: Path) -> list[Path]:
    """The files that a page links to, each once, in its order."""
    targets = (target.partition("#")[0] for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))))
    return list(dict.fromkeys((page.parent / one).resolve() for one in targets if one and "://" not in one))


def slugs(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCED.sub("", page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = found[slug] = found.get(slug, -1) + 1
        anchors.add(f"{slug}-{number}" if number else slug)
    return anchors


PAGES = [README, *(page for page in linked(README) if page.parent == DOCS and page.exists())]
"""In the order in which a reader meets them: a block may use what an earlier page has made."""
LINKING = [README, *(PROJECT / name for name in ("CONTRIBUTING.md", "research/README.md")), *sorted(DOCS.rglob("*.md"))]
BLOCKS = [
    (found["mark"] or "", found["code"]) for page in PAGES for found in BLOCK.finditer(page.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("clone") / "tuneserve")


@pytest.fixture
def start(clone: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a block in a process group of its own, which ends with the test, or with the process that runs the test."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, environment: dict[str, str], **options: int) -> "subprocess.Popen[str]":
        for beginning, variables in SHORTER.items():
            environment = environment | (variables if code.startswith(beginning) else {})
        process = subprocess.Popen(
            ["bash", "-ec", code.replace("localhost:8000", f"localhost:{environment['PORT']}")],
            cwd=clone,
            env=environment,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent,  # make passes the signal on to the server
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_every_mark_is_one_that_is_known() -> None:
    assert {mark for mark, _ in BLOCKS if not NEEDS.fullmatch(mark)} == {"", "background"}
    assert [mark for mark, _ in BLOCKS].count("background") == 1


def test_every_shell_block_is_one_that_is_found_here() -> None:
    for page in [*PAGES, PROJECT / "CONTRIBUTING.md"]:
        content = page.read_text(encoding="utf-8")
        languages = [found["language"] for found in FENCED.finditer(content)]
        assert set(languages) <= OTHERS, f"{page.name}: shell blocks are marked `sh`"
        assert languages.count("sh") == len(BLOCK.findall(content)), page.name


def test_the_readme_links_every_page() -> None:
    assert set(PAGES) == {README, *DOCS.glob("*.md")}


def test_the_readme_has_fewer_than_200_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_to_files_and_anchors_to_headings(page: Path) -> None:
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link} leads to no file"
        assert target.is_relative_to(PROJECT), f"{page.name}: {link} leads out of the project"
        if anchor:
            assert anchor in slugs(target.read_text(encoding="utf-8")), f"{page.name}: {link} leads to no heading"


def test_slugs_are_those_of_github() -> None:
    page = "# A `b-c`: d_e, f!\n## Twice\n### Twice\n```sh\n# a comment\n```\n## [Link](x.md) and more\n"
    assert slugs(page) == {"a-b-c-d_e-f", "twice", "twice-1", "link-and-more"}


def test_the_blocks_work_in_their_order(clone: Path, start: Callable[..., "subprocess.Popen[str]"]) -> None:
    environment = os.environ | {"PORT": str(free_port()), "HOST": "127.0.0.1"}
    answers: dict[str, str] = {}
    for mark, code in BLOCKS:
        script = code.replace("/tmp/tickets", str(clone / "tickets"))
        if mark == "background":
            server = start(script, environment)
            wait_until_ready(environment["PORT"], server)
        elif not mark:
            process = start(script, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            answers[code], errors = process.communicate()
            assert process.returncode == 0, f"{code}\n{answers[code]}{errors}"
    os.killpg(server.pid, signal.SIGINT)
    assert server.wait(timeout=240) in (0, 130, -signal.SIGINT)

    def answer(part: str, number: int = 0) -> str:
        """What the block that holds `part` has printed; where several do, the one of this number."""
        return [output for code, output in answers.items() if part in code][number]

    assert json.loads(answer("/inference "))["label"] == "positive"
    assert [one["label"] for one in json.loads(answer("/inference/batch"))["predictions"]] == ["positive", "negative"]
    assert "8 texts are few" in answer("train.csv <<")
    assert "nothing to train" in answer("DATASET=/tmp/tickets N_EPOCHS=1", 1)
    assert re.search(r"encoded \d+ of \d+ texts", answer("TRAIN_BODY=0"))
    scored = answer("run.py predict").splitlines()
    assert scored[-3].startswith("text,label,predicted_label,score,scores,tokens,truncated,error,")
    assert "'label': 'negative'" in answer("transformers import pipeline")
    assert "tuneserve_requests_total" in answer("/metrics")

    champion = (clone / "models" / "champion").read_text().strip()
    metadata = read_version(clone / "models" / "versions" / champion).metadata
    assert metadata["data"]["dataset"] == "sample"
    assert metadata["metrics"]["test"]["accuracy"] > 0.72  # after one epoch of the three


def test_the_blocks_on_a_store_do_what_they_say(
    tmp_path: Path, store: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    models = tmp_path / "models"
    shutil.copytree(store, models)
    first = Store(models).champion()
    second = "20260102T030405Z-0a1b2c3d"  # as in the block
    shutil.copytree(first.folder, models / "versions" / second)
    for name in (second, first.id):
        Store(models).promote(name)
    feedback = Feedback(models / FILE, max_rows=10, keep_texts=False)
    for text in ("a text", "another"):
        feedback.label_text(text, "good", client="10.0.0.1")
    with open_database(models / FILE) as database:
        database.execute("UPDATE labels SET at = unixepoch('2026-03-02') WHERE id = 1")
        database.execute("UPDATE labels SET client = '3f2a91c4' WHERE id = 2")
    environment = os.environ | {"MODEL_PATH": str(models), "PORT": "8000"}
    said = []
    for code in (code for mark, code in BLOCKS if mark == "needs a trained store"):
        process = start(code, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        said.append(process.stdout.read())
        process.wait()
        assert process.returncode == 0, f"{code}\n{said[-1]}"
    versions, labels = said
    assert f"{second} is the champion again" in versions
    assert f"{second} is the champion; servers" in versions
    assert "1 labels count as yours" in labels
    assert "1 labels removed" in labels


def test_the_blocks_with_a_server_of_their_own_do_what_they_say(
    clone: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    environment = os.environ | {"PORT": str(free_port()), "HOST": "127.0.0.1"}
    [begin] = [code for mark, code in BLOCKS if mark == "needs a server"]
    wait_until_ready(environment["PORT"], start(begin, environment))
    said = []
    for ask in (code for mark, code in BLOCKS if mark == "needs that server"):
        asking = start(ask, environment, stdout=subprocess.PIPE)
        assert asking.stdout is not None
        said.append(json.loads(asking.stdout.read()))
    [vectors] = [one for one in said if isinstance(one, list)]
    assert [len(vector) for vector in vectors] == [384, 384]
    [answer] = [one for one in said if isinstance(one, dict)]
    assert [len(one["embedding"]) for one in answer["data"]] == [384]


@pytest.mark.parametrize("code", [code for mark, code in BLOCKS if mark], ids=lambda code: code.splitlines()[0][:60])
def test_what_the_other_blocks_name_is_there(code: str) -> None:
    variables = set(re.findall(r"(?:^|\s)(?:-e )?([A-Z][A-Z_]+)=", code))
    assert {name for name in variables if not name.startswith(("PET_", "EXTRAS", "ARGS", "IFS"))} <= {
        name.upper() for name in Settings.model_fields
    }
    makefile = (PROJECT / "Makefile").read_text()
    for target in re.findall(r"(?:^|\s)make ([a-z-]+)", code):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"(?:^|\s)((?:production|benchmarks|tests)/[\w./-]+)", code):
        assert (PROJECT / path).exists(), path
    offered = (PROJECT / "production" / "build.py").read_text()
    for line in code.replace("\\\n", " ").splitlines():
        for option in re.findall(r"(?<= )--[a-z-]+", line) if "build.py" in line else []:
            assert option == "--help" or f'"{option}"' in offered, option
    for verb in re.findall(r"(?:run\.py|tuneserve) ([a-z][a-z-]*)", code):
        assert f'"{verb}"' in (PROJECT / "production" / "docker-res" / "run.py").read_text(), verb


def wait_until_ready(port: str, server: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server has ended"
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        time.sleep(0.2)  # a test that asks without pause takes a core from the training it waits for
    pytest.fail("the server never became ready")
