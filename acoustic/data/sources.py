"""Anything that holds recordings -> rows that stay undecoded: {"audio": {"path", "bytes"}, "name", "text", "label"}.

`name` identifies the recording for as long as its place in the data set stays the same; the held-out part is chosen by
it. `text` and `label` are there when the columns for them were asked for.
"""

import csv
import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

import datasets
import pyarrow
import pyarrow.parquet

from acoustic.console import UserError
from acoustic.data.headers import AUDIO_SUFFIXES, is_audio_name
from acoustic.data.remote import is_remote, list_files
from acoustic.data.rows import IndexedRows, PackedList, Rows, ShardedRows, StreamedRows
from acoustic.data.shards import ParquetReader, TarReader, find_readable, open_binary, read_features, shard_kind

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PATH_COLUMNS = ("file_name", "path", "file", "filename", "audio_path")
NO_AUDIO = {"path": None, "bytes": None}


def open_rows(
    dataset_name: str,
    split: str = "train",
    *,
    dataset_config_name: str | None = None,
    audio_column: str = "audio",
    text_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    indexed: bool = False,
) -> Rows:
    """Open a folder, a glob, a manifest, tar or parquet shards, a URL of these, a saved data set or a Hub id.

    A split of a local folder is its subfolder of that name or its manifest of that name (`train/`, `train.csv`, a
    fairseq `train.tsv`); where there is neither, "train" is all of the folder.

    Args:
        streaming: read a Hub data set as a stream, without downloading it first.
        indexed: rows must be looked up by number, so parquet with embedded audio is first converted by `datasets`.

    Raises:
        UserError: nothing is there, nothing in it is audio, or a column is missing.
    """
    columns = {"text": text_column, "label": label_column}
    options = Options(dataset_config_name, audio_column, columns, streaming, indexed)
    path = Path(os.path.expanduser(dataset_name))
    is_pattern = has_pattern(dataset_name) and not path.exists()
    if is_remote(dataset_name):
        return open_url(dataset_name, split, options)
    if split != "train" and (is_pattern or path.is_file()):
        raise UserError(single_list(dataset_name, split))
    if is_pattern:
        found = itertools.chain.from_iterable(glob.glob(name, recursive=True) for name in expand_braces(str(path)))
        return open_files(sorted(found), dataset_name, options)
    if path.is_dir():
        return open_folder(path, split, options)
    if path.is_file():
        return open_file(path, options)
    if looks_like_path(dataset_name):
        raise UserError(f"dataset_name: there is no folder or file {dataset_name!r}")
    return open_hub(dataset_name, split, options)


class Options(NamedTuple):
    """What `open_rows` was asked for, but the place and the split."""

    config: str | None
    audio_column: str
    columns: dict[str, str | None]
    streaming: bool
    indexed: bool


def single_list(dataset_name: str, split: str) -> str:
    # The same rows under another name would be trained on and tested on.
    return (
        f"dataset_name: {dataset_name!r} is a single list without a split {split!r}; give the folder with "
        f"train and {split} in it, as subfolders or manifests"
    )


def has_pattern(name: str) -> bool:
    return glob.has_magic(name) or re.search(r"\{[^{}]+\}", name) is not None


def expand_braces(name: str) -> list[str]:
    """`{a,b}` and WebDataset's `{000..123}` in a name -> the names."""
    found = re.search(r"\{([^{}]+)\}", name)
    if found is None:
        return [name]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        choices = found[1].split(",")
    return [full for choice in choices for full in expand_braces(name[: found.start()] + choice + name[found.end() :])]


def looks_like_path(name: str) -> bool:
    """Whether a name that doesn't exist was meant as a local path and not as a Hub id (`name` or `user/name`)."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(("/", *MANIFEST_SUFFIXES, ".tar"))


def open_url(url: str, split: str, options: Options) -> Rows:
    """A file, a folder or a pattern behind https://, s3://, hf://, ...: what lies there is what a folder may hold."""
    name = PurePosixPath(unquote(url.split("?")[0])).name
    is_file = is_audio_name(name) or name.endswith((*MANIFEST_SUFFIXES, ".tar"))
    if split != "train" and (is_file or has_pattern(url)):
        raise UserError(single_list(url, split))
    try:
        if has_pattern(url) or not is_file:
            # A range needs no listing, which many web servers don't give.
            names = expand_braces(url)
            listed = [file for name in names for file in (list_files(name) if not is_shard(name) else [name])]
            return open_files(in_split(listed, url, split), url, options)
        if is_shard(url):
            return open_shards([url], url, options)
        return from_files([url], url, url) if is_audio_name(name) else open_manifest(url, options)
    except OSError as error:
        raise UserError(f"dataset_name: can't read {url!r}: {error}") from None


def is_shard(name: str) -> bool:
    return not glob.has_magic(name) and shard_kind(name) is not None


def in_split(files: list[str], root: str, split: str) -> list[str]:
    """The files in a subfolder named like the split; where there is none, "train" is all of them."""
    inside = [file for file in files if file.startswith(f"{root.rstrip('/')}/{split}/")]
    if not inside and split != "train":
        raise UserError(f"dataset_name: {root!r} has no split {split!r}: no file in a folder {split}/")
    return inside or files


def open_files(files: list[str], description: str, options: Options) -> Rows:
    """Audio files, or else the tars, or else the parquet files, among what was found."""
    audio = [file for file in files if is_audio_name(file)]
    if audio:
        folders = [file.rpartition("/")[0] for file in audio]
        return from_files(audio, os.path.commonprefix([f"{folder}/" for folder in folders]), description)
    for kind in (".tar", ".parquet"):
        shards = [file for file in files if shard_kind(file) == kind]
        if shards:
            return open_shards(shards, description, options)
    raise UserError(f"dataset_name: no audio file matches {description!r}")


def open_shards(files: list[str], description: str, options: Options) -> Rows:
    """Tars and parquet are read in place; parquet that lists paths is a manifest."""
    if shard_kind(files[0]) == ".tar":
        return ShardedRows(files, TarReader(options.columns), description)
    example = find_readable(files)
    features = read_parquet_features(example, description)
    audio_column = choose_path_column(features, options.audio_column, description)
    check_columns(features, options.columns, description)
    if not isinstance(features[audio_column], (datasets.Audio, dict)):
        if len(files) == 1 and not options.streaming:
            return open_manifest(files[0], options)
        root = None if is_remote(files[0]) else Path(files[0]).parent
        to_row = DatasetRow(audio_column, options.columns, features, description, root)
    elif options.indexed:
        dataset = load(description, "parquet", data_files=files, split="train")
        return from_dataset(dataset, description, options)
    else:
        to_row = DatasetRow(audio_column, options.columns, features, description, None)
    wanted = [audio_column, *(column for column in options.columns.values() if column is not None)]
    return ShardedRows(files, ParquetReader(to_row, list(dict.fromkeys(wanted))), description)


def read_parquet_features(path: str, description: str) -> datasets.Features:
    try:
        return read_features(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"dataset_name: can't read {description!r} as parquet: {reason}") from None


def open_folder(path: Path, split: str, options: Options) -> Rows:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return open_saved(path, split, options)
    if (path / split).is_dir():
        return open_subfolder(path / split, options)
    for suffix in MANIFEST_SUFFIXES:
        if (path / f"{split}{suffix}").is_file():
            return open_file(path / f"{split}{suffix}", options)
    if split != "train" and not named_like(find_audio(path)[1], split):
        raise UserError(
            f"dataset_name: {str(path)!r} has no split {split!r} (neither a subfolder nor a manifest); it has: "
            f"{contents(path)}"
        )
    return open_subfolder(path, options, split)


def named_like(shards: list[str], split: str) -> list[str]:
    """The shards whose names begin with the split's, as the Hub's do (`train-00000-of-00004.parquet`)."""
    return [shard for shard in shards if re.match(rf"{re.escape(split)}[-_.]", shard.rpartition("/")[2])]


def open_subfolder(path: Path, options: Options, split: str = "train") -> Rows:
    """A folder of audio: described by its metadata file where it has one, else by its subfolders' names."""
    for suffix in MANIFEST_SUFFIXES:
        if (path / f"metadata{suffix}").is_file():
            return open_file(path / f"metadata{suffix}", options)
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"dataset_name: no permission to read the folder {str(path)!r}")
    files, shards, others = find_audio(path)
    if files:
        for wanted, column in options.columns.items():
            # Without a column, folder-per-class gives the label; a text can't come from there.
            if column is not None and (wanted == "text" or column != "label"):
                raise UserError(
                    f"{wanted}_column_name: {str(path)!r} is a plain folder, without a column {column!r}; add a "
                    f"metadata.csv with the columns file_name and {column}"
                )
        return from_files(files, str(path), str(path))
    if shards:
        return open_files(named_like(shards, split) or shards, f"{path} [{split}]", options)
    if others[".arrow"]:
        return open_hub(str(path), "train", options)
    found = ", ".join(f"{count} {suffix or '(no suffix)'}" for suffix, count in others.most_common(5)) or "nothing"
    raise UserError(f"dataset_name: no audio in {str(path)!r} (found {found}; read are {' '.join(AUDIO_SUFFIXES)})")


def find_audio(path: Path) -> tuple[list[str], list[str], Counter]:
    """Audio files and shards below a folder (links followed once, hidden ones left out), and a count of the others."""
    files, shards, others, seen = [], [], Counter(), set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                others[""] += 1
            elif is_audio_name(name):
                files.append(os.path.join(folder, name))
            elif shard_kind(name):
                shards.append(os.path.join(folder, name))
            else:
                others[Path(name).suffix.lower()] += 1
    return files, shards, others


def contents(path: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"


def from_files(files: list[str], root: str, description: str) -> IndexedRows:
    """Rows of audio files; the label is the first folder below `root`, the name the path below it."""
    start = len(root.rstrip("/")) + 1 if len(files) > 1 or files[0] != root else 0

    def to_row(file: str, index: int) -> dict:
        name = file[start:] if start else file.rpartition("/")[2]
        folder = name.split("/")[0] if "/" in name else None
        return {"audio": {"path": file, "bytes": None}, "name": name, "label": folder, "text": None}

    return IndexedRows(PackedList(files), to_row, description)


def open_file(path: Path, options: Options) -> Rows:
    """A manifest, a shard or a single recording."""
    if is_audio_name(path.name):
        return from_files([str(path)], str(path.parent), str(path))
    if shard_kind(path.name):
        return open_shards([str(path)], str(path), options)
    if path.suffix not in MANIFEST_SUFFIXES:
        raise UserError(f"dataset_name: {str(path)!r} is neither audio nor a manifest ({' '.join(MANIFEST_SUFFIXES)})")
    return open_manifest(str(path), options)


def open_manifest(path: str, options: Options) -> IndexedRows:
    """Rows of a table with a column of paths, local or behind a URL; relative ones start where the table is."""
    items, root = read_fairseq(path) or (read_manifest(path), path.rpartition("/")[0])
    if not items:
        raise UserError(f"dataset_name: the manifest {path!r} has no rows")
    path_column = choose_path_column(items[0], options.audio_column, path)
    check_columns(items[0], options.columns, path)
    wanted = {path_column, *options.columns.values()} - {None}

    def to_row(item: dict, index: int) -> dict:
        file = item.get(path_column)
        if not file or not isinstance(file, str):
            return {"audio": NO_AUDIO, "name": f"row {index}", **read_columns(item, options.columns)}
        where = file if is_remote(file) else f"{root}/{file}" if is_remote(root) else os.path.join(root, file)
        return {"audio": {"path": where, "bytes": None}, "name": file, **read_columns(item, options.columns)}

    return IndexedRows(PackedList({name: item.get(name) for name in wanted} for item in items), to_row, path)


def read_manifest(path: str) -> list[dict]:
    try:
        content = read_bytes(path)
        if path.endswith(".parquet"):
            return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        text = content.decode("utf-8-sig")
        if path.endswith(".jsonl"):
            lines = enumerate(text.split("\n"), 1)
            return [parse_json_line(line, number, path) for number, line in lines if line.strip()]
        table = io.StringIO(text, newline="")
        return list(csv.DictReader(table, delimiter="\t" if path.endswith(".tsv") else ","))
    except UnicodeDecodeError as error:
        raise UserError(f"dataset_name: {path!r} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"dataset_name: {path!r} is not a table of text: {error}") from None
    except OSError as error:
        raise UserError(f"dataset_name: can't read {path!r}: {error.strerror or error}") from None


def read_bytes(path: str) -> bytes:
    with open_binary(path) as file:
        return file.read()


def parse_json_line(line: str, number: int, path: str) -> dict:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"dataset_name: {path!r} line {number} is not JSON: {error.msg}") from None
    if not isinstance(item, dict):
        raise UserError(f"dataset_name: {path!r} line {number} is not a JSON object")
    return item


def read_fairseq(path: str) -> tuple[list[dict], str] | None:
    """fairseq's manifest: the root folder on the first line, then `path<TAB>frames`. None if it is another .tsv."""
    if not path.endswith(".tsv") or is_remote(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\r\n") for line in file]
    folder = os.path.dirname(path)
    if not lines or not lines[0] or "\t" in lines[0] or not os.path.isdir(os.path.join(folder, lines[0])):
        return None
    return [{"path": line.split("\t")[0]} for line in lines[1:] if line], os.path.join(folder, lines[0])


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


def open_saved(path: Path, split: str, options: Options) -> Rows:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"dataset_name: {str(path)!r} has no split {split!r}; it has: {', '.join(dataset)}")
        dataset = dataset[split]
    return from_dataset(dataset, str(path), options)


def open_hub(name: str, split: str, options: Options) -> Rows:
    dataset = load(name, name, options.config, split=split, streaming=options.streaming)
    return from_dataset(dataset, f"{name} [{split}]", options)


def load(name: str, *args, **kwargs):
    """`datasets.load_dataset`, whose many errors become one line."""
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(
            f"dataset_name: {name!r} is no local folder or file, and can't be loaded as a data set: {first}"
        ) from None


def from_dataset(dataset, description: str, options: Options) -> Rows:
    """Rows of a `datasets.Dataset` or `IterableDataset`, whose audio column stays undecoded."""
    features = dataset.features or next(iter(dataset.take(1)), {})
    audio_column = choose_path_column(features, options.audio_column, description)
    check_columns(features, options.columns, description)
    is_audio = isinstance(features[audio_column], datasets.Audio)
    if is_audio or isinstance(features[audio_column], dict):
        dataset = dataset.cast_column(audio_column, datasets.Audio(decode=False))
    to_row = DatasetRow(audio_column, options.columns, features, description, None)
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
            name = audio.get("path") or (content_name(audio["bytes"]) if audio.get("bytes") else f"row {index}")
        values = {wanted: self.value(wanted, item) if wanted in self.sources else None for wanted in self.columns}
        return {"audio": audio, "name": name, **values}

    def value(self, wanted: str, item: dict):
        """The item's "text" or "label"; a class number as its name."""
        value = item.get(self.sources[wanted])
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
    if not isinstance(rows, IndexedRows):
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
