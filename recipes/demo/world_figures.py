"""The figures beside the demo's data: what the components sound like, and what the faults do to a machine."""

import faults
import numpy as np
import sound_world
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from sound_world import COMPONENTS, SAMPLE_RATE

FIGURE_STREAM = 4  # beside the seed, for draws that no file uses; the next number as well
PHASE_COLOURS = {"run_up": "#8ecae6", "steady": "#95d5b2", "load_change": "#ffd166", "coast_down": "#f4a6a0"}
COMPONENT_COLOURS = dict(zip(COMPONENTS, ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")))
# Long windows show harmonics, short ones impacts and cycles.
WINDOWS = {"motor": 1024, "compressor": 512, "fan": 1024, "pump": 1024, "bearing": 512, "gear": 1024}
LOWEST_HZ, OCTAVES = 31.25, 8  # up to 8 kHz


def log_spectrogram(waveform, window):
    """(240, frames) power in dB on a logarithmic frequency axis from LOWEST_HZ, OCTAVES octaves up; 8 ms hop."""
    padded = np.pad(waveform, window // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::128] * np.hanning(window).astype(np.float32)
    power = 10 * np.log10(np.abs(np.fft.rfft(frames, 4 * window)) ** 2 + 1e-9)
    bins = LOWEST_HZ * 2 ** np.linspace(0, OCTAVES, 240) * 4 * window / SAMPLE_RATE
    below = np.minimum(bins.astype(int), power.shape[1] - 2)
    share = bins - below
    return ((1 - share) * power[:, below] + share * power[:, below + 1]).T


def draw_spectrogram(axis, waveform, window):
    image = log_spectrogram(waveform, window)
    seconds = len(waveform) / SAMPLE_RATE
    low, high = np.percentile(image, [20, 99.8])
    extent = (0, seconds, 0, OCTAVES)
    axis.imshow(image, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=low, vmax=high)
    axis.set_yticks([1, 3, 5, 7], ["62 Hz", "250 Hz", "1 kHz", "4 kHz"])
    axis.tick_params(labelbottom=False)


def draw_phases(axis, event, seconds):
    """The strip below a clip: its phases as colours, the shaft rate as a curve."""
    for phase in event["phases"]:
        axis.axvspan(phase["start"], phase["end"], color=PHASE_COLOURS[phase["kind"]], linewidth=0)
    times = np.linspace(event["start"], event["end"], 500)
    speed = sound_world.lagged_curve(event, "speed_hz", times)
    axis.plot(times, speed, color="black", linewidth=1.4)
    axis.set(xlim=(0, seconds), ylim=(0, 1.25 * speed.max()))
    axis.set_yticks([0, event["speed_hz"]], ["0", f"{event['speed_hz']:.1f} Hz"])


def draw_lanes(axis, timeline):
    """One lane per component: bars while it runs, darker edges where its load changes."""
    present = [name for name in COMPONENTS if any(event["component"] == name for event in timeline["events"])]
    for event in timeline["events"]:
        lane = len(present) - 1 - present.index(event["component"])
        for phase in event["phases"]:
            faint = phase["kind"] in ("run_up", "coast_down")
            span = [(phase["start"], phase["end"] - phase["start"])]
            colour = COMPONENT_COLOURS[event["component"]]
            axis.broken_barh(span, (lane + 0.1, 0.8), facecolors=colour, alpha=0.45 if faint else 1.0, linewidth=0)
            if phase["kind"] == "load_change":
                axis.plot([phase["start"]] * 2, [lane + 0.1, lane + 0.9], color="white", linewidth=1.5)
    axis.set(xlim=(0, timeline["duration"]), ylim=(0, len(present)), xlabel="seconds")
    axis.set_yticks(np.arange(len(present)) + 0.5, present[::-1])


def first_telling(draw_events, is_telling, key):
    """A Generator in the state from which the first of many draws shows what the figure is to show."""
    keys = ([*key, attempt] for attempt in range(1000))
    return np.random.default_rng(next(key for key in keys if is_telling(draw_events(np.random.default_rng(key)))))


def clip_with_run_up_and_stop(component, seed, seconds):
    rng = first_telling(
        lambda rng: sound_world.draw_clip_event(component, rng, seconds)[1]["phases"],
        lambda phases: (
            {phase["kind"] for phase in phases} == set(PHASE_COLOURS)
            and min(phase["end"] - phase["start"] for phase in phases) > 0.4  # seconds, so that each can be seen
        ),
        key=[seed, FIGURE_STREAM, COMPONENTS.index(component)],
    )
    return sound_world.synthesize_clip(component, rng, seconds)


def draw_world(path, seed):
    """A clip of each component over its phases, and one mixed recording over its timeline. Drawn for 1000 px."""
    figure = Figure(figsize=(10, 13.5))
    rows = figure.add_gridspec(4, 1, height_ratios=[1, 1, 1, 1.25], hspace=0.3)
    figure.subplots_adjust(left=0.1, right=0.985, top=0.915, bottom=0.04)
    for number, component in enumerate(COMPONENTS):
        cell = rows[number // 2].subgridspec(1, 2, wspace=0.17)[number % 2]
        above, strip = cell.subgridspec(2, 1, height_ratios=[3, 1], hspace=0.06).subplots(sharex=True)
        waveform, timeline = clip_with_run_up_and_stop(component, seed, seconds=6.0)
        draw_spectrogram(above, waveform, WINDOWS[component])
        draw_phases(strip, timeline["events"][0], 6.0)
        above.set_title(title_of(timeline["events"][0]), loc="left", fontsize=11)
    above, lanes = rows[3].subgridspec(2, 1, height_ratios=[2, 1], hspace=0.06).subplots(sharex=True)
    rng = np.random.default_rng([seed, FIGURE_STREAM + 1])  # any will do: each holds all six components
    waveform, timeline = sound_world.synthesize_recording(rng, seconds=60.0)
    draw_spectrogram(above, waveform, 1024)
    draw_lanes(lanes, timeline)
    title = "an unlabeled recording (pale: runs up or coasts down; white line: load changes)"
    above.set_title(title, loc="left", fontsize=11)
    figure.suptitle("The demo's sound world: synthesised, not recorded", x=0.1, y=0.985, ha="left", fontsize=14)
    keys = [Patch(color=colour, label=kind.replace("_", " ")) for kind, colour in PHASE_COLOURS.items()]
    keys.append(Line2D([], [], color="black", label="shaft rate"))
    figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.093, 0.967), ncols=5, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def title_of(event):
    """'fan: 7 blades' and the like."""
    geometry, component = event["geometry"], event["component"]
    detail = {
        "motor": "2 x line at {0:.0f} Hz, {rotor_slots} rotor slots",
        "compressor": "cylinders {cylinders}, pressure ratio {pressure_ratio}",
        "fan": "{blades} blades",
        "pump": "{vanes} vanes",
        "bearing": "{impacts_per_turn} impacts per turn, {race} race",
        "gear": "{teeth} : {wheel_teeth} teeth",
    }[component]
    return f"{component}: " + detail.format(2 * geometry.get("line_hz", 0), **geometry)


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------

SHOWN_MACHINE = "compressor_02"  # each of its faults can be seen
SHOWN_SECONDS, SHOWN_ORDERS = 2.0, 12
FAULT_COLOURS = {"normal": "#999999", "bearing": "#ee6677", "imbalance": "#4477aa", "leak": "#228833"}


def treble_envelope(waveform):
    """Magnitude (samples,) of the analytic signal above `faults.TREBLE_HZ`, smoothed over 4 ms."""
    spectrum, frequencies = np.fft.fft(waveform), np.fft.fftfreq(len(waveform), 1 / SAMPLE_RATE)
    magnitude = np.abs(np.fft.ifft(2 * spectrum * (frequencies > faults.TREBLE_HZ)))
    return np.convolve(magnitude, np.full(64, 1 / 64), mode="same")


def order_spectrum(envelope, event):
    """Orders (bins,) up to SHOWN_ORDERS and level (bins,) in dB of an envelope, resampled at equal shaft angles."""
    times = np.arange(len(envelope)) / SAMPLE_RATE
    turns = np.cumsum(sound_world.lagged_curve(event, "speed_hz", times)) / SAMPLE_RATE
    angles = np.arange(turns[0], turns[-1], 1 / 64)
    at_angles = np.interp(angles, turns, envelope / envelope.mean()) - 1
    level = 20 * np.log10(np.abs(np.fft.rfft(at_angles * np.hanning(len(angles)))) * 4 / len(angles) + 1e-6)
    orders = np.fft.rfftfreq(len(angles), 1 / 64)
    return orders[orders <= SHOWN_ORDERS], level[orders <= SHOWN_ORDERS]


def draw_excess(axis, waveform, usual):
    """Spectrogram in dB above `usual` (bands, 1): what is always there is left out."""
    image = log_spectrogram(waveform[: int(SHOWN_SECONDS * SAMPLE_RATE)], 512) - usual
    extent = (0, SHOWN_SECONDS, 0, OCTAVES)
    axis.imshow(image, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-5, vmax=20)
    axis.set_yticks([1, 3, 5, 7], ["62 Hz", "250 Hz", "1 kHz", "4 kHz"])


def draw_faults(path, seed):
    """One machine as it should be and with each fault, all else alike: spectrogram, envelope, its orders."""
    individual = faults.draw_individual(SHOWN_MACHINE, seed)
    clips = {}
    for label in (faults.NORMAL, *faults.FAULTS[individual.machine.component]):
        rng = np.random.default_rng([seed, FIGURE_STREAM])  # the same speed, load and background in each
        clips[label] = faults.synthesize_machine(individual, label, rng, seconds=24.0)
    normal, _ = clips[faults.NORMAL]
    usual = np.median(log_spectrogram(normal, 512), axis=1, keepdims=True)
    figure = Figure(figsize=(12, 2.3 * len(clips) + 1))
    axes = figure.subplots(len(clips), 3, sharex="col", sharey="col")
    figure.subplots_adjust(left=0.06, right=0.99, top=0.89, bottom=0.06, wspace=0.17, hspace=0.25)
    for row, (label, (waveform, event)) in zip(axes, clips.items()):
        row[0].set_title(label, loc="left", fontsize=11, fontweight="bold")
        draw_excess(row[0], waveform, usual)
        draw_envelopes(row[1], row[2], {label: waveform, faults.NORMAL: normal}, event)
    rate = individual.bearing["impacts_per_turn"]
    marks = {"bearing": (rate, f"{rate:.2f} impacts per turn"), "imbalance": (1.0, "once per turn")}
    for label, (order, text) in marks.items():
        axis = axes[list(clips).index(label), 2]
        axis.axvline(order, color="black", linestyle=":", linewidth=1, zorder=0)
        axis.annotate(text, (order, 2), xytext=(4, 0), textcoords="offset points", va="top", fontsize=9)
    for axis, unit in zip(axes[-1], ("seconds", "seconds", "times per turn")):
        axis.set_xlabel(unit)
    axes[0, 0].set_title("normal (spectrograms: dB above usual)", loc="left", fontsize=11)
    axes[0, 1].set_title("envelope above 2 kHz, dB", loc="left", fontsize=11)
    axes[0, 2].set_title("the envelope's spectrum, dB", loc="left", fontsize=11)
    title = (
        f"Faults that no training clip has ({SHOWN_MACHINE}; synthesised; grey: the same moments without the fault)"
    )
    figure.suptitle(title, x=0.06, y=0.975, ha="left", fontsize=13)
    figure.savefig(path, dpi=100)


def draw_envelopes(in_time, in_orders, waveforms, event):
    """The envelope of each waveform in time and over orders; the last one lies on top."""
    for label, waveform in waveforms.items():
        envelope, shown = treble_envelope(waveform), slice(0, int(SHOWN_SECONDS * SAMPLE_RATE), 16)
        times, level = np.arange(len(envelope)) / SAMPLE_RATE, 20 * np.log10(envelope / envelope.mean())
        style = {"color": FAULT_COLOURS[label], "linewidth": 0.9}
        in_time.plot(times[shown], level[shown], **style)
        in_orders.plot(*order_spectrum(envelope, event), **style)
    in_time.set(xlim=(0, SHOWN_SECONDS), ylim=(-15, 18))
    in_orders.set(xlim=(0, SHOWN_ORDERS), ylim=(-50, 3))
