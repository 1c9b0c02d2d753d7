"""The log: whole when the process ends, whatever ends it, and never in the way of what is logged."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PACKAGE, Disk

from tuneserve.logs import LONGEST_QUEUE

Python = Callable[..., "subprocess.CompletedProcess[str]"]
IMPORTS = "import logging, signal, sys\nfrom pathlib import Path\nfrom tuneserve import logs\n"
START = IMPORTS + "logs.start(Path(sys.argv[1]))\n"
LINES = "for number in range(2000): logging.getLogger('a').info('line %d', number)\n"


def messages(text: str) -> list[str]:
    return [line.partition(" INFO ")[2] or line.partition(" ERROR ")[2] for line in text.splitlines()]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('broken')", 1),
        ("from tuneserve.signals import Stop\nStop().listen()\nsignal.raise_signal(signal.SIGTERM)", 143),
        ("logs.start(Path(sys.argv[1]))", 0),
    ],
)
def test_every_line_is_written_before_the_process_ends(python: Python, tmp_path: Path, end: str, code: int) -> None:
    done = python("-c", START + LINES + end, tmp_path)
    assert done.returncode == code, done.stderr
    wanted = [f"line {number}" for number in range(2000)]
    assert messages(done.stdout) == wanted
    assert messages((tmp_path / "tuneserve.log").read_text()) == wanted


def test_what_ended_the_process_is_the_last_line_of_the_file(python: Python, tmp_path: Path) -> None:
    done = python("-c", START + LINES + "logs.report(ValueError('no room'))", tmp_path)
    assert done.stderr == "error: no room\n"
    assert messages((tmp_path / "tuneserve.log").read_text())[-2:] == ["line 1999", "no room"]
    assert "no room" not in done.stdout


def test_a_line_is_what_it_was_when_it_was_logged(python: Python, tmp_path: Path) -> None:
    change = "found = [1]\nlogging.getLogger('a').info('found %s, 100%% sure', found)\nfound.append(2)\n"
    assert messages(python("-c", START + change, tmp_path).stdout) == ["found [1], 100% sure"]


def test_a_traceback_is_kept_in_both_formats(python: Python, tmp_path: Path) -> None:
    fail = "try: 1 / 0\nexcept ZeroDivisionError: logging.getLogger('a').exception('it failed: %s', 'so')\n"
    plain = python("-c", START + fail, tmp_path).stdout
    assert "ERROR it failed: so\nTraceback" in plain
    assert plain.endswith("ZeroDivisionError: division by zero\n")
    as_json = python("-c", IMPORTS + "logs.start(Path(sys.argv[1]), json_lines=True)\n" + fail, tmp_path).stdout
    line = json.loads(as_json)
    assert (line["level"], line["message"]) == ("ERROR", "it failed: so")
    assert line["exception"].endswith("ZeroDivisionError: division by zero")


def test_a_reader_that_stopped_reading_holds_up_nobody_and_lost_lines_are_counted(tmp_path: Path) -> None:
    code = START + (
        f"for number in range({LONGEST_QUEUE} * 3): logging.getLogger('a').info('x' * 100)\n"
        "print('done', file=sys.stderr, flush=True)\n"
        "sys.stdin.readline()\n"
        "logging.getLogger('a').info('the last')\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=PACKAGE, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stderr.readline() == "done\n"  # though nobody has read a line of standard output
        read = [process.stdout.readline() for _ in range(LONGEST_QUEUE)]
        process.stdin.write("\n")
        process.stdin.close()
        output = process.stdout.read()
    lines = messages("".join(read) + output)
    assert lines[-1].startswith("the last (")
    lost = sum(int(number) for number in re.findall(r"\((\d+) lines before this one were lost", "".join(lines)))
    assert 0 < lost < LONGEST_QUEUE * 3
    assert len(lines) == LONGEST_QUEUE * 3 - lost + 1


def test_a_full_disk_is_said_once_and_the_log_goes_on(python: Python, tmp_path: Path, disk: Disk) -> None:
    code = START + (
        "ballast = Path(sys.argv[1], 'ballast')\n"
        "try: ballast.write_bytes(bytes(1 << 20))\n"
        "except OSError: pass\n" + LINES + "logging.getLogger().handlers[0].flush()\n"
        "ballast.unlink()\n"
        "logging.getLogger('a').info('room again')\n"
    )
    done = python("-c", code, disk.path)
    assert done.returncode == 0
    assert messages(done.stdout) == [*(f"line {number}" for number in range(2000)), "room again"]
    [said] = done.stderr.splitlines()
    assert said.startswith("error: ")
    assert "tuneserve.log cannot be written: [Errno 28]" in said
    kept = messages((disk.path / "tuneserve.log").read_text())
    assert kept[-1] == "room again"
    assert len(kept) < 2000


def test_a_handler_of_somebody_elses_writes_no_secret(python: Python) -> None:
    code = (
        "from tuneserve.redaction import remember\n"
        "remember({'API_KEY': 'hunter2-long'})\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "logging.root.handlers[0].addFilter(logs.let_pass)\n"
        "logging.root.handlers[0].addFilter(lambda record: print(record.exc_info, record.exc_text) or True)\n"
        "try: raise OSError('hunter2-long is wrong')\n"
        "except OSError: logging.getLogger('a').exception('said %s', 'hunter2-long')\n"
    )
    done = python("-c", IMPORTS + code)
    assert done.stdout.splitlines()[0] == "None None"
    assert "Traceback" in done.stdout
    assert "said " in done.stdout
    assert "hunter2" not in done.stdout
