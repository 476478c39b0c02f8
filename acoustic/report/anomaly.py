"""What a run of task anomaly leaves behind: the numbers, the figures and the model card of a detector."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_curve

from acoustic.console import say
from acoustic.report.card import write_card
from acoustic.report.figures import ACCENT, FAINT, INK, STYLE, level, save
from acoustic.report.provenance import how_it_was_made, limits, shown_name
from acoustic.report.record import write_data_report, write_json, write_run

USE = """
from acoustic.tasks.anomaly import AnomalyDetector  # of this repository

detector = AnomalyDetector.from_pretrained(".")
verdict = detector.score("recording.wav"{machine})
print(verdict.percentile, verdict.worst_segment)
"""
SHOWN = ("auc", "pauc", "auc_harmonic_mean", "pauc_harmonic_mean", "recall", "false_alarm_rate")
# Of the log-mel bands in a picture, which reach up to half of log_mel.RATE.
TOP_KHZ, TICKS_KHZ = 8, (0.5, 1, 2, 4, 8)
LINES = ("-", "--", ":", "-.")
# Curves beyond these can't be told apart: of more, the worst are named and the rest is drawn faint.
MAX_CURVES = 8


def report_anomaly(run, args, wall_seconds: float) -> dict:
    """Write everything that a run leaves beside its detector; returns all_results.json's content.

    Args:
        run: with `detector`, `notes`, `splits`, `description`, `tally` and `seconds`, as `run_anomaly` gives it.
    """
    output_dir, drawn, results = args.output_dir, [], {}
    Path(output_dir, "figures").mkdir(exist_ok=True)
    heard = run.seconds + sum(split.seconds for split in run.splits.values())
    write_run(output_dir, args, run.notes, wall_seconds)
    tallies = {"train": run.tally, **{name: split.tally for name, split in run.splits.items()}}
    write_data_report(
        output_dir, run.description, heard / 3600, {name: tally.report() for name, tally in tallies.items()}
    )
    if skipped := sum(len(tally.names) for tally in tallies.values()):
        say(f"skipped: {skipped} recordings, listed with their reasons in data_report.json")
    for name, split in run.splits.items():
        results |= {f"{name}_{key}": value for key, value in split.results.items()}
        predictions = [clip.readable() for clip in split.clips]
        write_json(Path(output_dir, f"predictions_{name}.json"), {"predictions": predictions})
        drawn += draw_split(output_dir, name, split, run.detector.settings.normal_label)
    shown = {f"{name}_{key}": results.get(f"{name}_{key}") for name in run.splits for key in SHOWN}
    shown = {key: value for key, value in shown.items() if value is not None}
    results["wall_seconds"] = wall_seconds
    machine = f', machine="{run.detector.machines[0]}"' if run.detector.machines else ""
    write_card(
        output_dir,
        kind=f"Anomaly detection, fitted on normal clips of {shown_name(args.given['dataset_name'])}",
        metadata={"library_name": "transformers", "tags": ["audio", "anomaly-detection"]},
        facts=[*run.notes, *explain(run), f"{heard / 3600:.2f} h of audio heard in {wall_seconds / 60:.1f} min"],
        results=shown | by_part(run.splits),
        figures=drawn,
        usage=USE.format(machine=machine),
        limits=limits("anomaly", f"{shown_name(args.given['dataset_name'])} ({run.seconds / 3600:.2f} h)"),
        made=how_it_was_made(args, wall_seconds),
        base=args.given.get("model_name_or_path"),
    )
    write_json(Path(output_dir, "all_results.json"), results)
    say(
        f"done: {output_dir}"
        + (f" ({', '.join(f'{key} {value:.4g}' for key, value in shown.items())})" if shown else "")
    )
    return results


def explain(run) -> list[str]:
    """What the numbers mean, of those that are there."""
    lines = [
        "score: 0 is the median of normal windows that were not fitted on, 1 a standard deviation more; percentile: "
        "the share of those windows that score lower"
    ]
    if any("auc" in split.results for split in run.splits.values()):
        lines.append(
            "pauc: the partial area under the ROC curve up to 0.1 false alarms, standardised (McClish 1989): 0.5 is "
            "guessing; recall and false_alarm_rate: above the 95th percentile"
        )
    if any("auc_harmonic_mean" in split.results for split in run.splits.values()):
        lines.append("harmonic means are over the machines; auc and pauc are over all clips, by score")
    return lines


def by_part(splits: dict) -> dict[str, float]:
    """Areas by machine and by fault, for the card."""
    return {
        f"{name}_{area} of {part}": found[area]
        for name, split in splits.items()
        for group in ("by_machine", "by_fault")
        for part, found in split.results.get(group, {}).items()
        for area in ("auc", "pauc")
    }


def draw_split(output_dir: str, name: str, split, normal_label: str) -> list[Path]:
    """The figures of one test split."""
    drawn = []
    labeled = [clip for clip in split.clips if clip.label is not None]
    if split.clips:
        drawn.append(score_histograms(output_dir, name, groups_of(split.clips, normal_label)))
    if "auc" in split.results:
        curves = {"all": labeled}
        machines = split.results["by_machine"]
        if len(machines) > 1:
            curves |= {machine: [clip for clip in labeled if clip.machine == machine] for machine in machines}
        panels = {
            "by machine" if len(machines) > 1 else "all clips": curves,
            "by fault": by_fault(labeled, normal_label),
        }
        panels = {
            title: {key: rates(clips, normal_label) for key, clips in panel.items()} for title, panel in panels.items()
        }
        drawn.append(roc_curves(output_dir, name, panels))
        if len(split.results["sweep"]) > 1:
            drawn.append(sweep(output_dir, name, split.results["sweep"], split.results["auc"]))
    if split.examples:
        drawn.append(most_anomalous(output_dir, name, split.examples))
    return drawn


def groups_of(clips: list, normal_label: str) -> dict[str, np.ndarray]:
    """Scores of normal, anomalous and unlabeled clips, of those that there are."""
    groups = {"normal": [], "anomalous": [], "unlabeled": []}
    for clip in clips:
        kind = "unlabeled" if clip.label is None else "normal" if clip.label == normal_label else "anomalous"
        groups[kind].append(clip.window.score)
    return {kind: np.array(scores) for kind, scores in groups.items() if scores}


def by_fault(clips: list, normal_label: str) -> dict[str, list]:
    """Each fault's clips with the normal ones of the machines that have it."""
    faults = sorted({clip.label for clip in clips} - {normal_label})
    found = {}
    for fault in faults:
        machines = {clip.machine for clip in clips if clip.label == fault}
        found[fault] = [
            clip for clip in clips if clip.label == fault or clip.label == normal_label and clip.machine in machines
        ]
    return {fault: group for fault, group in found.items() if any(clip.label == normal_label for clip in group)}


def rates(clips: list, normal_label: str) -> tuple[np.ndarray, np.ndarray]:
    """False alarms and hits of the ROC curve."""
    false_alarms, hits, _ = roc_curve(
        [clip.label != normal_label for clip in clips], [clip.window.score for clip in clips]
    )
    return false_alarms, hits


def score_histograms(output_dir: str, split: str, groups: dict[str, np.ndarray]) -> Path:
    """How many clips have which score, by kind; the upper axis is what the score's scale means.

    Args:
        groups: "normal", "anomalous", "unlabeled": (clips,) each.
    """
    everything = np.concatenate(list(groups.values()))
    high = np.percentile(everything, 98) if len(everything) > 50 else everything.max()
    low, high = min(everything.min(), -2.0), max(high, 3.0)
    edges = np.linspace(low, high, 41)
    looks = {"normal": (INK, None), "anomalous": (ACCENT, "//"), "unlabeled": (FAINT, None)}
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
        for kind, scores in groups.items():
            color, hatch = looks[kind]
            label = f"{kind} ({len(scores)}, median {np.median(scores):.1f})"
            axis.hist(
                np.clip(scores, low, high), edges, color=color, alpha=0.6, hatch=hatch, edgecolor="white", label=label
            )
        beyond = int((everything > high).sum())
        last = f"; the last bar: {beyond} beyond" if beyond else ""
        axis.set_xlabel(f"score (0: the median of normal, 1: a standard deviation more{last})")
        axis.set_ylabel("clips")
        axis.set_title(f"{split}: how wrong clips sound")
        axis.legend()
        return save(figure, output_dir, f"scores_{split}")


def roc_curves(output_dir: str, split: str, panels: dict[str, dict]) -> Path:
    """Hits over false alarms; shaded is what the partial area counts.

    Args:
        panels: title -> {name: (false alarms, hits)}, "all" being drawn strongest.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.2 * len(panels), 4.2), layout="constrained", squeeze=False, sharey=True
        )
        for axis, (title, curves) in zip(axes[0], panels.items()):
            axis.axvspan(0, 0.1, color=FAINT, alpha=0.15, linewidth=0)
            axis.plot([0, 1], [0, 1], color=FAINT, linestyle=":", linewidth=1)
            ranked = sorted(curves, key=lambda name: (name != "all", np.trapezoid(*curves[name][::-1])))
            colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, max(min(len(ranked), MAX_CURVES), 2)))
            for number, name in enumerate(ranked):
                false_alarms, hits = curves[name]
                if number < MAX_CURVES:
                    label = f"{name} {np.trapezoid(hits, false_alarms):.3f}".replace("$", r"\$")
                    style = {"color": colors[number], "linestyle": LINES[number % 4], "linewidth": 1.4}
                else:
                    label = f"{len(ranked) - MAX_CURVES} others, better" if number == MAX_CURVES else None
                    style = {"color": FAINT, "linewidth": 0.7}
                style = {"color": ACCENT, "linewidth": 2.2} if name == "all" else style
                axis.plot(false_alarms, hits, label=label, **style)
            axis.set_xlabel("false alarms (share of normal clips)")
            axis.set_title(f"{split}, {title}")
            axis.set_aspect("equal")
            # Below: curves from 0 to 1 leave no corner free.
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 2}
            axis.legend(title="area under the curve", title_fontsize=7, **below)
        axes[0, 0].set_ylabel("hits (share of anomalous clips)")
        return save(figure, output_dir, f"roc_{split}")


def sweep(output_dir: str, split: str, found: list[dict], mean_auc: float) -> Path:
    """AUC of each distance in each layer alone, and of what was used.

    Args:
        found: {"layer", "detector", "auc"} each.
    """
    layers, kinds = sorted({item["layer"] for item in found}), list(dict.fromkeys(item["detector"] for item in found))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
        for kind, color, style in zip(kinds, (INK, ACCENT, "#7fa3c7"), LINES):
            areas = {item["layer"]: item["auc"] for item in found if item["detector"] == kind}
            axis.plot(
                list(areas), list(areas.values()), color=color, linestyle=style, marker="o", markersize=4, label=kind
            )
        axis.axhline(mean_auc, color="black", linewidth=0.9, label="what is used")
        level(axis, 0.5, "guessing")
        axis.set_ylim(min(0.45, 0.95 * min(item["auc"] for item in found)), 1.02)
        axis.set_xticks(layers)
        axis.set_xlabel("layer (0: the input of the first)")
        axis.set_title(f"{split}: AUC of each distance alone")
        axis.legend(ncols=2)
        return save(figure, output_dir, f"sweep_{split}")


def most_anomalous(output_dir: str, split: str, examples: list[dict]) -> Path:
    """Log-mel bands of the worst windows, and below each the scores of its segments.

    Args:
        examples: {"name", "machine", "label", "percentile", "spectrogram" (bands, frames), "edges" (segments + 1) in
            seconds, "scores" (segments,), "alarm": the score above which 5 % of normal segments lie}.
    """
    columns = min(len(examples), 3)
    rows = -(-len(examples) // columns)
    highest = max(max(max(example["scores"]), example["alarm"]) for example in examples)
    lowest = min(0.0, *(min(example["scores"]) for example in examples))
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            2 * rows,
            columns,
            figsize=(3.9 * columns, 3.1 * rows),
            layout="constrained",
            squeeze=False,
            height_ratios=[2, 1] * rows,
        )
        for axis in axes.flat:
            axis.set_axis_off()
        for number, example in enumerate(examples):
            row, column = divmod(number, columns)
            draw_example(
                axes[2 * row, column], axes[2 * row + 1, column], example, (lowest, 1.05 * highest), column == 0
            )
        figure.suptitle(
            f"{split}: the most anomalous clips, two of a label at most; dotted: 5 % of normal segments are above",
            fontsize=9,
        )
        return save(figure, output_dir, f"most_anomalous_{split}")


def mel(kilohertz: float) -> float:
    """As torchaudio's (HTK's formula)."""
    return 2595 * np.log10(1 + kilohertz / 0.7)


def draw_example(above, below, example: dict, limits: tuple[float, float], first: bool) -> None:
    edges, scores = np.array(example["edges"]), np.array(example["scores"])
    above.set_axis_on()
    below.set_axis_on()
    low, high = np.percentile(example["spectrogram"], (2, 99.5))
    extent = (edges[0], edges[-1], 0, len(example["spectrogram"]))
    bands = len(example["spectrogram"])
    above.set_yticks([bands * mel(kilohertz) / mel(TOP_KHZ) for kilohertz in TICKS_KHZ], map(str, TICKS_KHZ))
    above.imshow(
        example["spectrogram"], origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high, extent=extent
    )
    named = [example["name"], example["machine"], example["label"]]
    # A dollar sign in a name would begin a formula.
    above.set_title(
        ", ".join(str(part) for part in named if part is not None).replace("$", r"\$"),
        fontsize=7,
        fontweight="normal",
    )
    above.tick_params(labelbottom=False)
    below.stairs(scores, edges, baseline=min(limits[0], 0), fill=True, color=INK, alpha=0.35)
    below.stairs(np.where(scores > example["alarm"], scores, np.nan), edges, color=ACCENT, linewidth=2, baseline=None)
    below.axhline(example["alarm"], color="black", linestyle=":", linewidth=0.9)
    below.set_xlim(edges[0], edges[-1])
    below.set_ylim(*limits)
    below.set_xlabel("seconds")
    if first:
        above.set_ylabel("kHz")
        below.set_ylabel("score")
