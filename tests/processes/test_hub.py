"""A hub that another process names by HF_ENDPOINT, for models and for data."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from tuneserve.training.base_model import PACKAGED

READ = """
import sys
from pathlib import Path
from tuneserve.errors import TuneserveError
from tuneserve.tables.rows import Columns
from tuneserve.training.base_model import resolve
from tuneserve.training.data import read
for ask in (
    lambda: resolve(sys.argv[1], revision="main", cache=Path("cache")),
    lambda: read(sys.argv[2], Columns(), cache=Path("cache")),
):
    try:
        ask()
    except TuneserveError as error:
        print(error)
"""


def ask(python: Callable[..., "subprocess.CompletedProcess[str]"], endpoint: str) -> list[str]:
    """What is said of a model and of a data set; the endpoint is read as huggingface_hub is imported."""
    done = python("-c", READ, PACKAGED, "owner/reviews", HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_hub_is_asked_for_another_revision_and_for_data(
    hub: tuple[str, Path], python: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    model, data = ask(python, hub[0])
    assert model == f"BASE_MODEL={PACKAGED}: neither a folder here nor a model on the hub."
    assert data.endswith("the hub has no data set of this name (a private one needs HF_TOKEN).")


def test_a_hub_out_of_reach_is_a_clear_error_within_the_patience_for_it(
    unreachable: str, python: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    model, data = ask(python, unreachable)
    assert model.startswith(f"BASE_MODEL={PACKAGED} is not a folder here, and the hub cannot be reached")
    assert data == "DATASET=owner/reviews is not a file or folder here, and the hub cannot be reached."
