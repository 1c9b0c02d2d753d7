"""A report's pictures, drawn by Matplotlib as SVG: text stays text, and lines take the colour of the page's ink."""

import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneserve.lifecycle.statistics import Array
from tuneserve.report.facts import Bin, Facts, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CELLS = 20
"""Labels of which a confusion matrix can be read."""

INK = "#010203"
"""Stands for the colour of the page's text until the picture is put there."""
FIRST, SECOND, SOFT = "#3b7dd8", "#d9772b", "#8a94a6"
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}


def draw(facts: Facts, cache: Path) -> dict[str, str]:
    """SVG elements by name: `curves`, `confusion`, `reliability`, `lengths`, of what there is; ink is `currentColor`.

    Args:
        facts: that are shown.
        cache: where Matplotlib may keep what it knows of fonts.
    """
    os.environ["MPLCONFIGDIR"] = str(cache / "matplotlib")  # read when it is imported
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it says which fonts lack which sign: a browser has others
    import matplotlib as mpl

    found = {}
    with mpl.rc_context(STYLE):
        history = [one for one in facts.metadata.get("history") or [] if isinstance(one, Mapping)]
        if history:
            found["curves"] = _curves(history, facts.losses)
        if facts.confusion is not None and len(facts.labels) <= MOST_CELLS:
            found["confusion"] = _confusion(facts.confusion, facts.labels)
        if facts.after:
            found["reliability"] = _reliability(facts.before, facts.after)
        if len(facts.lengths) > 1:
            found["lengths"] = _lengths(facts.lengths)
    return found


def _figure(width: float, height: float, axes: int = 1) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(1, axes, place + 1) for place in range(axes)]


def _svg(figure: "Figure", name: str) -> str:
    """The picture as an element; its parts have names of their own, for others stand on the same page."""
    import matplotlib as mpl

    content = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = content.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor").strip()


def _curves(history: Sequence[Mapping[str, Any]], losses: Sequence[Sequence[float]]) -> str:
    from matplotlib.ticker import MaxNLocator

    epochs = list(range(1, len(history) + 1))
    known = [name for name in ("validation_accuracy", "validation_macro_f1") if name in history[0]]
    figure, axes = _figure(8, 3, 2 if known else 1)
    loss = axes[0]
    if losses and len(losses) > 1:
        last = losses[-1][0]
        scaled = [len(history) * step / last for step, _ in losses]
        loss.plot(scaled, [value for _, value in losses], color=SOFT, linewidth=0.8, alpha=0.7, label="a step")
    for name, colour, label in (("train_loss", FIRST, "training"), ("validation_loss", SECOND, "validation")):
        if name in history[0]:
            loss.plot(epochs, [one[name] for one in history], "o-", color=colour, markersize=4, label=label)
    loss.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    loss.legend()
    for name in known:
        label, colour = ("accuracy", FIRST) if name.endswith("accuracy") else ("macro F1", SECOND)
        axes[1].plot(epochs, [one[name] for one in history], "o-", color=colour, markersize=4, label=label)
    if known:
        axes[1].set(xlabel="epoch", ylabel="on validation texts")
        axes[1].legend()
    for one in axes:
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure, "curves")


def _confusion(confusion: Array, labels: Sequence[str]) -> str:
    size = max(3.2, 0.55 * len(labels) + 1.8)
    figure, [axes] = _figure(size, size)
    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="none")
    for true, row in enumerate(confusion):
        for other, texts in enumerate(row):
            if texts:
                ink = "#ffffff" if shares[true, other] > 0.55 else "#14304f"
                axes.text(other + 0.5, true + 0.5, f"{texts:,}", ha="center", va="center", color=ink, fontsize=9)
    names = [label if len(label) <= 18 else f"{label[:17]}…" for label in labels]
    places = [index + 0.5 for index in range(len(labels))]
    axes.set_xticks(places, names)
    if len(labels) > 2:
        axes.tick_params(axis="x", rotation=45)
        for name in axes.get_xticklabels():
            name.set_horizontalalignment("right")
    axes.set_yticks(places, names)
    axes.set(xlabel="answered", ylabel="labelled", aspect="equal")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _svg(figure, "confusion")


def _reliability(before: Sequence[Bin], after: Sequence[Bin]) -> str:
    figure, both = _figure(8, 3.4, 2)
    for axes, bins, title in zip(both, (before, after), ("before calibration", "after"), strict=True):
        most = max(one.texts for one in bins)
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle="--")
        points = [100 * one.texts / most + 8 for one in bins]
        axes.plot([one.confidence for one in bins], [one.accuracy for one in bins], color=FIRST, linewidth=1)
        axes.scatter([one.confidence for one in bins], [one.accuracy for one in bins], s=points, color=FIRST, zorder=3)
        axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="confidence", ylabel="share that is right", title=title)
    return _svg(figure, "reliability")


def _lengths(groups: Sequence[Group]) -> str:
    figure, [axes] = _figure(8, 2.6)
    places = list(range(len(groups)))
    heights = [group.accuracy for group in groups]
    # Where all are right, or none, the interval's end is the accuracy but for rounding.
    below = [max(0.0, group.accuracy - group.low) for group in groups]
    spread = [below, [max(0.0, group.high - group.accuracy) for group in groups]]
    axes.bar(places, heights, width=0.6, color=FIRST, alpha=0.85)
    axes.errorbar(places, heights, yerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
    axes.set_xticks(places, [f"{group.name}\n{group.texts:,} texts" for group in groups])
    axes.set(xlabel="tokens read", ylabel="accuracy", ylim=(0, 1.05))
    return _svg(figure, "lengths")
