"""The figures of a run, drawn from what it logged. One style, readable in black and white."""

import re
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
# Released wav2vec 2.0 models name 60 to 70 % of the targets among 100 negatives (fairseq #2949).
RELEASED_ACCURACY, PAPER_NEGATIVES = (0.6, 0.7), 100

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
    """Where a curve of a healthy run lies, or ends, shaded, and named at its right end."""
    axis.axhspan(low, high, color=FAINT, alpha=0.12, linewidth=0)
    axis.annotate(
        text, (0.99, high), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=7, color="#5b6068"
    )


class Curves:
    """What a run logged, beside what its recipe's own run logged.

    Args:
        history: of the run.
        facts: `num_negatives`, `num_codes`, `fewest_codes`, `chance_loss` and `chance_accuracy` of the run.
        reference: a history like the run's own, or nothing.
    """

    def __init__(self, history: list[dict], facts, reference: list[dict] = ()):
        self.history, self.facts, self.reference = history, facts, list(reference)

    def draw(self, axis, key: str, label: str, **style) -> None:
        # First and wide, so that the run's own line lies on it.
        draw(axis, self.reference, key, "the recipe's own run", color="#c9ced6", linewidth=3.5, zorder=1)
        draw(axis, self.history, key, label, **style)

    def both(self, axis, key: str) -> None:
        """A metric in training and on the held-out part."""
        self.draw(axis, key, "training", color=INK, linewidth=1.2)
        draw(axis, self.history, f"eval_{key}", "held out", color=ACCENT, marker="o", markersize=3, linewidth=1.2)


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


def pretraining_curves(output_dir: str, curves: Curves, family: str, verdicts: list[tuple[int, str]] = ()) -> Path:
    """Up to six panels over updates: what the family of objectives is about above, how the run goes below.

    Args:
        family: a name in `ABOUT`.
        verdicts: (update, name) of what the watch said; black dashed lines, named in the last panel.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
        about, (gradient, speed, hours) = axes
        panels = ABOUT[family]
        for axis, panel in zip(about, panels):
            panel(axis, curves)
            if axis.lines:
                axis.legend()
        for axis in about[len(panels) :]:
            axis.set_axis_off()
        curves.draw(gradient, "grad_norm", "gradient norm", color=INK, linewidth=1.2)
        gradient.set_title("gradient norm (solid), learning rate (dashed)")
        if family == "contrastive":
            band(gradient, *HEALTHY_GRADIENT, "healthy")
        gradient.set_ylim(bottom=0)
        rate = gradient.twinx()
        rate.spines["right"].set_visible(False)
        rate.grid(False)
        draw(rate, curves.history, "learning_rate", "learning rate", color=ACCENT, linestyle="--", linewidth=1.2)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        draw(speed, curves.history, "audio_seconds_per_second", "audio seconds per second", color=INK, linewidth=1.2)
        speed.set_title("audio seconds per second")
        speed.set_ylim(bottom=0)
        curves.draw(hours, "hours_seen", "hours seen", color=INK, linewidth=1.2)
        hours.set_title("hours of audio seen")
        shown = np.array([axis for axis in axes.flat if axis.axison])
        for axis in shown:
            axis.set_xlabel("updates")
        mark_verdicts(shown, verdicts)
        return save(figure, output_dir, "pretraining")


def contrastive_loss(axis, curves: Curves) -> None:
    curves.both(axis, "contrastive_loss")
    axis.set_title("contrastive loss (nats per target)")
    level(axis, curves.facts.chance_loss, "chance")


def accuracy(axis, curves: Curves) -> None:
    curves.both(axis, "accuracy")
    if curves.facts.num_negatives:
        axis.set_title(f"accuracy among {curves.facts.num_negatives} negatives")
        level(axis, curves.facts.chance_accuracy, "chance")
    else:
        axis.set_title("accuracy among all codes")


def accuracy_as_published(axis, curves: Curves) -> None:
    accuracy(axis, curves)
    if curves.facts.num_negatives == PAPER_NEGATIVES:
        band(axis, *RELEASED_ACCURACY, "where released models end")


def code_perplexity(axis, curves: Curves) -> None:
    facts = curves.facts
    curves.both(axis, "code_perplexity")
    axis.set_title(f"code perplexity (of {facts.num_codes})")
    axis.set_ylim(0, facts.num_codes * 1.02)
    band(axis, facts.num_groups + facts.fewest_codes, facts.num_codes, "no collapse")


def codes_or_steps(axis, curves: Curves) -> None:
    if curves.facts.num_codes:
        code_perplexity(axis, curves)
        return
    last = max((int(key.removeprefix("accuracy_")) for key in by_step(curves.history)), default=0)
    for step, style in ((1, "-"), ((last + 1) // 2, "--"), (last, ":")):
        draw(axis, curves.history, f"accuracy_{step}", f"{step} ahead", color=INK, linewidth=1.2, linestyle=style)
    axis.set_title("accuracy by step ahead, training")
    level(axis, curves.facts.chance_accuracy, "chance")


def by_step(history: list[dict]) -> set[str]:
    return {key for entry in history for key in entry if re.fullmatch(r"accuracy_\d+", key)}


def reconstruction_loss(axis, curves: Curves) -> None:
    curves.both(axis, "reconstruction_loss")
    draw(
        axis, curves.history, "mean_predictor_loss", "the mean's, training", color=FAINT, linestyle=":", linewidth=1.2
    )
    axis.set_title("reconstruction loss (L1 per cell)")
    axis.set_ylim(bottom=0)


def explained(axis, curves: Curves) -> None:
    for prefix, label, style in (
        ("", "training", {"color": INK}),
        ("eval_", "held out", {"color": ACCENT, "marker": "o", "markersize": 3}),
    ):
        names = f"{prefix}reconstruction_loss", f"{prefix}mean_predictor_loss"
        points = [(entry["step"], *(entry[name] for name in names)) for entry in curves.history if names[1] in entry]
        if points:
            steps, losses, means = np.array(points).T
            axis.plot(steps, 1 - losses / means, label=label, linewidth=1.2, **style)
    axis.set_title("share of the mean's error that is gone")
    level(axis, 0.0, "the mean")


def codes_loss(axis, curves: Curves) -> None:
    curves.both(axis, "loss")
    draw(
        axis, curves.history, "unigram_loss", "frequencies alone, training", color=FAINT, linestyle=":", linewidth=1.2
    )
    axis.set_title("cross-entropy (nats per masked frame)")
    axis.set_ylim(bottom=0)


# What each family of objectives is about, in the upper row of its curves.
ABOUT = {
    "contrastive": (contrastive_loss, accuracy_as_published, code_perplexity),
    "predictive": (contrastive_loss, accuracy, codes_or_steps),
    "reconstruction": (reconstruction_loss, explained),
    "codes": (codes_loss, accuracy, code_perplexity),
}


def steps_ahead(output_dir: str, history: list[dict], chance: float) -> Path:
    """Accuracy over the number of steps that are predicted ahead, at the end of a run."""
    names = sorted(by_step(history), key=lambda name: int(name.removeprefix("accuracy_")))
    steps = [int(name.removeprefix("accuracy_")) for name in names]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
        for prefix, label, style in (("", "training", {"color": INK}), ("eval_", "held out", {"color": ACCENT})):
            values = [series(history, prefix + name)[1] for name in names]
            if all(values):
                axis.plot(steps, [value[-1] for value in values], label=label, marker="o", markersize=3, **style)
        level(axis, chance, "chance")
        axis.set_xticks(steps)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("steps ahead")
        axis.set_title("accuracy by step ahead")
        axis.legend()
        return save(figure, output_dir, "steps_ahead")


def probe(output_dir: str, history: list[dict], chance: float) -> Path:
    """Accuracy of the frozen probe over the updates, and what the weights were good for before the first."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
        draw(axis, history, "probe_accuracy", "frozen probe", color=INK, marker="o", markersize=3, linewidth=1.2)
        steps, values = series(history, "probe_accuracy")
        if steps[0] == 0:
            level(axis, values[0], "before training")
        level(axis, chance, "chance")
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("updates")
        axis.set_title("cross-validated accuracy on the probe's clips")
        return save(figure, output_dir, "probe")


def reconstruction(output_dir: str, example: dict) -> Path:
    """What the model saw of a window, what it made of it, and what there was.

    Args:
        example: "input", "prediction", "target" (frames, bands), "chosen" (frames,) bool, "hop_seconds".
    """
    seconds = len(example["target"]) * example["hop_seconds"]
    low, high = np.percentile(example["target"], (1, 99))
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(3, 1, figsize=(8, 6), layout="constrained", sharex=True)
        titles = ("input, hidden frames marked above", "prediction (its loss counts where marked)", "target")
        for axis, name, title in zip(axes, ("input", "prediction", "target"), titles):
            extent = (0, seconds, 0, example[name].shape[1])
            axis.imshow(
                example[name].T, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high, extent=extent
            )
            axis.set_title(title)
            axis.set_ylabel("band")
            times = (np.flatnonzero(example["chosen"]) + 0.5) * example["hop_seconds"]
            above = axis.get_xaxis_transform()  # seconds across, the panel's height upwards
            (marks,) = axis.plot(times, np.full(len(times), 1.015), "|", color=ACCENT, transform=above, clip_on=False)
            marks.set_in_layout(False)
        axes[-1].set_xlabel("seconds")
        return save(figure, output_dir, "reconstruction")


def code_usage(output_dir: str, counts: np.ndarray) -> Path:
    """The share of the frames that each code has, the most used first, a line for each group.

    Args:
        counts: (groups, entries).
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
        for group, style in zip(counts, ("-", "--", ":", "-.") * len(counts)):
            shares = np.sort(group / max(group.sum(), 1))[::-1]
            used = int((group > 0).sum())
            label = f"{used} of {len(group)} used"
            axis.plot(np.arange(1, used + 1), shares[:used], style, color=INK, label=label)
        level(axis, 1 / counts.shape[1], "all alike")
        axis.set_yscale("log")
        axis.set_xlim(0, counts.shape[1] * 1.02)
        axis.set_xlabel("codes, the most used first")
        axis.set_title(f"share of {counts.sum(1).max():,} frames, by group")
        axis.legend()
        return save(figure, output_dir, "code_usage")


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
