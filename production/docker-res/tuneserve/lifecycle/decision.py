"""What was decided about a version, and why: `decision.json` beside its weights."""

import logging
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import TypeAdapter

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.files import as_record, read_json, write_json

logger = logging.getLogger(__name__)

DECISION = "decision.json"


@dataclass(frozen=True)
class Check:
    """One thing a candidate must show: a figure, its bound, whether it passed, and a sentence for people."""

    name: str
    passed: bool
    value: float | None
    bound: float | None
    sentence: str


@dataclass(frozen=True)
class Decision:
    """The verdict on a candidate.

    `champion` is the id of the version that it was compared with, None if there was none. `figures` holds everything
    that was measured. `withdrawn_at` is set by a rollback.
    """

    version: str
    verdict: Literal["accepted", "refused", "unknown"]
    by: Literal["gate", "person"]
    sentence: str
    champion: str | None
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    withdrawn_at: str | None = None

    @classmethod
    def unknown(cls, version: str) -> "Decision":
        """The decision about a version that was never judged."""
        return cls(version, "unknown", "gate", "was never judged", None)

    @classmethod
    def by_a_person(cls, version: str, *, champion: str | None, before: "Decision | None") -> "Decision":
        """A promotion by hand; keeps what the gate measured."""
        said = f" (before: {before.sentence})" if before else ""
        checks, figures = (before.checks, before.figures) if before else ([], {})
        return cls(version, "accepted", "person", f"promoted by hand{said}", champion, checks, figures)

    @property
    def stands(self) -> bool:
        """Whether the version may serve."""
        return self.verdict == "accepted" and self.withdrawn_at is None

    @property
    def summary(self) -> str:
        """The verdict, or when it was withdrawn, and the reason."""
        return f"{f'withdrawn {self.withdrawn_at}' if self.withdrawn_at else self.verdict}: {self.sentence}"

    def overrides(self, other: "Decision") -> bool:
        """Whether this version was promoted by hand after the other decision."""
        return self.by == "person" and self.at >= other.at

    def withdrawn(self) -> "Decision":
        """The same, rolled back now."""
        return replace(self, withdrawn_at=datetime.now(UTC).isoformat(timespec="seconds"))


SHAPE = TypeAdapter(Decision)


def read_decision(version: Version) -> Decision | None:
    """The decision about a version; None if there is none, or it cannot be read."""
    path = version.folder / DECISION
    try:
        content = read_json(path)
        if isinstance(content, dict) and "at" not in content:  # now is not when it was decided
            raise ValueError("at: Field required")
        return as_record(content, SHAPE)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read, and counts as none: %s", path, error)
        return None


def write_decision(version: Version, decision: Decision) -> None:
    """Write it beside the weights, atomically.

    Raises:
        StoreError: the disk refuses.
    """
    try:
        write_json(version.folder / DECISION, asdict(decision))
    except OSError as error:
        raise StoreError(f"{version.folder / DECISION} cannot be written: {error}") from error
