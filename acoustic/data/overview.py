"""What is in a data set before anything is trained on it.

All headers are read, or those of a sample; what is expensive (decoding, hashing) is done for a part and for a limited
time, and the `Overview` says for how much.
"""

import hashlib
import math
import os
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from acoustic.console import UserError
from acoustic.data.headers import Skip, open_audio, read_header
from acoustic.data.remote import is_remote
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.sound import Sample, WindowSample, listen, take_examples
from acoustic.data.tally import most_common, reason_kind
from acoustic.data.windows import Plan

# A header takes about 0.1 ms from a warm disk. The rows of a stream come with their audio, over a network.
MAX_HEADERS, STREAM_ROWS = 20_000, 2_000
# Behind a URL it takes two round trips.
MAX_REMOTE_HEADERS = 200
# Copies differ in no byte. (pieces, bytes of each): a file is known by its middle, and where that is the same, by
# all of it up to 8 MiB.
MIDDLE, WHOLE, COPY_TIME = (1, 2**16), (16, 2**19), 20.0
# Edges of the length histogram in seconds, ten a decade from 10 ms to 28 h; 1, 2, 5 and 10 are near enough to some.
LENGTH_EDGES = [10 ** (step / 10) for step in range(-20, 51)]
MAX_EXAMPLES, MAX_GROUPS = 5, 100


@dataclass(slots=True)
class Recording:
    """A row without its audio. Without a usable header it has 0 frames; what would be skipped has a reason."""

    name: str
    format: str = "?"
    frames: int = 0
    rate: int = 0
    channels: int = 0
    bytes: int | None = None
    place: tuple[str, int] | None = None  # local file and the offset in it
    digest: str | None = None  # of audio that came with the row
    windows: int = 0
    used_seconds: float = 0.0
    reason: str | None = None
    fault: bool = False  # it can't be read, whatever the settings are

    @property
    def seconds(self) -> float:
        return self.frames / self.rate if self.rate else 0.0


def read_headers(rows: Rows, plan: Plan, seed: int = 0, show_progress: bool = False):
    """One walk over the rows, or over a sample of many; no audio is decoded.

    Returns:
        (recordings, how many rows there are or None for a stream with more of them, WindowSample)
    """
    sample, generator = WindowSample(seed=seed), np.random.default_rng(seed)
    if isinstance(rows, IndexedRows):
        remote = len(rows) and is_remote(rows[0]["audio"].get("path") or "")
        total, count = len(rows), min(len(rows), MAX_REMOTE_HEADERS if remote else MAX_HEADERS)
        indices = range(total) if count == total else np.sort(generator.choice(total, count, replace=False))
        some = (rows[int(index)] for index in indices)
    else:
        total, count, some = None, STREAM_ROWS, (row for _, row in rows.iterate(0, 1, None, 0))
    recordings = []
    with tqdm(total=count, desc="reading headers", unit=" rows", disable=not show_progress, leave=False) as bar:
        for row in some:
            if len(recordings) == count:
                break
            row = {**row, "name": readable(row["name"])}
            recordings.append(read_recording(row, plan, generator, sample))
            bar.update()
        else:
            total = len(recordings) if total is None else total
    return recordings, total, sample


def readable(text: str) -> str:
    """A name that can be printed and drawn on one line: what isn't text is shown escaped."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_recording(row: dict, plan: Plan, generator: np.random.Generator, sample: WindowSample) -> Recording:
    """A row's header as a `Recording`, its windows offered to the sample."""
    audio = row["audio"]
    recording = Recording(row["name"], Path(row["name"]).suffix.lstrip(".").lower() or "?")
    try:
        header = read_header(audio)
        recording.frames, recording.rate, recording.channels = header.frames, header.rate, header.channels
        locate(recording, audio)
        for window in plan(row, header, generator):
            sample.offer(window)
            recording.windows += 1
            recording.used_seconds += window.seconds
    except Skip as skip:
        recording.reason, recording.fault = readable(str(skip)), skip.fault
    except OSError:  # it has gone in between
        recording.reason, recording.fault = "no such file", True
    return recording


def locate(recording: Recording, audio: dict) -> None:
    """Size, place and format of audio that can be read. The size of what lies behind a URL stays unknown."""
    content, path = audio.get("bytes"), audio.get("path")
    if content is not None:
        recording.bytes, recording.digest = len(content), hashlib.sha256(content).hexdigest()
        if recording.format == "?":
            with open_audio(audio) as file:
                recording.format = file.format.lower()
    elif not is_remote(path):
        recording.place = (path, audio.get("offset", 0))
        recording.bytes = audio["size"] if "size" in audio else os.path.getsize(path)


@dataclass
class Copies:
    """Groups of names whose audio is the same byte for byte (the largest first, at most MAX_GROUPS), of `checked`."""

    groups: list[list[str]] = field(default_factory=list)
    recordings: int = 0  # that are a copy of an earlier one
    checked: int = 0
    unchecked: int = 0  # alike in length and size, but there was no time to look inside
    not_local: int = 0


def find_copies(recordings: list[Recording], time_limit: float = COPY_TIME) -> Copies:
    """What has the same frames, rate, channels and size is compared by its content."""
    local = [recording for recording in recordings if recording.bytes is not None and recording.reason is None]
    usable = sum(recording.reason is None for recording in recordings)
    copies = Copies(checked=len(local), not_local=usable - len(local))
    groups = divide([local], lambda r: (r.frames, r.rate, r.channels, r.bytes, r.digest))
    deadline = time.monotonic() + time_limit
    for pieces in (MIDDLE, WHOLE):
        unread = []

        def content(recording: Recording, pieces=pieces, unread=unread) -> str | None:
            if recording.digest is None and time.monotonic() > deadline:
                unread.append(recording)
                return None
            return recording.digest or fingerprint(recording, *pieces)

        groups = divide(groups, content)
        copies.unchecked += len(unread)
    copies.checked -= copies.unchecked
    groups.sort(key=len, reverse=True)
    copies.recordings = sum(len(group) - 1 for group in groups)
    copies.groups = [[recording.name for recording in group] for group in groups[:MAX_GROUPS]]
    return copies


def divide(groups: list[list[Recording]], key) -> list[list[Recording]]:
    """Each group by `key`; what is alone, or has the key None, is left out."""
    result = []
    for group in groups:
        parts = defaultdict(list)
        for recording in group:
            if (value := key(recording)) is not None:
                parts[value].append(recording)
        result += [part for part in parts.values() if len(part) > 1]
    return result


def fingerprint(recording: Recording, pieces: int, piece_bytes: int) -> str | None:
    """A hash of so many pieces, evenly spread over the file; of all of it where it is small. None if it has gone."""
    path, offset = recording.place
    length = min(piece_bytes, math.ceil(recording.bytes / pieces))
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for piece in range(pieces):
                file.seek(offset + max((2 * piece + 1) * recording.bytes // (2 * pieces) - length // 2, 0))
                digest.update(file.read(length))
    except OSError:
        return None
    return digest.hexdigest()


@dataclass
class Overview:
    """The numbers of a data set. Totals are estimates where `looked_at` is less than `recordings`.

    Names are as they can be printed. Seconds, bytes and counts are of all recordings; `rates`, `channels` and
    `formats` are {value: {"recordings", "hours"}} and `skipped_by_reason` is {reason: {"recordings",
    "examples"}}, scaled alike.
    """

    source: str
    settings: dict
    recordings: int | None  # None: a stream with more rows than were looked at, to which alone the totals belong
    looked_at: int
    seconds: float
    bytes: int | None
    shortest: tuple[str, float]
    median_seconds: float
    longest: tuple[str, float]
    lengths: dict[str, list]
    rates: dict[int, dict]
    channels: dict[int, dict]
    formats: dict[str, dict]
    skipped: int
    unreadable: int
    too_short: dict
    skipped_by_reason: dict[str, dict]
    copies: Copies
    sample: Sample
    windows: int
    used_seconds: float
    updates: int
    findings: list[str] = field(default_factory=list)

    @property
    def scale(self) -> float:
        return (self.recordings or self.looked_at) / self.looked_at

    @property
    def total(self) -> int:
        """Recordings that the totals are about."""
        return self.recordings or self.looked_at

    @property
    def about(self) -> str:
        return "about " if self.scale > 1 else ""


def look(rows: Rows, plan: Plan, settings: dict, seed: int = 0, show_progress: bool = False):
    """The `Overview` of a data set and examples to draw.

    Args:
        plan: the windows that training would use.
        settings: "min_duration_in_seconds", "max_duration_in_seconds" and "batch_seconds".

    Raises:
        UserError: there is no recording that could be used; the message says what dominates.
    """
    recordings, total, sample = read_headers(rows, plan, seed, show_progress)
    if not sample.offered:
        reasons = Counter(reason_kind(recording.reason) for recording in recordings if recording.reason)
        shown = most_common(reasons)
        raise UserError(f"dataset_name: nothing in {rows.description!r} can be used: {shown or 'it is empty'}")
    sounds = listen(sample, show_progress=show_progress)
    overview = summarise(readable(rows.description), settings, recordings, total, find_copies(recordings), sounds)
    return overview, take_examples(sample)


def summarise(source: str, settings: dict, recordings: list[Recording], total: int | None, copies, sample) -> Overview:
    scale = (total or len(recordings)) / len(recordings)
    readable = sorted((recording for recording in recordings if recording.frames), key=lambda r: r.seconds)
    skipped = [recording for recording in recordings if recording.reason]
    sizes = [recording.bytes for recording in readable if recording.bytes is not None]
    used_seconds = sum(recording.used_seconds for recording in recordings) * scale
    return Overview(
        source=source,
        settings=settings,
        recordings=total,
        looked_at=len(recordings),
        seconds=sum(recording.seconds for recording in readable) * scale,
        bytes=round(sum(sizes) * scale) if len(sizes) == len(readable) else None,
        shortest=(readable[0].name, readable[0].seconds),
        median_seconds=readable[len(readable) // 2].seconds,
        longest=(readable[-1].name, readable[-1].seconds),
        lengths=length_histogram(readable, scale),
        rates=count_by(readable, lambda r: r.rate, scale),
        channels=count_by(readable, lambda r: r.channels, scale),
        formats=count_by(readable, lambda r: r.format, scale),
        skipped=round(len(skipped) * scale),
        unreadable=round(sum(recording.fault for recording in skipped) * scale),
        too_short=count_short(readable, settings["min_duration_in_seconds"], scale),
        skipped_by_reason=count_reasons(skipped, scale),
        copies=copies,
        sample=sample,
        windows=round(sum(recording.windows for recording in recordings) * scale),
        used_seconds=used_seconds,
        updates=math.ceil(used_seconds / settings["batch_seconds"]),
    )


def length_histogram(recordings: list[Recording], scale: float) -> dict[str, list]:
    """{"edges" in seconds, "recordings", "hours"}: without the empty bins at both ends."""
    seconds = np.clip([recording.seconds for recording in recordings], LENGTH_EDGES[0], LENGTH_EDGES[-1])
    counts, _ = np.histogram(seconds, LENGTH_EDGES)
    hours, _ = np.histogram(seconds, LENGTH_EDGES, weights=seconds / 3600)
    first, last = np.flatnonzero(counts)[[0, -1]]
    return {
        "edges": LENGTH_EDGES[first : last + 2],
        "recordings": np.rint(counts[first : last + 1] * scale).astype(int).tolist(),
        "hours": (hours[first : last + 1] * scale).tolist(),
    }


def count_by(recordings: list[Recording], key, scale: float) -> dict:
    """{value: {"recordings", "hours"}}, the value with the most recordings first."""
    counts, seconds = Counter(), Counter()
    for recording in recordings:
        counts[key(recording)] += 1
        seconds[key(recording)] += recording.seconds
    return {
        value: {"recordings": round(count * scale), "hours": seconds[value] * scale / 3600}
        for value, count in counts.most_common()
    }


def count_short(recordings: list[Recording], min_seconds: float, scale: float) -> dict:
    """{"recordings", "would_use": {a lower min_duration_in_seconds: of these, how many it would use}}."""
    short = [recording.seconds for recording in recordings if recording.reason and recording.seconds < min_seconds]
    lower = [limit for limit in (2.0, 1.0, 0.5, 0.25, 0.1) if limit < min_seconds]
    would_use = {limit: round(sum(seconds >= limit for seconds in short) * scale) for limit in lower}
    return {"recordings": round(len(short) * scale), "would_use": would_use}


def count_reasons(skipped: list[Recording], scale: float) -> dict[str, dict]:
    names = defaultdict(list)
    for recording in skipped:
        names[reason_kind(recording.reason)].append(recording.name)
    ordered = sorted(names.items(), key=lambda item: -len(item[1]))
    return {
        reason: {"recordings": round(len(some) * scale), "examples": some[:MAX_EXAMPLES]} for reason, some in ordered
    }
