"""How a data set sounds: a random sample of its windows, decoded and measured at their own rate."""

import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import scipy.signal
import soundfile
from tqdm.auto import tqdm

from acoustic.data.decode import read_window
from acoustic.data.headers import Skip, open_audio
from acoustic.data.windows import Window

# A window takes 5 to 30 ms to decode and measure. The bytes are those of rows that hold their audio.
SAMPLE_WINDOWS, SAMPLE_BYTES, SAMPLE_TIME = 300, 256 * 2**20, 30.0
# The most that is measured of a window: its middle.
MEASURED_SECONDS = 30.0
# Of more channels only the mean is measured: one by one they would not fit into memory.
MAX_CHANNELS = 8
# Lossy decoders need some past before they are exact.
PREROLL_SECONDS = 2.0

# dBFS: 0 is the largest number; a sine that reaches it has an RMS of -3. Nothing: below one step of 16 bits.
NOTHING_DB, SILENCE_DB, FLOOR_DB = -90.0, -60.0, -100.0
SILENCE_FRAME_SECONDS = 0.05
# Of full scale; 8 bits end at 0.992. A flat top is three equal samples up there, a rounded one is beyond full scale.
CLIPPING_LEVEL = 0.99
# Shares of the energy that lie below "bandwidth" and "edge". 99 % of speech lies low whatever the recorder heard;
# above the edge there is next to nothing (-50 dB): there an upsampled file ends.
BANDWIDTH_SHARE, EDGE_SHARE = 0.99, 1 - 1e-5
SPECTRUM_POINTS = 128


class WindowSample:
    """At most `size` of the windows that are offered, each with the same chance, however many they are.

    It shrinks when rows that hold their audio would need more than `max_bytes`.
    """

    def __init__(self, size: int = SAMPLE_WINDOWS, max_bytes: int = SAMPLE_BYTES, seed: int = 0):
        self.size, self.max_bytes, self.random = size, max_bytes, random.Random(seed)
        self.offered, self.windows = 0, []

    def offer(self, window: Window) -> None:
        self.offered += 1
        if len(self.windows) < self.size:
            self.windows.append(window)
        elif (place := self.random.randrange(self.offered)) < self.size:
            self.windows[place] = window
        else:
            return
        if window.row["audio"].get("bytes"):
            while self.held() > self.max_bytes and self.size > 1:
                self.size = max(self.size // 2, 1)
                self.windows = self.random.sample(self.windows, min(self.size, len(self.windows)))

    def held(self) -> int:
        audio = {id(window.row): window.row["audio"].get("bytes") or b"" for window in self.windows}
        return sum(map(len, audio.values()))

    def shuffled(self) -> list[Window]:
        """All of them, so that the first ones are a sample too."""
        return self.random.sample(self.windows, len(self.windows))


@dataclass
class Sound:
    """One window, measured over all of its channels. Levels in dBFS, frequencies in Hz, shares from 0 to 1."""

    name: str
    rate: int
    encoding: str
    level: float
    peak: float
    clipped: float  # share of samples
    silent: float  # share of frames of 50 ms below SILENCE_DB
    offset: float  # the largest |mean| of a channel, full scale is 1
    bandwidth: float | None  # None where there is no sound
    edge: float | None
    # "mono" (or more than MAX_CHANNELS), "alike", "one silent", "cancelling" (their mean is nothing) or "different"
    channels: str


@dataclass
class Sample:
    """A random sample of windows: what was measured, what could not be decoded, a mean spectrum for each rate."""

    sounds: list[Sound] = field(default_factory=list)
    windows: int = 0  # that there are, in the recordings whose headers were read
    failed: dict[str, str] = field(default_factory=dict)
    spectra: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    def share(self, condition) -> float:
        return sum(map(condition, self.sounds)) / max(len(self.sounds), 1)

    def percentile(self, name: str, percent: float) -> float:
        return float(np.percentile([getattr(sound, name) for sound in self.sounds], percent))


def listen(sample: WindowSample, time_limit: float = SAMPLE_TIME, show_progress: bool = False) -> Sample:
    """Decode and measure the sampled windows, in random order, until the time is over."""
    result, spectra = Sample(windows=sample.offered), defaultdict(list)
    deadline = time.monotonic() + time_limit
    bar = tqdm(sample.shuffled(), "listening", unit=" windows", disable=not show_progress, leave=False)
    for window in bar:
        if result.sounds and time.monotonic() > deadline:
            break
        try:
            frames, encoding = read_channels(middle(window, MEASURED_SECONDS))
        except Skip as skip:
            result.failed[window.row["name"]] = str(skip)
            continue
        sound, spectrum = measure(window.row["name"], frames, window.rate, encoding)
        result.sounds.append(sound)
        if spectrum is not None:
            spectra[window.rate].append(spectrum / spectrum.sum())
    result.spectra = {rate: mean_spectrum(spectra[rate], rate) for rate in sorted(spectra)}
    return result


def middle(window: Window, seconds: float) -> tuple[dict, int, int, int]:
    """(audio, start, stop, rate): at most so many seconds of the window."""
    length = min(window.stop - window.start, int(seconds * window.rate))
    start = window.start + (window.stop - window.start - length) // 2
    return window.row["audio"], start, start + length, window.rate


def read_channels(part: tuple[dict, int, int, int]) -> tuple[np.ndarray, str]:
    """((frames, channels) float32 at the recording's own rate, its encoding). Raises `Skip` where training would."""
    audio, start, stop, rate = part
    mono = read_window(audio, start, stop, rate)
    try:
        with open_audio(audio) as file:
            encoding = name_encoding(file)
            if file.channels == 1 or file.channels > MAX_CHANNELS:
                return mono[:, None], encoding
            first = max(start - int(PREROLL_SECONDS * file.samplerate), 0)
            file.seek(first)
            return file.read(stop - first, dtype="float32", always_2d=True)[start - first :], encoding
    except (Skip, soundfile.LibsndfileError, RuntimeError):
        return mono[:, None], "?"


def name_encoding(file) -> str:
    """Container and samples, as far as the decoder says: "WAV PCM 16", "MP3"."""
    subtype = getattr(file, "subtype", "").replace("MPEG_LAYER_III", "")
    return f"{file.format} {subtype}".replace("_", " ").strip()


def measure(name: str, frames: np.ndarray, rate: int, encoding: str) -> tuple[Sound, np.ndarray | None]:
    """(what is measured, the power spectrum from 0 to rate / 2 or None for silence) of (frames, channels)."""
    means = frames.mean(axis=0, dtype=np.float64)
    centred = frames - means
    powers = np.square(centred, dtype=np.float64)
    level = decibels(powers.mean())
    per_frame = max(int(rate * SILENCE_FRAME_SECONDS), 1)
    whole = len(frames) // per_frame * per_frame
    frame_powers = powers[:whole].mean(axis=1).reshape(-1, per_frame).mean(axis=1) if whole else powers.mean()
    spectrum = bandwidth = edge = None
    if level > NOTHING_DB:
        points = 2 ** max(round(math.log2(rate / 16)), 4)
        _, spectrum = scipy.signal.welch(centred, rate, nperseg=min(points, len(frames)), nfft=points, axis=0)
        spectrum = spectrum.mean(axis=1)
        bandwidth, edge = (energy_limit(spectrum, rate, share) for share in (BANDWIDTH_SHARE, EDGE_SHARE))
    sound = Sound(
        name=name,
        rate=rate,
        encoding=encoding,
        level=level,
        peak=decibels(float(np.abs(frames).max()) ** 2),
        clipped=clipped_share(frames),
        silent=float(np.mean(frame_powers < 10 ** (SILENCE_DB / 10))),
        offset=float(np.abs(means).max()),
        bandwidth=bandwidth,
        edge=edge,
        channels=compare_channels(centred, powers),
    )
    return sound, spectrum


def decibels(power: float) -> float:
    return max(10 * math.log10(power), FLOOR_DB) if power > 0 else FLOOR_DB


def clipped_share(frames: np.ndarray) -> float:
    """Share of samples beyond full scale, or in runs of three or more equal ones next to it."""
    loud = np.abs(frames) >= CLIPPING_LEVEL
    equal = np.zeros((len(frames) + 1, frames.shape[1]), bool)
    equal[1:-1] = (frames[1:] == frames[:-1]) & loud[1:]  # equal[i]: sample i is as the one before
    run = equal[:-1] & equal[1:]  # the middle of three equal samples
    edges = np.zeros_like(loud)
    edges[1:] |= run[:-1]
    edges[:-1] |= run[1:]
    return float(np.mean(run | edges | (np.abs(frames) > 1)))


def energy_limit(spectrum: np.ndarray, rate: int, share: float) -> float:
    """The frequency in Hz below which so much of the energy lies."""
    below = np.cumsum(spectrum)
    return float(np.searchsorted(below, share * below[-1]) / (len(spectrum) - 1) * rate / 2)


def compare_channels(centred: np.ndarray, powers: np.ndarray) -> str:
    if centred.shape[1] == 1:
        return "mono"
    each = powers.mean(axis=0)
    if each.max() <= 10 ** (NOTHING_DB / 10):
        return "alike"
    if each.min() <= max(each.max() * 1e-5, 10 ** (NOTHING_DB / 10)):
        return "one silent"
    if np.square(centred.mean(axis=1)).mean() < 0.01 * each.mean():
        return "cancelling"
    differences = np.square(centred - centred[:, :1]).mean(axis=0)
    return "alike" if differences.max() < 1e-4 * each.max() else "different"


def mean_spectrum(spectra: list[np.ndarray], rate: int) -> dict[str, list[float]]:
    """{"hz", "db"}: the mean of spectra that weigh the same, in at most SPECTRUM_POINTS bands, 0 dB the strongest."""
    mean = np.mean(spectra, axis=0)
    bands = np.array_split(mean, min(SPECTRUM_POINTS, len(mean)))
    powers = np.array([band.mean() for band in bands])
    edges = np.cumsum([0] + [len(band) for band in bands])
    hertz = (edges[:-1] + edges[1:] - 1) / 2 * rate / 2 / (len(mean) - 1)
    levels = 10 * np.log10(np.maximum(powers / powers.max(), 1e-14))
    return {"hz": hertz.round(1).tolist(), "db": levels.round(2).tolist()}


def take_examples(sample: WindowSample, count: int = 6, seconds: float = 6.0) -> list[dict]:
    """{"name", "seconds", "rate", "waveform"} of `count` recordings, drawn by the seed."""
    examples, names = [], set()
    for window in sample.shuffled():
        if len(examples) == count:
            break
        name = window.row["name"]
        if name in names:
            continue
        audio, start, stop, rate = middle(window, seconds)
        try:
            waveform = read_window(audio, start, stop, rate)
        except Skip:
            continue
        names.add(name)
        examples.append({"name": name, "seconds": (stop - start) / rate, "rate": rate, "waveform": waveform})
    return examples
