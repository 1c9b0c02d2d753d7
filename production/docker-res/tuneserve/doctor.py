"""What would go wrong, said before anybody waits for a training: `run.py doctor`.

Each check looks at one thing and changes nothing. Its line has `ok`, `warn` or `fail`, a name, and what to do.
"""

import importlib.util
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from tuneserve import hardware
from tuneserve.artifact import damage, read_version
from tuneserve.errors import DataError, NoModelError, SettingsError, StoreError, TuneserveError
from tuneserve.extras import require
from tuneserve.files import require_writable
from tuneserve.lifecycle.status import holder
from tuneserve.lifecycle.store import MEND, Store
from tuneserve.redaction import redact, redact_url
from tuneserve.servers import UnreachableError, ask_hub, look_up
from tuneserve.settings import SAMPLE, Settings

if TYPE_CHECKING:
    from tuneserve.training.needs import Needs

LIMIT_S, ANSWER_S = 8.0, 3.0
"""Seconds after which a check is given up, the hashes of a large model say; and which a server may take."""
GIB = 1 << 30
LEAST = {"MODEL_PATH": GIB, "DATA_PATH": GIB, "LOG_PATH": 50_000_000}
"""Bytes that should be free: for a store of models whose size is not known, a cache, and five log files of 10 MB."""
COLOURS = {"ok": 32, "warn": 33, "fail": 31}


@dataclass(frozen=True)
class Finding:
    """What a check has found, in a sentence, and what to do about it."""

    level: Literal["ok", "warn", "fail"]
    said: str
    advice: str = ""


def report(environ: Mapping[str, str], out: TextIO) -> int:
    """Write a line for each check as soon as it is made; the exit code is 2 if one has failed, else 0."""
    coloured = out.isatty() and not environ.get("NO_COLOR")
    failed = False
    for name, found in examine(environ):
        level = f"\x1b[{COLOURS[found.level]}m{found.level:<4}\x1b[0m" if coloured else f"{found.level:<4}"
        print(f"{level}  {name:<10}  {redact(' '.join(f'{found.said} {found.advice}'.split()))}", file=out, flush=True)
        failed |= found.level == "fail"
    return 2 if failed else 0


def examine(environ: Mapping[str, str]) -> Iterator[tuple[str, Finding]]:
    """The checks' names and findings, one after the other; bad settings end them, since all others go by these."""
    try:
        settings = Settings.from_environ(environ)
    except TuneserveError as error:
        yield "settings", Finding("fail", str(error), "Correct them and ask again: all other checks go by them.")
        return
    names = sorted(name for name in environ if name.lower() in Settings.model_fields and environ[name].strip())
    yield "settings", Finding("ok", f"set: {', '.join(names) or 'none'}; all others have their defaults.")
    for name, check in CHECKS.items():
        if trains(settings) or name not in ("base model", "dataset", "tracker"):
            yield name, within(LIMIT_S, lambda check=check: check(settings, environ))  # type: ignore[misc]


def within(limit_s: float, check: Callable[[], Finding]) -> Finding:
    """The finding of a check; that it was not foreseen or took too long is one too."""
    future: Future[Finding] = Future()

    def run() -> None:
        try:
            future.set_result(check())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # which the end of the process need not wait for
    try:
        return future.result(limit_s)
    except TuneserveError as error:
        return Finding("fail", str(error))
    except Exception as error:
        if not future.done():
            return Finding("warn", f"not known after {limit_s:g} s.", "Ask again, or see what is slow: a disk, say.")
        return Finding("warn", f"cannot be checked: {type(error).__name__}: {error}.", "See what the job itself says.")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def trains(settings: Settings) -> bool:
    """Whether a model can be trained in this place, and the settings want one."""
    served = settings.task != "text-classification" or settings.model or settings.models
    return not served and importlib.util.find_spec("torch") is not None


def check_training(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """See `trains`."""
    if importlib.util.find_spec("torch") is None:
        return Finding("warn", "not possible here: torch is not installed.", "This place can serve; train in the job.")
    if not trains(settings):
        return Finding("warn", "not wanted: TASK, MODEL or MODELS name what is only served.", "Unset them to train.")
    if settings.precision == "int8":
        require("nncf", wanted_by="PRECISION=int8", product="NNCF", extra="int8")
    return Finding("ok", "possible: torch is installed.")


def check_cpu(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Cores, threads, number format."""
    quota, threads, native = (
        hardware.cpu_quota(),
        hardware.count_threads(settings.omp_num_threads),
        hardware.cpu_has_bf16(),
    )
    bf16 = settings.precision == "bf16" or (native and settings.precision != "fp32")
    said = f"{quota:g} of {os.cpu_count()} cores may be used, with {threads} threads, in {'bf16' if bf16 else 'fp32'}"
    said += f"; it {'has' if native else 'does not have'} bf16 in hardware."
    if threads > math.ceil(quota):
        return Finding("warn", said, "Unset OMP_NUM_THREADS, or grant more cores: threads would wait for each other.")
    if bf16 and not native:
        return Finding("warn", said, "Unset PRECISION unless a GPU computes: emulated, it is slower than fp32.")
    return Finding("ok", said)


def check_gpu(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Whether there is a GPU, and whether torch can use it."""
    if settings.device == "cpu":
        return Finding("ok", "not asked for (DEVICE=cpu).")
    driver = hardware.ask_driver(environ, timeout_s=ANSWER_S)
    if not driver and not hardware.gpu_may_be_there() and settings.device == "auto":
        return Finding("ok", "none is visible; the CPU computes.")
    shown = f"nvidia-smi shows {driver}" if driver else "nvidia-smi shows none"
    answer = hardware.ask_torch(timeout_s=LIMIT_S - ANSWER_S)
    if "obstacle" in answer:
        advice = "Take a driver and an image that go together, start with --gpus all, or set DEVICE=cpu."
        said = f"{shown}, {'but' if driver else 'and'} torch cannot use one: {answer['obstacle']}."
        return Finding("fail" if settings.device == "cuda" else "warn", said, advice)
    said = f"{answer['name']}, {_gib(answer['free'])} free, {'with' if answer['bf16'] else 'without'} bf16; {shown}."
    if settings.precision == "bf16" and not answer["bf16"]:
        return Finding("fail", said, "Set PRECISION=fp32.")
    if (needs := _needs(settings)) and needs.state > answer["free"]:
        return Finding("fail", f"{said} A training takes {_gib(needs.state)} or more.", "Free some, or set DEVICE=cpu.")
    return Finding("ok", said)


def check_memory(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Memory against what the base model and a step need, roughly."""
    free, needs = hardware.memory_free(), _needs(settings)
    if needs is None or (settings.device != "cpu" and hardware.gpu_may_be_there()):
        return Finding("ok", f"{_gib(free)} are free; what is needed is not known.")
    said = f"{_gib(free)} are free; a training takes, very roughly, {_gib(GIB + needs.state + needs.step)}."
    if GIB + needs.state > free:
        return Finding("fail", said, "Give it more, choose a smaller BASE_MODEL, or set TRAIN_BODY=0.")
    if GIB + needs.state + needs.step > free:
        return Finding("warn", said, "Give it more, or lower NUM_MAX_POSITIONS: a step in small parts is slower.")
    return Finding("ok", said)


def _needs(settings: Settings) -> "Needs | None":
    from tuneserve.training.needs import estimate

    return estimate(settings) if trains(settings) else None


def check_disk(name: str, settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Whether a folder can be written to, or made, and how much room there is."""
    folder: Path = getattr(settings, name.lower())
    above = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
    worst: Literal["warn", "fail"] = "fail" if name != "MODEL_PATH" or trains(settings) else "warn"  # servers only read
    try:
        require_writable(above)
    except OSError as error:
        said = f"{folder} cannot be written to: {above}: {error.strerror}."
        return Finding(worst, said, f"Mount a folder that this user may write to, or name another in {name}.")
    needs = _needs(settings) if name == "MODEL_PATH" else None
    wanted, (total, _, free) = needs.disk if needs else LEAST[name], shutil.disk_usage(above)
    room = f"{_gib(free)} are free." if total else "how much is free is not known."  # of an object store, say
    said = f"{folder} can be {'written to' if above == folder else 'made'}; {room}"
    if total and free < wanted:
        advice = f"Roughly {_gib(wanted)} may be needed: free some, or name another disk in {name}."
        return Finding(worst if free < wanted / 4 else "warn", said, advice)
    return Finding("ok", said)


def check_champion(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Whether there is a champion, whose files are what was saved."""
    store = Store(settings.model_path)
    try:
        champion = store.champion()
    except NoModelError as error:
        fine = trains(settings) and not (store.root / "config.json").exists()
        return Finding("ok", "none yet; a training makes one.") if fine else Finding("warn", str(error))
    except StoreError as error:
        return Finding("fail", str(error), MEND * (MEND not in str(error)))
    if wrong := damage(champion):
        return Finding("fail", f"{champion.id} is damaged: {wrong}.", f"Restore the file. {MEND}")
    by = "SHA-256" if champion.metadata.get("sha256") else "sizes"
    return Finding("ok", f"{champion.id} is whole, by the {by} of its files.")


def check_versions(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Whether the store's versions can be read."""
    folder = Store(settings.model_path).versions_folder
    read, faults = 0, []
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        try:
            read += not path.name.startswith(".") and bool(read_version(path))
        except StoreError as error:
            faults.append(str(error).rstrip("."))
    if faults:
        said = f"{len(faults)} of {read + len(faults)} cannot be read: {'; '.join(faults[:3])}."
        return Finding("warn", said, "They are passed over: restore them, or take their folders away.")
    return Finding("ok", f"{read} in the store can be read.")


def check_lock(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Whether another process trains for the store."""
    if who := holder(Store(settings.model_path).lock):
        return Finding("warn", f"{who}.", "Wait for its end, or stop it: a second training is refused.")
    return Finding("ok", "nobody trains for this store now.")


def check_base_model(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Where the base model is found, and whether its weights are whole; or whether the hub has it."""
    from tuneserve.training import base_model, needs

    name = settings.base_model
    found = base_model.locate(name, revision=settings.base_model_revision)
    source, folder = found[::-1] if found else ("hub's copy", needs.fetched(settings))
    if folder is None:
        ask_hub("models", name, timeout_s=ANSWER_S)
        return Finding("ok", f"{name} is not here; the hub has it, and it will be fetched.")
    weights = base_model.count_weights(base_model.find_weights(folder))
    return Finding("ok", f"{name} is here, in the {source} {folder}: {weights / 1e6:.1f} million weights.")


def check_dataset(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Whether the files of DATASET are there and can be opened, or who has it answers."""
    from tuneserve.tables.formats import is_known
    from tuneserve.training.folders import SAMPLE_FOLDER, open_files

    name, said = settings.dataset, f"DATASET={redact_url(settings.dataset)}"
    path = SAMPLE_FOLDER if name == SAMPLE else Path(name).expanduser()
    if "://" in name:
        look_up(name, timeout_s=ANSWER_S)
        return Finding("ok", f"{said} answers.")
    if os.path.exists(path):  # noqa: PTH110  (Path.exists() raises when the name is too long)
        counts = open_files(path)
        return Finding("ok", f"{said} can be opened: {', '.join(f'{split} ({n})' for split, n in counts.items())}.")
    if name.startswith(("/", ".", "~")) or is_known(path.name):
        raise DataError(f"{said}: there is no such file or folder. Mount it, or correct DATASET.")
    try:
        ask_hub("datasets", name.partition(":")[0], timeout_s=ANSWER_S)
    except UnreachableError as error:
        copied = any((settings.data_path / "arrow").glob(f"{name.partition('/')[0]}___*"))  # as `datasets` names it
        return Finding("warn" if copied else "fail", str(error), "A copy that was fetched before may do." * copied)
    return Finding("ok", f"{said} is not here; the hub has it, and it will be fetched.")


def check_tracker(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Whether the MLflow server answers, if there is one."""
    from tuneserve.training.trackers import require_extra

    uri = settings.mlflow_tracking_uri.get_secret_value()
    require_extra(uri)
    if not uri.startswith("http"):
        return Finding("ok", "Databricks is not asked here." if uri else "no MLflow server is to be told.")
    try:
        look_up(f"{uri.rstrip('/')}/health", timeout_s=ANSWER_S)
    except UnreachableError as error:
        return Finding("warn", str(error), "A training goes on without it.")
    return Finding("ok", f"{redact_url(uri)} answers.")


def check_port(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Whether the port is free."""
    from tuneserve.serving.http.server import listen

    try:
        listen(settings.host, settings.port).close()
    except SettingsError as error:
        return Finding("fail", str(error), "Stop what listens there, or set another PORT or HOST.")
    return Finding("ok", f"{settings.host}:{settings.port} is free.")


CHECKS: dict[str, Callable[[Settings, Mapping[str, str]], Finding]] = {
    **{"training": check_training, "cpu": check_cpu, "gpu": check_gpu, "memory": check_memory},
    **{name: partial(check_disk, name) for name in ("MODEL_PATH", "DATA_PATH", "LOG_PATH")},
    **{"champion": check_champion, "versions": check_versions, "lock": check_lock},
    **{"base model": check_base_model, "dataset": check_dataset, "tracker": check_tracker, "port": check_port},
}
