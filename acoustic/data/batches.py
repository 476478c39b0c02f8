"""Rows -> windows -> batches. The only place that holds order; audio is decoded when a batch is made, not before."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from acoustic.console import UserError
from acoustic.data.decode import read_window
from acoustic.data.headers import Skip, read_header
from acoustic.data.sources import IndexedRows, Rows
from acoustic.data.windows import Plan, Window

# Windows that are shuffled and bucketed together. They are a few hundred bytes each: nothing is decoded yet.
BLOCK_WINDOWS = 4096
# Rows of a parquet file or a Hub stream hold their audio, still encoded; so much of it is kept at a time.
BLOCK_BYTES = 256 * 2**20

# Under so many rows a shard, not rows are dealt out but windows, so that no reader starves on five long recordings.
MIN_ROWS_PER_SHARD = 8

# In some order a small share can hold nothing but a bad file; after so many orders without audio there is no hope.
MAX_SILENT_EPOCHS = 20


class BatchStream(IterableDataset):
    """Batches of at most `batch_seconds` of audio, for one rank; DataLoader workers divide the rank's share.

    Every batch is what `collate(windows, waveforms, generator)` makes, with two entries more: "audio_seconds" (float)
    and "skipped", the [(name, reason)] met since the last batch. Training streams never end, so no rank starves.

    Args:
        rows: where the recordings come from.
        plan: which windows of a recording are used.
        collate: (windows, waveforms, generator) -> the model's inputs.
        rate: Hz at which the waveforms are read.
        batch_seconds: the most audio in a batch, counting the length of its longest window for each.
        train: endless and shuffled, else once and in order.
    """

    def __init__(
        self,
        rows: Rows,
        plan: Plan,
        collate: Callable[[list[Window], list[np.ndarray], np.random.Generator], dict],
        *,
        rate: int,
        batch_seconds: float,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.rows, self.plan, self.collate = rows, plan, collate
        self.rate, self.batch_seconds, self.train, self.seed = rate, batch_seconds, train, seed
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        shard, num_shards = self.rank * workers + worker_id, self.world_size * workers
        silent_epochs, reason = 0, "there is no window for it"
        for epoch in itertools.count() if self.train else [0]:
            silent_epochs += 1
            for batch in self.epoch(epoch, shard, num_shards):
                if "audio_seconds" in batch:
                    silent_epochs = 0
                elif batch["skipped"]:
                    reason = ": ".join(batch["skipped"][-1])
                yield batch
            if self.train and silent_epochs == MAX_SILENT_EPOCHS:
                raise UserError(
                    f"dataset_name: no usable audio in share {shard + 1} of {num_shards} of {self.rows.description!r} "
                    f"(the last: {reason})"
                )

    def epoch(self, epoch: int, shard: int, num_shards: int) -> Iterator[dict]:
        generator = np.random.default_rng([self.seed, epoch, shard])
        skipped: list[tuple[str, str]] = []
        windows = self.windows(epoch, shard, num_shards, skipped)
        while block := take_block(windows):
            for batch_windows in self.cut(block, generator):
                batch = self.make(batch_windows, generator, skipped)
                if batch is not None:
                    yield {**batch, "skipped": skipped[:]}
                    skipped.clear()
        if skipped:
            yield {"skipped": skipped}

    def windows(self, epoch: int, shard: int, num_shards: int, skipped: list) -> Iterator[Window]:
        """This shard's windows of an epoch; what can't be used is added to `skipped` with its reason."""
        seed = self.seed if self.train else None
        by_window = isinstance(self.rows, IndexedRows) and len(self.rows) < MIN_ROWS_PER_SHARD * num_shards
        rows = self.rows.iterate(0, 1, seed, epoch) if by_window else self.rows.iterate(shard, num_shards, seed, epoch)
        counter = itertools.count()
        for number, row in enumerate(rows):
            # One generator a row, not a shard: every reader that walks all rows must plan the same windows.
            generator = np.random.default_rng([self.seed, epoch, number, 0 if by_window else shard])
            try:
                for window in self.plan(row, read_header(row["audio"]), generator):
                    if not by_window or next(counter) % num_shards == shard:
                        yield window
            except Skip as skip:
                if not by_window or number % num_shards == shard:
                    skipped.append((row["name"], str(skip)))

    def cut(self, block: list[Window], generator: np.random.Generator) -> list[list[Window]]:
        """Batches of windows of near length. In training the order of batches and among equal lengths is random."""
        if self.train:
            generator.shuffle(block)
        block.sort(key=lambda window: window.seconds)
        batches: list[list[Window]] = [[]]
        for window in block:
            # Sorted, so this window is the longest of its batch so far.
            if batches[-1] and (len(batches[-1]) + 1) * window.seconds > self.batch_seconds + 1e-6:
                batches.append([])
            batches[-1].append(window)
        if self.train:
            generator.shuffle(batches)
        return batches

    def make(self, windows: list[Window], generator: np.random.Generator, skipped: list) -> dict | None:
        """Decode the windows of one batch and collate those that could be decoded."""
        kept, waveforms = [], []
        for window in windows:
            try:
                waveforms.append(read_window(window.row["audio"], window.start, window.stop, self.rate))
                kept.append(window)
            except Skip as skip:
                skipped.append((window.row["name"], str(skip)))
        if not kept:
            return None
        batch = self.collate(kept, waveforms, generator)
        # What the model hears: neither what was cropped away nor padding.
        samples = min(sum(map(len, waveforms)), math.prod(batch["input_values"].shape))
        return {**batch, "audio_seconds": samples / self.rate}


def take_block(windows: Iterator[Window]) -> list[Window]:
    """The next windows to shuffle together: at most BLOCK_WINDOWS, and BLOCK_BYTES of audio embedded in rows."""
    block, held, last_row = [], 0, None
    for window in windows:
        block.append(window)
        if window.row is not last_row:
            held, last_row = held + len(window.row["audio"]["bytes"] or b""), window.row
        if len(block) == BLOCK_WINDOWS or held > BLOCK_BYTES:
            break
    return block


def as_it_is(batch: dict) -> dict:
    """In the place of torch's conversion, which makes lists of tuples and tensors of numbers."""
    return batch


def make_loader(stream: BatchStream, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """A DataLoader that hands the stream's batches on as they are. The stream knows its rank and worker itself."""
    return DataLoader(
        stream,
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
    )
