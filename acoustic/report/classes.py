"""Figures of classes: how well each is told from the others."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from acoustic.report.figures import ACCENT, FAINT, INK, STYLE, save

# Bars beyond these can't be read.
MAX_BARS = 40
LOOKS = (
    {"color": INK},
    {"color": "white", "edgecolor": ACCENT, "hatch": "////"},
    {"color": FAINT, "edgecolor": FAINT},
)


def bars_by_class(output_dir: str, name: str, title: str, rows: list[str], bars: dict[str, np.ndarray]) -> Path:
    """A group of bars for each class, the best above.

    Args:
        rows: what stands beside a group.
        bars: legend -> (classes,) from 0 to 1, NaN where there is nothing to measure; at most three.
    """
    order = np.argsort(-np.nan_to_num(next(iter(bars.values())), nan=-1.0), kind="stable")[:MAX_BARS]
    height = 0.8 / len(bars)
    with plt.rc_context({**STYLE, "hatch.linewidth": 0.8}):
        figure, axis = plt.subplots(figsize=(6.4, (0.2 * len(bars) + 0.1) * len(order) + 1.3), layout="constrained")
        for number, (legend, values) in enumerate(bars.items()):
            places = np.arange(len(order)) + (number - (len(bars) - 1) / 2) * height
            axis.barh(places, np.nan_to_num(values[order]), 0.9 * height, label=legend, linewidth=0.8, **LOOKS[number])
            for place, value in zip(places, values[order]):
                text, end = ("none", 0.0) if np.isnan(value) else (f"{value:.2f}", value)
                axis.annotate(text, (end, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set_yticks(range(len(order)), [rows[index].replace("$", r"\$") for index in order])
        axis.set_ylim(len(order) - 0.5, -0.5)
        axis.set_xlim(0, 1.08)
        axis.grid(False, axis="y")
        left_out = f", {len(rows) - len(order)} more" if len(order) < len(rows) else ""
        axis.set_title(title + left_out)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(bars))
        return save(figure, output_dir, name)
