"""A look at the headers before a run: how much audio there is, what would be skipped, how many windows it makes."""

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from acoustic.console import UserError
from acoustic.data.headers import Skip, read_header
from acoustic.data.sources import IndexedRows, Rows
from acoustic.data.windows import Plan

# A header takes about 0.1 ms from a warm disk; more recordings than this are sampled, unless they must be counted.
MAX_COUNTED = 20_000
SAMPLE = 1_000


@dataclass
class Survey:
    """What the headers say. `complete` is False when only a sample was read; then the totals are estimates."""

    recordings: int
    windows: int = 0
    seconds: float = 0.0
    longest_seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    complete: bool = True

    def reasons(self) -> str:
        counts = Counter(reason_kind(reason) for reason in self.skipped.values())
        return ", ".join(f"{count} x {reason}" for reason, count in counts.most_common(3))

    def __str__(self) -> str:
        about = "" if self.complete else "about "
        hours, windows = f"{about}{self.seconds / 3600:.2f} h of audio", f"{about}{self.windows} windows"
        text = f"{self.recordings} recordings, {hours} in {windows}"
        return text + (f"; {len(self.skipped)} skipped ({self.reasons()})" if self.skipped else "")


def reason_kind(reason: str) -> str:
    """A reason without the recording's own numbers, so that alike ones are counted together."""
    return re.sub(r"^[\d.]+ s is ", "", reason)


def survey(rows: Rows, plan: Plan, *, count_all: bool = False, show_progress: bool = False) -> Survey | None:
    """Read the headers of all rows, or of a sample of many. None for a stream, which can't be looked at beforehand.

    Raises:
        UserError: none of the recordings can be used; the message says what dominates.
    """
    if not isinstance(rows, IndexedRows):
        return None
    indices = np.arange(len(rows))
    complete = count_all or len(rows) <= MAX_COUNTED
    if not complete:
        indices = np.sort(np.random.default_rng(0).choice(len(rows), SAMPLE, replace=False))
    result = Survey(recordings=len(rows), complete=complete)
    generator = np.random.default_rng(0)
    for index in tqdm(indices, "reading headers", unit=" files", disable=not show_progress or len(indices) < 500):
        row = rows[int(index)]
        try:
            windows = plan(row, read_header(row["audio"]), generator)
        except Skip as skip:
            result.skipped[row["name"]] = str(skip)
            continue
        result.windows += len(windows)
        result.seconds += sum(window.seconds for window in windows)
        result.longest_seconds = max(result.longest_seconds, *(window.seconds for window in windows))
    if result.windows == 0:
        raise UserError(
            f"dataset_name: nothing in {rows.description!r} can be used: {result.reasons() or 'it is empty'}"
        )
    scale = len(rows) / len(indices)
    result.windows, result.seconds = round(result.windows * scale), result.seconds * scale
    return result
