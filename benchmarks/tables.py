"""Runs of several contenders as Markdown tables. A run holds the contender's name, seed, precision and figures."""

from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Any

Runs = list[dict[str, Any]]
COLUMNS = {
    "texts/s": ("texts_per_s", 1, 1),
    "tokens/s": ("tokens_per_s", 1, 0),
    "of {precision} rate %": ("rate_share", 100, 1),
    "padding %": ("padding_share", 100, 1),
    "fit s": ("fit_s", 1, 1),
    "process s": ("process_s", 1, 1),
    "peak memory MiB": ("peak_bytes", 1 / 2**20, 0),
    "test accuracy %": ("test_accuracy", 100, 1),
}
"""Titles of the table, each with its figure's name in a run, what it is multiplied by, and its decimals."""
RATIOS = {"texts/s": "texts_per_s", "process s": "process_s", "peak memory": "peak_bytes"}


def tabulate(runs: Runs, contenders: Sequence[str], precision: str) -> str:
    """A row for each contender that ran: mean ± standard deviation over its seeds; `-` where nothing is known.

    `precision` is that of the products whose rate the shares are of.
    """
    titles = [title.format(precision=precision) for title in COLUMNS]
    rows = [["contender", *titles], ["---"] * (1 + len(titles))]
    for contender in contenders:
        if own := [run for run in runs if run["contender"] == contender]:
            cells = [spread([run[key] for run in own], scale, digits) for key, scale, digits in COLUMNS.values()]
            rows.append([f"{contender}, {own[0]['precision']}", *cells])
    return join(rows)


def compare(runs: Runs, contenders: Sequence[str]) -> str:
    """The first contender's figures by each other's of the same seed: the median of the ratios (lowest to highest)."""
    first, *others = contenders
    own = {run["seed"]: run for run in runs if run["contender"] == first}
    rows = [["ratio", *RATIOS, "test accuracy, points"], ["---"] * (2 + len(RATIOS))]
    for contender in others:
        if pairs := [(own[run["seed"]], run) for run in runs if run["contender"] == contender]:
            cells = [span([mine[key] / other[key] for mine, other in pairs], "{:.2f}") for key in RATIOS.values()]
            tested = [(mine["test_accuracy"], other["test_accuracy"]) for mine, other in pairs]
            gains = [100 * (mine - other) for mine, other in tested if mine is not None]
            rows.append([f"{first} / {contender}", *cells, span(gains, "{:+.1f}")])
    return join(rows)


def spread(values: Sequence[float | None], scale: float, digits: int) -> str:
    """Mean ± standard deviation of what is known."""
    known = [value * scale for value in values if value is not None]
    if not known:
        return "-"
    return f"{mean(known):.{digits}f}" + (f" ± {stdev(known):.{digits}f}" if len(known) > 1 else "")


def span(values: Sequence[float], form: str) -> str:
    """The median (lowest to highest)."""
    if not values:
        return "-"
    middle, lowest, highest = (form.format(of(values)) for of in (median, min, max))
    return middle if len(values) == 1 else f"{middle} ({lowest} to {highest})"


def join(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
