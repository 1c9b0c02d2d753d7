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
    roles, problems = dict[str | None, str](), list[str]()
    if previous := store.previous():
        roles[previous.id] = "previous"
    for role, pointer in (("challenger", store.challenger_id), ("champion", store.champion_id)):
        try:
            roles[pointer()] = role
        except StoreError as error:
            problems.append(str(error))
    rows = [COLUMNS]
    for version in store.versions():
        serves = roles.get(version.id, "")
        accuracy = version.metadata.get("metrics", {}).get("test", {}).get("accuracy")
        shown = f"{accuracy:.2%}" if isinstance(accuracy, float) else ""
        rows.append((version.id, str(version.metadata.get("created_at", "")), shown, serves, _decided(version)))
    if len(rows) == 1:
        return f"There is no version in MODEL_PATH={root} yet."
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS) - 1)]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )
    return "\n".join([*lines, *problems])


def _decided(version: Version) -> str:
    decision = read_decision(version)
    if decision is None:
        return "not judged"
    state = f"withdrawn {decision.withdrawn_at}" if decision.withdrawn_at else decision.verdict
    return f"{state}: {decision.sentence}"
