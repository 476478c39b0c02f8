"""Write the demo's data: synthesised machine recordings, their timelines, and a figure of them.

    python recipes/demo/synthesize.py --output_dir data/demo

OUTPUT_DIR/
  unlabeled/rec_00000.flac ...           long recordings: one machine of each component comes and goes
  train/<component>/0000.flac ...        clips in which one component runs for at least half of the time
  test/<component>/0000.flac ...         other machines and rooms of the same world
  shifted/<component>/0000.flac ...      speeds outside of the usual ranges, 6 to 10 dB more noise
  {unlabeled,train,test,shifted}_timeline.jsonl   one line per file: which component does what, when
  figures/sound_world.png
  settings.json                          same settings again: nothing to do

Recording k of a split depends only on (seed, split, k), not on how many there are or on the number of processes.
"""

import argparse
import hashlib
import json
import multiprocessing
import time
from functools import partial
from pathlib import Path

import numpy as np
import sound_world
import soundfile
from sound_world import COMPONENTS, SAMPLE_RATE
from tqdm import tqdm

SPLITS = ("unlabeled", "train", "test", "shifted")


def positive(kind, text):
    value = kind(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse_arguments(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number, count = partial(positive, float), partial(positive, int)
    number.__name__, count.__name__ = "number", "whole number"  # argparse names the type in its message
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--hours", type=number, default=1.0, help="hours of unlabeled recordings (default 1.0)")
    parser.add_argument("--labeled_per_class", type=count, default=40, help="training clips per component (40)")
    parser.add_argument(
        "--test_per_class", type=count, default=50, help="clips per component in test and shifted (50)"
    )
    parser.add_argument("--recording_seconds", type=number, default=60.0, help="length of unlabeled recordings (60)")
    parser.add_argument("--clip_seconds", type=number, default=4.0, help="length of labeled clips (4)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other machines (0)")
    parser.add_argument("--num_workers", type=count, default=2, help="processes; changes nothing but the time (2)")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, not {args.seed}")
    if args.clip_seconds < 1 or args.recording_seconds < 5:
        parser.error("nothing happens in less: --clip_seconds must be 1 or more, --recording_seconds 5 or more")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file")
    occupied = args.output_dir.is_dir() and any(args.output_dir.iterdir())
    if occupied and not (args.output_dir / "settings.json").exists():
        parser.error(f"--output_dir {args.output_dir} holds other files; name a new or empty folder")
    return args


def settings_of(args):
    """All that decides about the files' content, the synthesis' own source included."""
    settings = {key: value for key, value in vars(args).items() if key not in ("output_dir", "num_workers")}
    sources = b"".join(Path(path).read_bytes() for path in (sound_world.__file__, __file__))
    return {**settings, "source_sha256": hashlib.sha256(sources).hexdigest()[:16]}


def jobs_of(args):
    """(split, k, component or None, seconds, file name) of every file."""
    recordings = max(1, round(args.hours * 3600 / args.recording_seconds))
    for k in range(recordings):
        yield "unlabeled", k, None, args.recording_seconds, f"unlabeled/rec_{k:05d}.flac"
    clips_per_class = {"train": args.labeled_per_class, "test": args.test_per_class, "shifted": args.test_per_class}
    for split, per_class in clips_per_class.items():
        for k in range(per_class * len(COMPONENTS)):
            number, component = k // len(COMPONENTS), COMPONENTS[k % len(COMPONENTS)]
            yield split, k, component, args.clip_seconds, f"{split}/{component}/{number:04d}.flac"


def synthesize_file(job, output_dir, seed):
    """Write one file; return its split and its line of the timeline."""
    split, k, component, seconds, file_name = job
    rng = np.random.default_rng([seed, SPLITS.index(split), k])
    if component is None:
        waveform, timeline = sound_world.synthesize_recording(rng, seconds)
    else:
        waveform, timeline = sound_world.synthesize_clip(component, rng, seconds, shifted=split == "shifted")
    soundfile.write(output_dir / file_name, waveform, SAMPLE_RATE, subtype="PCM_16")
    return split, {"file_name": file_name, **timeline}


def write_files(args):
    """All files, then the timelines; returns the seconds of audio per split."""
    jobs = list(jobs_of(args))
    for folder in {(args.output_dir / job[-1]).parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    work = partial(synthesize_file, output_dir=args.output_dir, seed=args.seed)
    timelines = {split: [] for split in SPLITS}
    progress = partial(tqdm, total=len(jobs), desc="synthesising", unit="file", mininterval=0.5)
    if args.num_workers == 1:
        for split, line in progress(map(work, jobs)):
            timelines[split].append(line)
    else:
        with multiprocessing.get_context("spawn").Pool(args.num_workers) as pool:
            for split, line in progress(pool.imap_unordered(work, jobs, chunksize=4)):
                timelines[split].append(line)
    for split, lines in timelines.items():
        lines.sort(key=lambda line: line["file_name"])
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (args.output_dir / f"{split}_timeline.jsonl").write_text(text)
    return {split: sum(line["duration"] for line in lines) for split, lines in timelines.items()}


def remove_earlier(output_dir):
    """Files of earlier settings, and only files that this script names so."""
    for pattern in ("unlabeled/rec_*.flac", *(f"{split}/{c}/[0-9]*.flac" for split in SPLITS[1:] for c in COMPONENTS)):
        for path in output_dir.glob(pattern):
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------------------------------

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
        key=[seed, len(SPLITS), COMPONENTS.index(component)],
    )
    return sound_world.synthesize_clip(component, rng, seconds)


def draw_figure(path, seed):
    """A clip of each component over its phases, and one mixed recording over its timeline. Drawn for 1000 px."""
    from matplotlib.figure import Figure  # here, as the worker processes import this file and need none of it
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

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
    rng = np.random.default_rng([seed, len(SPLITS) + 1])  # any will do: each holds all six components
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


def main(argv=None):
    args = parse_arguments(argv)
    settings, settings_file = settings_of(args), args.output_dir / "settings.json"
    if settings_file.exists() and settings_file.read_text() == json.dumps(settings, indent=2):
        print(f"{args.output_dir} already holds exactly this; nothing to do")
        return
    began = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings_file.write_text("{}")  # from here on the folder is ours, but not complete
    remove_earlier(args.output_dir)
    seconds = write_files(args)
    draw_figure(args.output_dir / "figures" / "sound_world.png", args.seed)
    settings_file.write_text(json.dumps(settings, indent=2))
    amounts = ", ".join(f"{split} {total / 60:.1f} min" for split, total in seconds.items())
    print(f"{args.output_dir}: {amounts} of synthesised audio in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
