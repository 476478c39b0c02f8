"""A look at the headers before a run: how much audio there is, what would be skipped, how many windows it makes."""

from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from acoustic.console import UserError
from acoustic.data.decode import read_window
from acoustic.data.headers import Skip, read_header
from acoustic.data.remote import is_remote
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.tally import Tally, most_common, refuse_too_many
from acoustic.data.windows import Plan

# A header takes about 0.1 ms from a warm disk; more recordings than this are sampled, unless they must be counted.
MAX_COUNTED = 20_000
SAMPLE = 1_000
# Behind a URL it takes two round trips.
MAX_COUNTED_REMOTE = 200
# A header says nothing of NaN, silence or a missing end. In small data sets the end of every recording is listened to.
MAX_LISTENED = 500


@dataclass
class Survey:
    """What the headers say. `complete` is False when only a sample was read; then the totals are estimates."""

    recordings: int
    windows: int = 0
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    complete: bool = True

    def __str__(self) -> str:
        about = "" if self.complete else "about "
        hours, windows = f"{about}{self.seconds / 3600:.2f} h of audio", f"{about}{self.windows} windows"
        text = f"{self.recordings} recordings, {hours} in {windows}"
        skipped = len(self.tally.names)
        return text + (f"; {skipped} skipped ({most_common(self.tally.reasons)})" if skipped else "")


def survey(
    sources: list[tuple[Rows, float]],
    plan: Plan,
    *,
    unlabeled: bool = False,
    max_skipped_fraction: float = 1.0,
    count_all: bool = False,
    show_progress: bool = False,
) -> Survey | None:
    """Read the headers of all rows, or of a sample of many. None where a source is a stream: that can't be looked at.

    `unlabeled`: silence is a fault, as in `BatchStream`.

    Raises:
        UserError: none of the recordings of a source can be used, or too many can't; the message says what dominates.
    """
    if not all(isinstance(rows, IndexedRows) for rows, _ in sources):
        return None
    total = Survey(recordings=0)
    for rows, _ in sources:
        found = survey_rows(rows, plan, unlabeled, count_all, show_progress)
        refuse_too_many(
            found.tally.faults, found.tally.rows, found.tally.fault_reasons, max_skipped_fraction, rows.description
        )
        total.recordings += found.recordings
        total.windows += found.windows
        total.seconds += found.seconds
        total.complete &= found.complete
        total.tally.merge(found.tally)
    return total


def survey_rows(rows: IndexedRows, plan: Plan, unlabeled: bool, count_all: bool, show_progress: bool) -> Survey:
    indices = np.arange(len(rows))
    remote = is_remote(rows[0]["audio"]["path"] or "") if len(rows) else False
    complete = count_all or len(rows) <= (MAX_COUNTED_REMOTE if remote else MAX_COUNTED)
    if not complete:
        size = MAX_COUNTED_REMOTE if remote else SAMPLE
        indices = np.sort(np.random.default_rng(0).choice(len(rows), size, replace=False))
    result = Survey(recordings=len(rows), complete=complete)
    generator, least = np.random.default_rng(0), 20 if remote else 500
    for index in tqdm(indices, "reading headers", unit=" files", disable=not show_progress or len(indices) < least):
        row = rows[int(index)]
        skipped = []
        try:
            windows, seconds, window = 0, 0.0, None
            for window in plan(row, read_header(row["audio"]), generator):
                windows, seconds = windows + 1, seconds + window.seconds
            if window is not None and len(rows) <= MAX_LISTENED and not remote:
                refuse_silence = unlabeled and window.alone
                read_window(window.row["audio"], window.start, window.stop, window.rate, refuse_silence)
            result.windows, result.seconds = result.windows + windows, result.seconds + seconds
        except Skip as skip:
            skipped = [(row["name"], str(skip), skip.fault, 0)]
        result.tally.add(skipped, rows=1)
    if result.windows == 0:
        reasons = most_common(result.tally.reasons) or "it is empty"
        raise UserError(f"dataset_name: nothing in {rows.description!r} can be used: {reasons}")
    scale = len(rows) / len(indices)
    result.windows, result.seconds = round(result.windows * scale), result.seconds * scale
    return result
