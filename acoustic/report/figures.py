"""The figures of a run, drawn from what it logged. One style, readable in black and white."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

STYLE = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
INK, ACCENT, FAINT = "#1f3b57", "#d1603d", "#8a8f98"

# Of runs that learn well: quoted by others (0.5 to 2) and measured here (up to 4.3).
HEALTHY_GRADIENT = (0.5, 4.5)

# Of names below each other, as a share of a panel's height.
ROW = 0.075


def save(figure, output_dir: str, name: str) -> Path:
    path = Path(output_dir, "figures", f"{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return path


def series(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def draw(axis, history: list[dict], key: str, label: str, **style) -> None:
    steps, values = series(history, key)
    if steps:
        axis.plot(steps, values, label=label, **style)


def level(axis, value: float, text: str) -> None:
    """A horizontal line that a curve is to be compared with, named at its right end."""
    axis.axhline(value, color=FAINT, linestyle=":", linewidth=1.2)
    axis.annotate(
        text, (1.0, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color=FAINT
    )


def band(axis, low: float, high: float, text: str) -> None:
    """Where a curve of a healthy run lies, shaded, and named at its right end."""
    axis.axhspan(low, high, color=FAINT, alpha=0.12, linewidth=0)
    axis.annotate(
        text, (0.99, high), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=7, color="#5b6068"
    )


def mark_verdicts(axes, verdicts: list[tuple[int, str]]) -> None:
    """A line in every panel where the watch spoke, named in the last one: below its rising curve or above it."""
    hours, rows = axes.flat[-1], {"left": 0, "right": 0}
    for said, name in sorted(verdicts):
        for axis in axes.flat:
            axis.axvline(said, color="black", linestyle=(0, (6, 2)), linewidth=0.9)
        early = said < sum(hours.get_xlim()) / 2
        side = "left" if early else "right"
        row = 0.03 + ROW * (rows[side] % int(0.9 / ROW))
        rows[side] += 1
        hours.annotate(
            name.replace("_", " "),
            (said, row if early else 1 - row),
            xycoords=("data", "axes fraction"),
            xytext=(3 if early else -3, 0),
            textcoords="offset points",
            ha=side,
            va="bottom" if early else "top",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        )


def pretraining_curves(
    output_dir: str, history: list[dict], *, num_negatives: int, num_codes: int, verdicts: list[tuple[int, str]] = ()
) -> Path:
    """Six panels over updates: loss, accuracy, perplexity, gradient norm and learning rate, throughput, hours seen.

    verdicts: (update, name) of what the watch said; black dashed lines, named in the last panel.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
        (loss, accuracy, perplexity), (gradient, speed, hours) = axes
        for axis, key in ((loss, "contrastive_loss"), (accuracy, "accuracy"), (perplexity, "code_perplexity")):
            draw(axis, history, key, "training", color=INK, linewidth=1.2)
            draw(axis, history, f"eval_{key}", "held out", color=ACCENT, marker="o", markersize=3, linewidth=1.2)
            if axis.lines:
                axis.legend()
        loss.set_title("contrastive loss (nats per masked frame)")
        level(loss, math.log(num_negatives + 1), "chance")
        accuracy.set_title(f"accuracy among {num_negatives} negatives")
        level(accuracy, 1 / (num_negatives + 1), "chance")
        perplexity.set_title(f"code perplexity (of {num_codes})")
        perplexity.set_ylim(0, num_codes * 1.02)
        draw(gradient, history, "grad_norm", "gradient norm", color=INK, linewidth=1.2)
        gradient.set_title("gradient norm (solid), learning rate (dashed)")
        band(gradient, *HEALTHY_GRADIENT, "healthy")
        gradient.set_ylim(bottom=0)
        rate = gradient.twinx()
        rate.spines["right"].set_visible(False)
        rate.grid(False)
        draw(rate, history, "learning_rate", "learning rate", color=ACCENT, linestyle="--", linewidth=1.2)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        draw(speed, history, "audio_seconds_per_second", "audio seconds per second", color=INK, linewidth=1.2)
        speed.set_title("audio seconds per second")
        speed.set_ylim(bottom=0)
        draw(hours, history, "hours_seen", "hours seen", color=INK, linewidth=1.2)
        hours.set_title("hours of audio seen")
        for axis in axes.flat:
            axis.set_xlabel("updates")
        mark_verdicts(axes, verdicts)
        return save(figure, output_dir, "pretraining")


def finetuning_curves(output_dir: str, history: list[dict], metric: str) -> Path:
    """Training loss, and the metric on the held-out part where there is one."""
    with plt.rc_context(STYLE):
        has_metric = any(f"eval_{metric}" in entry for entry in history)
        figure, axes = plt.subplots(
            1, 1 + has_metric, figsize=(4.2 * (1 + has_metric), 3), layout="constrained", squeeze=False
        )
        loss = axes[0, 0]
        draw(loss, history, "loss", "training", color=INK, linewidth=1.2)
        draw(loss, history, "eval_loss", "held out", color=ACCENT, marker="o", markersize=3, linewidth=1.2)
        loss.set_title("loss (nats per target)")
        frozen, values = series(history, "encoder_frozen")
        released = next((step for step, value in zip(frozen, values) if not value), None)
        if released and values[0]:
            loss.axvline(released, color=FAINT, linestyle=":")
            loss.annotate(
                "encoder released", (released, 0.98), xycoords=("data", "axes fraction"), fontsize=7, color=FAINT
            )
        if loss.lines:
            loss.legend()
        if has_metric:
            draw(axes[0, 1], history, f"eval_{metric}", metric, color=ACCENT, marker="o", markersize=3, linewidth=1.2)
            axes[0, 1].set_title(f"held-out {metric}")
            axes[0, 1].set_ylim(0, 1.05 * max(1.0, *series(history, f"eval_{metric}")[1]))
        for axis in axes.flat:
            axis.set_xlabel("updates")
        return save(figure, output_dir, "finetuning")


def confusion(output_dir: str, split: str, counts: np.ndarray, classes: list[str]) -> Path:
    """Rows: the true class, columns: the predicted one; shaded by the row's share, numbered by count."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(0.5 * len(classes) + 1.6, 3.2)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(size, size * 0.9), layout="constrained")
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column] and len(classes) <= 30:
                color = "white" if shares[row, column] > 0.55 else "black"
                axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
        axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), classes)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        axis.set_title(f"{split}: {np.trace(counts) / max(counts.sum(), 1):.0%} of {counts.sum()} clips right")
        return save(figure, output_dir, f"confusion_{split}")


def error_by_length(output_dir: str, split: str, scored: list[dict]) -> Path:
    """One dot per utterance: its word error rate over the words of its reference, and the mean per length."""
    lengths = np.array([len(item["reference"].split()) for item in scored])
    rates = np.array([item["wer"] for item in scored])
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
        jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(lengths))
        axis.scatter(
            lengths + jitter, np.minimum(rates, 2), s=10, color=INK, alpha=0.45, linewidths=0, label="utterance"
        )
        unique = np.unique(lengths)
        axis.plot(
            unique, [rates[lengths == n].mean() for n in unique], color=ACCENT, marker="o", markersize=3, label="mean"
        )
        level(axis, 1.0, "an empty answer")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks := [2**n for n in range(int(np.log2(max(lengths.max(), 1))) + 1)], map(str, ticks))
        axis.set_xlabel("words in the reference")
        axis.set_ylabel("word error rate (cut at 2)")
        axis.set_title(f"{split}: where the errors are, {len(scored)} utterances")
        axis.legend()
        return save(figure, output_dir, f"errors_{split}")


def compare_starts(
    output_dir: str, rows: list[dict], starts: tuple[str, ...], splits: tuple[str, ...], chance: float
) -> Path:
    """Accuracy over the labels per class: a bar with its range for each start, a panel for each split.

    Args:
        rows: {"start", "budget", "draw", split: accuracy}; not every start needs every budget.
        starts: their order and with it their shade; a word "fine-tuned" in the name hatches the bar.
    """
    budgets = sorted({row["budget"] for row in rows})
    shades = dict(zip(starts, (FAINT, "#f0b99f", "#7fa3c7", ACCENT, INK)))
    width = 0.84 / len(starts)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(splits), figsize=(5 * len(splits), 3.6), layout="constrained", sharey=True)
        for axis, split in zip(np.atleast_1d(axes), splits):
            for place, budget in enumerate(budgets):
                present = [s for s in starts if any((r["start"], r["budget"]) == (s, budget) for r in rows)]
                for index, start in enumerate(present):
                    values = [r[split] for r in rows if (r["start"], r["budget"]) == (start, budget)]
                    x, mean = place + (index - (len(present) - 1) / 2) * width, np.mean(values)
                    hatch = "//" if "fine-tuned" in start else None
                    axis.bar(x, mean, width * 0.92, color=shades[start], label=start, hatch=hatch, edgecolor="white")
                    axis.vlines(x, min(values), max(values), color="black", linewidth=1.2)
            level(axis, chance, "chance")
            axis.set_xticks(range(len(budgets)), [f"{budget} per class" for budget in budgets])
            axis.set_title(split)
            axis.set_ylim(0, 1)
        np.atleast_1d(axes)[0].set_ylabel("accuracy: mean and range")
        handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
        unique = dict(sorted(dict(zip(labels, handles)).items(), key=lambda item: starts.index(item[0])))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3)
        return save(figure, output_dir, "comparison")
