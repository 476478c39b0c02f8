"""Rows of a data set, undecoded, in an order that can be entered anywhere: a position is all that resuming needs.

A row is {"audio": {"path", "bytes", ...}, "name", "text", "label"}. Every kind of rows has

    iterate(shard, num_shards, seed, epoch, start) -> (position, row), ...

where shards are disjoint and together all rows, the order changes with the epoch (without a seed it is the rows' own),
and `start`, a position that was given before, makes that row the first. Positions are small JSON values.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence

import datasets
import numpy as np

from acoustic.data.fields import names_of
from acoustic.data.shards import broken, first_line

# With fewer rows a reader, windows are dealt out and not rows, so that no reader starves on five long recordings.
MIN_ROWS_PER_SHARD = 8


class PackedList(Sequence):
    """JSON values in one piece of memory.

    A list of 100,000 Python objects would slowly be copied into every forked worker: reading an object changes its
    reference count, and with it its page.
    """

    def __init__(self, values: Iterable):
        packed = [json.dumps(value).encode() for value in values]
        self.ends = np.cumsum([len(value) for value in packed], dtype=np.int64)
        self.content = b"".join(packed)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int):
        if not 0 <= index < len(self.ends):
            raise IndexError(index)
        return json.loads(self.content[self.ends[index - 1] if index else 0 : self.ends[index]])


class IndexedRows:
    """Rows that can be looked up by number: a `PackedList` or a `datasets.Dataset`. Shuffled as a whole, every epoch.

    `indices` are the items that are in use; an item keeps its number, and so its name, in every part.
    """

    def __init__(self, items, to_row, description: str, indices: np.ndarray | None = None):
        self.items, self.to_row, self.description = items, to_row, description
        self.indices = np.arange(len(items)) if indices is None else np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        number = int(self.indices[index])
        return self.to_row(self.items[number], number)

    def select(self, keep) -> "IndexedRows":
        """The rows whose `keep(row)` is true; decided on names and labels, no audio is opened."""
        return self.take([index for index in range(len(self)) if keep(self[index])])

    def take(self, indices: list[int]) -> "IndexedRows":
        return IndexedRows(self.items, self.to_row, self.description, self.indices[np.asarray(indices, dtype=int)])

    def can_divide(self, num_shards: int) -> bool:
        return len(self) >= MIN_ROWS_PER_SHARD * num_shards

    def iterate(self, shard: int, num_shards: int, seed: int | None, epoch: int, start: int | None = None):
        order = np.arange(len(self)) if seed is None else np.random.default_rng([seed, epoch]).permutation(len(self))
        mine = order[shard::num_shards]
        for position in range(start or 0, len(mine)):
            yield position, self[int(mine[position])]

    def columns(self, column: str) -> Iterator:
        return (self[index][column] for index in range(len(self)))

    def fingerprint(self) -> str:
        """Changes when rows come or go: a position in the old order means nothing in the new one."""
        return f"{len(self)} of {len(self.items)} recordings"


class ShardedRows:
    """Rows inside of larger files (tar, parquet), read in order: the files are shuffled, and windows within a block.

    Args:
        files: paths or URLs.
        reader: `reader(file, start)` gives (position, row); `reader.column(file, name)` one column of a file.
        keep: which rows are in use.
    """

    def __init__(self, files: Sequence[str], reader, description: str, keep: Callable[[dict], bool] | None = None):
        self.files, self.reader, self.description, self.keep = files, reader, description, keep

    def select(self, keep) -> "ShardedRows":
        return ShardedRows(self.files, self.reader, self.description, both(self.keep, keep))

    def can_divide(self, num_shards: int) -> bool:
        return len(self.files) >= num_shards

    def iterate(self, shard: int, num_shards: int, seed: int | None, epoch: int, start: list | None = None):
        count = len(self.files)
        order = np.arange(count) if seed is None else np.random.default_rng([seed, epoch]).permutation(count)
        mine = order[shard::num_shards]
        first, within = start or (0, None)
        for number in range(first, len(mine)):
            for position, row in self.reader(self.files[int(mine[number])], within):
                if self.keep is None or self.keep(row):
                    yield [number, position], row
            within = None

    def columns(self, column: str) -> Iterator:
        if self.keep is not None:
            return (row[column] for _, row in self.iterate(0, 1, None, 0))
        return (value for file in self.files for value in self.reader.column(file, column))

    def fingerprint(self) -> str:
        return f"{len(self.files)} shards"


class StreamedRows:
    """Rows of any other `datasets.IterableDataset`: its files are shuffled, and windows within a block."""

    def __init__(self, dataset: datasets.IterableDataset, to_row, description: str, keep=None):
        self.dataset, self.to_row, self.description, self.keep = dataset, to_row, description, keep

    def select(self, keep) -> "StreamedRows":
        return StreamedRows(self.dataset, self.to_row, self.description, both(self.keep, keep))

    def can_divide(self, num_shards: int) -> bool:
        return self.dataset.num_shards >= num_shards

    def iterate(self, shard: int, num_shards: int, seed: int | None, epoch: int, start: dict | None = None):
        dataset = self.dataset
        if seed is not None:
            # One input shard: interleaving several would start threads, and sleep 5 s at the end of an epoch.
            # Not `set_epoch`: `shard` below would forget it, and every epoch would have the same order.
            generator = np.random.default_rng([seed, epoch])
            dataset = dataset.shuffle(generator=generator, buffer_size=1, max_buffer_input_shards=1)
        dataset = dataset.shard(num_shards=num_shards, index=shard) if num_shards > 1 else dataset
        number = 0
        if start is not None:
            number = start["number"]
            if start["state"] is not None:
                dataset.load_state_dict(start["state"])
        # Not `for item in dataset`: in a DataLoader worker that would give this worker a share of the share.
        batches = iter(dataset.iter(batch_size=1))
        position = {"number": number, "state": start and start["state"]}
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # whatever `datasets`, its readers and their networks raise
                yield position, broken(f"{self.description} after row {number}", f"broken shard: {first_line(error)}")
                return
            if batch is None:
                return
            row = self.to_row({column: values[0] for column, values in batch.items()}, number)
            if self.keep is None or self.keep(row):
                yield position, row
            number += 1
            position = {"number": number, "state": dataset.state_dict()}

    def columns(self, column: str) -> Iterator:
        """One column of the kept rows, as rows have it; the audio stays unread where the format can leave it so."""
        if self.keep is not None:
            return (row[column] for _, row in self.iterate(0, 1, None, 0))
        if column not in self.to_row.sources:
            return iter(())
        items = self.dataset.select_columns(list(names_of(self.to_row.sources[column])))
        return (self.to_row.value(column, item) for item in items)

    def fingerprint(self) -> str:
        return f"{self.dataset.num_shards} shards"


Rows = IndexedRows | ShardedRows | StreamedRows


def both(first: Callable[[dict], bool] | None, second: Callable[[dict], bool]) -> Callable[[dict], bool]:
    return second if first is None else lambda row: first(row) and second(row)
