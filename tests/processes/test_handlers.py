"""Models with code of their own, each in a process: the toolkit's rules, and what bad code costs the others."""

import asyncio
import json
import logging
import os
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wire import wait_until

from tuneserve.archives import find_program
from tuneserve.errors import HandlerError, NoModelError, OverloadedError, TimeoutExceededError
from tuneserve.serving.metrics import Metrics
from tuneserve.tasks.handler import Handler, Invocation, Response

Make = Callable[..., Handler]
PLAIN = {"PATH": "/usr/bin:/bin"}


def write_code(folder: Path, code: str, **others: str) -> Path:
    """An unpacked archive with this code and other modules."""
    for name, content in {"inference": code, **others}.items():
        (folder / "code").mkdir(parents=True, exist_ok=True)
        (folder / "code" / f"{name}.py").write_text(textwrap.dedent(content), encoding="utf-8")
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Handlers of code that is given, which are closed at the end."""
    made: list[Handler] = []

    def make(code: str, *, modules: dict[str, str] | None = None, **options: Any) -> Handler:
        folder = write_code(tmp_path / f"model-{len(made)}", code, **modules or {})
        options = {"environ": PLAIN, "name": folder.name, **options}
        program = find_program(folder)
        assert program is not None
        made.append(Handler(folder, program=program, **options))
        made[-1].wait()
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(handler: Handler, body: bytes = b"{}", **headers: str) -> Any:
    """The answer to one request."""
    [found] = handler.predict([Invocation(body, **headers)])
    return found


def said(handler: Handler, body: bytes = b"{}", **headers: str) -> tuple[bytes, str]:
    found = ask(handler, body, **headers)
    assert isinstance(found, Response), found
    return found.body, found.content_type


def is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def process_of(handler: Handler) -> int:
    assert handler._process is not None
    return handler._process.pid


ECHO = """
def model_fn(model_dir): return model_dir
def transform_fn(model, data, content_type, accept): return repr((data, content_type, accept))
"""
PID = """
import os
def model_fn(model_dir): return None
def input_fn(data, content_type): return data
def predict_fn(data, model):
    exec(data)
    return os.getpid()
"""


def test_the_functions_get_what_the_toolkit_gives_them(make: Make, tmp_path: Path) -> None:
    echo = make(ECHO)
    assert said(echo, "ü".encode(), content_type="text/csv; charset=utf-8") == (
        b"('\xc3\xbc', 'text/csv', 'application/json')",
        "application/json",
    )
    assert said(echo, b"\xff", content_type="image/png", accept="text/plain") == (
        rb"(b'\xff', 'image/png', 'text/plain')",
        "text/plain",
    )
    assert b"text/html, */*" in said(echo, accept="text/html, */*")[0]
    assert said(echo, accept="text/html, */*")[1] == "application/json"
    assert ask(echo, b"\xff").kind == "UnicodeDecodeError"
    full = make("""
        import os, sys
        def model_fn(model_dir, context): return model_dir, sys.path[0], os.getcwd(), context.model_name
        def input_fn(data, content_type, context):
            return context.get_request_header(0, "X-Amzn-SageMaker-Custom-Attributes")
        def predict_fn(data, model, context): return [*model, data]
        def output_fn(prediction, accept, context):
            context.set_response_content_type(0, "text/x-own")
            return str(prediction)
    """)
    folder = str(tmp_path / "model-1")
    body, kind = said(full, custom_attributes="tenant=7")
    assert body.decode() == str([folder, f"{folder}/code", folder, "model-1", "tenant=7"])
    assert kind == "text/x-own"


@pytest.mark.parametrize(
    ("content_type", "body", "data"),
    [
        ("application/json", b'{"inputs": ["a", "b"], "parameters": {"k": 2}, "other": 1}', "[['a', 'b'], {'k': 2}]"),
        ("application/json", b'{"text": "a"}', "[{'text': 'a'}, {}]"),
        ("application/json", b'["a"]', "[['a'], {}]"),
        ("text/csv", b"inputs\na\nb\n", "[['a', 'b'], {}]"),
        ("text/csv", b"question,context\na,b\n", "[[{'question': 'a', 'context': 'b'}], {}]"),
        ("text/csv", b"text\na\n", "CSV needs a header row"),
        ("text/plain", b"a", "content type 'text/plain' is not read"),
        ("application/json", b"{", "Expecting property name"),
    ],
)
def test_what_is_missing_has_defaults(make: Make, content_type: str, body: bytes, data: str) -> None:
    handler = make("def model_fn(model_dir): return lambda inputs, **named: {'é': str([inputs, named])}")
    found = ask(handler, body, content_type=content_type)
    if isinstance(found, Response):
        assert found.body.decode() == json.dumps({"é": data}, ensure_ascii=False, separators=(",", ":"))
    else:
        assert (str(found)[: len(data)], found.status) == (data, 400)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("def model_fn(): pass", "TypeError", "model_fn definition takes 1 or 2 arguments but 0 were given."),
        ("def input_fn(*all): pass", "TypeError", "input_fn definition takes 2 or 3 arguments but 1 were given."),
        ("def predict_fn(a, b, c, d): pass", "TypeError", "predict_fn definition takes 2 or 3 arguments but 4"),
        ("def transform_fn(a, b, c): pass", "TypeError", "transform_fn definition takes 4 or 5 arguments but 3"),
        (f"{ECHO}\ndef input_fn(data, kind): pass", "ValueError", "Cannot use transform_fn implementation in conjunct"),
        ("raise RuntimeError('at import')", "RuntimeError", "at import"),
        ("import sys; sys.exit('no')", "SystemExit", "no"),
        ("def model_fn(: pass", "SyntaxError", ""),
        ("import not_there", "ModuleNotFoundError", "No module named 'not_there'"),
        ("import embedding", "ModuleNotFoundError", "No module named 'embedding'"),
        ("import tuneserve", "ModuleNotFoundError", "No module named 'tuneserve'"),
        ("import os; os._exit(3)", "ProcessEnded", "Its process ended with exit code 3 while it was loaded."),
        ("import ctypes; ctypes.string_at(0)", "ProcessEnded", "Its process ended by SIGSEGV while it was loaded."),
        ("x = 1", "FileNotFoundError", "config.json"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_leaves_no_process(make: Make, code: str, kind: str, words: str) -> None:
    started: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = subprocess.Popen

        def popen(*arguments: Any, **options: Any) -> Any:
            child = real(*arguments, **options)
            started.append(child.pid)
            return child

        patch.setattr(subprocess, "Popen", popen)
        with pytest.raises(HandlerError) as error:
            make(code)
    assert error.value.kind == kind
    assert words in str(error.value)
    assert [is_gone(pid) for pid in started] == [True]


def test_errors_of_a_request_leave_the_model_as_it_is(make: Make) -> None:
    handler = make(PID, max_bytes=1000)
    first = said(handler, b"pass")[0]
    for code, kind, words in [
        ("raise KeyError('inputs')", "KeyError", "'inputs'"),
        ("raise SystemExit(3)", "SystemExit", "3"),
        ("1 / 0", "ZeroDivisionError", "division by zero"),
        ("raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})()", "E", "its message cannot be read"),
        ("raise ValueError('x' * 10**6)", "ValueError", "x" * 100),
    ]:
        error = ask(handler, code.encode())
        assert isinstance(error, HandlerError)
        assert (error.kind, error.status, str(error)[: len(words)]) == (kind, 400, words)
        assert len(str(error)) <= 2000
    assert said(handler, b"pass")[0] == first


@pytest.mark.parametrize(
    ("output", "kind", "words"),
    [
        ("object()", "TypeError", "object of type object cannot be written as JSON"),
        ("float('nan')", "ValueError", "Out of range float values"),
        ("'\\ud800'", "UnicodeEncodeError", ""),
        ("b'x' * 1001", "ValueError", "the answer has 1001 bytes; the most is 1000"),
        ("('x', 'text/x\\r\\nSet-Cookie: a=b')", "", "application/json"),
        ("('x', 'text/x')", "", "text/x"),
        ("bytearray(b'x')", "", "application/json"),
    ],
)
def test_what_a_function_returns_is_written_or_refused(make: Make, output: str, kind: str, words: str) -> None:
    handler = make(
        f"def model_fn(folder): pass\ndef transform_fn(model, data, kind, accept): return {output}", max_bytes=1000
    )
    found = ask(handler)
    if kind:
        assert (found.kind, words in str(found)) == (kind, True)
    else:
        assert (found.body, found.content_type) == (b"x", words)


def test_modules_of_one_name_never_meet(make: Make) -> None:
    def code(number: int) -> dict[str, str]:
        return {"helper": f"NUMBER = {number}", "handler": "raise RuntimeError", "classification": f"A = {number}"}

    text = """
        import helper, classification
        def model_fn(model_dir): return lambda inputs: [helper.NUMBER, classification.A]
    """
    one, two = make(text, modules=code(1)), make(text, modules=code(2))
    assert (said(one)[0], said(two)[0]) == (b"[1,1]", b"[2,2]")


@pytest.mark.parametrize(
    ("code", "ended"),
    [("os._exit(3)", "with exit code 3"), ("import ctypes; ctypes.string_at(0)", "by SIGSEGV")],
)
def test_a_crash_ends_one_request_and_no_other_model(make: Make, code: str, ended: str) -> None:
    handler, other = make(PID), make(PID)
    before, beside = said(handler, b"pass")[0], said(other, b"pass")[0]
    error = ask(handler, code.encode())
    assert (error.status, str(error)) == (500, f"Its process ended {ended} while it computed.")
    assert said(handler, b"pass")[0] != before
    assert said(other, b"pass")[0] == beside
    assert is_gone(int(before))
    assert handler._process is not None
    os.kill(handler._process.pid, 9)  # between two requests: none fails
    wait_until(handler._process.has_ended)
    assert said(handler, b"pass")[0] != before


def test_a_model_that_crashes_again_when_it_is_loaded_is_dead(make: Make, tmp_path: Path) -> None:
    handler = make(PID)
    deaths: list[BaseException] = []
    handler.attach(Metrics(), deaths.append)
    code = tmp_path / "model-0" / "code" / "inference.py"
    code.write_text("import os; os._exit(4)", encoding="utf-8")
    assert ask(handler, b"os._exit(3)").status == 500
    wait_until(lambda: handler.dead and deaths)
    assert [str(one) for one in deaths] == ["Its process ended with exit code 4 while it was loaded."]
    with pytest.raises(NoModelError):
        ask(handler)
    assert handler.memory_bytes == 0


class Clock:
    """Seconds that pass when a test wants it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_hangs_is_ended_with_its_children_and_started_anew(make: Make, tmp_path: Path) -> None:
    clock = Clock()
    handler, other = make(PID, clock=clock, timeout_s=60), make(PID)
    first = process_of(handler)
    told = tmp_path / "hangs"
    hang = f"""
import pathlib, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "3600"])
pathlib.Path({str(told)!r}).write_text(str(child.pid))
time.sleep(3600)
"""

    async def both() -> list[Any]:
        hung = asyncio.ensure_future(handler.answer([Invocation(hang.encode(), content_type="text/csv")]))
        await asyncio.to_thread(wait_until, lambda: told.exists() and told.read_text())
        assert handler.memory_bytes > 0
        waits = asyncio.ensure_future(handler.answer([Invocation(b"pass", content_type="text/csv")]))
        beside = await other.answer([Invocation(b"pass", content_type="text/csv")])
        clock.now = 61.0
        return [*await hung, *await waits, *beside]

    hung, waits, beside = asyncio.run(both())
    assert isinstance(hung, TimeoutExceededError)
    assert waits.body == str(process_of(handler)).encode() != str(first).encode()
    assert beside.body == str(process_of(other)).encode()
    assert is_gone(first)
    assert not Path(f"/proc/{told.read_text()}/cmdline").exists()


def test_requests_wait_within_bounds_and_their_deadlines(make: Make, tmp_path: Path) -> None:
    handler = make(PID, max_waiting=2)
    go = tmp_path / "go"
    wait = f"import time, pathlib\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)".encode()

    async def all_of_them() -> list[Any]:
        first = asyncio.ensure_future(handler.answer([Invocation(wait)]))
        await asyncio.to_thread(wait_until, lambda: handler._busy)
        left = asyncio.ensure_future(handler.answer([Invocation(b"open('/nowhere/x', 'w')")]))
        late = asyncio.ensure_future(handler.answer([Invocation(b"pass")], deadline=handler._clock() + 0.01))
        await asyncio.sleep(0)
        assert isinstance(handler.room(), OverloadedError)
        with pytest.raises(OverloadedError, match="2 requests wait for model model-0 already"):
            await handler.answer([Invocation(b"pass")])
        with pytest.raises(TimeoutExceededError):
            await late
        left.cancel()
        go.touch()
        return [*await first, *await handler.answer([Invocation(b"pass"), Invocation(b"pass")])]

    assert len({one.body for one in asyncio.run(all_of_them())}) == 1
    assert handler.room() is None


def test_what_is_printed_is_logged_with_the_name_and_within_bounds(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    code = """
import subprocess, sys, logging
print("printed")
sys.stderr.write("written\\x1b[31m\\n")
logging.warning("logged")
os.write(1, b"raw\\n")
subprocess.run(["echo", "by a child"])
"""
    handler = make(PID)
    assert said(handler, code.encode())[0].isdigit()
    handler.close()
    lines = [record.getMessage() for record in caplog.records]
    for words in ("printed", "written�[31m", "WARNING:root:logged", "raw", "by a child"):
        assert f"model model-0: {words}" in lines
    caplog.clear()
    loud = make(PID)
    assert said(loud, b"for _ in range(20_000): print('x' * 999)")[0].isdigit()
    loud.close()
    assert [len(record.getMessage()) < 1100 for record in caplog.records] == [True] * 1001


def test_close_answers_what_waits_and_returns_when_the_processes_are_gone(make: Make) -> None:
    handler = make(PID)
    group = process_of(handler)
    code = b"import subprocess; subprocess.Popen(['sleep', '3600'])"

    async def close() -> Any:
        work = asyncio.ensure_future(handler.answer([Invocation(code)]))
        await asyncio.sleep(0)
        await asyncio.to_thread(handler.close)
        return await work

    [found] = asyncio.run(close())
    assert found.body == str(group).encode()
    assert is_gone(group)
    handler.close()
    with pytest.raises(NoModelError):
        ask(handler)


def test_close_ends_a_model_that_is_being_loaded(tmp_path: Path) -> None:
    folder = write_code(tmp_path / "model", "import time, pathlib; pathlib.Path('began').touch(); time.sleep(3600)")
    handler = Handler(folder, name="slow", program=folder / "code" / "inference.py", environ=PLAIN)
    wait_until((folder / "began").exists)
    handler.close()
    with pytest.raises(HandlerError):
        handler.wait()


def test_the_servers_secrets_stay_with_it(make: Make) -> None:
    secrets = {
        "API_KEY": "k" * 20,
        "HF_TOKEN": "t" * 20,
        "DATASET": "https://me:word@host/x",
        "HTTPS_PROXY": "http://a:b@c",
    }
    handler = make(
        "import os\ndef model_fn(folder): return lambda inputs: dict(os.environ)",
        environ=PLAIN | secrets | {"LANG": "C.UTF-8"},
    )
    found = json.loads(said(handler)[0])
    assert not set(secrets) & set(found)
    assert (found["LANG"], found["OMP_NUM_THREADS"]) == ("C.UTF-8", "1")


@pytest.mark.parametrize(
    "call", ["[sys.executable, '-m', 'pip', 'install', 'transformers==4.6']", "['pip', 'install', 'x']", "['pip3']"]
)
def test_code_that_calls_pip_goes_on_without_it(make: Make, call: str) -> None:
    make(f"import subprocess, sys\nsubprocess.check_call({call})\ndef model_fn(folder): pass")


def test_code_that_writes_to_the_socket_is_ended(make: Make) -> None:
    handler = make(PID)
    code = b"""
for number in range(3, 30):
    if os.path.lexists(name := f'/proc/self/fd/{number}') and 'socket' in os.readlink(name):
        os.write(number, b'{"kind": 1}' * 1000)
"""
    assert ask(handler, code).status == 500
    assert said(handler, b"pass")[0].isdigit()


def test_a_server_that_dies_takes_along_a_worker_that_computes(tmp_path: Path, python: Any) -> None:
    folder = write_code(tmp_path / "model", PID)
    code = f"""
import os, signal, threading, time
from pathlib import Path
from tuneserve.tasks.handler import Handler, Invocation
folder = Path({str(folder)!r})
handler = Handler(folder, name="m", program=folder / "code/inference.py", environ={{}})
handler.wait()
endless = b"import pathlib; pathlib.Path('began').touch()\\nwhile True: pass"
threading.Thread(target=handler.predict, args=[[Invocation(endless, "text/csv")]], daemon=True).start()
while not (folder / "began").exists():
    time.sleep(0.01)
print(handler._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = python("-c", code)
    assert done.returncode == -9, done.stderr
    wait_until(lambda: is_zombie(done.stdout.strip()))


def is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("files", "name", "found"),
    [
        (["code/inference.py"], "inference.py", "code/inference.py"),
        (["code/inference.py"], "inference", "code/inference.py"),
        (["inference.py", "code/other.py"], "inference.py", "inference.py"),
        (["code/other.py"], "inference.py", None),
        (["x.py"], "../code/../x.py", None),
    ],
)
def test_the_code_is_found_by_its_name(tmp_path: Path, files: list[str], name: str, found: str | None) -> None:
    for one in files:
        (tmp_path / one).parent.mkdir(exist_ok=True)
        (tmp_path / one).touch()
    assert find_program(tmp_path, name) == (tmp_path / found if found else None)
