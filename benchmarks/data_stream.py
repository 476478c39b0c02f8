"""What the audio stream costs, beside the stock path (`datasets`, torchcodec, the official pretraining example).

    python benchmarks/data_stream.py [--part first_batch decode ...] [--quick] [--output FILE.json]

Every part prints a table and puts it, with what it ran on, under its name into the JSON file. Each measurement begins
in a fresh process. `--quick` shows that it works; its numbers mean nothing.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import accelerate
import datasets
import matplotlib.pyplot as plt
import numpy as np
import soundfile
import torch
import torchaudio
from transformers import Wav2Vec2FeatureExtractor
from transformers.trainer_pt_utils import get_length_grouped_indices

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from acoustic.data.batches import BatchStream  # noqa: E402
from acoustic.data.collate import Rectangle  # noqa: E402
from acoustic.data.decode import read_window  # noqa: E402
from acoustic.data.headers import Skip, open_audio, read_header  # noqa: E402
from acoustic.data.holdout import hold_out  # noqa: E402
from acoustic.data.loader import StreamLoader  # noqa: E402
from acoustic.data.rows import IndexedRows  # noqa: E402
from acoustic.data.sources import open_rows  # noqa: E402
from acoustic.data.survey import survey  # noqa: E402
from acoustic.data.windows import cover, usable  # noqa: E402
from acoustic.report.figures import ACCENT, FAINT, INK, STYLE  # noqa: E402
from acoustic.report.record import LIBRARIES, command_line, commit, hardware  # noqa: E402

SEED, RATE, WORKERS = 0, 16_000, 2
VOICE_PROMPTS = ROOT / "data/voice_prompts"


@dataclass(frozen=True)
class Sizes:
    """How much is measured: numbers of files, durations in seconds."""

    few: int = 1_000
    many: int = 100_000
    stock_files: tuple[int, ...] = (1_000, 5_000)  # the stock path's time for more is extrapolated from these
    batch_seconds: float = 64
    decode_files: int = 6
    decode_seconds: float = 15
    repeats: int = 8
    memory_batches: int = 2_000
    memory_every: int = 50
    memory_batch_seconds: float = 100  # so that 2,000 batches are all of the 100,000 files
    long_seconds: float = 7_200
    accesses: int = 20
    clips: int | None = None  # of made-up prompts, in the place of the voice prompts
    positions: tuple[int, ...] = (1, 100, 1_000)
    replayed: tuple[int, ...] = (1, 20, 40)


QUICK = Sizes(
    few=20,
    many=60,
    stock_files=(10, 20),
    batch_seconds=8,
    decode_files=1,
    decode_seconds=3,
    repeats=2,
    memory_batches=40,
    memory_every=4,
    memory_batch_seconds=8,
    long_seconds=25,
    accesses=2,
    clips=60,
    positions=(1, 6),
    replayed=(1, 3),
)


class Row(NamedTuple):
    """One line of a table; a number that wasn't measured is None, and `note` says why."""

    what: str
    unit: str
    ours: float | None
    stock: float | None = None
    note: str = ""


# --- What is measured on --------------------------------------------------------------------------------------------


def noise(seconds: float, rate: int, generator: np.random.Generator) -> np.ndarray:
    """Coloured noise whose level rises and falls like that of speech: (samples,) float32, peaks below 1."""
    samples = int(seconds * rate)
    spectrum = np.fft.rfft(generator.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    wave = np.fft.irfft(spectrum / np.maximum(frequency, 100), samples)
    level = np.repeat(generator.uniform(0.1, 1, math.ceil(samples / rate * 4)), rate // 4 + 1)[:samples]
    return (0.7 * level * wave / np.abs(wave).max()).astype(np.float32)


def speech(seconds: float, rate: int) -> np.ndarray:
    """The voice prompts, one after the other, as often as needed, or noise where they aren't: (samples,) float32."""
    files = sorted((VOICE_PROMPTS / "audio").rglob("*.wav"))[:600]
    if not files:
        return noise(seconds, rate, np.random.default_rng(SEED))
    pieces, missing = [], seconds
    for file in itertools.cycle(files):
        samples, source_rate = soundfile.read(file, dtype="float32")
        pieces.append(torchaudio.functional.resample(torch.from_numpy(samples), source_rate, rate).numpy())
        missing -= len(samples) / source_rate
        if missing <= 0:
            return np.concatenate(pieces)[: int(seconds * rate)]


def make_corpus(folder: Path, count: int) -> Path:
    """`count` wav files of 1 to 3 s at 16 kHz in subfolders of 1,000, cut out of ten minutes of noise."""
    marker = folder / f"{count}.complete"
    if marker.exists():
        return folder / "audio"
    generator = np.random.default_rng(SEED)
    samples = (noise(600, RATE, generator) * 32767).astype(np.int16)
    for number in range(count):
        file = folder / "audio" / f"{number // 1000:03d}" / f"{number:06d}.wav"
        if number % 1000 == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
        length = int(generator.integers(RATE, 3 * RATE))
        start = int(generator.integers(len(samples) - length))
        soundfile.write(file, samples[start : start + length], RATE)
    marker.touch()
    return folder / "audio"


def make_clips(folder: Path, count: int, seconds: float) -> dict[str, list[Path]]:
    """{format: files} of speech in the three formats: 8 kHz wav, 16 kHz flac, 44.1 kHz stereo mp3."""
    formats = {
        "8 kHz wav": ("wav", 8_000, 1),
        "16 kHz flac": ("flac", 16_000, 1),
        "44.1 kHz stereo mp3": ("mp3", 44_100, 2),
    }
    folder.mkdir(exist_ok=True)
    files = {}
    for name, (suffix, rate, channels) in formats.items():
        files[name] = [folder / f"{number}.{suffix}" for number in range(count)]
        for file, samples in zip(files[name], np.split(speech(seconds * count, rate), count)):
            write_audio(file, samples, rate, channels)
    return files


def write_audio(file: Path, samples: np.ndarray, rate: int, channels: int) -> None:
    """In pieces: libsndfile's encoders overflow the stack on hours at once."""
    with soundfile.SoundFile(file, "w", samplerate=rate, channels=channels) as out:
        for start in range(0, len(samples), 60 * rate):
            piece = samples[start : start + 60 * rate]
            out.write(np.stack([piece, 0.8 * np.roll(piece, 9)], axis=1) if channels == 2 else piece)


def make_prompts(folder: Path, count: int) -> Path:
    """Clips of 0.4 to 10 s at 8 kHz, as skewed in length as the voice prompts, for where those aren't."""
    generator = np.random.default_rng(SEED)
    folder.mkdir()
    for number, seconds in enumerate(np.clip(generator.lognormal(0.6, 0.8, count), 0.4, 10)):
        soundfile.write(folder / f"{number}.wav", noise(seconds, 8_000, generator), 8_000)
    return folder


# --- Fresh processes, and what the stock path needs -----------------------------------------------------------------


def fresh(function, *arguments, **environment: str):
    """function(*arguments), called in a new process that starts with these environment variables."""
    before = dict(os.environ)
    os.environ.update(environment, HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, start_workers_by_fork) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def start_workers_by_fork() -> None:
    """As in a script; a process that was spawned would spawn its own."""
    multiprocessing.set_start_method("fork", force=True)


def why_no_stock() -> str | None:
    """Why the stock path can't decode here, or None where it can: torchcodec needs FFmpeg's libraries."""
    try:
        from torchcodec.decoders import AudioDecoder  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return "not measured: no FFmpeg"
    return None


def bytes_in(folder: str | Path) -> int:
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def audio_of(file: str | Path) -> dict:
    return {"path": str(file), "bytes": None}


def seconds_in(folder: Path) -> float:
    return sum(read_header(audio_of(file)).seconds for file in folder.rglob("*.wav"))


def make_stream(rows, batch_seconds: float, min_seconds: float = 1.0, max_seconds: float = 15.6) -> BatchStream:
    """A training stream with the settings that run_pretrain.py has when nothing else is said."""
    return stream_of(BatchStream, rows, batch_seconds, min_seconds, max_seconds)


def stream_of(kind, rows, batch_seconds: float, min_seconds: float, max_seconds: float) -> BatchStream:
    collate = Rectangle(Wav2Vec2FeatureExtractor())
    plan = cover(min_seconds, max_seconds)
    options = {"rate": RATE, "batch_seconds": batch_seconds, "train": True, "unlabeled": True, "seed": SEED}
    return kind([(rows, 1.0)], plan, collate, **options)


def heard(loader):
    """The batches that hold audio; the others only report what was skipped."""
    return (batch for batch in loader if "audio_seconds" in batch)


# --- Time to the first batch ----------------------------------------------------------------------------------------


def first_batch(sizes: Sizes, work: Path, results: Path) -> list[Row]:
    """Seconds from the imports' end to the first training batch, and bytes written on the way; files in the cache."""
    no_stock = why_no_stock()
    sampled = sizes.stock_files if no_stock is None else ()
    stock = {count: fresh_first_batch(stock_first_batch, corpus(work, count), sizes) for count in sampled}
    seconds = {count: found["seconds"] for count, found in stock.items()}
    rows = []
    for count in (sizes.few, sizes.many):
        ours = fresh_first_batch(our_first_batch, corpus(work, count), sizes)
        rows.append(Row(f"first batch, {count:,} files", "s", ours["seconds"], *beside(seconds, count, no_stock)))
    rows += [Row(f"of which {stage}, {count:,} files", "s", value) for stage, value in ours["stages"].items()]
    written = None
    if stock:
        hours = seconds_in(corpus(work, max(stock))) / 3600
        written = stock[max(stock)]["written"] / hours / 1e6
    return [*rows, Row("disk written per hour of audio", "MB", ours["written"] / 1e6, written, no_stock or "")]


def corpus(work: Path, count: int) -> Path:
    return make_corpus(work / f"corpus_{count}", count)


def beside(known: dict[int, float], count: int, no_stock: str | None) -> tuple[float | None, str]:
    """(stock's number at `count`, the note on it): measured, or on the line through the two largest measured."""
    if no_stock is not None:
        return None, no_stock
    if count in known:
        return known[count], ""
    (x0, y0), (x1, y1) = [(size, known[size]) for size in sorted(known)[-2:]]
    return y1 + (count - x1) * (y1 - y0) / (x1 - x0), f"stock: extrapolated from {x0:,} and {x1:,}"


def fresh_first_batch(function, folder: Path, sizes: Sizes) -> dict:
    """What `function` returns, called with an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
        return fresh(function, str(folder), sizes.batch_seconds, HF_HOME=cache, TMPDIR=cache)


def our_first_batch(folder: str, batch_seconds: float) -> dict:
    """As run_pretrain.py does: list, hold a part out, look at the headers, start the workers, take a batch."""
    plan, stages = cover(1.0, 15.6), Stages()
    rows = open_rows(folder)
    stages.end("listing")
    rows, _ = hold_out(rows, 5.0, usable(plan))
    stages.end("choosing the held-out part")
    survey([(rows, 1.0)], plan)
    stages.end("survey of headers")
    next(heard(StreamLoader(make_stream(rows, batch_seconds), WORKERS)))
    stages.end("workers and batch")
    return {"seconds": sum(stages.seconds.values()), "stages": stages.seconds, "written": cache_bytes()}


class Stages:
    """Wall seconds between calls of `end`."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now


def cache_bytes() -> int:
    return bytes_in(os.environ["HF_HOME"])


def stock_first_batch(folder: str, batch_seconds: float) -> dict:
    """As the official example does: load_dataset, cast_column, map into input_values, filter, a padded batch."""
    start = time.perf_counter()
    extractor = Wav2Vec2FeatureExtractor()
    data = datasets.load_dataset("audiofolder", data_dir=folder, split="train")
    data = data.cast_column("audio", datasets.Audio(sampling_rate=RATE))
    data = data.map(
        prepare, fn_kwargs={"extractor": extractor}, num_proc=WORKERS, remove_columns=data.column_names
    ).filter(is_long_enough, input_columns=["input_length"])
    data = data.remove_columns("input_length")
    # As many clips of the corpus, of 2 s each, as one of our batches holds.
    options = {"batch_size": int(batch_seconds / 2), "shuffle": True, "num_workers": WORKERS}
    next(iter(torch.utils.data.DataLoader(data, collate_fn=Padded(extractor), **options)))
    return {"seconds": time.perf_counter() - start, "written": cache_bytes()}


def prepare(example: dict, extractor, max_seconds: float = 15.6) -> dict:
    """The example's `prepare_dataset`."""
    sample = example["audio"]
    inputs = extractor(
        sample["array"], sampling_rate=sample["sampling_rate"], max_length=int(max_seconds * RATE), truncation=True
    )
    return {"input_values": inputs.input_values[0], "input_length": len(inputs.input_values[0])}


def is_long_enough(length: int) -> bool:
    return length > RATE


class Padded:
    """The example's collator, without its masks."""

    def __init__(self, extractor):
        self.extractor = extractor

    def __call__(self, examples: list[dict]) -> dict:
        examples = [{"input_values": example["input_values"]} for example in examples]
        return self.extractor.pad(examples, padding=True, return_tensors="pt")


# --- Decoding -------------------------------------------------------------------------------------------------------


def decode(sizes: Sizes, work: Path, results: Path) -> list[Row]:
    """Seconds of audio decoded to 16 kHz mono per second of processor time, ours and stock in turn, on one thread."""
    no_stock = why_no_stock()
    files = make_clips(work / "clips", sizes.decode_files, sizes.decode_seconds)
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    rows = []
    for name, paths in files.items():
        paths = [str(path) for path in paths]
        ours, stock = fresh(decode_in_turn, paths, sizes.repeats, no_stock is None, **one_thread)
        unit = "audio s / s"
        rows.append(
            Row(name, unit, sizes.decode_seconds / ours, stock and sizes.decode_seconds / stock, no_stock or "")
        )
        shares = fresh(where_time_goes, paths, sizes.repeats, **one_thread)
        rows += [Row(f"{name}: {stage}", "% of time", 100 * share) for stage, share in shares.items()]
    return rows


def decode_in_turn(paths: list[str], repeats: int, with_stock: bool) -> tuple[float, float | None]:
    """Median processor seconds for one file, (ours, stock)."""
    torch.set_num_threads(1)
    feature = datasets.Audio(sampling_rate=RATE)
    ways = {"ours": whole_window, "stock": lambda path: feature.decode_example(audio_of(path))["array"]}
    if not with_stock:
        del ways["stock"]
    took = {name: [] for name in ways}
    for path in paths * (repeats + 1):
        for name, way in ways.items():
            took[name].append(cpu_seconds(way, path))
    # The first round made the kernels and loaded the libraries.
    medians = {name: statistics.median(values[len(paths) :]) for name, values in took.items()}
    return medians["ours"], medians.get("stock")


def whole_window(path: str, rate: int = RATE) -> np.ndarray:
    """A header for the plan, then the window: what a recording costs the stream."""
    header = read_header(audio_of(path))
    return read_window(audio_of(path), 0, header.frames, rate or header.rate)


def cpu_seconds(function, *arguments) -> float:
    """Processor time of all threads: other people's work on the machine does not count, and waiting does not."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def where_time_goes(paths: list[str], repeats: int) -> dict[str, float]:
    """Shares of the time from file to batch, each the difference of two roads: of least times, which hold no noise."""
    torch.set_num_threads(1)
    extractor = Wav2Vec2FeatureExtractor()
    collate = Rectangle(extractor)
    plan = cover(0.5, 600.0)
    rows = [{"name": path, "audio": audio_of(path)} for path in paths]
    windows = [next(iter(plan(row, read_header(row["audio"]), None))) for row in rows]
    waves = [read_window(window.row["audio"], window.start, window.stop, RATE) for window in windows]

    def per_file(function) -> float:
        for path, wave in zip(paths, waves):
            function(path, wave)
        return statistics.mean(min(cpu_seconds(function, *each) for _ in range(repeats)) for each in zip(paths, waves))

    read = per_file(lambda path, wave: read_all(path))
    mono = per_file(lambda path, wave: whole_window(path, 0))
    window = per_file(lambda path, wave: whole_window(path))
    scale = per_file(lambda path, wave: extractor(wave, sampling_rate=RATE))
    batch = min(cpu_seconds(collate, windows, waves) for _ in range(repeats)) / len(paths)
    stages = {
        "open and decode": read,
        "header, downmix, checks": mono - read,
        "resample": window - mono,
        "scale (feature extractor)": scale,
        "collate": batch - scale,
    }
    return {stage: max(seconds, 0) / (window + max(batch, scale)) for stage, seconds in stages.items()}


def read_all(path: str) -> None:
    with open_audio(audio_of(path)) as file:
        file.read(dtype="float32", always_2d=True)


# --- Memory ---------------------------------------------------------------------------------------------------------


def memory(sizes: Sizes, work: Path, results: Path) -> list[Row]:
    """Resident memory of the main process and its workers over many batches: shared pages once, libraries left out."""
    if not Path("/proc/self/smaps_rollup").exists():
        return [Row("resident memory", "MB", None, None, "not measured: /proc/self/smaps_rollup is Linux's")]
    folder = corpus(work, sizes.many)
    samples = fresh(memory_over_batches, str(folder), sizes)
    draw_memory(samples, results / "data_stream_memory.png", f"{sizes.many:,} files, {WORKERS} workers")
    warm = [megabytes for number, megabytes in samples if number >= sizes.memory_batches / 10]
    numbers = [number for number, _ in samples][-len(warm) :]
    slope = np.polyfit(numbers, warm, 1)[0] * 1000
    return [
        Row(f"after {numbers[0]} batches", "MB", warm[0]),
        Row(f"after {numbers[-1]} batches", "MB", warm[-1]),
        Row("most in between", "MB", max(warm)),
        Row("growth per 1,000 batches", "MB", slope, None, "of a straight line"),
    ]


def memory_over_batches(folder: str, sizes: Sizes) -> list[tuple[int, float]]:
    """(batches so far, MB) every so many batches."""
    stream = make_stream(open_rows(folder), sizes.memory_batch_seconds)
    samples = []
    for number, _ in enumerate(heard(StreamLoader(stream, WORKERS)), 1):
        if number % sizes.memory_every == 0:
            samples.append((number, resident_megabytes()))
        if number == sizes.memory_batches:
            return samples


def resident_megabytes() -> float:
    """Of this process and its children; a page that n of them share counts once (as 1/n in each).

    Without the pages of libraries: what counts of them changes with what other programs are running.
    """
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    rollups = [Path(f"/proc/{process}/smaps_rollup").read_text() for process in processes]
    kinds = ("\nPss_Anon:", "\nPss_Shmem:")
    return sum(int(text.split(kind)[1].split()[0]) for text in rollups for kind in kinds) / 1024


def draw_memory(samples: list[tuple[int, float]], path: Path, title: str) -> None:
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 3), layout="constrained")
        numbers, megabytes = zip(*samples)
        axis.plot(numbers, megabytes, color=INK, linewidth=1.2)
        axis.axhline(max(megabytes), color=FAINT, linestyle=":", linewidth=1.2)
        text = f"most: {max(megabytes):.0f} MB"
        axis.annotate(
            text, (1, max(megabytes)), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=ACCENT
        )
        axis.set(title=f"resident memory (MB), {title}", xlabel="batches", ylim=(0, 1.15 * max(megabytes)))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", facecolor="white")
        plt.close(figure)


# --- Random access --------------------------------------------------------------------------------------------------


def random_access(sizes: Sizes, work: Path, results: Path) -> list[Row]:
    """A window of 10 s at random places of a long recording, the file opened anew each time; and all of the file."""
    no_stock = why_no_stock()
    rows = []
    for name, file in make_long(work, sizes.long_seconds).items():
        ours = fresh(our_windows, str(file), sizes.accesses)
        stock = fresh(stock_windows, str(file), sizes.accesses) if no_stock is None else {}
        for what, unit in {"10 s window, mean": "ms", "10 s window, worst": "ms", "whole file": "s"}.items():
            rows.append(Row(f"{name}, {what}", unit, ours[what], stock.get(what), no_stock or ""))
    if not any(row.what.startswith("m4a") for row in rows):
        rows.append(Row("m4a, 10 s window, mean", "ms", None, None, "not measured: pip install av"))
    return rows


def make_long(work: Path, seconds: float) -> dict[str, Path]:
    """One long recording in each format."""
    kinds = {"16 kHz flac": ("long.flac", RATE, 1), "44.1 kHz stereo mp3": ("long.mp3", 44_100, 2)}
    with contextlib.suppress(ImportError):
        import av  # noqa: F401

        kinds["m4a, 44.1 kHz"] = ("long.m4a", 44_100, 1)
    files = {}
    for name, (file, rate, channels) in kinds.items():
        files[name] = work / file
        if not files[name].exists():
            # Ten minutes, over and over: enough that no decoder has seen the place before.
            samples = np.resize(speech(min(seconds, 600), rate), int(seconds * rate))
            write = write_m4a if file.endswith("m4a") else write_audio
            write(files[name], samples, rate, channels)
    return files


def write_m4a(file: Path, samples: np.ndarray, rate: int, channels: int) -> None:
    import av

    with av.open(str(file), "w", format="mp4") as out:
        track = out.add_stream("aac", rate=rate, layout="mono")
        for start in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            out.mux(track.encode(frame))
        out.mux(track.encode(None))


def places(seconds: float, count: int) -> list[float]:
    """Starts of 10 s windows, in seconds; the first is of a warm-up near the start."""
    return [0.0, *np.random.default_rng(SEED).uniform(0, seconds - 11, count)]


def summary(windows: list[float], whole: float) -> dict[str, float]:
    timed = [1000 * seconds for seconds in windows[1:]]
    return {"10 s window, mean": statistics.mean(timed), "10 s window, worst": max(timed), "whole file": whole}


def our_windows(path: str, count: int) -> dict[str, float]:
    audio, header = audio_of(path), read_header(audio_of(path))
    windows = []
    for place in places(header.seconds, count):
        first = int(place * header.rate)
        windows.append(wall_seconds(read_window, audio, first, first + 10 * header.rate, RATE))

    def whole():
        # As the stream would: a window after the other.
        for first in range(0, header.frames - 10 * header.rate, 10 * header.rate):
            read_window(audio, first, first + 10 * header.rate, RATE)

    return summary(windows, wall_seconds(whole))


def stock_windows(path: str, count: int) -> dict[str, float]:
    """torchcodec can seek, so its windows are timed too, though the stock path asks for whole files only."""
    feature = datasets.Audio(sampling_rate=RATE)

    def window(place: float):
        decoder = feature.decode_example(audio_of(path))
        decoder.get_samples_played_in_range(place, place + 10).data.mean(dim=0).numpy()

    windows = [wall_seconds(window, place) for place in places(read_header(audio_of(path)).seconds, count)]
    return summary(windows, wall_seconds(lambda: feature.decode_example(audio_of(path))["array"]))


def wall_seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


# --- Padding --------------------------------------------------------------------------------------------------------

PROMPT_SETTINGS = {"batch_seconds": 64, "min_seconds": 0.5, "max_seconds": 8.0}  # recipes/voice_prompts/pretrain.yaml


def padding(sizes: Sizes, work: Path, results: Path) -> list[Row]:
    """What an epoch over the voice prompts leaves out and fills up: lengths are all that is compared."""
    made_up = sizes.clips is not None or not VOICE_PROMPTS.exists()
    if made_up:
        rows = open_rows(str(make_prompts(work / "prompts", sizes.clips or 1_500)))
    else:
        rows = open_rows(str(VOICE_PROMPTS), "unlabeled")
    seconds = usable_seconds(rows, PROMPT_SETTINGS["min_seconds"])
    ours = our_epoch(rows, sum(seconds))
    stock = stock_epoch(seconds, round(ours["clips"]), PROMPT_SETTINGS["max_seconds"])
    note = "on made-up prompts" if made_up else ""
    return [
        Row(
            "audio not heard in an epoch",
            "%",
            ours["lost"],
            stock["cut off"],
            f"stock: cut at 8 s; {note}".strip("; "),
        ),
        Row("the same, longer recordings dropped", "%", ours["lost"], stock["dropped"], "as fairseq2 does"),
        Row("padding, batches at random", "%", 0.0, stock["padding"], f"{round(ours['clips'])} recordings a batch"),
        Row("padding, group_by_length", "%", 0.0, stock["padding grouped"], "the Trainer's sampler"),
        Row("mean fill of a batch", "% of batch_seconds", ours["fill"]),
        Row("distinct lengths of a batch", "", ours["lengths"], stock["lengths"]),
        Row("distinct shapes of a batch", "", ours["shapes"], stock["lengths"], "stock: one number of rows"),
        Row("batches in an epoch", "", ours["batches"], stock["batches"]),
    ]


def usable_seconds(rows: IndexedRows, min_seconds: float) -> list[float]:
    found = []
    for index in range(len(rows)):
        with contextlib.suppress(Skip):
            found.append(read_header(rows[index]["audio"]).seconds)
    return [seconds for seconds in found if seconds >= min_seconds]


def our_epoch(rows: IndexedRows, total_seconds: float) -> dict[str, float]:
    """One epoch's batches, decoded."""
    shapes, audio_seconds = [], 0.0
    for batch in heard(make_stream(rows, **PROMPT_SETTINGS).batches(0, 1)):
        if batch["epoch"] > 1 + 1e-9:
            break
        shapes.append(tuple(batch["input_values"].shape))
        audio_seconds += batch["audio_seconds"]
    return {
        "lost": 100 * (1 - audio_seconds / total_seconds),
        "fill": 100 * audio_seconds / len(shapes) / PROMPT_SETTINGS["batch_seconds"],
        "clips": statistics.mean(count for count, _ in shapes),
        "lengths": len({length for _, length in shapes}),
        "shapes": len(set(shapes)),
        "batches": len(shapes),
    }


def stock_epoch(seconds: list[float], batch_size: int, max_seconds: float) -> dict[str, float]:
    """One epoch of the example: cut to `max_seconds`, `batch_size` recordings a batch, padded to the longest."""
    cut = [min(value, max_seconds) for value in seconds]
    generator = torch.Generator().manual_seed(SEED)
    random = torch.randperm(len(cut), generator=generator).tolist()
    grouped = get_length_grouped_indices(cut, batch_size, generator=generator)
    return {
        "cut off": 100 * (1 - sum(cut) / sum(seconds)),
        "dropped": 100 * (1 - sum(value for value in seconds if value <= max_seconds) / sum(seconds)),
        "padding": padded_share(cut, random, batch_size),
        "padding grouped": padded_share(cut, grouped, batch_size),
        "lengths": len({max(cut[index] for index in batch) for batch in groups(random, batch_size)}),
        "batches": math.ceil(len(cut) / batch_size),
    }


def groups(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded_share(seconds: list[float], order: list[int], batch_size: int) -> float:
    """Percent of all that the model computes on."""
    batches = [[seconds[index] for index in batch] for batch in groups(order, batch_size)]
    return 100 * (1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches))


# --- Resuming -------------------------------------------------------------------------------------------------------


def resume(sizes: Sizes, work: Path, results: Path) -> list[Row]:
    """Seconds from load_state_dict to the next batch, in a fresh process, wherever the run was stopped."""
    folder = str(corpus(work, sizes.many))
    total = sizes.many * 2.0  # seconds of audio
    deep = round(1.6 * total / sizes.batch_seconds)
    no_stock = why_no_stock()
    replayed = sizes.replayed if no_stock is None else ()
    stock = {position: fresh(stock_resume, folder, position, sizes.batch_seconds) for position in replayed}
    rows = []
    for position in (*sizes.positions, deep):
        state = fresh(state_after, folder, position, sizes.batch_seconds)
        seconds = fresh(our_resume, folder, state, sizes.batch_seconds)
        where = f"after {position:,} batches" + (" (second epoch)" if position == deep else "")
        rows.append(Row(where, "s", seconds, *beside(stock, position, no_stock)))
    size = max(len(json.dumps(worker)) for worker in state["workers"])
    return [*rows, Row("state of a worker", "bytes", size)]


class Undecoded(BatchStream):
    """The same batches in the same order with nothing in them: how the benchmark gets deep into an epoch."""

    def make(self, windows, generator, skipped) -> dict:
        return {"audio_seconds": 0.0}


def resumable(kind, folder: str, batch_seconds: float) -> StreamLoader:
    return StreamLoader(stream_of(kind, open_rows(folder), batch_seconds, 1.0, 15.6), WORKERS)


def state_after(folder: str, position: int, batch_seconds: float) -> dict:
    loader = resumable(Undecoded, folder, batch_seconds)
    for _ in itertools.islice(heard(loader), position):
        pass
    return json.loads(json.dumps(loader.state_dict()))


def our_resume(folder: str, state: dict, batch_seconds: float) -> float:
    loader = resumable(BatchStream, folder, batch_seconds)
    start = time.perf_counter()
    loader.load_state_dict(state)
    next(heard(loader))
    return time.perf_counter() - start


def stock_resume(folder: str, position: int, batch_seconds: float) -> float:
    """What the Trainer does to a data set that streams: accelerate takes batches and throws them away."""
    extractor = Wav2Vec2FeatureExtractor()
    data = datasets.load_dataset("audiofolder", data_dir=folder, split="train", streaming=True)
    data = data.cast_column("audio", datasets.Audio(sampling_rate=RATE)).shuffle(seed=SEED, buffer_size=100)
    data = data.map(prepare, fn_kwargs={"extractor": extractor}, remove_columns=data.column_names)
    options = {"batch_size": int(batch_seconds / 2), "num_workers": 0}
    loader = torch.utils.data.DataLoader(data, collate_fn=Padded(extractor), **options)
    start = time.perf_counter()
    next(iter(accelerate.skip_first_batches(loader, position)))
    return time.perf_counter() - start


# --- Tables ---------------------------------------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (first_batch, decode, memory, random_access, padding, resume)}


def show(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else f"{number:.3g}"


def table(rows: list[Row]) -> str:
    """GitHub's Markdown, ready for benchmarks/README.md."""
    cells = [("", "unit", "ours", "stock", "note")]
    cells += [(row.what, row.unit, show(row.ours), show(row.stock), row.note) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def about(sizes: Sizes, seconds: float) -> dict:
    """What a number has to travel with."""
    return {
        "command": f"python benchmarks/{command_line()}",
        "commit": commit(),
        "date": date.today().isoformat(),
        "seed": SEED,
        "quick": sizes == QUICK,
        "wall_seconds": round(seconds, 1),
        "hardware": {**hardware(), "processors": os.cpu_count()},
        "versions": {name: installed(name) for name in (*LIBRARIES, "torchcodec", "numpy", "av")},
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_results(output: Path, name: str, content: dict) -> None:
    """Other parts in the file stay, each with what it was measured on."""
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = json.loads(output.read_text()) if output.exists() else {}
    output.write_text(json.dumps({**parts, name: content}, indent=2) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "all"], default=["all"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/data_stream.json")
    parser.add_argument("--work_dir", type=Path, help="keeps the generated audio (8 GB) for the next run")
    parser.add_argument("--files", type=int, help="in the place of 100,000")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, list[Row]]:
    args = parse(argv)
    sizes = QUICK if args.quick else Sizes()
    sizes = replace(sizes, many=args.files) if args.files else sizes
    names = list(PARTS) if "all" in args.part else args.part
    tables = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work_dir or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name in names:
            start = time.perf_counter()
            tables[name] = PARTS[name](sizes, work, args.output.parent)
            rows = [row._asdict() for row in tables[name]]
            write_results(args.output, name, {**about(sizes, time.perf_counter() - start), "rows": rows})
            print(f"\n{name}: {' '.join(PARTS[name].__doc__.split())}\n\n{table(tables[name])}", flush=True)
    return tables


if __name__ == "__main__":
    main()
