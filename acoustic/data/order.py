"""Rows -> windows, in an order that can be entered anywhere: readers of one source each, and the blocks they fill."""

import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from acoustic.data.headers import Skip, read_header
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.windows import Plan, Window

# Windows that are shuffled and bucketed together. They are a few hundred bytes each: nothing is decoded yet.
BLOCK_WINDOWS = 4096
# Rows of a parquet file or a Hub stream hold their audio, still encoded; so much of it is kept at a time.
BLOCK_BYTES = 256 * 2**20

FIRST_BLOCK = 1 / 16  # of these


class Skipped(NamedTuple):
    """A recording that could not be used, or not all of it, in an epoch of its source. `fault`: see `Skip`."""

    name: str
    reason: str
    fault: bool
    epoch: int = 0


class Reader:
    """The windows of one source for one of `num_shards` readers: epoch after epoch, from any place.

    Attributes:
        epoch: the epoch of the next window.
        rows_met: rows looked at so far, those that were skipped included.
    """

    def __init__(self, rows: Rows, plan: Plan, shard: int, num_shards: int, seed: int | None):
        self.rows, self.plan, self.shard, self.num_shards, self.seed = rows, plan, shard, num_shards, seed
        # Too few rows to deal them out: every reader walks all of them and takes its share of the windows.
        self.by_window = num_shards > 1 and not rows.can_divide(num_shards)
        self.epoch, self.position, self.taken, self.dealt = 0, None, 0, 0
        self.skipped: list[Skipped] = []
        self.rows_met = 0

    def state_dict(self) -> dict:
        """Where the next window is: its epoch, its row, the windows taken from that row and dealt before it."""
        return {"epoch": self.epoch, "position": self.position, "taken": self.taken, "dealt": self.dealt}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position, self.taken, self.dealt = (
            state[name] for name in ("epoch", "position", "taken", "dealt")
        )

    def windows(self) -> Iterator[Window | None]:
        """What is left of this epoch, None for each row that can't be used; then the reader is at the next epoch."""
        shard, num_shards = (0, 1) if self.by_window else (self.shard, self.num_shards)
        number, entered_at = 0, self.position
        for position, row in self.rows.iterate(shard, num_shards, self.seed, self.epoch, self.position):
            self.dealt += number  # of the row before: until the next row begins, a state is of a place within a row
            taken, entered_at = (self.taken if position == entered_at else 0), None
            self.position, self.taken, number = position, taken, 0
            mine = not self.by_window or zlib.crc32(row_key(row)) % self.num_shards == self.shard
            self.rows_met += mine and not taken
            row |= {"epoch": self.epoch, "mine": mine}  # for what is to be said of it later
            try:
                for number, window in enumerate(self.plan(row, read_header(row["audio"]), self.generator(row)), 1):
                    if number > taken:
                        self.taken = number
                        if not self.by_window or (self.dealt + number) % self.num_shards == self.shard:
                            yield window
            except Skip as skip:
                if not taken:
                    self.taken = 1  # told once, also if the stream is left here
                    self.skipped += [Skipped(row["name"], str(skip), skip.fault, self.epoch)] if mine else []
                    yield None
        self.epoch, self.position, self.taken, self.dealt = self.epoch + 1, None, 0, 0

    @property
    def progress(self) -> float:
        """Epochs read, with the part of this one where the number of rows is known."""
        if self.position is None or not isinstance(self.rows, IndexedRows):
            return float(self.epoch)
        share = len(self.rows) if self.by_window else math.ceil(len(self.rows) / self.num_shards)
        return self.epoch + self.position / share

    def generator(self, row: dict) -> np.random.Generator | None:
        """One for a row and an epoch, whoever reads it: readers that walk the same rows must plan the same windows."""
        if self.seed is None:
            return None
        return np.random.default_rng([self.seed, self.epoch, zlib.crc32(row_key(row))])


def row_key(row: dict) -> bytes:
    return row["name"].encode("utf-8", "surrogateescape")


class Blocks:
    """Blocks of windows from one source or several, for one reader, from any place.

    Of several sources the next window is taken from the one that is furthest behind its weight in seconds of audio, so
    their shares are exact and need no random numbers. Each counts its own epochs. A block of a single source ends with
    its epoch.
    """

    def __init__(self, readers: list[Reader], weights: list[float], endless: bool, max_seconds: float = math.inf):
        self.readers, self.weights, self.endless, self.max_seconds = readers, weights, endless, max_seconds
        self.drawn = [0.0] * len(readers)
        self.taken = 0
        self.iterators: list[Iterator | None] = []

    def state_dict(self) -> dict:
        readers = [reader.state_dict() for reader in self.readers]
        return {"block": self.taken, "drawn": list(self.drawn), "readers": readers}

    def load_state_dict(self, state: dict) -> None:
        self.taken, self.drawn = state["block"], list(state["drawn"])
        for reader, its in zip(self.readers, state["readers"]):
            reader.load_state_dict(its)

    def take(self) -> list[Window] | None:
        """At most BLOCK_WINDOWS windows and unusable rows, and BLOCK_BYTES of audio in rows; None at the end."""
        self.iterators = self.iterators or [reader.windows() for reader in self.readers]
        block, items, held, rows = [], 0, 0, set()
        # The first blocks are small, so that training begins at once.
        share = FIRST_BLOCK * 4 ** min(self.taken, 2) if self.endless else 1.0
        most, most_bytes = max(int(share * BLOCK_WINDOWS), 1), share * BLOCK_BYTES
        while items < most and held <= most_bytes and sum(self.drawn) < self.max_seconds:
            which = self.next_source()
            if which is None:
                break
            items += 1
            window = next(self.iterators[which], END)
            if window is END:
                self.iterators[which] = self.readers[which].windows() if self.endless else None
                if self.endless and len(self.readers) == 1:
                    break
            elif window is not None:
                block.append(window)
                self.drawn[which] += window.seconds
                if id(window.row) not in rows:
                    rows.add(id(window.row))
                    held += len(window.row["audio"].get("bytes") or b"")
        self.taken += 1
        return block if items else None

    def next_source(self) -> int | None:
        """The source furthest behind its weight, of those that have not ended."""
        open_sources = [index for index, iterator in enumerate(self.iterators) if iterator is not None]
        return min(open_sources, key=lambda index: self.drawn[index] / self.weights[index], default=None)


END = object()
