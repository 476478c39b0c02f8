"""Recordings of any length in windows that overlap, and what a model says of the windows -> of the recordings."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from acoustic.data.headers import Header, Skip
from acoustic.data.windows import Plan, Window, slide
from acoustic.tasks.events import FrameGrid

# Of a window, shared with the next one where a recording is longer than one.
OVERLAP = 0.25


class Stitcher:
    """Frames of windows, which overlap, -> frames of recordings: the mean, weighted by a triangle over each window.

    A frame counts for most in the middle of a window, where the encoder sees both of its sides. Windows may come in
    any order.
    """

    def __init__(self):
        self.parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, recording: str, start_frame: int, probabilities: np.ndarray) -> None:
        """probabilities: (frames, classes) of a window whose first frame is number `start_frame` of its recording."""
        count, classes = probabilities.shape
        stop = start_frame + count
        sums, weights = self.parts.get(recording, (np.zeros((0, classes), np.float32), np.zeros(0, np.float32)))
        if stop > len(sums):
            room = max(stop, 2 * len(sums)) - len(sums)  # so that hours are copied a few times, not for each window
            sums, weights = np.pad(sums, ((0, room), (0, 0))), np.pad(weights, (0, room))
            self.parts[recording] = sums, weights
        triangle = np.minimum(np.arange(1, count + 1), np.arange(count, 0, -1)).astype(np.float32)
        sums[start_frame:stop] += triangle[:, None] * probabilities
        weights[start_frame:stop] += triangle

    def take(self, recording: str, frames: int) -> np.ndarray:
        """(frames, classes) float32 of a recording, which is then forgotten; 0 where there was no window."""
        sums, weights = self.parts.pop(recording)
        means = sums[:frames] / np.maximum(weights[:frames, None], 1e-9)
        return np.pad(means, ((0, frames - len(means)), (0, 0)))


def slide_on_grid(min_seconds: float, max_seconds: float, grid: FrameGrid, lengths: Callable[[int], int]) -> Plan:
    """All of a recording in windows that overlap by OVERLAP, each with what a `Stitcher` needs in row["place"]:

    {"first": number of its first frame in the recording, "frames": of the window, "start": in seconds, "total": frames
    of the recording, "seconds": of the recording}.

    A window begins where a frame of the whole recording would, so that overlapping frames are the same moment.
    """
    inner = slide(min_seconds, max_seconds, OVERLAP * max_seconds)

    def plan(row: dict, header: Header, generator: np.random.Generator | None) -> Iterator[Window]:
        windows, total = inner(row, header, generator), count_frames(header.frames, header.rate, grid, lengths)
        if total < 1:
            raise Skip(f"{header.seconds:.3f} s are too short for a frame")
        return placed(windows, header, total)

    def placed(windows, header: Header, total: int) -> Iterator[Window]:
        for window in windows:
            first = int(window.start / window.rate / grid.seconds + 1e-6)
            start = round(first * grid.seconds * window.rate)
            place = {
                "first": first,
                "frames": count_frames(window.stop - start, window.rate, grid, lengths),
                "start": start / window.rate,
                "total": total,
                "seconds": header.seconds,
            }
            seconds = (window.stop - start) / window.rate
            yield replace(window, row={**window.row, "place": place}, start=start, seconds=seconds)

    return plan


def count_frames(samples: int, rate: int, grid: FrameGrid, lengths: Callable[[int], int]) -> int:
    """Of so many samples at a recording's own rate; `read_window` says how many they become."""
    return max(int(lengths(math.ceil(samples * grid.rate / rate))), 0)
