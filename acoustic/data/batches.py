"""Rows -> windows -> batches. The only place that holds order, and all of its state; audio is decoded last.

Order is decided on windows, which are a few numbers each: a block of them is shuffled, bucketed by length, cut into
batches, and the batches are shuffled. Everything random is drawn from (seed, reader, block, batch), so where the
readers of the rows were when the block began, and the number of the next batch in it, is the whole state of a stream.
"""

import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from acoustic.console import ShareError
from acoustic.data.decode import read_window
from acoustic.data.headers import Silent, Skip, read_header
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.windows import Plan, Window

# Windows that are shuffled and bucketed together. They are a few hundred bytes each: nothing is decoded yet.
BLOCK_WINDOWS = 4096
# Rows of a parquet file or a Hub stream hold their audio, still encoded; so much of it is kept at a time.
BLOCK_BYTES = 256 * 2**20

FIRST_BLOCK = 1 / 16  # of these

# A batch takes windows of the next longer kind, cropped, until it is half full; but none that would lose a quarter.
MIN_FILL, MAX_CROP = 0.5, 0.25

# By chance a reader's share of a small, damaged data set holds no audio for an epoch; after so many there is none.
MAX_SILENT_EPOCHS = 20
# Where an epoch takes long because every row is waited for, as behind a server that is gone, fewer are enough.
FEWEST_SILENT_EPOCHS, MAX_SILENT_SECONDS = 3, 120


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


class BatchStream(IterableDataset):
    """Batches of at most `batch_seconds` of audio, for one rank; DataLoader workers divide the rank's share.

    Every batch is what `collate(windows, waveforms)` makes, with entries about itself: "audio_seconds", "skipped" (a
    list of `Skipped`) and "rows" (rows met) since the last batch, "epoch" (how many of the first source) and "state"
    (what continues after it). One without "audio_seconds" only reports what was skipped. Training streams never end,
    so no rank starves.

    Args:
        sources: (rows, weight): where the recordings come from and, of several, their shares of the audio.
        plan: which windows of a recording are used.
        collate: (windows, waveforms) -> the model's inputs.
        rate: Hz at which the waveforms are read.
        batch_seconds: the most audio in a batch, counting the length of its longest window for each.
        train: endless and shuffled, else once and in order.
        unlabeled: no label holds for a window, so a batch is cropped to its shortest, and silence teaches nothing.
        max_seconds: read no more audio than this, over all ranks.
    """

    def __init__(
        self,
        sources: list[tuple[Rows, float]],
        plan: Plan,
        collate: Callable[[list[Window], list[np.ndarray]], dict],
        *,
        rate: int,
        batch_seconds: float,
        train: bool,
        unlabeled: bool = False,
        max_seconds: float = math.inf,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.sources, self.plan, self.collate = sources, plan, collate
        self.rate, self.batch_seconds, self.train, self.unlabeled = rate, batch_seconds, train, unlabeled
        self.max_seconds, self.seed, self.rank, self.world_size = max_seconds, seed, rank, world_size
        # Of a resumed stream: a state for each worker, and the worker whose turn it is. See loader.py.
        self.starts: list[dict | None] | None = None
        self.turn = 0

    @property
    def description(self) -> str:
        return ", ".join(rows.description for rows, _ in self.sources)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        number = (worker_id + self.turn) % workers
        start = self.starts[number] if self.starts else None
        return self.batches(self.rank * workers + number, self.world_size * workers, start)

    def batches(self, shard: int, num_shards: int, start: dict | None = None) -> Iterator[dict]:
        """The batches of one reader, from the state `start` on."""
        seed = self.seed if self.train else None
        readers = [Reader(rows, self.plan, shard, num_shards, seed) for rows, _ in self.sources]
        weights = [weight for _, weight in self.sources]
        blocks = Blocks(readers, weights, endless=self.train, max_seconds=self.max_seconds / num_shards)
        first, heard = 0, 0
        if start is not None:
            blocks.load_state_dict(start)
            first, heard = start["batch"], sum(reader.epoch for reader in readers)
        skipped: list[Skipped] = []
        reason, since = "there is no window for it; use fewer workers or processes", time.monotonic()
        state, begin = blocks.state_dict(), readers[0].progress
        while (block := blocks.take()) is not None:
            batches = self.cut(block, self.generator(shard, state["block"], 0))
            state["check"] = checksum(batches)
            if first:
                take_report(readers, skipped)  # was told before the stream was left
                if start["check"] != state["check"]:
                    print(f"warning: {CHANGED}", file=sys.stderr, flush=True)
            step = (readers[0].progress - begin) / max(len(batches), 1)
            for number, windows in enumerate(batches[first:], first + 1):
                batch = self.make(windows, self.generator(shard, state["block"], number), skipped)
                if batch is not None:
                    heard = sum(reader.epoch for reader in readers)
                    about = {"epoch": begin + step * number, "state": {**state, "batch": number}}
                    yield {**batch, **take_report(readers, skipped), **about}
            first, state, begin = 0, blocks.state_dict(), readers[0].progress
            report = take_report(readers, skipped)
            if report["skipped"]:
                reason = ": ".join(report["skipped"][-1][:2])
                yield {**report, "epoch": begin, "state": {**state, "batch": 0}}
            silent = sum(reader.epoch for reader in readers) - heard
            if silent == 0:
                since = time.monotonic()
            waited = silent >= FEWEST_SILENT_EPOCHS and time.monotonic() - since > MAX_SILENT_SECONDS
            if self.train and (silent >= MAX_SILENT_EPOCHS or waited):
                raise ShareError(
                    f"dataset_name: no usable audio in share {shard + 1} of {num_shards} of {self.description!r} "
                    f"(the last: {reason})"
                )

    def generator(self, *numbers: int) -> np.random.Generator | None:
        return np.random.default_rng([self.seed, *numbers]) if self.train else None

    def cut(self, block: list[Window], generator: np.random.Generator | None) -> list[list[Window]]:
        """Batches of windows of near length. In training the order of batches and among equal lengths is random."""
        if generator:
            generator.shuffle(block)
        block.sort(key=lambda window: window.seconds)
        ends_before = self.ends_before_cropped if self.unlabeled else self.ends_before_padded
        batches: list[list[Window]] = []
        for window in block:
            if not batches or ends_before(batches[-1], window):
                batches.append([])
            batches[-1].append(window)
        if generator:
            generator.shuffle(batches)
        return batches

    def ends_before_padded(self, batch: list[Window], longer: Window) -> bool:
        return (len(batch) + 1) * longer.seconds > self.batch_seconds + 1e-6

    def ends_before_cropped(self, batch: list[Window], longer: Window) -> bool:
        """Full; or the next window would be cropped, and the batch is half full or the window would lose too much."""
        shortest, count = batch[0].seconds, len(batch)
        if (count + 1) * shortest > self.batch_seconds + 1e-6:
            return True
        enough = count * shortest >= MIN_FILL * self.batch_seconds or shortest < (1 - MAX_CROP) * longer.seconds
        return longer.seconds > shortest and enough

    def make(self, windows: list[Window], generator: np.random.Generator | None, skipped: list) -> dict | None:
        """Decode the windows of one batch and collate those that could be decoded."""
        if self.unlabeled:
            windows = [window.crop(windows[0].seconds, generator) for window in windows]
        kept, waveforms = [], []
        for window in windows:
            try:
                waveform = read_window(window.row["audio"], window.start, window.stop, self.rate, self.unlabeled)
            except Skip as skip:
                # Pauses are no fault, and a recording that several readers share is one fault.
                fault = skip.fault and window.row["mine"] and (window.alone or not isinstance(skip, Silent))
                reason = (
                    f"{skip} (at {window.start / window.rate:.0f} s)" if window.start >= window.rate else str(skip)
                )
                skipped.append(Skipped(window.row["name"], reason, fault, window.row["epoch"]))
            else:
                kept.append(window)
                waveforms.append(waveform)
        if not kept:
            return None
        batch = self.collate(kept, waveforms)
        # What the model hears, without padding.
        samples = min(sum(map(len, waveforms)), math.prod(batch["input_values"].shape))
        return {**batch, "audio_seconds": samples / self.rate}


CHANGED = (
    "the audio is not quite what it was when the checkpoint was saved: a recording went, changed, or could not be "
    "read then or now; the run goes on from the same place, and a few windows near it are heard twice or not at all"
)


def checksum(batches: list[list[Window]]) -> int:
    """Of the order and place of all windows of a block."""
    places = [(window.row["name"], window.start, window.stop) for batch in batches for window in batch]
    return zlib.crc32(repr(places).encode("utf-8", "surrogateescape"))


def take_report(readers: list[Reader], skipped: list[Skipped]) -> dict:
    """{"skipped", "rows"} since the last report."""
    report = {"skipped": skipped[:], "rows": 0}
    skipped.clear()
    for reader in readers:
        report["skipped"] += reader.skipped
        report["rows"] += reader.rows_met
        reader.skipped, reader.rows_met = [], 0
    return report
