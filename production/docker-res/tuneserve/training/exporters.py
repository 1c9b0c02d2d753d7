"""What is saved beside the checkpoint: the same model in other forms, for engines that run it faster.

The place for an export of your own: a class like those below, and one line in `EXPORTERS`. What it adds to a version's
metadata is under `engine`, where the serving side finds it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from tuneserve import extras
from tuneserve.artifact import GOLDEN_INT8, Golden, write_golden
from tuneserve.settings import Settings
from tuneserve.text import TextEncoder
from tuneserve.training import int8_graph, openvino_graph
from tuneserve.training.tokens import TokenizedSplit


@dataclass(frozen=True)
class Saved:
    """A model that was saved and loaded again, in fp32 on the CPU, and what its other forms are made and judged with.

    `tokens` are the splits by name; `golden` is the model's own answers; `seed` and CPU `threads` are the run's;
    `shares` says whether its body may serve other heads too, which want its states.
    """

    model: PreTrainedModel
    tokens: Mapping[str, TokenizedSplit]
    golden: Golden
    encoder: TextEncoder
    seed: int
    threads: int
    shares: bool = False


class Exporter(Protocol):
    """Makes another form of a saved model."""

    name: str
    """In a run's fingerprint: a version is never changed, so one without this form cannot be given it afterwards."""

    def wanted(self, settings: Settings) -> bool:
        """Whether these settings ask for it."""

    def require(self) -> None:
        """Refuse to train for what could not be made afterwards.

        Raises:
            SettingsError: something that it needs is not installed.
        """

    def export(self, saved: Saved, folder: Path, description: dict[str, Any]) -> dict[str, Any]:
        """Write files into a version's folder; return what `engine` of the metadata holds, `description` until now."""


class OpenVINOGraph:
    """The model as a graph for CPUs, unless it cannot be converted."""

    name = "openvino"

    def wanted(self, settings: Settings) -> bool:
        """Always: wherever a version was trained, it may be served on a CPU."""
        return True

    def require(self) -> None:
        """OpenVINO is always installed."""

    def export(self, saved: Saved, folder: Path, description: dict[str, Any]) -> dict[str, Any]:
        """See `openvino_graph.export`."""
        valid = saved.tokens["valid"]
        made = openvino_graph.export(saved.model, folder, valid, threads=saved.threads, states=saved.shares)
        return description | (made or {})


class Int8Graph:
    """That graph with int8 products, where it hardly costs accuracy."""

    name = "int8"

    def wanted(self, settings: Settings) -> bool:
        """With PRECISION=int8."""
        return settings.precision == "int8"

    def require(self) -> None:
        """See `Exporter.require`."""
        extras.require("nncf", wanted_by="PRECISION=int8", product="NNCF", extra="int8")

    def export(self, saved: Saved, folder: Path, description: dict[str, Any]) -> dict[str, Any]:
        """See `int8_graph.quantize`; its golden answers are its own."""
        if not description:  # there is no graph to quantize
            return description
        train, valid = saved.tokens["train"], saved.tokens["valid"]
        description = int8_graph.quantize(folder, train, valid, threads=saved.threads, seed=saved.seed)
        if description["int8"]["accepted"]:
            golden = int8_graph.golden_answers(folder, saved.golden, saved.encoder, threads=saved.threads)
            write_golden(folder, golden, GOLDEN_INT8)
        return description


EXPORTERS: Sequence[Exporter] = (OpenVINOGraph(), Int8Graph())
"""In this order; each may build on the files of those before it."""


def choose_exporters(settings: Settings) -> list[Exporter]:
    """Those that the settings ask for.

    Raises:
        SettingsError: one of them needs something that is not installed.
    """
    chosen = [exporter for exporter in EXPORTERS if exporter.wanted(settings)]
    for exporter in chosen:
        exporter.require()
    return chosen


def export(exporters: Sequence[Exporter], saved: Saved, folder: Path) -> dict[str, Any] | None:
    """Write all these forms into a version's folder; return what its metadata says of them, None if there is none."""
    description: dict[str, Any] = {}
    for exporter in exporters:
        description = exporter.export(saved, folder, description)
    return description or None
