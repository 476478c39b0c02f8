"""Recordings one after the other, each heard on its own, with a progress bar in seconds of audio."""

import sys
from collections import Counter
from collections.abc import Iterator

from tqdm.auto import tqdm

from acoustic.data.headers import Header, Skip, read_header
from acoustic.data.remote import is_remote
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.tally import reason_kind

# A header takes about 0.1 ms from a warm disk; those of more recordings are not read for the sake of a progress bar.
MAX_COUNTED = 20_000


class Listening:
    """What was heard and what was skipped: iterating gives (row, header, answer) of each that could be read.

    Args:
        sources: rows.
        answer: (row, header, progress) -> what is made of a recording; progress is told the seconds heard so far. It
            raises `Skip` where that can't be done: then the recording is named on stderr.
    """

    def __init__(self, sources: list[Rows], answer):
        self.sources, self.answer = sources, answer
        self.answered, self.skipped, self.seconds = 0, 0, 0.0
        self.reasons = Counter()

    def __iter__(self) -> Iterator[tuple[dict, Header, object]]:
        with progress_bar(self.sources) as bar:
            for row, header in with_headers(self.sources):
                start = bar.n
                try:
                    if isinstance(header, Skip):
                        raise header
                    answer = self.answer(row, header, lambda seconds, start=start: advance(bar, start + seconds))
                except Skip as reason:
                    self.skip(file_of(row), str(reason))
                    continue
                self.answered, self.seconds = self.answered + 1, self.seconds + header.seconds
                advance(bar, start + header.seconds)
                bar.set_postfix(files=self.answered, skipped=self.skipped, refresh=False)
                yield row, header, answer

    def skip(self, name: str, reason: str) -> None:
        self.skipped += 1
        self.reasons[reason_kind(reason)] += 1
        tqdm.write(f"skipped: {name}: {reason}", file=sys.stderr)


def say_unread(row: dict, unread: list[dict]) -> bool:
    """On stderr, where some of a recording could not be read. Returns whether that is so."""
    for part in unread[:1]:
        tqdm.write(f"read in part: {file_of(row)}: {part['reason']} ({part['start']:g} s)", file=sys.stderr)
    return bool(unread)


def advance(bar: tqdm, seconds: float) -> None:
    bar.update(round(seconds) - bar.n)


def file_of(row: dict) -> str:
    """What a recording is called: where it is, or for a part of a larger file its name there."""
    audio = row["audio"]
    is_file = audio.get("path") and audio.get("bytes") is None and "offset" not in audio
    return audio["path"] if is_file else row["name"]


def with_headers(sources: list[Rows]) -> Iterator[tuple[dict, Header | Skip]]:
    """Each row with its header, or the reason why there is none, in the rows' own order."""
    for rows in sources:
        for _, row in rows.iterate(0, 1, None, 0):
            try:
                yield row, read_header(row["audio"])
            except Skip as reason:
                yield row, reason


def progress_bar(sources: list[Rows]) -> tqdm:
    """In seconds, in a terminal; of how many where that is soon known."""
    if not sys.stderr.isatty():
        return tqdm(disable=True)
    total = total_seconds(sources)
    return tqdm(total=total and round(total), unit=" s", desc="heard")


def total_seconds(sources: list[Rows]) -> float | None:
    """By the headers; None where that would take long: of streams, of what is behind URLs, of very many files."""
    if not all(isinstance(rows, IndexedRows) for rows in sources) or sum(map(len, sources)) > MAX_COUNTED:
        return None
    if any(len(rows) and is_remote(rows[0]["audio"].get("path") or "") for rows in sources):
        return None
    return sum(header.seconds for _, header in with_headers(sources) if isinstance(header, Header))
