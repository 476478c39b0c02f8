"""Write the demo's data: synthesised machine recordings, what is to be known of them, and figures.

    python recipes/demo/synthesize.py --output_dir data/demo

OUTPUT_DIR/
  components: which component is running?
    unlabeled/rec_00000.flac ...          long recordings: one machine of each component comes and goes
    train/<component>/0000.flac ...       clips in which one component runs for at least half of the time
    test/<component>/0000.flac ...        other machines and rooms of the same world
    shifted/<component>/0000.flac ...     speeds outside of the usual ranges, 6 to 10 dB more noise
    {unlabeled,train,test,shifted}_timeline.jsonl   one line per file: which component does what, when
    figures/sound_world.png
  plant: when does which component run?
    plant/{train,validation,test}/        long recordings as in unlabeled/; metadata.jsonl: file_name and spans, a list
                                          of {"start", "end", "label"} that overlap, in seconds
  mixed: which components run at once?
    mixed/{train,validation,test}/        clips of one to four components; metadata.jsonl: file_name and components
  faults: does this machine sound wrong?
    faults/train/<machine>/0000.flac ...  twelve individual machines, each as it should be
    faults/test/<machine>/0000.flac ...   half of the clips with a fault; metadata.jsonl in train/ and test/:
                                          file_name, machine, and label: normal, bearing, imbalance or leak
    figures/faults.png
  settings.json                           a part with the same settings again is left as it is

Recording k of a folder depends only on (seed, folder, k), not on how many there are or on the number of processes.
"""

import argparse
import hashlib
import json
import multiprocessing
import time
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import faults
import numpy as np
import sound_world
import soundfile
from sound_world import COMPONENTS, SAMPLE_RATE
from tqdm import tqdm

PARTS = {
    "components": ("unlabeled", "train", "test", "shifted"),
    "plant": ("plant/train", "plant/validation", "plant/test"),
    "mixed": ("mixed/train", "mixed/validation", "mixed/test"),
    "faults": ("faults/train", "faults/test"),
}
PART_OF = {folder: part for part, folders in PARTS.items() for folder in folders}
# Number of each folder's random stream. 4 and 5 draw the figure.
STREAMS = dict(zip(PART_OF, (0, 1, 2, 3, *range(6, 6 + len(PART_OF)))))
# All that the files of a part depend on, beside the options that every part has: seed and the sources.
OPTIONS = {
    "components": ("hours", "labeled_per_class", "test_per_class", "recording_seconds", "clip_seconds"),
    "plant": ("plant_recordings", "recording_seconds"),
    "mixed": ("mixed_clips", "clip_seconds"),
    "faults": ("fault_clips", "clip_seconds"),
}
OWN_FILES = {
    "components": (
        "unlabeled/rec_*.flac",
        *(f"{s}/{c}/[0-9]*.flac" for s in PARTS["components"][1:] for c in COMPONENTS),
    ),
    "plant": ("plant/*/rec_*.flac", "plant/*/metadata.jsonl"),
    "mixed": ("mixed/*/[0-9]*.flac", "mixed/*/metadata.jsonl"),
    "faults": (*(f"faults/*/{machine}/[0-9]*.flac" for machine in faults.MACHINE_IDS), "faults/*/metadata.jsonl"),
}


class Job(NamedTuple):
    """One file."""

    folder: str  # relative to the output folder, as in PART_OF
    number: int
    name: str | None  # of the component or the machine; None: several components
    seconds: float
    file_name: str  # relative to `folder`


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
    add, counts = parser.add_argument, partial(parser.add_argument, type=count)
    three = {"nargs": 3, "metavar": ("TRAIN", "VALIDATION", "TEST")}
    add("--output_dir", type=Path, required=True)
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to make; others stay as they are (all)")
    add("--hours", type=number, default=1.0, help="hours of unlabeled recordings (default 1.0)")
    counts("--labeled_per_class", default=40, help="training clips per component (40)")
    counts("--test_per_class", default=50, help="clips per component in test and shifted (50)")
    counts("--plant_recordings", default=[20, 5, 15], **three, help="recordings in plant (20 5 15)")
    counts("--mixed_clips", default=[400, 100, 300], **three, help="clips in mixed (400 100 300)")
    help_text = "clips per machine in faults: normal for training, and normal and faulty each for the test (40 15)"
    counts("--fault_clips", default=[40, 15], nargs=2, metavar=("TRAIN", "TEST"), help=help_text)
    add("--recording_seconds", type=number, default=60.0, help="length of unlabeled and plant recordings (60)")
    add("--clip_seconds", type=number, default=4.0, help="length of all clips (4)")
    add("--seed", type=int, default=0, help="another seed, other machines (0)")
    counts("--num_workers", default=2, help="processes; changes nothing but the time (2)")
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


def settings_of(args, part):
    """All that decides about the content of a part's files, the synthesis' own source included."""
    modules = (sound_world.__file__, __file__, *([faults.__file__] if part == "faults" else []))
    sources = b"".join(Path(path).read_bytes() for path in modules)
    chosen = {key: getattr(args, key) for key in (*OPTIONS[part], "seed")}
    return {**chosen, "source_sha256": hashlib.sha256(sources).hexdigest()[:16]}


def jobs_of(args, part):
    """A Job for every file of a part."""
    if part == "components":
        recordings = max(1, round(args.hours * 3600 / args.recording_seconds))
        for k in range(recordings):
            yield Job("unlabeled", k, None, args.recording_seconds, f"rec_{k:05d}.flac")
        for split, per_class in zip(
            PARTS[part][1:], (args.labeled_per_class, args.test_per_class, args.test_per_class)
        ):
            yield from jobs_by_name(split, COMPONENTS, per_class, args.clip_seconds)
    elif part == "faults":
        train, test = args.fault_clips
        yield from jobs_by_name("faults/train", faults.MACHINE_IDS, train, args.clip_seconds)
        yield from jobs_by_name("faults/test", faults.MACHINE_IDS, 2 * test, args.clip_seconds)
    else:
        counts, seconds, pattern = {
            "plant": (args.plant_recordings, args.recording_seconds, "rec_{:05d}.flac"),
            "mixed": (args.mixed_clips, args.clip_seconds, "{:05d}.flac"),
        }[part]
        for folder, count in zip(PARTS[part], counts):
            for k in range(count):
                yield Job(folder, k, None, seconds, pattern.format(k))


def jobs_by_name(folder, names, count, seconds):
    """`count` clips of each name, in a subfolder each; the names take turns, so that more clips change no number."""
    for k in range(count * len(names)):
        number, name = k // len(names), names[k % len(names)]
        yield Job(folder, k, name, seconds, f"{name}/{number:04d}.flac")


# ---------------------------------------------------------------------------------------------------------------------
# A file of each part: (job, rng, seed) -> (waveform, what its line of the table tells beside its name)
# ---------------------------------------------------------------------------------------------------------------------


def make_components(job, rng, seed):
    if job.name is None:
        return sound_world.synthesize_recording(rng, job.seconds)
    return sound_world.synthesize_clip(job.name, rng, job.seconds, shifted=job.folder == "shifted")


def make_plant(job, rng, seed):
    waveform, timeline = sound_world.synthesize_recording(rng, job.seconds)
    return waveform, {"spans": sound_world.running_spans(timeline)}


def make_mixed(job, rng, seed):
    waveform, timeline = sound_world.synthesize_mixture(rng, job.seconds)
    return waveform, {"components": [event["component"] for event in timeline["events"]]}


individual_of = cache(faults.draw_individual)


def make_faults(job, rng, seed):
    clip_of_machine = job.number // len(faults.MACHINE_IDS)
    label = faults.label_of(job.name, clip_of_machine) if job.folder == "faults/test" else faults.NORMAL
    waveform, _ = faults.synthesize_machine(individual_of(job.name, seed), label, rng, job.seconds)
    return waveform, {"machine": job.name, "label": label}


MAKERS = {"components": make_components, "plant": make_plant, "mixed": make_mixed, "faults": make_faults}


def synthesize_file(job, output_dir, seed):
    """Write one file; return its folder and its line of the folder's table."""
    rng = np.random.default_rng([seed, STREAMS[job.folder], job.number])
    part = PART_OF[job.folder]
    waveform, told = MAKERS[part](job, rng, seed)
    soundfile.write(output_dir / job.folder / job.file_name, waveform, SAMPLE_RATE, subtype="PCM_16")
    file_name = f"{job.folder}/{job.file_name}" if part == "components" else job.file_name
    return job.folder, len(waveform) / SAMPLE_RATE, {"file_name": file_name, **told}


def write_files(args, parts):
    """All files of the parts, then their tables; returns the seconds of audio per folder."""
    jobs = [job for part in parts for job in jobs_of(args, part)]
    for folder in {(args.output_dir / job.folder / job.file_name).parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    work = partial(synthesize_file, output_dir=args.output_dir, seed=args.seed)
    seconds = {folder: 0.0 for part in parts for folder in PARTS[part]}
    tables = {folder: [] for folder in seconds}
    progress = partial(tqdm, total=len(jobs), desc="synthesising", unit="file", mininterval=0.5)

    def collect(results):
        for folder, duration, line in progress(results):
            tables[folder].append(line)
            seconds[folder] += duration

    if args.num_workers == 1:
        collect(map(work, jobs))
    else:
        with multiprocessing.get_context("spawn").Pool(args.num_workers) as pool:
            collect(pool.imap_unordered(work, jobs, chunksize=4))
    for folder, lines in tables.items():
        lines.sort(key=lambda line: line["file_name"])
        name = f"{folder}_timeline.jsonl" if PART_OF[folder] == "components" else f"{folder}/metadata.jsonl"
        (args.output_dir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return seconds


def remove_earlier(output_dir, part):
    """Files of earlier settings, and only files that this script names so."""
    for pattern in OWN_FILES[part]:
        for path in output_dir.glob(pattern):
            path.unlink()


def draw_figures(output_dir, parts, seed):
    import world_figures  # here, as the worker processes import this file and need no matplotlib

    folder = output_dir / "figures"
    folder.mkdir(exist_ok=True)
    if "components" in parts:
        world_figures.draw_world(folder / "sound_world.png", seed)
    if "faults" in parts:
        world_figures.draw_faults(folder / "faults.png", seed)


def read_settings(path):
    """Settings of the parts that are complete."""
    return (
        {part: value for part, value in json.loads(path.read_text()).items() if part in PARTS} if path.exists() else {}
    )


def main(argv=None):
    args = parse_arguments(argv)
    settings_file = args.output_dir / "settings.json"
    wanted = {part: settings_of(args, part) for part in PARTS if part in args.parts}
    done = read_settings(settings_file)
    parts = [part for part in wanted if done.get(part) != wanted[part]]
    if not parts:
        print(f"{args.output_dir} already holds exactly this; nothing to do")
        return
    began = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    kept = {part: done[part] for part in done if part not in parts}
    settings_file.write_text(json.dumps(kept, indent=2))  # from here on the folder is ours, but these aren't complete
    for part in parts:
        remove_earlier(args.output_dir, part)
    seconds = write_files(args, parts)
    draw_figures(args.output_dir, parts, args.seed)
    finished = {**kept, **{part: wanted[part] for part in parts}}
    settings_file.write_text(json.dumps({part: finished[part] for part in PARTS if part in finished}, indent=2))
    amounts = ", ".join(f"{folder} {total / 60:.1f} min" for folder, total in seconds.items())
    print(f"{args.output_dir}: {amounts} of synthesised audio in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
