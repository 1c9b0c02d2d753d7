"""The page in a real browser: each of its states, the keyboard, whether everybody can read it, and a whole story."""

import csv
import io
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loop
import pytest
import tiny
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from pydantic import SecretStr
from serving.conftest import EchoEngine, classifier, engine, held, make_engine, settings, slot, version
from wire import Full, served

from tuneserve.errors import NoModelError, RefusedError
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving.http.page import FILES
from tuneserve.serving.slot import Slot
from tuneserve.settings import PROJECT, Settings

__all__ = ["EchoEngine", "classifier", "engine", "held", "make_engine", "settings", "slot", "version"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    *["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"],
    *["--disable-component-update", "--disable-sync"],
    *(["--no-sandbox"] if os.geteuid() == 0 else []),  # Chromium refuses root one
]
IMAGES = PROJECT / "docs" / "images"
PATIENCE_MS = 60_000.0
"""For what takes a second: other tests may run on the same cores."""

expect.set_options(timeout=PATIENCE_MS)

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open the page of the server at a port; whatever it complains of is a failure, but answers that are no success."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_(port: int, *, view: str = "", scheme: Any = "light", width: int = 1100) -> Page:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url) if "/page/" in request.url else None)
        page.on("console", lambda said: complaints.append(said.text) if "Security Policy" in said.text else None)
        page.goto(f"http://127.0.0.1:{port}/{view and f'#{view}'}")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def picture(request: pytest.FixtureRequest) -> Callable[[Page, str], None]:
    """Check that a state can be read by everybody; with --record keep a picture of it, too."""

    def look(page: Page, name: str) -> None:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
            assert [(one["id"], one["impact"], [node["target"] for node in one["nodes"]]) for one in found] == []
        page.emulate_media(color_scheme="light")
        size = page.viewport_size
        page.set_viewport_size({"width": 360, "height": 740})  # a phone
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        if size is not None:
            page.set_viewport_size(size)
        if request.config.getoption("--record"):
            IMAGES.mkdir(exist_ok=True)
            page.screenshot(path=IMAGES / f"{name}.png", full_page=True)

    return look


def state(page: Page) -> Locator:
    return page.locator("#state")


def show_key(page: Page, key: str = "k") -> None:
    page.click("#key")
    page.fill("#key-value", key)
    page.keyboard.press("Enter")


def keyed(settings: Settings, **values: Any) -> Settings:
    return settings.model_copy(update={"api_key": SecretStr("k"), **values})


TRAINING = """
import sys, time
from pathlib import Path
from tuneserve.lifecycle import status
from tuneserve.lifecycle.decision import Decision
status.EVERY_S = 0
root = Path(sys.argv[1])

def wait_for(name):
    while not (root / name).exists():
        time.sleep(0.01)

with status.Status(root / "training.json") as said:
    wait_for("data")
    said.found(["train: 2120 texts (bad 1060, good 1060)", "12 training texts left out because they repeat another"])
    said.training(steps=90, epochs=3)
    for step in range(1, 61):
        if step % 30 == 0:
            said.step(step, {"validation_loss": 0.6 / (1 + step / 60)})
        said.step(step, {"loss": 0.7 / (1 + step / 30)})
    wait_for("tested")
    said.phase("testing")
    wait_for("judged")
    said.phase("judging")
    wait_for("decided")
    decision = Decision("three", "refused", "gate", "it has 3.1 points less accuracy than the champion", "one")
    said.decided(decision, before=None)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    """A trainer whose trainings go on as files of their names appear, and bring a version that is refused."""
    store = Store(tmp_path / "models")
    store.prepare()
    environ = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", TRAINING, str(store.root), str(RefusedError.exit_code)]
    trainer = Trainer(command, store, serves=lambda: False, environ=environ)
    yield trainer
    trainer.kill()
    trainer.close()


def go_on(tmp_path: Path, name: str) -> None:
    (tmp_path / "models" / name).touch()


def test_while_the_first_model_is_trained_the_page_shows_how_far_it_is(
    settings: Settings, trainer: Trainer, tmp_path: Path, open_page: Open, picture: Any
) -> None:
    with served(settings, Slot(), trainer=trainer) as port:
        trainer.start("the container's start")
        page = open_page(port)
        expect(state(page)).to_have_text("preparing …")
        expect(page.locator(".steps [aria-current]")).to_have_text("Preparing")
        picture(page, "preparing")
        go_on(tmp_path, "data")
        expect(state(page)).to_contain_text("training: 67%, about")
        expect(page.locator("progress")).to_have_attribute("value", re.compile("0.66"))
        expect(page.locator("figcaption")).to_contain_text("validation loss 0.300")
        expect(page.locator("main li", has_text="repeat another")).to_be_visible()
        picture(page, "training")
        page.click("nav a[href='#ask']")
        expect(page.locator("main h2")).to_have_text("The first model is being trained")
        page.click("main a")
        go_on(tmp_path, "tested")
        expect(page.locator(".steps [aria-current]")).to_have_text("Testing")
        go_on(tmp_path, "judged")
        expect(state(page)).to_have_text("judging …")
        picture(page, "judging")


def test_a_model_answers_while_another_is_trained_and_a_refused_one_is_told_of(
    settings: Settings, slot: Slot, trainer: Trainer, tmp_path: Path, open_page: Open, picture: Any
) -> None:
    with served(settings, slot, trainer=trainer) as port:
        page = open_page(port)
        expect(state(page)).to_have_text("ready")
        trainer.start("RETRAIN_SCHEDULE")
        go_on(tmp_path, "data")
        expect(state(page)).to_contain_text("ready; training: 67%")
        page.fill("textarea", "a great film")
        page.click("button[type=submit]")
        expect(page.locator(".verdict")).to_contain_text("good")
        picture(page, "retraining")
        for name in ("tested", "judged", "decided"):
            go_on(tmp_path, name)
        expect(page.locator("#notice")).to_contain_text("refused; the one before goes on answering")
        expect(page.locator("#notice")).to_contain_text("3.1 points less accuracy")
        picture(page, "refused")
        page.click("#notice button")
        expect(page.locator("#notice")).to_be_empty()
        page.click("nav a[href='#training']")
        expect(page.locator("main h2")).to_have_text("The last training brought a version that the gate refused")


def test_a_text_is_asked_and_its_words_and_its_end_are_shown(
    settings: Settings, slot: Slot, tmp_path: Path, open_page: Open, picture: Any
) -> None:
    feedback = Feedback(tmp_path / FILE, max_rows=100, keep_texts=False)
    with served(settings, slot, feedback=feedback) as port:
        page = open_page(port)
        page.click("button[type=submit]")
        expect(page.locator(".result")).to_have_text("There is no text yet.")
        expect(page.locator("textarea").first).to_be_focused()
        page.keyboard.type("a great film <b>😀</b> a dull film a film a film a film a film a film a film")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".verdict")).to_contain_text("good")
        expect(page.locator(".read mark").first).to_be_visible()
        expect(page.locator(".read .end")).to_have_text("reading ended here")
        assert page.locator(".read b").count() == 0  # what is shown is text, whatever it looks like
        shown = page.locator(".read").inner_text().replace("reading ended here", "")
        assert shown == page.locator("textarea").first.input_value()
        bars = page.locator(".scores .filled").evaluate_all("bars => bars.map(bar => bar.style.width)")
        assert len(bars) == 2
        assert sum(float(width.rstrip("%")) for width in bars) == pytest.approx(100, abs=0.2)
        picture(page, "ask")
        page.click("text=Wrong")
        page.select_option("select[aria-label='The right label']", "bad")
        page.click("text=Send")
        expect(page.locator("main [role=status].good")).to_contain_text("kept apart")
        assert feedback.counts() == {"labels": 1, "labelled_texts": 0, "kept_apart": 1}
    feedback.close()


def test_the_page_is_used_without_a_mouse(settings: Settings, slot: Slot, open_page: Open) -> None:
    with served(settings, slot) as port:
        page = open_page(port)
        expect(page.locator("textarea").first).to_be_visible()

        def focused() -> str:
            script = "(document.activeElement.textContent || document.activeElement.id || '').trim().slice(0, 20)"
            return str(page.evaluate(script))

        page.keyboard.press("Tab")
        assert focused() == "Skip to the content"
        seen = []
        for _ in range(7):
            page.keyboard.press("Tab")
            seen.append(focused())
        assert seen[:5] == ["Ask", "Label", "Model", "Training", "API"]
        assert page.evaluate("document.activeElement.tagName") == "BUTTON"  # after the text's box
        page.keyboard.press("Shift+Tab")
        page.keyboard.type("a great film")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator(".verdict")).to_contain_text("good")
        page.locator("nav a[href='#model']").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#view")).to_be_focused()
        expect(page.locator("nav [aria-current]")).to_have_text("Model")


def test_an_overloaded_server_is_asked_again_when_it_says(
    settings: Settings, held: tuple[Slot, threading.Event], open_page: Open, picture: Any
) -> None:
    slot, go = held
    with served(settings, slot) as port:
        page = open_page(port)
        expect(page.locator("textarea").first).to_be_visible()
        full = Full(slot, go, port)
        page.fill("textarea", "a great film")
        page.click("button[type=submit]")
        expect(page.locator(".result")).to_contain_text("more to do than it can take. Asking again in")
        picture(page, "overloaded")
        full.make_room()
        expect(page.locator(".verdict")).to_contain_text("good")
        full.close()


def test_a_server_without_a_model_says_what_brings_one(settings: Settings, open_page: Open, picture: Any) -> None:
    with served(settings, Slot()) as port:
        page = open_page(port)
        expect(state(page)).to_have_text("no model")
        expect(page.locator("main")).to_contain_text("run.py train, or run.py import FOLDER")
        picture(page, "no-model")
        page.click("nav a[href='#label']")
        expect(page.locator("main h2")).to_have_text("Labelling wants an API key")


def test_a_failed_model_and_a_server_that_is_gone_are_told_apart(
    settings: Settings, slot: Slot, open_page: Open, picture: Any
) -> None:
    with served(settings, slot) as port:
        page = open_page(port)
        expect(state(page)).to_have_text("ready")
        slot.fail(NoModelError("The engine died."))
        expect(state(page)).to_have_text("failed")
        expect(page.locator("#notice")).to_contain_text("cannot answer any more")
        picture(page, "failed")
    expect(state(page)).to_have_text("not connected")
    picture(page, "not-connected")


def test_what_a_person_has_begun_outlives_a_server_that_is_away_for_a_while(
    settings: Settings, slot: Slot, open_page: Open
) -> None:
    with served(settings, slot) as port:
        page = open_page(port)
        page.fill("textarea", "a great film")
        page.click("button[type=submit]")
        expect(page.locator(".verdict")).to_contain_text("good")
    expect(state(page)).to_have_text("not connected")
    page.click("button[type=submit]")
    expect(page.locator("main [role=alert]")).to_contain_text("cannot be reached")
    assert page.locator("textarea").first.input_value() == "a great film"
    with served(settings, slot, port=port):
        expect(state(page)).to_have_text("ready")
        page.click("button[type=submit]")
        expect(page.locator(".verdict")).to_contain_text("good")


def test_what_the_page_shows_without_the_key_is_what_anybody_may_see(
    settings: Settings, slot: Slot, open_page: Open, picture: Any
) -> None:
    with served(keyed(settings), slot) as port:
        page = open_page(port)
        expect(page.locator("main")).to_contain_text("This server answers only with its API key")
        page.fill("textarea", "a great film")
        page.click("button[type=submit]")
        expect(page.locator("main [role=alert]")).to_contain_text("wants its API key")
        picture(page, "no-key")
        show_key(page, "wrong")
        expect(page.locator("#key")).to_have_text("Key not right")
        show_key(page)
        expect(page.locator("#key")).to_have_text("Key in use")
        expect(page.locator("textarea").first).to_have_value("a great film")  # it need not be typed again
        page.click("button[type=submit]")
        expect(page.locator(".verdict")).to_contain_text("good")
        page.reload()  # the key was in the page's memory alone
        expect(page.locator("#key")).to_have_text("API key")
        assert page.evaluate("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0
        assert page.context.cookies() == []
    with served(keyed(settings, api_key_guards="everything"), slot) as port:
        # Not even the page is shown then; a browser that has it already is told why.
        page = open_page(port)
        expect(page.locator("body")).to_contain_text("wants its API key")


def test_a_pasted_table_comes_back_scored(settings: Settings, slot: Slot, open_page: Open, picture: Any) -> None:
    rows = ["id,text", *(f"{number},a great film {number}" for number in range(150))]
    rows += [
        '150,"two ""quoted""',
        'lines, one field"',
        "151,",
        "=1+1,a dull film,one more than the head",
    ]
    rows += ["-1+1+cmd|' /C calc'!A0,film", "a;=1+1,film", "-1.5,film"]
    with served(settings.model_copy(update={"max_body_kb": 1024}), slot) as port:
        page = open_page(port)
        page.get_by_label("Or its rows, pasted").fill("\n".join(rows))
        expect(page.get_by_label("Texts are in")).to_have_value("1")
        page.get_by_role("button", name="Score").click()
        expect(page.locator("main")).to_contain_text("156 rows scored")
        picture(page, "table")
        with page.expect_download() as download:
            page.click("text=Save as CSV")
        with Path(download.value.path()).open(encoding="utf-8", newline="") as file:
            content = file.read()
    head, *scored = csv.reader(io.StringIO(content, newline=""))
    assert head == ["id", "text", "column_3", "prediction", "probability", "error"]
    assert len(scored) == 156
    assert scored[150][1] == 'two "quoted"\nlines, one field'
    assert scored[151][3:5] == ["", ""]
    assert "empty" in scored[151][5]
    assert scored[152][2] == "one more than the head"
    # What a spreadsheet would run is text, what is a number stays one, and nothing is split at another separator.
    assert [row[0] for row in scored[152:]] == ["'=1+1", "'-1+1+cmd|' /C calc'!A0", "a;=1+1", "-1.5"]
    assert '"a;=1+1"' in content
    assert {row[3] for row in scored if not row[5]} == {"good"}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "data"
    folder.mkdir()
    loop.write_rows(folder / "train.csv", tiny.sentences(160))
    loop.write_rows(folder / "test.csv", tiny.sentences(120, first=1000))
    return {
        **tiny.RECIPE,
        **tiny.paths(tmp_path),
        "DATASET": str(folder),
        "BASE_MODEL": str(tiny.make_base_model(tmp_path / "base")),
        "HOST": "127.0.0.1",
        "PORT": str(loop.free_port()),
        "API_KEY": loop.KEY["X-API-Key"],
        "KEEP_TEXTS": "1",
        "RETRAIN_NICE": "0",  # other tests may run on the same cores
        "MAX_ACCURACY_DROP": "1",  # which version is better is not what this is about
        "MAX_LATENCY_INCREASE": "100",
    }


def test_a_story_from_the_first_training_to_a_rollback(
    environment: dict[str, str], tmp_path: Path, open_page: Open, picture: Any
) -> None:
    service = loop.Service(environment, tmp_path / "out.log")
    service.start()
    try:
        page = open_page(int(environment["PORT"]))
        show_key(page, environment["API_KEY"])
        expect(state(page)).to_have_text("ready", timeout=4 * PATIENCE_MS)
        first = service.version()

        page.locator(".examples button").first.click()  # a text of the test
        page.click("button[type=submit]")
        expect(page.locator(".read + .note")).to_contain_text("“")
        page.click("text=Wrong")
        page.select_option("select[aria-label='The right label']", index=0)
        page.click("text=Send")
        expect(page.locator("main [role=status].good")).to_contain_text("counts at the next training")

        texts = [text for text, _ in tiny.sentences(60, first=3000)]
        page.get_by_label("Or its rows, pasted").fill("\n".join(["text", *texts]))
        page.get_by_role("button", name="Score").click()
        expect(page.locator("main")).to_contain_text("60 rows scored")

        page.click("nav a[href='#label']")
        box = page.locator(".to-label")
        look_again = page.get_by_role("button", name="Look again")  # what was answered just now is about to be written
        expect(box.or_(look_again)).to_be_visible()
        while look_again.is_visible():
            time.sleep(0.2)
            look_again.click()
            expect(box.or_(look_again)).to_be_visible()
        picture(page, "label")
        given = []
        for number in range(20):
            text = box.inner_text()
            given.append(text)
            page.keyboard.press(str(1 + number % 2))
            expect(box).not_to_have_text(text)
        expect(page.locator(".row.between [role=status]")).to_contain_text("20 labels given")
        last = box.inner_text()
        page.keyboard.press("u")  # the twentieth comes back
        expect(box).to_have_text(given[-1])
        page.keyboard.press("1")
        expect(box).to_have_text(last)
        page.keyboard.press("s")
        expect(box).not_to_have_text(last)

        page.click("nav a[href='#model']")  # the last label is sent when the view is left
        service.wait("/feedback", lambda said: said["labelled_texts"] == 21)
        expect(page.locator("tr.answers code")).to_have_text(first)
        page.click("text=Retrain now")
        expect(page.locator("main")).to_contain_text("A training has begun")
        expect(page.locator("tr.answers code")).not_to_have_text(first, timeout=4 * PATIENCE_MS)
        second = page.locator("tr.answers code").inner_text()
        assert service.get("/feedback")["labels"] == 21
        for box_ in page.locator("input[data-version]").all():
            box_.check()
        expect(page.locator("h3", has_text="Compared")).to_be_visible()
        picture(page, "model")

        page.click("text=Roll back")
        page.get_by_role("button", name="Cancel").click()
        assert service.version() == second
        page.click("text=Roll back")
        page.locator("dialog[open] button.main").click()
        expect(page.locator("main")).to_contain_text(f"{first} is the champion again")
        expect(page.locator("tr.answers code")).to_have_text(first)
        expect(page.locator("main")).to_contain_text("withdrawn")
        page.click("nav a[href='#training']")
        expect(page.locator("main h2")).to_have_text("The last training has ended well")
        picture(page, "trained")
    finally:
        if service.process is not None:
            service.process.kill()
            service.process.wait()


def test_no_file_of_the_page_waits_for_another(settings: Settings, slot: Slot, open_page: Open) -> None:
    with served(settings, slot) as port:
        page = open_page(port)
        expect(page.locator("textarea").first).to_be_visible()
        links = page.locator("head link[href], head script[src]")
        named = links.evaluate_all("all => all.map(one => one.href || one.src)")
        assert {url.rpartition("/")[2] for url in named} == set(FILES)  # each is asked for once the page is there
        script = "performance.getEntriesByType('resource').map(one => one.name)"
        loaded = [url.rpartition("/")[2] for url in page.evaluate(script) if "/page/" in url]
        assert sorted(set(loaded)) == sorted(FILES)
