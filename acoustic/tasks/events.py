"""Spans <-> frames of an encoder, and how good predicted spans are; numpy and scipy alone.

Segment-based and event-based F1 as Mesaros, Heittola, Virtanen 2016 ("Metrics for Polyphonic Sound Event Detection",
doi 10.3390/app6060162) define them and as DCASE and sed_eval compute them.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from scipy.ndimage import median_filter
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from sklearn.metrics import average_precision_score

from acoustic.data.spans import Span

# Of the definitions; seconds, and for the end of an event the share of its length where that is longer.
SEGMENT_SECONDS, COLLAR_SECONDS, COLLAR_SHARE = 1.0, 0.2, 0.2
CANDIDATES = np.round(np.arange(0.05, 0.96, 0.05), 2)
DEFAULT_THRESHOLD = 0.5
# The difference of two decimal numbers is not exact.
ROUNDING = 1e-6


@dataclass(frozen=True)
class FrameGrid:
    """Where the frames of an encoder are: frame i is centred on sample `offset + i * hop`, at `rate` Hz."""

    rate: int
    hop: int
    offset: float

    @classmethod
    def of(cls, lengths: Callable[[int], int], hop: int, rate: int) -> "FrameGrid":
        """
        Args:
            lengths: samples -> frames. The fewest samples that give a frame are what a frame sees.
            hop: samples from one frame to the next.
        """
        receptive_field = bisect_left(range(2**20), 1, key=lambda samples: int(lengths(samples)))
        return cls(rate, hop, receptive_field / 2)

    @property
    def seconds(self) -> float:
        """From one frame to the next."""
        return self.hop / self.rate

    def place(self, seconds):
        """A time as a number of frames: i at the centre of frame i."""
        return (seconds * self.rate - self.offset) / self.hop

    def edges(self, frames: int, seconds: float) -> np.ndarray:
        """(frames + 1,) seconds: half way between the centres; the outer ones are the recording's ends."""
        edges = (self.offset + (np.arange(frames + 1) - 0.5) * self.hop) / self.rate
        edges[0], edges[-1] = 0.0, seconds
        return np.minimum(edges, seconds)


def frame_targets(
    spans: Iterable[Span], ids: dict[str, int], frames: int, grid: FrameGrid, start: float, seconds: float
) -> np.ndarray:
    """(frames, classes) int8 of a window from `start` on, `seconds` long: 1 where a frame's centre is within a span.

    A span between two centres, a point too, has the frame that is nearest to its middle, in the window that has that.
    """
    targets = np.zeros((frames, len(ids)), np.int8)
    for span in spans:
        first, last = (int(np.ceil(grid.place(time - start) - ROUNDING)) for time in (span.start, span.end))
        middle = (span.start + span.end) / 2 - start
        if last <= first and 0 <= middle <= seconds:
            first = min(max(round(grid.place(middle)), 0), frames - 1)
            last = first + 1
        targets[max(first, 0) : max(last, 0), ids[span.label]] = 1
    return targets


# ---- frames -> spans


@dataclass(frozen=True)
class Event:
    """A predicted span, in seconds, and the mean probability of its frames."""

    start: float
    end: float
    label: str
    probability: float

    def span(self) -> Span:
        return Span(self.start, self.end, self.label)


@dataclass(frozen=True)
class Decoding:
    """What turns probabilities into spans; a model's config keeps it.

    Args:
        thresholds: by class; where there is none, 0.5.
        median_filter_seconds: width of the median filter over each class's probabilities; 0 for none.
        min_gap_seconds: shorter gaps between two spans of a class are closed; before:
        min_span_seconds: shorter spans are left out.
    """

    thresholds: dict[str, float] = field(default_factory=dict)
    median_filter_seconds: float = 0.0
    min_gap_seconds: float = 0.0
    min_span_seconds: float = 0.0

    def to_dict(self) -> dict:
        return asdict(self)

    def threshold(self, label: str) -> float:
        return self.thresholds.get(label, DEFAULT_THRESHOLD)


def smooth(probabilities: np.ndarray, grid: FrameGrid, seconds: float) -> np.ndarray:
    """Median over an odd number of frames, near `seconds` long; (frames, classes).

    A median and a threshold can change places, so one filtering serves all thresholds.
    """
    width = 2 * round(seconds / grid.seconds / 2) + 1
    return median_filter(probabilities, (width, 1), mode="nearest") if width > 1 else probabilities


def runs(active: np.ndarray) -> np.ndarray:
    """(frames,) bool -> (runs, 2): first frame, and the one behind the last."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(np.int8)))
    return changes.reshape(-1, 2)


def close_gaps(found: np.ndarray, edges: np.ndarray, decoding: Decoding) -> np.ndarray:
    """Runs (runs, 2) without the short gaps between them, then without those that are short themselves."""
    if len(found) and decoding.min_gap_seconds > 0:
        gaps = edges[found[1:, 0]] - edges[found[:-1, 1]] >= decoding.min_gap_seconds - ROUNDING
        found = np.stack([found[np.r_[True, gaps], 0], found[np.r_[gaps, True], 1]], 1)
    return found[edges[found[:, 1]] - edges[found[:, 0]] >= decoding.min_span_seconds - ROUNDING]


def decode(
    probabilities: np.ndarray, grid: FrameGrid, seconds: float, classes: Sequence[str], decoding: Decoding
) -> list[Event]:
    """(frames, classes) of a recording of so many seconds -> its spans, by start."""
    smoothed = smooth(probabilities, grid, decoding.median_filter_seconds)
    edges, events = grid.edges(len(probabilities), seconds), []
    for index, label in enumerate(classes):
        for first, last in close_gaps(runs(smoothed[:, index] >= decoding.threshold(label)), edges, decoding):
            mean = float(probabilities[first:last, index].mean())
            events.append(Event(float(edges[first]), float(edges[last]), label, mean))
    return sorted(events, key=lambda event: (event.start, event.end, event.label))


# ---- metrics


def count_matches(reference: np.ndarray, predicted: np.ndarray) -> int:
    """Events of one class in one recording that are found; (n, 2), (m, 2) starts and ends in seconds.

    Found: the start within COLLAR_SECONDS, the end within that or COLLAR_SHARE of the event's length, whichever is
    more. Each event has at most one partner, and as many as can have one (maximum matching, sed_eval's "optimal").
    """
    if not len(reference) or not len(predicted):
        return 0
    predicted = predicted[np.argsort(predicted[:, 0], kind="stable")]
    collars = np.maximum(COLLAR_SECONDS, COLLAR_SHARE * (reference[:, 1] - reference[:, 0])) + ROUNDING
    firsts = np.searchsorted(predicted[:, 0], reference[:, 0] - COLLAR_SECONDS - ROUNDING)
    lasts = np.searchsorted(predicted[:, 0], reference[:, 0] + COLLAR_SECONDS + ROUNDING, "right")
    pairs = [
        (row, column)
        for row, (first, last) in enumerate(zip(firsts, lasts))
        for column in range(first, last)
        if abs(predicted[column, 1] - reference[row, 1]) <= collars[row]
    ]
    if not pairs:
        return 0
    rows, columns = np.array(pairs).T
    graph = csr_matrix((np.ones(len(pairs), bool), (rows, columns)), shape=(len(reference), len(predicted)))
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


def event_counts(reference: Iterable, predicted: Iterable, classes: Sequence[str]) -> np.ndarray:
    """(classes, 3): events found, in the reference, predicted, of one recording."""
    sides = [times_by_class(events, classes) for events in (reference, predicted)]
    return np.array([[count_matches(*pair), len(pair[0]), len(pair[1])] for pair in zip(*sides)]).reshape(-1, 3)


def times_by_class(events: Iterable, classes: Sequence[str]) -> list[np.ndarray]:
    """(events, 2) starts and ends of each class."""
    times = {label: [] for label in classes}
    for event in events:
        times[event.label].append((event.start, event.end))
    return [np.array(times[label], float).reshape(-1, 2) for label in classes]


def segment_counts(reference: Iterable, predicted: Iterable, classes: Sequence[str], seconds: float) -> np.ndarray:
    """(classes, 3) like `event_counts`, of segments of SEGMENT_SECONDS: one has a class that sounds anywhere in it."""
    total = max(int(np.ceil(seconds / SEGMENT_SECONDS - ROUNDING)), 1)
    sides = [np.zeros((total, len(classes)), bool) for _ in range(2)]
    for events, active in zip((reference, predicted), sides):
        for index, times in enumerate(times_by_class(events, classes)):
            for start, end in times / SEGMENT_SECONDS:
                first = min(int(np.floor(start + ROUNDING)), total - 1)
                active[first : max(int(np.ceil(end - ROUNDING)), first + 1), index] = True
    return np.stack([(sides[0] & sides[1]).sum(0), sides[0].sum(0), sides[1].sum(0)], 1)


def f1(counts: np.ndarray) -> np.ndarray:
    """(..., 3) found, in the reference, predicted -> (...) F1; NaN where there was nothing and nothing was said."""
    found, reference, predicted = np.moveaxis(np.asarray(counts, float), -1, 0)
    with np.errstate(invalid="ignore"):
        return 2 * found / (reference + predicted)


def micro_macro(counts: np.ndarray) -> tuple[float, float]:
    """F1 of all classes' counts (classes, 3) together, and the mean over the classes that occur or were predicted.

    Both are 1 where nothing was there to be found and nothing was said.
    """
    by_class = f1(counts)
    micro = f1(counts.sum(0))
    return float(np.nan_to_num(micro, nan=1.0)), 1.0 if np.isnan(by_class).all() else float(np.nanmean(by_class))


@dataclass
class Recording:
    """A recording with what was predicted of it.

    Args:
        seconds: its length.
        probabilities: (frames, classes) float32.
        reference: the true spans, of classes that the model knows.
        predicted: by `decode`.
        audio: where it is, undecoded; None where that is not kept.
    """

    name: str
    seconds: float
    probabilities: np.ndarray
    reference: list[Span]
    predicted: list[Event] = field(default_factory=list)
    audio: dict | None = None

    def targets(self, ids: dict[str, int], grid: FrameGrid) -> np.ndarray:
        return frame_targets(self.reference, ids, len(self.probabilities), grid, 0.0, self.seconds)


def score(recordings: list[Recording], classes: Sequence[str], grid: FrameGrid) -> dict[str, np.ndarray]:
    """{"event", "segment"}: counts (classes, 3) over all recordings; {"average_precision"}: (classes,) over their
    frames, NaN for a class that never sounds."""
    ids = {label: index for index, label in enumerate(classes)}
    total = {"event": np.zeros((len(classes), 3), int), "segment": np.zeros((len(classes), 3), int)}
    for recording in recordings:
        sides = recording.reference, recording.predicted
        total["event"] += event_counts(*sides, classes)
        total["segment"] += segment_counts(*sides, classes, recording.seconds)
    targets = np.concatenate([recording.targets(ids, grid) for recording in recordings])
    probabilities = np.concatenate([recording.probabilities for recording in recordings])
    precision = [
        average_precision_score(targets[:, index], probabilities[:, index]) if targets[:, index].any() else np.nan
        for index in range(len(classes))
    ]
    return {**total, "average_precision": np.array(precision)}


def choose_thresholds(
    recordings: list[Recording], classes: Sequence[str], grid: FrameGrid, decoding: Decoding
) -> dict[str, float]:
    """For each class the threshold with the highest mean of event F1 and frame F1, among equals the one nearest 0.5.

    Event F1 alone would be decided by a handful of events. A class that does not sound in the recordings keeps 0.5.
    """
    ids = {label: index for index, label in enumerate(classes)}
    smoothed = [smooth(recording.probabilities, grid, decoding.median_filter_seconds) for recording in recordings]
    targets = [recording.targets(ids, grid).astype(bool) for recording in recordings]
    unfiltered = replace(decoding, median_filter_seconds=0.0)
    chosen = {}
    for label, index in ids.items():
        best = (-1.0, 0.0, DEFAULT_THRESHOLD)
        for threshold in CANDIDATES if any(frames[:, index].any() for frames in targets) else ():
            trial, total = replace(unfiltered, thresholds={label: float(threshold)}), np.zeros((2, 3))
            for recording, values, true in zip(recordings, smoothed, targets):
                one, said = values[:, [index]], values[:, index] >= threshold
                events = decode(one, grid, recording.seconds, [label], trial)
                reference = [span for span in recording.reference if span.label == label]
                total[0] += event_counts(reference, events, [label])[0]
                total[1] += (true[:, index] & said).sum(), true[:, index].sum(), said.sum()
            best = max(best, (float(f1(total).mean()), -abs(float(threshold) - DEFAULT_THRESHOLD), float(threshold)))
        chosen[label] = best[2]
    return chosen
