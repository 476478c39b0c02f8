"""Figures of spans: what sounded when and what was predicted, and F1 by class. Readable in black and white."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.signal import spectrogram

from acoustic.report.figures import ACCENT, FAINT, INK, STYLE, save

# Rows and bars beyond these can't be read.
MAX_ROWS, MAX_BARS = 16, 40
# Of the spectrogram: its window, and columns of a panel.
WINDOW_SECONDS, MAX_COLUMNS = 0.04, 1200
TRUE, PREDICTED = {"facecolor": INK, "edgecolor": INK}, {"facecolor": "white", "edgecolor": ACCENT, "hatch": "////"}


def timelines(output_dir: str, split: str, examples: list[dict], classes: list[str]) -> Path:
    """A spectrogram of each recording, and below it a row for each class: true spans above, predicted ones below.

    Args:
        examples: {"name", "score" (segment F1), "waveform" (samples,), "rate" in Hz, "start" (of the waveform, in
            seconds of the recording), "reference", "predicted": (start, end, label) in seconds of the recording}.
        classes: all of the model's; those that occur nowhere in what is shown have no row.
    """
    occurring = {
        label
        for example in examples
        for side in ("reference", "predicted")
        for start, end, label in example[side]
        if end >= example["start"] and start <= stop_of(example)
    }
    rows = [label for label in classes if label in occurring][:MAX_ROWS] or classes[:1]
    heights = [1.3, 0.25 + 0.24 * len(rows)] * len(examples)
    with plt.rc_context({**STYLE, "axes.grid": False, "hatch.linewidth": 0.8}):
        figure, axes = plt.subplots(
            2 * len(examples),
            1,
            figsize=(10, sum(heights) + 0.55 * len(examples) + 0.3),
            height_ratios=heights,
            layout="constrained",
        )
        for sound, bars, example in zip(axes[::2], axes[1::2], examples):
            draw_sound(sound, example)
            draw_bars(bars, example, rows)
        handles = [plt.Rectangle((0, 0), 1, 1, linewidth=0.8, **style) for style in (TRUE, PREDICTED)]
        figure.legend(handles, ("true", "predicted"), loc="outside lower center", ncols=2)
        return save(figure, output_dir, f"timeline_{split}")


def stop_of(example: dict) -> float:
    return example["start"] + len(example["waveform"]) / example["rate"]


def draw_sound(axis, example: dict) -> None:
    spectrum(axis, example["waveform"], example["rate"], example["start"])
    axis.set_xticklabels([])
    axis.set_title(f"{shorten(example['name'])}: segment F1 {example['score']:.2f}", loc="left")


def spectrum(axis, waveform: np.ndarray, rate: int, start: float = 0.0) -> None:
    """(samples,) -> a panel: seconds from `start` across, kHz upwards, what is loud is black."""
    length = min(max(int(WINDOW_SECONDS * rate), 2 * len(waveform) // MAX_COLUMNS), len(waveform))
    frequencies, _, power = spectrogram(waveform, rate, nperseg=length, noverlap=length // 2, scaling="spectrum")
    level = 10 * np.log10(power + 1e-12)
    low, high = np.percentile(level, (25, 99.9))  # what is there most of the time is white
    extent = (start, start + len(waveform) / rate, 0, frequencies[-1] / 1000)
    axis.imshow(level, origin="lower", aspect="auto", cmap="gray_r", vmin=low, vmax=high, extent=extent)
    axis.set_ylabel("kHz")


def draw_bars(axis, example: dict, rows: list[str]) -> None:
    start, stop = example["start"], stop_of(example)
    for side, below, style in (("reference", 0.0, TRUE), ("predicted", 0.42, PREDICTED)):
        for begin, end, label in example[side]:
            if label in rows and end >= start and begin <= stop:
                # A point, too, is to be seen.
                width = max(min(end, stop) - max(begin, start), (stop - start) / 500)
                place = max(begin, start), rows.index(label) + below - 0.4
                axis.add_patch(plt.Rectangle(place, width, 0.36, linewidth=0.8, **style))
    axis.set_xlim(start, stop)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_yticks(range(len(rows)), [shorten(label, 24) for label in rows])
    axis.hlines(np.arange(len(rows) - 1) + 0.5, start, stop, color=FAINT, linewidth=0.3)
    axis.set_xlabel("seconds")


def scores_by_class(
    output_dir: str, split: str, classes: list[str], by_class: dict[str, np.ndarray], counts: np.ndarray
) -> Path:
    """Event and segment F1 of each class, the best above, with the number of its true events.

    Args:
        by_class: {"event", "segment"}: (classes,), NaN where a class neither occurs nor was predicted.
        counts: (classes,) true events.
    """
    order = sorted(range(len(classes)), key=lambda index: -np.nan_to_num(by_class["event"][index], nan=-1.0))
    order = order[:MAX_BARS]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 0.42 * len(order) + 1.3), layout="constrained")
        looks = {"event": {"color": INK}, "segment": {"color": "white", "edgecolor": ACCENT, "hatch": "////"}}
        for offset, (kind, style) in zip((-0.19, 0.19), looks.items()):
            values = np.nan_to_num(by_class[kind][order])
            axis.barh(np.arange(len(order)) + offset, values, 0.34, label=f"{kind} F1", linewidth=0.8, **style)
            for place, value in enumerate(by_class[kind][order]):
                text = "none" if np.isnan(value) else f"{value:.2f}"
                end = (np.nan_to_num(value), place + offset)
                axis.annotate(text, end, (3, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set_yticks(range(len(order)), [f"{shorten(classes[index], 24)} ({counts[index]})" for index in order])
        axis.set_ylim(len(order) - 0.5, -0.5)
        axis.set_xlim(0, 1.08)
        axis.grid(False, axis="y")
        left_out = f", {len(classes) - len(order)} classes more" if len(order) < len(classes) else ""
        axis.set_title(f"{split}: F1 by class, in brackets the true events{left_out}")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return save(figure, output_dir, f"f1_by_class_{split}")


def shorten(name: str, length: int = 80) -> str:
    name = name.encode("utf-8", "replace").decode().replace("$", r"\$")
    return name if len(name) <= length else f"...{name[3 - length :]}"
