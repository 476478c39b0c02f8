"""Write the demo's data: synthesised machine recordings, their timelines, and a figure of them.

    python recipes/demo/synthesize.py --output_dir data/demo

OUTPUT_DIR/
  unlabeled/rec_00000.flac ...           minutes-long recordings of several machines that come and go
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
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))  # a recipe's folder is no package; spawned workers need this too

import sound_world  # noqa: E402
from sound_world import COMPONENTS, SAMPLE_RATE  # noqa: E402

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
    if (
        args.output_dir.is_dir()
        and any(args.output_dir.iterdir())
        and not (args.output_dir / "settings.json").exists()
    ):
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
    for split, per_class in (
        ("train", args.labeled_per_class),
        ("test", args.test_per_class),
        ("shifted", args.test_per_class),
    ):
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
    settings_file.write_text(json.dumps(settings, indent=2))
    amounts = ", ".join(f"{split} {total / 60:.1f} min" for split, total in seconds.items())
    print(f"{args.output_dir}: {amounts} of synthesised audio in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
