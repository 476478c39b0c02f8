"""Windows -> batches. With order.py the only place that holds order, and all of its state; audio is decoded last.

Order is decided on windows, which are a few numbers each: a block of them is shuffled, bucketed by length, cut into
batches, and the batches are shuffled. Everything random is drawn from (seed, reader, block, batch), so where the
readers of the rows were when the block began, and the number of the next batch in it, is the whole state of a stream.
"""

import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from acoustic.console import ShareError
from acoustic.data.decode import read_window
from acoustic.data.headers import Silent, Skip
from acoustic.data.order import Blocks, Reader, Skipped
from acoustic.data.rows import Rows
from acoustic.data.windows import Plan, Window

# A batch takes windows of the next longer kind, cropped, until it is half full; but none that would lose a quarter.
MIN_FILL, MAX_CROP = 0.5, 0.25

# By chance a reader's share of a small, damaged data set holds no audio for an epoch; after so many there is none.
MAX_SILENT_EPOCHS = 20
# Where an epoch takes long because every row is waited for, as behind a server that is gone, fewer are enough.
FEWEST_SILENT_EPOCHS, MAX_SILENT_SECONDS = 3, 120


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
        # What the model hears: cropped, and without padding.
        samples = sum(map(len, waveforms))
        if "input_values" in batch:
            samples = min(samples, math.prod(batch["input_values"].shape))
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
