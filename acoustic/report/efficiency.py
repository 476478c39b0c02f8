"""The figure of label efficiency: a score over the number of labels, from several starts."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from acoustic.report.figures import ACCENT, FAINT, INK, STYLE, save

TITLES = {"frozen": "probe on the frozen encoder", "fine_tuned": "fine-tuned"}
# The start in question comes last, and strongest.
LOOKS = (
    {"color": FAINT, "linestyle": ":", "marker": "s"},
    {"color": FAINT, "linestyle": "--", "marker": "^"},
    {"color": INK, "linestyle": "-.", "marker": "D"},
    {"color": INK, "linestyle": "--", "marker": "v"},
)
OURS = {"color": ACCENT, "linestyle": "-", "marker": "o"}


# As an axis has them.
NAMES = {"wer": "word error rate", "cer": "character error rate", "map": "mean average precision"}


def label_efficiency(output_dir: str, found: dict) -> Path:
    """Panels: splits and metrics across, ways to learn down; lines are means over the draws, shades their range.

    Args:
        found: "rows": {"way", "start", "budget", "draw", column: score}, where budgets are numbers as texts, or "all";
            "starts": names in order; "splits", "metrics": those that are shown; "columns": "split metric" -> column;
            "unit": of the budgets; "greater_is_better".
    """
    rows, starts = found["rows"], found["starts"]
    ways = [way for way in TITLES if any(row["way"] == way for row in rows)]
    budgets = sorted(
        {row["budget"] for row in rows}, key=lambda budget: (budget == "all", budget != "all" and float(budget))
    )
    panels = [(split, metric) for metric in found["metrics"] for split in found["splits"]]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(ways),
            len(panels),
            figsize=(4.6 * len(panels), 3.4 * len(ways)),
            squeeze=False,
            sharey="col" if len(found["metrics"]) > 1 else True,
            layout="constrained",
        )
        for (line, column), axis in np.ndenumerate(axes):
            split, metric = panels[column]
            for number, start in enumerate(starts):
                look = OURS if number == len(starts) - 1 else LOOKS[number % len(LOOKS)]
                draw_start(axis, rows, ways[line], start, found["columns"][f"{split} {metric}"], budgets, look)
            axis.set_xticks(range(len(budgets)), budgets)
            axis.set_title(f"{split}, {TITLES[ways[line]]}")
            better = "" if found["greater_is_better"] else " (lower is better)"
            first = column == 0 or panels[column - 1][1] != metric
            axis.set_ylabel(NAMES.get(metric, metric) + better if first else None)
            axis.set_xlabel(found["unit"] if line == len(ways) - 1 else None)
        handles = {}
        for axis in axes.flat:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
        figure.legend(
            [handles[start] for start in starts if start in handles],
            [start for start in starts if start in handles],
            loc="outside lower center",
            ncols=min(len(starts), 3),
        )
        return save(figure, output_dir, "label_efficiency")


def draw_start(axis, rows: list[dict], way: str, start: str, column: str, budgets: list[str], look: dict) -> None:
    scores = [
        [row[column] for row in rows if (row["way"], row["start"], row["budget"]) == (way, start, budget)]
        for budget in budgets
    ]
    places = [place for place, values in enumerate(scores) if values]
    if not places:
        return
    axis.plot(places, [np.mean(scores[place]) for place in places], label=start, markersize=4, linewidth=1.4, **look)
    low, high = [min(scores[place]) for place in places], [max(scores[place]) for place in places]
    axis.fill_between(places, low, high, color=look["color"], alpha=0.12, linewidth=0)
