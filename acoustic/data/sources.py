"""Anything that holds recordings -> rows that stay undecoded: {"audio": {"path", "bytes"}, "name", "text", "label"}.

`name` identifies the recording for as long as its place in the data set stays the same; the held-out part is chosen by
it. `text` and `label` are there when the columns for them were asked for.
"""

import csv
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np

from acoustic.console import UserError
from acoustic.data.headers import AUDIO_SUFFIXES, is_audio_name

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PATH_COLUMNS = ("file_name", "path", "file", "filename", "audio_path")
TABLE_SUFFIXES = (".parquet", ".arrow", ".tar")
NO_AUDIO = {"path": None, "bytes": None}


class IndexedRows:
    """Rows that can be looked up by number: a list of dicts or a `datasets.Dataset`. Shuffled as a whole, every epoch.

    `indices` are the items that are in use; an item keeps its number, and so its name, in every part.
    """

    def __init__(self, items, to_row, description: str, indices: list[int] | None = None):
        self.items, self.to_row, self.description = items, to_row, description
        self.indices = list(range(len(items))) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        number = self.indices[index]
        return self.to_row(self.items[number], number)

    def select(self, keep) -> "IndexedRows":
        """The rows whose `keep(row)` is true; decided on names and labels, no audio is opened."""
        indices = [index for index in range(len(self)) if keep(self[index])]
        return self.take(indices)

    def take(self, indices: list[int]) -> "IndexedRows":
        return IndexedRows(self.items, self.to_row, self.description, [self.indices[index] for index in indices])

    def iterate(self, shard: int, num_shards: int, seed: int | None, epoch: int) -> Iterator[dict]:
        """Rows of one of `num_shards` disjoint shards; in a new order every epoch, or in their own without a seed."""
        order = np.arange(len(self)) if seed is None else np.random.default_rng([seed, epoch]).permutation(len(self))
        for index in order[shard::num_shards]:
            yield self[int(index)]

    def columns(self, column: str) -> Iterator:
        return (self[index][column] for index in range(len(self)))


class StreamedRows:
    """Rows that can only be read in order (`datasets.IterableDataset`): files are shuffled, windows in blocks."""

    def __init__(self, dataset: datasets.IterableDataset, to_row, description: str, keep=None):
        self.dataset, self.to_row, self.description, self.keep = dataset, to_row, description, keep

    def select(self, keep) -> "StreamedRows":
        both = keep if self.keep is None else lambda row: self.keep(row) and keep(row)
        return StreamedRows(self.dataset, self.to_row, self.description, both)

    def iterate(self, shard: int, num_shards: int, seed: int | None, epoch: int) -> Iterator[dict]:
        dataset, step, offset = self.dataset, 1, 0
        if seed is not None:
            # One input shard: interleaving several would start threads, and sleep 5 s at the end of an epoch.
            # Not `set_epoch`: `shard` below would forget it, and every epoch would have the same order.
            generator = np.random.default_rng([seed, epoch])
            dataset = dataset.shuffle(generator=generator, buffer_size=1, max_buffer_input_shards=1)
        if dataset.num_shards >= num_shards:
            dataset = dataset.shard(num_shards=num_shards, index=shard)
        else:
            # Fewer files than readers: every reader walks all undecoded rows and keeps its own.
            step, offset = num_shards, shard
        # Not `for item in dataset`: in a DataLoader worker that would give this worker a share of the share.
        for index, batch in enumerate(dataset.iter(batch_size=1)):
            if index % step == offset:
                row = self.to_row({column: values[0] for column, values in batch.items()}, index)
                if self.keep is None or self.keep(row):
                    yield row

    def columns(self, column: str) -> Iterator:
        """One column of the kept rows, as rows have it; the audio stays unread where the format can leave it so."""
        if self.keep is not None:
            return (row[column] for row in self.iterate(0, 1, None, 0))
        if column not in self.to_row.sources:
            return iter(())
        items = self.dataset.select_columns([self.to_row.sources[column]])
        return (self.to_row.value(column, item) for item in items)


Rows = IndexedRows | StreamedRows


def open_rows(
    dataset_name: str,
    split: str = "train",
    *,
    dataset_config_name: str | None = None,
    audio_column: str = "audio",
    text_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
) -> Rows:
    """Open a folder, a glob, a manifest, a saved data set or a Hub id; one split of it.

    A split of a local folder is its subfolder of that name or its manifest of that name (`train/`, `train.csv`, a
    fairseq `train.tsv`); where there is neither, "train" is all of the folder.

    Raises:
        UserError: nothing is there, nothing in it is audio, or a column is missing.
    """
    columns = {"text": text_column, "label": label_column}
    path = Path(os.path.expanduser(dataset_name))
    is_glob = glob.has_magic(dataset_name) and not path.exists()
    if split != "train" and (is_glob or path.is_file()):
        # The same rows under another name would be trained on and tested on.
        raise UserError(
            f"dataset_name: {dataset_name!r} is a single list without a split {split!r}; give the folder with "
            f"train and {split} in it, as subfolders or manifests"
        )
    if is_glob:
        files = sorted(filter(is_audio_name, glob.glob(str(path), recursive=True)))
        if not files:
            raise UserError(f"dataset_name: no audio file matches {dataset_name!r}")
        return from_files(files, Path(os.path.commonpath([os.path.dirname(file) for file in files])), dataset_name)
    if path.is_dir():
        return open_folder(path, split, dataset_config_name, audio_column, columns, streaming)
    if path.is_file():
        return open_file(path, audio_column, columns, streaming)
    if looks_like_path(dataset_name):
        raise UserError(f"dataset_name: there is no folder or file {dataset_name!r}")
    return open_hub(dataset_name, split, dataset_config_name, audio_column, columns, streaming)


def looks_like_path(name: str) -> bool:
    """Whether a name that doesn't exist was meant as a local path and not as a Hub id (`name` or `user/name`)."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(("/", *MANIFEST_SUFFIXES))


def open_folder(path: Path, split: str, config: str | None, audio_column: str, columns: dict, streaming: bool) -> Rows:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return open_saved(path, split, audio_column, columns, streaming)
    if (path / split).is_dir():
        return open_subfolder(path / split, config, audio_column, columns, streaming)
    for suffix in MANIFEST_SUFFIXES:
        if (path / f"{split}{suffix}").is_file():
            return open_file(path / f"{split}{suffix}", audio_column, columns, streaming)
    if split != "train":
        raise UserError(
            f"dataset_name: {str(path)!r} has no split {split!r} (neither a subfolder nor a manifest); it has: "
            f"{contents(path)}"
        )
    return open_subfolder(path, config, audio_column, columns, streaming)


def open_subfolder(path: Path, config: str | None, audio_column: str, columns: dict, streaming: bool) -> Rows:
    """A folder of audio: described by its metadata file where it has one, else by its subfolders' names."""
    for suffix in MANIFEST_SUFFIXES:
        if (path / f"metadata{suffix}").is_file():
            return open_file(path / f"metadata{suffix}", audio_column, columns, streaming)
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"dataset_name: no permission to read the folder {str(path)!r}")
    files, others = find_audio(path)
    if files:
        for wanted, column in columns.items():
            # Without a column, folder-per-class gives the label; a text can't come from there.
            if column is not None and (wanted == "text" or column != "label"):
                raise UserError(
                    f"{wanted}_column_name: {str(path)!r} is a plain folder, without a column {column!r}; add a "
                    f"metadata.csv with the columns file_name and {column}"
                )
        return from_files(files, path, str(path))
    if any(suffix in TABLE_SUFFIXES for suffix in others):
        return open_hub(str(path), "train", config, audio_column, columns, streaming)
    found = ", ".join(f"{count} {suffix or '(no suffix)'}" for suffix, count in others.most_common(5)) or "nothing"
    raise UserError(f"dataset_name: no audio in {str(path)!r} (found {found}; read are {' '.join(AUDIO_SUFFIXES)})")


def find_audio(path: Path) -> tuple[list[str], Counter]:
    """All audio files below a folder (links followed once, hidden files left out), and a count of the others."""
    files, others, seen = [], Counter(), set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if is_audio_name(name) and not name.startswith("."):
                files.append(os.path.join(folder, name))
            else:
                others[Path(name).suffix.lower()] += 1
    return files, others


def contents(path: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"


def from_files(files: list[str], root: Path, description: str) -> IndexedRows:
    """Rows of audio files; the label is the first folder below `root`, the name the path below it."""

    def to_row(file: str, index: int) -> dict:
        name = os.path.relpath(file, root)
        folder = name.split(os.sep)[0] if os.sep in name else None
        return {"audio": {"path": file, "bytes": None}, "name": name, "label": folder, "text": None}

    return IndexedRows(files, to_row, description)


def open_file(path: Path, audio_column: str, columns: dict, streaming: bool) -> Rows:
    """A manifest, or a single recording."""
    if is_audio_name(path.name):
        return from_files([str(path)], path.parent, str(path))
    if path.suffix == ".parquet":
        dataset = load(str(path), "parquet", data_files=str(path), split="train", streaming=streaming)
        return from_dataset(dataset, str(path), audio_column, columns, path.parent)
    if path.suffix not in MANIFEST_SUFFIXES:
        raise UserError(f"dataset_name: {str(path)!r} is neither audio nor a manifest ({' '.join(MANIFEST_SUFFIXES)})")
    items, root = read_fairseq(path) or (read_manifest(path), path.parent)
    if not items:
        raise UserError(f"dataset_name: the manifest {str(path)!r} has no rows")
    path_column = choose_path_column(items[0], audio_column, str(path))
    check_columns(items[0], columns, str(path))

    def to_row(item: dict, index: int) -> dict:
        file = item.get(path_column)
        if not file or not isinstance(file, str):
            return {"audio": NO_AUDIO, "name": f"row {index}", **read_columns(item, columns)}
        return {
            "audio": {"path": os.path.join(root, file), "bytes": None},
            "name": file,
            **read_columns(item, columns),
        }

    return IndexedRows(items, to_row, str(path))


def read_manifest(path: Path) -> list[dict]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                return [parse_json_line(line, number, path) for number, line in enumerate(file, 1) if line.strip()]
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except UnicodeDecodeError as error:
        raise UserError(
            f"dataset_name: {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except csv.Error as error:
        raise UserError(f"dataset_name: {str(path)!r} is not a table of text: {error}") from None
    except OSError as error:
        raise UserError(f"dataset_name: can't read {str(path)!r}: {error.strerror}") from None


def parse_json_line(line: str, number: int, path: Path) -> dict:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"dataset_name: {str(path)!r} line {number} is not JSON: {error.msg}") from None
    if not isinstance(item, dict):
        raise UserError(f"dataset_name: {str(path)!r} line {number} is not a JSON object")
    return item


def read_fairseq(path: Path) -> tuple[list[dict], Path] | None:
    """fairseq's manifest: the root folder on the first line, then `path<TAB>frames`. None if it is another .tsv."""
    if path.suffix != ".tsv":
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\r\n") for line in file]
    if not lines or not lines[0] or "\t" in lines[0] or not os.path.isdir(os.path.join(path.parent, lines[0])):
        return None
    return [{"path": line.split("\t")[0]} for line in lines[1:] if line], path.parent / lines[0]


def choose_path_column(columns: dict, audio_column: str, description: str) -> str:
    # Only the default name may stand for another: a name that was given is meant.
    for column in (audio_column, *(PATH_COLUMNS if audio_column == "audio" else ())):
        if column in columns:
            return column
    raise UserError(
        f"audio_column_name: {description} has no column {audio_column!r}; it has: {', '.join(map(str, columns))}"
    )


def check_columns(available, columns: dict, description: str) -> None:
    for wanted, column in columns.items():
        if column is not None and column not in available:
            raise UserError(
                f"{wanted}_column_name: {description} has no column {column!r}; it has: "
                f"{', '.join(map(str, available))}"
            )


def read_columns(item: dict, columns: dict) -> dict:
    return {wanted: None if column is None else item.get(column) for wanted, column in columns.items()}


def open_saved(path: Path, split: str, audio_column: str, columns: dict, streaming: bool) -> Rows:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"dataset_name: {str(path)!r} has no split {split!r}; it has: {', '.join(dataset)}")
        dataset = dataset[split]
    return from_dataset(dataset, str(path), audio_column, columns)


def open_hub(name: str, split: str, config: str | None, audio_column: str, columns: dict, streaming: bool) -> Rows:
    dataset = load(name, name, config, split=split, streaming=streaming)
    return from_dataset(dataset, f"{name} [{split}]", audio_column, columns)


def load(name: str, *args, **kwargs):
    """`datasets.load_dataset`, whose many errors become one line."""
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(
            f"dataset_name: {name!r} is no local folder or file, and can't be loaded as a data set: {first}"
        ) from None


def from_dataset(dataset, description: str, audio_column: str, columns: dict, root: Path | None = None) -> Rows:
    """Rows of a `datasets.Dataset` or `IterableDataset`, whose audio column stays undecoded."""
    features = dataset.features or next(iter(dataset.take(1)), {})
    audio_column = choose_path_column(features, audio_column, description)
    check_columns(features, columns, description)
    is_audio = isinstance(features[audio_column], datasets.Audio)
    if is_audio or isinstance(features[audio_column], dict):
        dataset = dataset.cast_column(audio_column, datasets.Audio(decode=False))
    to_row = DatasetRow(audio_column, columns, features, description, root)
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedRows(dataset, to_row, description)
    return IndexedRows(dataset, to_row, description)


class DatasetRow:
    """One item of a data set -> a row: class numbers become their names, paths get their root."""

    def __init__(self, audio_column: str, columns: dict, features: dict, description: str, root: Path | None):
        self.audio_column, self.columns, self.description, self.root = audio_column, columns, description, root
        self.sources = {wanted: column for wanted, column in columns.items() if column is not None}
        feature = features.get(columns.get("label"))
        self.class_names = feature.names if isinstance(feature, datasets.ClassLabel) else None

    def __call__(self, item: dict, index: int) -> dict:
        audio = item[self.audio_column] or NO_AUDIO
        if isinstance(audio, str):
            name, audio = audio, {"path": os.path.join(self.root, audio) if self.root else audio, "bytes": None}
        else:
            name = audio["path"] or (content_name(audio["bytes"]) if audio["bytes"] else f"row {index}")
        values = {wanted: self.value(wanted, item) if wanted in self.sources else None for wanted in self.columns}
        return {"audio": audio, "name": name, **values}

    def value(self, wanted: str, item: dict):
        """The item's "text" or "label"; a class number as its name."""
        value = item[self.sources[wanted]]
        return self.class_names[value] if wanted == "label" and self.class_names and isinstance(value, int) else value


def content_name(content: bytes) -> str:
    """A name for embedded audio without a path: a row's number differs between shards and moves with every new row."""
    return f"audio with sha256 {hashlib.sha256(content).hexdigest()[:16]}"


def hold_out(
    rows: Rows, percentage: float, usable: Callable[[dict], bool] = lambda row: True
) -> tuple[Rows, Rows | None]:
    """(training rows, held-out rows): by recording, by a hash of its name, so that it never moves and never leaks.

    Where no usable recording's hash falls under the percentage, the usable one with the smallest hash is held out. A
    single usable recording can't be divided: then there is no held-out part (None).
    """
    if percentage <= 0:
        return rows, None
    threshold = percentage / 100
    if isinstance(rows, StreamedRows):
        return rows.select(lambda row: unit_hash(row["name"]) >= threshold), rows.select(
            lambda row: unit_hash(row["name"]) < threshold
        )
    hashes = [unit_hash(rows[index]["name"]) for index in range(len(rows))]
    by_hash = sorted(range(len(hashes)), key=hashes.__getitem__)
    held_out = {index for index in by_hash if hashes[index] < threshold}
    if not any(usable(rows[index]) for index in sorted(held_out)):
        held_out.update(next(([index] for index in by_hash if usable(rows[index])), []))
    if len(held_out) == len(hashes):
        held_out.discard(by_hash[-1])
    training = [index for index in range(len(hashes)) if index not in held_out]
    if not held_out or not any(usable(rows[index]) for index in training):
        return rows, None
    return rows.take(training), rows.take(sorted(held_out))


def unit_hash(name: str) -> float:
    """A name's hash as a number in [0, 1), the same on every machine."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
