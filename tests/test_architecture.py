"""Who may import whom, and what an import may do: the wall between the wings, and the direction of every arrow."""

import ast
import subprocess
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tuneserve.settings import PROJECT

ROOT = PROJECT / "production" / "docker-res"
PACKAGE = ROOT / "tuneserve"
Python = Callable[..., "subprocess.CompletedProcess[str]"]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
ENTRIES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("*.py"))}
GROUND = (
    "artifact",
    "code",
    "env_file",
    "errors",
    "extras",
    "files",
    "hardware",
    "logs",
    "network",
    "progress",
    "redaction",
    "servers",
    "settings",
    "settings_docs",
    "signals",
    "text",
)


KNOW_MODELS = ("model", "service", "slot", "registry", "follower", "shadow", "monitor", "metrics")


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported anywhere in a file, also within its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def within(name: str, room: str) -> bool:
    return f"{name}.".startswith(f"tuneserve.{room}.")


def test_the_modules_are_found_and_their_imports_seen() -> None:
    names = ("training.job", "serving.service", "lifecycle.store", *GROUND)
    assert {f"tuneserve.{name}" for name in names} <= set(MODULES)
    assert set(ENTRIES) == {"run", "app", "function"}
    assert {"tuneserve.training.job", "tuneserve.serving.http.server"} <= set(imports(ENTRIES["run"]))  # in functions
    assert "tuneserve.training.checks" in set(imports(MODULES["tuneserve.training.job"]))


def test_nothing_that_is_loaded_may_bring_code() -> None:
    loads = [
        (name, node)
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("from_pretrained", "load_dataset", "pipeline")
    ]
    assert len(loads) >= 6
    for name, node in loads:
        assert "trust_remote_code=False" in ast.unparse(node), f"{name}, line {node.lineno}"


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("training", ["serving", "scoring", "tasks"]),
        ("serving", ["training", "scoring"]),
        ("tasks", ["training", "scoring", "serving.http", "adapters"]),
        ("scoring", ["training", "serving.http", "adapters"]),
        ("report", ["serving", "scoring", "tables", "tasks", "adapters", "training.job"]),
        ("lifecycle", ["training", "serving", "scoring", "tables", "tasks", "report"]),
        ("tables", ["training", "serving", "scoring", "lifecycle", "tasks"]),
        *[(room, ["training", "serving", "scoring", "lifecycle", "tables", "tasks"]) for room in GROUND],
        # The seams: what looks after a model knows no task's own, and what speaks HTTP knows the service alone.
        *[(f"serving.{one}", ["tasks", "adapters", "serving.engines"]) for one in KNOW_MODELS],
        (
            "serving.http",
            [
                "tasks.classifier",
                "tasks.classification",
                "adapters",
                "serving.slot",
                "serving.batcher",
                "serving.engines",
            ],
        ),
        ("adapters", ["serving.slot", "serving.batcher", "serving.engines", "training", "scoring", "lifecycle"]),
        ("errors", [one for one in GROUND if one not in ("errors", "redaction")]),
        ("redaction", [""]),
    ],
)
def test_arrows_only_run_down(room: str, forbidden: list[str]) -> None:
    found = [
        f"{name} imports {other}"
        for name, tree in MODULES.items()
        if within(name, room)
        for other in imports(tree)
        if any(within(other, one) if one else other.startswith("tuneserve") for one in forbidden)
    ]
    assert found == []


def test_no_import_comes_back_to_where_it_began() -> None:
    graph = {name: set(imports(tree)) & set(MODULES) - {name} for name, tree in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("tuneserve.errors") < order.index("tuneserve.training.job")


def test_only_run_knows_the_doctor_which_may_look_at_everything(python: Python) -> None:
    assert {name for name, tree in (MODULES | ENTRIES).items() if "tuneserve.doctor" in imports(tree)} == {"run"}
    assert not {one for one in imports_of_its_own(MODULES["tuneserve.doctor"]) if within(one, "training")}
    assert not loaded(python, "tuneserve.doctor") & (
        HEAVY | {"numpy", "fsspec", "fastapi", "uvicorn", "huggingface_hub"}
    )


def reads_environment(tree: ast.Module) -> list[int]:
    """Lines that read the process's environment; setting a variable for the libraries is none."""
    written = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ("environ", "environb", "getenv", "getenvb")
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            and id(node) not in written
        )
        or (isinstance(node, ast.ImportFrom) and node.module == "os")
    ]


@pytest.mark.parametrize(
    ("code", "reads"),
    [
        ("os.environ['X'] = 'y'", False),
        ("os.environ['X']", True),
        ("os.environ.get('X')", True),
        ("f(os.environ)", True),
        ("os.getenv('X')", True),
        ("from os import environ", True),
    ],
)
def test_a_read_of_the_environment_is_told_from_a_write(code: str, reads: bool) -> None:
    assert bool(reads_environment(ast.parse(code))) == reads


def test_only_the_entry_points_read_the_environment() -> None:
    assert {name: lines for name, tree in MODULES.items() if (lines := reads_environment(tree))} == {}
    assert all(reads_environment(tree) for tree in ENTRIES.values())


def test_there_is_no_pickle_but_what_an_import_reads_tensors_from() -> None:
    pickles = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert {name for name, tree in MODULES.items() if pickles & {one.split(".")[0] for one in imports(tree)}} == set()
    uses = [
        (name, ast.unparse(node))
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save")
    ]
    assert uses == [("tuneserve.training.imported", "torch.load")]  # in the process that imports a model
    calls = [node for node in ast.walk(MODULES[uses[0][0]]) if isinstance(node, ast.Call)]
    [call] = [ast.unparse(node) for node in calls if ast.unparse(node.func) == "torch.load"]
    assert "weights_only=True" in call


def imports_of_its_own(tree: ast.AST) -> Iterator[str]:
    """What is imported with the module itself; what is under TYPE_CHECKING or within functions is not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.Module([node], []))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            yield from imports_of_its_own(node)


ENGINES = {"tuneserve.serving.engines.torch_engine", "tuneserve.serving.engines.torch_writer"}


def test_outside_training_the_network_and_two_engines_load_torch_and_two_functions_ask_for_it() -> None:
    of_torch = {
        name
        for name, tree in MODULES.items()
        if {"torch", "transformers"} & {one.split(".")[0] for one in imports_of_its_own(tree)}
    }
    apart = {name for name in of_torch if not within(name, "training")}
    network = (
        "attention",
        "cache",
        "decoder",
        "embedding",
        "forward",
        "head",
        "optimizer",
        "page",
        "pooling",
        "search",
    )
    assert apart == {*(f"tuneserve.network.{name}" for name in network), *ENGINES}
    askers = {
        (name, other)
        for name, tree in MODULES.items()
        if not within(name, "training")
        for other in apart & set(imports(tree))
    }
    assert askers == {
        ("tuneserve.network.decoder", "tuneserve.network.cache"),
        ("tuneserve.network.forward", "tuneserve.network.attention"),
        ("tuneserve.network.forward", "tuneserve.network.pooling"),
        ("tuneserve.network.head", "tuneserve.network.embedding"),
        ("tuneserve.network.optimizer", "tuneserve.network.forward"),
        ("tuneserve.serving.engines.torch_engine", "tuneserve.network.attention"),
        ("tuneserve.serving.engines.torch_engine", "tuneserve.network.forward"),
        ("tuneserve.serving.engines.torch_engine", "tuneserve.network.head"),
        ("tuneserve.serving.engines.choice", "tuneserve.serving.engines.torch_engine"),
        ("tuneserve.network.page", "tuneserve.network.decoder"),
        ("tuneserve.network.page", "tuneserve.network.search"),
        ("tuneserve.serving.engines.torch_writer", "tuneserve.network.forward"),
        ("tuneserve.serving.engines.torch_writer", "tuneserve.network.page"),
        ("tuneserve.tasks.generator", "tuneserve.serving.engines.torch_writer"),
    }
    for name in ("tuneserve.serving.engines.choice", "tuneserve.tasks.generator"):
        assert not ENGINES & set(imports_of_its_own(MODULES[name]))


def test_scipy_is_for_training_alone() -> None:
    """A function on AWS Lambda has none, and an import within a function would be found missing late."""
    users = {name for name, tree in MODULES.items() if "scipy" in {one.split(".")[0] for one in imports(tree)}}
    assert users
    assert all(within(name, "training") for name in users), users


HEAVY = {"torch", "transformers", "datasets", "sklearn", "pandas", "pyarrow"}
LOADED = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"


def loaded(python: Python, *modules: str, **variables: str) -> set[str]:
    """Top-level packages that a process has loaded after it imported these modules and nothing else."""
    done = python("-c", f"import {', '.join(modules)}\n{LOADED}", **variables)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_settings_and_errors_load_nothing_heavy(python: Python) -> None:
    found = loaded(python, "tuneserve.settings", "tuneserve.errors", "tuneserve.signals", "tuneserve.hardware", "run")
    assert "pydantic" in found
    assert not found & (HEAVY | {"numpy", "tokenizers", "safetensors", "fastapi", "uvicorn", "huggingface_hub"})


def test_the_name_of_the_network_loads_nothing(python: Python) -> None:
    assert loaded(python, "tuneserve.network") == loaded(python, "tuneserve")


def test_what_both_wings_stand_on_loads_neither_torch_nor_numpy(python: Python) -> None:
    found = loaded(python, "tuneserve.artifact", "tuneserve.lifecycle.store", "tuneserve.logs")
    assert not found & (HEAVY | {"numpy", "tokenizers"})


def test_the_serving_half_loads_neither_torch_nor_transformers_nor_datasets(python: Python) -> None:
    rooms = ("serving", "scoring", "tables", "tasks")
    modules = [name for name in MODULES if any(within(name, room) for room in rooms) and name not in ENGINES]
    assert len(modules) > 5
    found = loaded(python, *modules, "app")
    assert "fastapi" in found
    assert not found & (HEAVY - {"pyarrow"})  # which scoring files needs, and the server does not


def test_the_server_does_not_load_what_reads_files(python: Python) -> None:
    assert not loaded(python, "tuneserve.serving.http.server", "app") & (HEAVY | {"fsspec", "tqdm"})


def test_a_serverless_function_loads_no_server(python: Python) -> None:
    found = loaded(python, "tuneserve.serving.fixed", "tuneserve.adapters.lambda_function")
    assert "fastapi" in found
    assert not found & (HEAVY | {"uvicorn", "uvloop", "httptools", "multiprocessing", "cronsim"})


def test_an_import_does_nothing(python: Python, tmp_path: Path) -> None:
    """No variable is read, no log set up, no signal taken over, no folder made: the process works as if unasked."""
    modules = [name for name in MODULES if not name.endswith("__main__")]
    code = (
        "import logging, os, signal\n"
        "before = dict(os.environ)\n"
        f"import {', '.join(modules)}, run\n"
        "assert logging.root.handlers == [], logging.root.handlers\n"
        "assert logging.root.level == logging.WARNING\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
        "assert os.environ.get('OMP_NUM_THREADS') == before.get('OMP_NUM_THREADS')\n"
    )
    folders = {f"{name}_PATH": str(tmp_path / name) for name in ("MODEL", "DATA", "LOG")}
    done = python("-c", code, LR="abc", N_EPOCH="3", **folders)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"hf", ".cache"}


def test_a_server_starts_without_what_only_trains(python: Python) -> None:
    """What the images that only serve leave out; see requirements-serve.txt."""
    absent = ["torch", "transformers", "pyarrow", "datasets", "xxhash", "safetensors", "huggingface_hub", "pandas"]
    program = f"""
import sys
sys.modules |= dict.fromkeys({absent!r})
import tuneserve.serving.application, tuneserve.serving.fixed, tuneserve.serving.labelling, tuneserve.doctor
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr[-2000:]
