"""One page that shows what is in a data set, drawn from the numbers of `python -m acoustic.data`."""

import textwrap
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchaudio
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from acoustic.report.figures import ACCENT, FAINT, INK, STYLE, save

# Inches; the two rows of panels are higher than those of spectrograms.
SIZE, HEIGHTS = (13.5, 10.2), (3.1, 3.1, 1.6, 1.6)
LENGTH_TICKS = {
    0.01: "10 ms",
    0.1: "0.1 s",
    1: "1 s",
    10: "10 s",
    60: "1 min",
    600: "10 min",
    3600: "1 h",
    36000: "10 h",
}
MELS, RANGE_DB = 48, 70
LINES = (INK, ACCENT, FAINT, "#7fa3c7")


def draw_page(output_dir: str, numbers: dict, examples: list[dict], title: str, headline: str) -> Path:
    """Draw `figures/data.png`.

    Args:
        numbers: the fields of an `acoustic.data.overview.Overview`, as a dict; its texts are printable.
        examples: up to six {"name", "seconds", "rate" in Hz, "waveform"}.
        headline: the line below the title.
    """
    # A name may hold characters that the font lacks: they become boxes, which is no news.
    with plt.rc_context({**STYLE, "axes.titlelocation": "left"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = plt.figure(figsize=SIZE, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.1, hspace=0.03, wspace=0.03)
        grid = figure.add_gridspec(4, 3, height_ratios=HEIGHTS)
        figure.suptitle(f"{shorten(title, 90)}\n", fontsize=14, fontweight="bold", parse_math=False)
        figure.text(0.5, 0.955, headline, ha="center", fontsize=10, color=INK, parse_math=False)
        lengths(figure.add_subplot(grid[0, 0]), numbers)
        kinds(figure.add_subplot(grid[0, 1]), numbers)
        levels(figure.add_subplot(grid[0, 2]), numbers["sample"])
        spectra(figure.add_subplot(grid[1, 0]), numbers["sample"])
        skips(figure.add_subplot(grid[1, 1]), numbers)
        findings(figure.add_subplot(grid[1, 2]), numbers["findings"])
        for place, example in enumerate(examples[:6]):
            spectrogram(figure.add_subplot(grid[2 + place // 3, place % 3]), example)
        return save(figure, output_dir, "data")


def lengths(axis, numbers: dict) -> None:
    """Hours as bars, recordings as a line; between the dashed lines a recording is one window."""
    edges, hours = np.array(numbers["lengths"]["edges"]), numbers["lengths"]["hours"]
    axis.bar(edges[:-1], hours, np.diff(edges), align="edge", color=INK, edgecolor="white", linewidth=0.4)
    axis.set_title("length of the recordings: hours (bars), number (line)")
    axis.set_ylabel("hours", color=INK)
    axis.set_xscale("log")
    axis.set_xlim(edges[0] / 1.3, edges[-1] * 1.3)
    counts = axis.twinx()
    counts.spines["right"].set_visible(False)
    counts.grid(False)
    steps = [0, *numbers["lengths"]["recordings"], 0]
    counts.step(np.concatenate([edges[:1], edges, edges[-1:]])[:-1], steps, where="post", color=ACCENT, linewidth=1.2)
    counts.set_ylabel("recordings", color=ACCENT)
    counts.set_ylim(0, max(steps) * 1.15)
    axis.set_ylim(0, max(hours) * 1.15)
    ticks = {at: name for at, name in LENGTH_TICKS.items() if edges[0] / 1.3 <= at <= edges[-1] * 1.3}
    if len(ticks) < 2:
        ticks = {at: f"{at:.2g} s" for at in (edges[0], edges[-1])}
    axis.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_xticklabels(ticks.values())
    axis.xaxis.set_minor_formatter(NullFormatter())
    for limit, meaning in (("min_duration_in_seconds", "skipped"), ("max_duration_in_seconds", "cut")):
        mark_length(axis, numbers["settings"][limit], meaning, edges)


def mark_length(axis, at: float, meaning: str, edges: np.ndarray) -> None:
    """A limit that recordings lie beyond: the shorter ones are skipped, the longer ones cut into windows."""
    beyond = edges[0] < at * 0.99 if meaning == "skipped" else edges[-1] > at * 1.01
    if beyond:
        side = "right" if meaning == "skipped" else "left"
        text = f" {meaning}: under {at:g} s " if meaning == "skipped" else f" {meaning}: over {at:g} s "
        axis.axvline(at, color=FAINT, linestyle="--", linewidth=1)
        axis.text(at, 0.99, text, transform=axis.get_xaxis_transform(), ha=side, va="top", fontsize=7, color="0.35")


def kinds(axis, numbers: dict) -> None:
    """Share of the recordings for each sample rate, channel count and format: at most 4 of each."""
    groups = (
        {f"{int(rate) / 1000:g} kHz": value for rate, value in numbers["rates"].items()},
        {{"1": "mono", "2": "stereo"}.get(str(count), f"{count} ch."): v for count, v in numbers["channels"].items()},
        numbers["formats"],
    )
    place, ticks, names = 0.0, [], []
    total = sum(value["recordings"] for value in numbers["rates"].values())
    for group, color in zip(groups, (INK, "#7fa3c7", FAINT)):
        for name, count in largest({name: value["recordings"] for name, value in group.items()}, 4).items():
            axis.barh(place, count / total, 0.75, color=color)
            axis.text(count / total + 0.015, place, f"{count:,}", va="center", fontsize=8)
            ticks.append(place)
            names.append(shorten(name, 12))
            place += 1
        place += 0.6
    axis.set_yticks(ticks, names)
    axis.set_ylim(max(place - 0.9, 5.5), -0.7)
    share_axis(axis)
    axis.set_title("sample rates, channels, formats (recordings)")


def largest(counts: dict[str, int], most: int) -> dict[str, int]:
    """The first ones, and the sum of the others under their number."""
    items = list(counts.items())
    if len(items) <= most:
        return dict(items)
    rest = items[most - 1 :]
    return {**dict(items[: most - 1]), f"{len(rest)} others": sum(count for _, count in rest)}


def share_axis(axis) -> None:
    axis.set_xlim(0, 1.22)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)


def levels(axis, sample: dict) -> None:
    """Level of the sampled windows, the clipped ones in another colour, digital silence at the left end."""
    sounds = sample["sounds"]
    axis.set_title(f"level of {len(sounds):,} random windows (RMS)")
    if not sounds:
        return nothing(axis, "no window could be decoded")
    level = np.array([sound["level"] for sound in sounds])
    clipped = np.array([sound["clipped"] > 0.001 for sound in sounds])
    silent = level <= -90
    # Silence of any depth is one bar at the left end.
    lowest = -93 if silent.any() else min(3 * np.floor(level.min() / 3), -30)
    bins = np.arange(lowest, 3.1, 3)
    parts = (level[~silent & ~clipped], level[~silent & clipped], np.full(silent.sum(), -91.5))
    colors = (INK, ACCENT, FAINT)
    axis.hist(parts, bins, stacked=True, color=colors, edgecolor="white", linewidth=0.4)
    axis.set_xlabel("dBFS")
    axis.set_ylabel("windows")
    quiet = np.mean([sound["silent"] for sound in sounds])
    shares = (f"clipped: {share(clipped.mean())}", f"digital silence: {share(silent.mean())}")
    lines = [*zip(shares, colors[1:]), (f"time below -60 dBFS: {share(quiet)}", "0.35")]
    # In the corner that the distribution leaves free; bold where there is something.
    left = np.median(level) > (bins[0] + bins[-1]) / 2
    for row, (text, color) in enumerate(lines):
        axis.text(
            0.02 if left else 0.98,
            0.97 - 0.075 * row,
            text,
            transform=axis.transAxes,
            ha="left" if left else "right",
            va="top",
            fontsize=8,
            color=color if color != FAINT else "0.35",
            fontweight="bold" if row == 0 and clipped.any() else "normal",
        )
    axis.set_ylim(0, axis.get_ylim()[1] * 1.25)


def share(value: float) -> str:
    return f"{100 * value:.0f} %" if value == 0 or value >= 0.01 else f"{100 * value:.1f} %"


def spectra(axis, sample: dict) -> None:
    """Mean spectrum for each of the most frequent rates; a dot where the median window has 99 % of its energy."""
    axis.set_title("mean spectrum; dot: 99 % of the energy lies below")
    rates = [sound["rate"] for sound in sample["sounds"]]
    shown = sorted(sample["spectra"], key=rates.count, reverse=True)[: len(LINES)]
    if not shown:
        return nothing(axis, "no sound")
    for rate, color in zip(sorted(shown), LINES):
        spectrum = sample["spectra"][rate]
        hertz, level = np.array(spectrum["hz"]), np.array(spectrum["db"])
        axis.plot(hertz / 1000, level, color=color, linewidth=1.2, label=f"{rate / 1000:g} kHz")
        limits = [s["bandwidth"] for s in sample["sounds"] if s["rate"] == rate and s["bandwidth"] is not None]
        limit = np.median(limits)
        axis.plot(limit / 1000, np.interp(limit, hertz, level), "o", color=color, markersize=5)
    axis.set_xlabel("kHz")
    axis.set_ylabel("dB below the strongest band")
    axis.set_ylim(max(axis.get_ylim()[0], -110), 5)
    axis.set_xlim(left=0)
    axis.legend(title="files at", title_fontsize=8, loc="best")


def skips(axis, numbers: dict) -> None:
    """Why recordings would be skipped: the six most frequent reasons, above their bars."""
    total = numbers["recordings"] or numbers["looked_at"]
    axis.set_title(f"would be skipped: {numbers['skipped']:,} of {total:,} recordings")
    reasons = {reason: value["recordings"] for reason, value in numbers["skipped_by_reason"].items()}
    if not reasons:
        return nothing(axis, "none: every header can be read,\nand every recording is long enough")
    reasons = largest(reasons, 6)
    most = max(reasons.values())
    for place, (reason, count) in enumerate(reasons.items()):
        axis.barh(place + 0.22, count / most, 0.34, color=ACCENT)
        axis.text(count / most + 0.015, place + 0.22, f"{count:,}", va="center", fontsize=8)
        axis.text(0, place - 0.05, shorten(reason, 62), va="bottom", fontsize=8, parse_math=False)
    axis.set_ylim(max(len(reasons), 4) - 0.3, -0.5)
    axis.set_xlim(0, 1.15)
    axis.xaxis.set_major_locator(NullLocator())
    axis.yaxis.set_major_locator(NullLocator())
    axis.spines[["left", "bottom"]].set_visible(False)


def findings(axis, lines: list[str]) -> None:
    """What to do, in words, as far as it fits."""
    axis.set_title("what to look at" if lines else "nothing stands out")
    axis.set_axis_off()
    wrapped = [textwrap.fill(line, 62, initial_indent="• ", subsequent_indent="   ") for line in lines]
    kept, rows = [], 0
    for text in wrapped:
        rows += text.count("\n") + 1
        if rows > 16:
            kept.append(f"... and {len(wrapped) - len(kept)} more in data.json")
            break
        kept.append(text)
    text = (
        "\n".join(kept)
        if kept
        else "No warning from levels, silence, clipping, channels,\nbandwidth, copies or lengths."
    )
    axis.text(0, 0.98, text, va="top", fontsize=8.5, linespacing=1.35, transform=axis.transAxes, parse_math=False)


def spectrogram(axis, example: dict) -> None:
    """Log-mel, from 0 to half of the rate, the loudest 70 dB."""
    rate, waveform = example["rate"], torch.from_numpy(np.asarray(example["waveform"], dtype=np.float32))
    points = 2 ** max(round(np.log2(rate / 20)), 6)
    bank = {"n_fft": points, "hop_length": points // 4, "n_mels": MELS, "norm": "slaney"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filterbank")
        mel = torchaudio.transforms.MelSpectrogram(rate, **bank, pad_mode="constant")(waveform)
    level = 10 * torch.log10(mel.clamp_min(1e-12)).numpy()
    seconds = len(waveform) / rate
    top = max(level.max(), -60)  # digital silence stays dark
    axis.imshow(
        level,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=top - RANGE_DB,
        vmax=top,
        extent=(0, seconds, 0, MELS),
        interpolation="nearest",
    )
    axis.grid(False)
    ticks = [hertz for hertz in (250, 1000, 2000, 4000, 8000, 16000, 32000) if hertz < rate / 2.2]
    axis.set_yticks([mels(hertz) / mels(rate / 2) * MELS for hertz in ticks], [f"{h / 1000:g} kHz" for h in ticks])
    axis.xaxis.set_major_formatter("{x:g} s")
    axis.tick_params(labelsize=7)
    axis.set_title(
        f"{shorten(example['name'], 44)}   {example['seconds']:.1f} s at {rate / 1000:g} kHz",
        fontsize=8,
        fontweight="normal",
        parse_math=False,
    )


def mels(hertz: float) -> float:
    """The HTK scale, which torchaudio uses."""
    return 2595 * np.log10(1 + hertz / 700)


def nothing(axis, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", color=FAINT, transform=axis.transAxes)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[["left", "bottom"]].set_visible(False)


def shorten(text: str, length: int) -> str:
    """A long text without its middle."""
    return text if len(text) <= length else f"{text[: length // 3]}...{text[len(text) + 3 + length // 3 - length :]}"
