"""Recordings to windows: (row, start, stop) in the recording's own frames. Each task says which windows it wants."""

import math
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from acoustic.data.headers import Header, Skip, read_header

# Six lengths an octave: cutting a recording to the next one below loses 5.6 % of it on average, at most 10.9 %.
LENGTHS_PER_OCTAVE = 6
# Of so many ways to cut a long recording, the one that leaves least over.
DRAWS = 4
FRAMES_PER_SECOND = 50  # lengths are whole 20 ms frames of a wav2vec 2.0 encoder


@dataclass(frozen=True)
class Window:
    """A piece [start, stop) of a recording, in frames at its own rate; `row` stays undecoded.

    `seconds` is its nominal length: the frames are enough for it, rounded up to whole ones. `alone`: it is all that is
    used of the recording.
    """

    row: dict
    start: int
    stop: int
    rate: int
    seconds: float
    alone: bool = True

    @property
    def hash(self) -> int:
        """32 bits of its recording's name and its place there."""
        return zlib.crc32(f"{self.start} {self.row['name']}".encode("utf-8", "surrogateescape"))

    def crop(self, seconds: float, generator: np.random.Generator | None) -> "Window":
        """A part of `seconds`, at a random place; at the start without a generator."""
        if seconds >= self.seconds:
            return self
        length = frames_of(seconds, self.rate)
        spare = self.stop - self.start - length
        start = self.start + (int(generator.integers(spare + 1)) if generator else 0)
        return replace(self, start=start, stop=start + length, seconds=seconds)


# (row, header, generator) -> its windows, lazily; raises Skip when called for a recording that can't be used. Without
# a generator the windows are the same every time.
Plan = Callable[[dict, Header, np.random.Generator | None], Iterable[Window]]


def window_lengths(min_seconds: float, max_seconds: float) -> tuple[float, ...]:
    """The lengths in seconds that `cover` uses, ascending: few, so that the shapes of batches repeat."""
    steps = int(LENGTHS_PER_OCTAVE * math.log2(max_seconds / min_seconds) + 1e-9)
    exact = (max_seconds * 2 ** (-step / LENGTHS_PER_OCTAVE) for step in range(1, steps + 1))
    rounded = {math.floor(length * FRAMES_PER_SECOND) / FRAMES_PER_SECOND for length in exact}
    return tuple(sorted({min_seconds, max_seconds, *(length for length in rounded if length > min_seconds)}))


def cover(min_seconds: float, max_seconds: float) -> Plan:
    """Windows of `window_lengths` over all of a recording; what is left between them is less than one step of lengths.

    A recording longer than `max_seconds` is cut into pieces of that length between a first piece of random length and
    a last one of what remains, so the cuts are in other places in every epoch. Nothing overlaps.
    """
    lengths = window_lengths(min_seconds, max_seconds)

    def plan(row: dict, header: Header, generator: np.random.Generator | None) -> Iterator[Window]:
        refuse_short(header, min_seconds)
        return lay_out(row, header, lengths, generator)

    plan.lengths = lengths
    return plan


def thin(plan: Plan, most: int) -> Plan:
    """Of a plan's windows those whose hash is at most `most`: the same share of every recording, every time."""

    def thinned(row: dict, header: Header, generator: np.random.Generator | None) -> Iterator[Window]:
        return (window for window in plan(row, header, generator) if window.hash <= most)

    return thinned


def lay_out(row: dict, header: Header, lengths: tuple[float, ...], generator) -> Iterator[Window]:
    rate, longest = header.rate, frames_of(lengths[-1], header.rate)
    firsts = [0]
    if generator and header.frames > longest:
        # The longest is no first piece of its own: that is what 0, no such piece, stands for.
        firsts = generator.integers(len(lengths), size=DRAWS)
    spare, first, full, last = min(divide(header, lengths, int(first)) for first in firsts)
    start = int(generator.integers(spare + 1)) if generator else 0
    alone = bool(first) + full + bool(last) == 1
    for seconds in pieces(lengths, first, full, last):
        stop = start + frames_of(seconds, rate)
        yield Window(row, start, stop, rate, seconds, alone)
        start = stop


def divide(header: Header, lengths: tuple[float, ...], first: int) -> tuple[int, int, int, int]:
    """(frames left over, first, number of windows of full length, last); see `pieces`."""
    rest = header.frames - (frames_of(lengths[first - 1], header.rate) if first else 0)
    full, rest = divmod(rest, frames_of(lengths[-1], header.rate))
    last = bisect_right(lengths, rest, key=lambda length: frames_of(length, header.rate))
    return rest - (frames_of(lengths[last - 1], header.rate) if last else 0), first, full, last


def pieces(lengths: tuple[float, ...], first: int, full: int, last: int) -> Iterator[float]:
    """Lengths in order: number `first` (from 1; 0 is none), `full` of the longest, number `last`."""
    if first:
        yield lengths[first - 1]
    for _ in range(full):
        yield lengths[-1]
    if last:
        yield lengths[last - 1]


def crop(min_seconds: float, max_seconds: float, random: bool) -> Plan:
    """One window per recording, for labels that hold for all of it; at a random place in training, else the middle."""

    def plan(row: dict, header: Header, generator: np.random.Generator | None) -> list[Window]:
        refuse_short(header, min_seconds)
        length = min(header.frames, int(max_seconds * header.rate))
        spare = header.frames - length
        start = int(generator.integers(spare + 1)) if random and generator else spare // 2
        return [Window(row, start, start + length, header.rate, length / header.rate)]

    return plan


def whole(min_seconds: float, max_seconds: float) -> Plan:
    """The whole recording or none of it, for labels that can't be cut (transcripts)."""

    def plan(row: dict, header: Header, generator: np.random.Generator | None) -> list[Window]:
        refuse_short(header, min_seconds)
        if header.seconds > max_seconds:
            reason = f"{header.seconds:.1f} s is longer than max_duration_in_seconds={max_seconds:g}"
            raise Skip(reason, fault=False)
        return [Window(row, 0, header.frames, header.rate, header.seconds)]

    return plan


def divide_evenly(min_seconds: float, max_seconds: float) -> Plan:
    """All of a recording in as few equal pieces as `max_seconds` allows; the same every time."""

    def plan(row: dict, header: Header, generator: np.random.Generator | None) -> Iterator[Window]:
        refuse_short(header, min_seconds)
        return even_pieces(row, header, math.ceil(header.seconds / max_seconds - 1e-9))

    return plan


def even_pieces(row: dict, header: Header, count: int) -> Iterator[Window]:
    for number in range(count):
        start, stop = header.frames * number // count, header.frames * (number + 1) // count
        yield Window(row, start, stop, header.rate, (stop - start) / header.rate, alone=count == 1)


def slide(min_seconds: float, max_seconds: float, overlap_seconds: float) -> Plan:
    """All of a recording in windows of `max_seconds` that overlap; the last one ends where the recording does."""

    def plan(row: dict, header: Header, generator: np.random.Generator | None) -> Iterator[Window]:
        refuse_short(header, min_seconds)
        length = min(frames_of(max_seconds, header.rate), header.frames)
        hop = max(length - int(overlap_seconds * header.rate), 1)
        count = math.ceil((header.frames - length) / hop) + 1
        return sliding_windows(row, header, length, hop, count)

    return plan


def sliding_windows(row: dict, header: Header, length: int, hop: int, count: int) -> Iterator[Window]:
    for number in range(count):
        start = min(number * hop, header.frames - length)
        yield Window(row, start, start + length, header.rate, length / header.rate, alone=count == 1)


def usable(plan: Plan) -> Callable[[dict], bool]:
    """row -> whether its header can be read and the plan finds windows in it."""

    def is_usable(row: dict) -> bool:
        try:
            return any(plan(row, read_header(row["audio"]), None))
        except Skip:
            return False

    return is_usable


def frames_of(seconds: float, rate: int) -> int:
    """Enough frames for `seconds`."""
    return math.ceil(seconds * rate - 1e-6)


def refuse_short(header: Header, min_seconds: float) -> None:
    if header.seconds < min_seconds:
        reason = f"{header.seconds:.2f} s is shorter than min_duration_in_seconds={min_seconds:g}"
        raise Skip(reason, fault=False)
