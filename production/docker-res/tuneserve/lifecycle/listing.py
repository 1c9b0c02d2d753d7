"""The store as a table, for people."""

from pathlib import Path

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.lifecycle.decision import read_decision
from tuneserve.lifecycle.store import Store

COLUMNS = ("version", "created", "test accuracy", "serves", "decision")


def table(root: Path) -> str:
    """The versions of a store, oldest first: id, when, accuracy, which one serves, what was decided and why."""
    store = Store(root)
    try:
        champion, problem = store.champion_id(), ""
    except StoreError as error:
        champion, problem = None, f"\n{error}"
    previous = store.previous()
    rows = [COLUMNS]
    for version in store.versions():
        serves = "champion" if version.id == champion else "previous" if previous and version.id == previous.id else ""
        accuracy = version.metadata.get("metrics", {}).get("test", {}).get("accuracy")
        shown = f"{accuracy:.2%}" if isinstance(accuracy, float) else ""
        rows.append((version.id, str(version.metadata.get("created_at", "")), shown, serves, _decided(version)))
    if len(rows) == 1:
        return f"There is no version in MODEL_PATH={root} yet."
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS) - 1)]
    return (
        "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        )
        + problem
    )


def _decided(version: Version) -> str:
    decision = read_decision(version)
    if decision is None:
        return "not judged"
    state = f"withdrawn {decision.withdrawn_at}" if decision.withdrawn_at else decision.verdict
    return f"{state}: {decision.sentence}"
