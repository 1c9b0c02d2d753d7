"""SageMaker's training: its folders and files as this job's variables, and what it wants to find at the end.

Everything lies below /opt/ml, or SAGEMAKER_BASE_DIR:

input/config/hyperparameters.json, inputdataconfig.json, resourceconfig.json
input/data/<channel>/   train (or training), validation, test; model: a base model
checkpoints/            the store, which the platform copies to S3 all the time and back before a restart
model/                  what training ends with
output/data/            the report and the figures
output/failure          why a training failed

Source: "How Amazon SageMaker AI Provides Training Information" and "… Processes Training Output".
"""

import difflib
import json
import logging
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tuneserve.adapters.start import SAGEMAKER, Start
from tuneserve.artifact import METADATA
from tuneserve.errors import DataError, SettingsError, TrainingError
from tuneserve.files import read_json
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

MASTER_PORT = "7777"
FAILURE_CHARACTERS = 1024
"""Of the failure file, the platform shows so many."""
OURS = {"MODEL_PATH", "HOST", "PORT", "PLATFORM", "SHARD", "SHARDS", "INPUT", "OUTPUT"}
"""Variables that are no hyperparameters: the platform decides them, or other verbs read them."""
NOT_OURS = ("sagemaker_", "_tuning_objective_metric")
"""How hyperparameters begin that the platform's SDK and tuner add."""
TRAIN = ("train", "training")
RESOLVE_S = 300.0
"""Seconds that other hosts may take to get names that can be resolved."""


class Training(Start):
    """`train`: hyperparameters and channels in, a model's folder out."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ, self._base = environ, Path(environ.get("SAGEMAKER_BASE_DIR") or SAGEMAKER)
        self._config, self._data = self._base / "input" / "config", self._base / "input" / "data"
        self._failure = self._base / "output" / "failure"
        self._store = self._base / "checkpoints"
        self._resources: Mapping[str, Any] = {}
        with suppress(OSError):
            self._failure.unlink()  # of the attempt before

    def variables(self) -> Mapping[str, str]:
        """See `Start`.

        Raises:
            SettingsError: a hyperparameter is none of this job's, or a file of the platform cannot be read.
            DataError: there is no channel to train on, or none that can be read.
        """
        self._resources = _read(self._config / "resourceconfig.json")
        asked = read_hyperparameters(_read(self._config / "hyperparameters.json"))
        environ = {**self._environ, **asked}
        found = {"MODEL_PATH": str(self._store), "DATA_PATH": environ.get("DATA_PATH") or "/tmp/tuneserve"}
        found |= asked | self._dataset(environ) | self._world()
        if (self._data / "model").is_dir() and not environ.get("BASE_MODEL"):
            found["BASE_MODEL"] = str(self._data / "model")
        return found

    @property
    def _hosts(self) -> list[str]:
        return list(map(str, self._resources.get("hosts") or []))

    @property
    def leads(self) -> bool:  # type: ignore[override]
        """See `Start`: the first host, for all hosts' models become one archive."""
        return not self._hosts or self._resources.get("current_host") == self._hosts[0]

    def _dataset(self, environ: Mapping[str, str]) -> dict[str, str]:
        channels = _read(self._config / "inputdataconfig.json")
        for name, channel in channels.items():
            if channel.get("TrainingInputMode") == "Pipe":
                raise DataError(
                    f"Channel {name} is in Pipe mode, which can be read once and only forwards; the data are read "
                    "several times. Choose TrainingInputMode File or FastFile."
                )
            if channel.get("S3DistributionType") == "ShardedByS3Key" and len(self._hosts) > 1:
                raise DataError(
                    f"Channel {name} is ShardedByS3Key, so that every host sees other data; hosts that train together "
                    "share the batches of one data set. Choose FullyReplicated."
                )
        given = [name for name in TRAIN if (self._data / name).is_dir()]
        if environ.get("DATASET"):
            if given:
                raise DataError(f"DATASET and the channel {given[0]} both name the data; leave one out.")
            return {}
        if not given:
            raise DataError(
                f"There is no channel {' or '.join(TRAIN)} (the channels are: {', '.join(channels) or 'none'}), and "
                "no hyperparameter DATASET that names the data."
            )
        return {"DATASET": str(self._data)}

    def _world(self) -> dict[str, str]:
        """Torchrun's variables, if there are several hosts."""
        hosts, here = self._hosts, str(self._resources.get("current_host"))
        if len(hosts) < 2:
            return {}
        if here not in hosts:
            raise SettingsError(f"{self._config / 'resourceconfig.json'}: current_host {here!r} is none of {hosts}.")
        found = {
            "PET_NNODES": str(len(hosts)),
            "PET_NODE_RANK": str(hosts.index(here)),
            "PET_MASTER_ADDR": hosts[0],
            "PET_MASTER_PORT": MASTER_PORT,
        }
        if interface := self._resources.get("network_interface_name"):
            found |= {"NCCL_SOCKET_IFNAME": str(interface), "GLOO_SOCKET_IFNAME": str(interface)}
        return found

    def prepare(self) -> None:
        """See `Start`: the names of several hosts.

        Raises:
            TrainingError: one cannot be resolved.
        """
        if len(self._hosts) > 1:
            resolve(self._hosts)

    def hand_over(self, version: Path) -> None:
        """See `Start`."""
        self._report(version)
        model = self._base / "model"
        # The report holds texts, and stands with the output already.
        shutil.copytree(version, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("report"))
        logger.info("version %s is in %s", version.name, model)

    def fail(self, words: str) -> None:
        """See `Start`; a version that was refused has its report beside."""
        versions = sorted(path.parent for path in self._store.glob(f"versions/*/{METADATA}"))
        with suppress(OSError):
            if versions:
                self._report(versions[-1])
        try:
            self._failure.parent.mkdir(parents=True, exist_ok=True)
            self._failure.write_text(_shortened(words), encoding="utf-8")
        except OSError as error:
            logger.error("%s cannot be written: %s", self._failure, error.strerror)

    def _report(self, version: Path) -> None:
        """The report and the figures of a version, and what the gate decided."""
        output = self._base / "output" / "data"
        output.mkdir(parents=True, exist_ok=True)
        for name in (METADATA, "decision.json"):
            if (version / name).is_file():
                shutil.copyfile(version / name, output / name)
        if (version / "report").is_dir():
            shutil.copytree(version / "report", output / "report", dirs_exist_ok=True)


def read_hyperparameters(given: Mapping[str, Any]) -> dict[str, str]:
    """Hyperparameters as variables; each is a string, and perhaps JSON in it, as the SDK writes all.

    Raises:
        SettingsError: naming those that are none of this job's, and what may have been meant.
    """
    names = {field.upper() for field in Settings.model_fields} - OURS
    found, problems = {}, []
    for given_name, value in given.items():
        name = given_name.upper().replace("-", "_")
        if given_name.startswith(NOT_OURS):
            continue
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
            meant = f"; did you mean {near[0]}?" if near else "."
            problems.append(f"  {given_name}: there is no such hyperparameter{meant}")
        elif text := _decoded(value):
            found[name] = text
    if problems:
        shown = [*problems[:10], *(["  …"] if len(problems) > 10 else [])]
        raise SettingsError("\n".join(["These hyperparameters cannot be used:", *shown]))
    return found


def _decoded(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        inner = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if isinstance(inner, bool):
        return str(int(inner))
    return "" if inner is None else inner if isinstance(inner, str) else value


def resolve(
    hosts: list[str],
    *,
    look_up: Callable[[str], Any] = socket.gethostbyname,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Wait until the names of all hosts can be resolved.

    Raises:
        TrainingError: one cannot be, in RESOLVE_S.
    """
    until, waits_s = clock() + RESOLVE_S, 0.5
    for host in hosts:
        while True:
            try:
                look_up(host)
                break
            except OSError as error:
                if clock() >= until:
                    words = f"The host {host} has no address after {RESOLVE_S:g} s: {error.strerror or error}."
                    raise TrainingError(words) from None
                logger.info("waiting for the name of host %s", host)
                pause(waits_s)
                waits_s = min(10.0, 2 * waits_s)


def _read(path: Path) -> dict[str, Any]:
    """A file of the platform's; empty if there is none.

    Raises:
        SettingsError: it is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    return found


def _shortened(words: str) -> str:
    return words if len(words) <= FAILURE_CHARACTERS else words[: FAILURE_CHARACTERS - 1] + "…"
