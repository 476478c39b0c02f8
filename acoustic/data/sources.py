"""Anything that holds recordings -> rows that stay undecoded: {"audio": {"path", "bytes"}, "name", "text", "label"}.

`name` identifies the recording for as long as its place in the data set stays the same; the held-out part is chosen by
it. `text`, `label`, `spans` and `machine` are there when the columns for them were asked for.
"""

import glob
import itertools
import os
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import datasets
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from acoustic.console import UserError, did_you_mean_path, say, say_asking_the_hub
from acoustic.data.columns import DatasetRow, Options, check_columns, choose_path_column, only_present
from acoustic.data.fields import names_of
from acoustic.data.headers import AUDIO_SUFFIXES, is_audio_name
from acoustic.data.manifests import MANIFEST_SUFFIXES, open_manifest
from acoustic.data.remote import RemoteFile, is_remote, list_files, patiently
from acoustic.data.rows import IndexedRows, PackedList, Rows, ShardedRows, StreamedRows
from acoustic.data.shards import ParquetReader, TarReader, find_readable, read_features, shard_kind


def open_rows(
    dataset_name: str,
    split: str = "train",
    *,
    dataset_config_name: str | None = None,
    audio_column: str = "audio",
    text_column: str | None = None,
    label_column: str | None = None,
    spans_column: str | None = None,
    machine_column: str | None = None,
    streaming: bool = False,
    indexed: bool = False,
    other_splits: tuple[str, ...] = (),
) -> Rows:
    """Open a folder, a glob, a manifest, tar or parquet shards, a URL of these, a saved data set or a Hub id.

    A split of a local folder is its subfolder of that name or its manifest of that name (`train/`, `train.csv`, a
    fairseq `train.tsv`); where there is neither, "train" is all of the folder.

    Args:
        streaming: read a Hub data set as a stream, without downloading it first.
        indexed: rows must be looked up by number, so parquet with embedded audio is first converted by `datasets`.
        other_splits: where "train" is all of a folder, what belongs to these is left out of it.

    Raises:
        UserError: nothing is there, nothing in it is audio, or a column is missing.
    """
    columns = {"text": text_column, "label": label_column} | ({"spans": spans_column} if spans_column else {})
    columns |= {"machine": machine_column} if machine_column else {}
    options = Options(dataset_config_name, audio_column, columns, streaming, indexed, other_splits)
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
        raise UserError(f"dataset_name: there is no folder or file {dataset_name!r}{did_you_mean_path(dataset_name)}")
    return open_hub(dataset_name, split, options)


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
            files = of_split(listed, url, split, options.other_splits)
            if not files and split != "train":
                raise UserError(f"dataset_name: {url!r} has no split {split!r}: no file in a folder {split}/")
            return open_files(files, url, options)
        if is_shard(url):
            with RemoteFile(url) as file:
                file.read(1)  # a server that can't be reached is told now
            return open_shards([url], url, options)
        return from_files([url], url, url) if is_audio_name(name) else open_manifest(url, options)
    except OSError as error:
        raise UserError(f"dataset_name: can't read {url!r}: {error}") from None


def is_shard(name: str) -> bool:
    return not glob.has_magic(name) and shard_kind(name) is not None


def of_split(files: list[str], root: str, split: str, other_splits: tuple[str, ...]) -> list[str]:
    """The files of a split: in its subfolder, or shards named like it (the Hub's `train-00000-of-00004.parquet`).

    Where there are none, "train" is all but the files of the other splits that are in use.
    """

    def belongs(file: str, name: str) -> bool:
        inside = file[len(root.rstrip("/")) + 1 :].startswith(f"{name}/")
        return inside or (is_shard(file) and re.match(rf"{re.escape(name)}[-_.]", file.rpartition("/")[2]) is not None)

    mine = [file for file in files if belongs(file, split)]
    if mine or split != "train":
        return mine
    return [file for file in files if not any(belongs(file, other) for other in other_splits)]


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
    hint = '; several data sets are a list in YAML, or JSON: \'["one/", "other/"]\'' if "," in description else ""
    raise UserError(f"dataset_name: no audio file matches {description!r}{hint}")


def open_shards(files: list[str], description: str, options: Options) -> Rows:
    """Tars and parquet are read in place; parquet that lists paths is a manifest."""
    if shard_kind(files[0]) == ".tar":
        return ShardedRows(files, TarReader(options.columns), description)
    example = find_readable(files)
    features = read_parquet_features(example, description)
    options = options._replace(columns=only_present(options.columns, features))
    audio_column = choose_path_column(features, options.audio_column, description)
    check_columns(features, options.columns, description)
    if not isinstance(features[audio_column], (datasets.Audio, dict)):
        if len(files) == 1 and not options.streaming:
            return open_manifest(files[0], options)
        root = None if is_remote(files[0]) else Path(files[0]).parent
        to_row = DatasetRow(audio_column, options.columns, features, description, root, root is not None)
    elif options.indexed:
        dataset = load(datasets.load_dataset, description, "parquet", data_files=files, split="train")
        return from_dataset(dataset, description, options, is_ours=not is_remote(files[0]))
    else:
        to_row = DatasetRow(audio_column, options.columns, features, description, None, not is_remote(files[0]))
    wanted = [audio_column, *(name for column in options.columns.values() for name in names_of(column))]
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
    for suffix in MANIFEST_SUFFIXES:  # before a folder of that name, which then holds the audio that it lists
        if (path / f"{split}{suffix}").is_file():
            return open_file(path / f"{split}{suffix}", options)
    if (path / split).is_dir():
        return open_subfolder(path / split, options)
    return open_subfolder(path, options, split)


def open_subfolder(path: Path, options: Options, split: str | None = None) -> Rows:
    """A folder of audio, or a split's part of it: described by its metadata file, else by its subfolders' names."""
    for suffix in MANIFEST_SUFFIXES:
        if (path / f"metadata{suffix}").is_file() and split in (None, "train"):
            return open_file(path / f"metadata{suffix}", options)
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"dataset_name: no permission to read the folder {str(path)!r}")
    files, shards, others = find_audio(path)
    if split is not None:
        files, shards = (of_split(found, str(path), split, options.other_splits) for found in (files, shards))
    if split not in (None, "train") and not files and not shards:
        raise UserError(
            f"dataset_name: {str(path)!r} has no split {split!r} (neither a subfolder nor a manifest); it has: "
            f"{contents(path)}"
        )
    if files:
        refuse_columns(path, only_present(options.columns, ()))
        if shards:
            say(f"note: {len(shards)} tar or parquet files in {path} are left out, as there is audio beside them")
        return from_files(files, str(path), str(path))
    if shards:
        return open_files(shards, f"{path} [{split}]" if split else str(path), options)
    if others[".arrow"]:
        return open_hub(str(path), "train", options)
    found = ", ".join(f"{count} {suffix or '(no suffix)'}" for suffix, count in others.most_common(5)) or "nothing"
    raise UserError(f"dataset_name: no audio in {str(path)!r} (found {found}; read are {' '.join(AUDIO_SUFFIXES)})")


def refuse_columns(path: Path, columns: dict[str, str | None]) -> None:
    """Of a plain folder: folder-per-class gives the label; a text, or another label, can't come from there."""
    for wanted, column in columns.items():
        if column is not None and (wanted in ("text", "machine") or column != "label"):
            names = names_of(column)
            raise UserError(
                f"{wanted}_column_name: {str(path)!r} is a plain folder, without a column {names[0]!r}; add a "
                f"metadata.csv with the columns {', '.join(['file_name', *names[:-1]])} and {names[-1]}"
            )


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
        hint = "; unpack it first" if path.suffix in (".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst") else ""
        kinds = " ".join((*MANIFEST_SUFFIXES, ".tar"))
        raise UserError(f"dataset_name: {str(path)!r} is neither audio nor a manifest ({kinds}){hint}")
    return open_manifest(str(path), options)


def open_saved(path: Path, split: str, options: Options) -> Rows:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"dataset_name: {str(path)!r} has no split {split!r}; it has: {', '.join(dataset)}")
        dataset = dataset[split]
    return from_dataset(dataset, str(path), options)


def open_hub(name: str, split: str, options: Options) -> Rows:
    """What `datasets` can load; but tar shards are read in place by our own reader, which resumes within one."""
    description, is_ours = f"{name} [{split}]", Path(name).exists()
    say_asking_the_hub(name)
    builder = load(datasets.load_dataset_builder, name, name, options.config)
    if isinstance(builder, WebDataset):
        return open_shards(shards_of(builder, name, split), description, options)
    if options.streaming:
        return from_dataset(load(builder.as_streaming_dataset, name, split=split), description, options, is_ours)
    dataset = load(datasets.load_dataset, name, name, options.config, split=split)
    return from_dataset(dataset, description, options, is_ours)


def shards_of(builder: WebDataset, name: str, split: str) -> list[str]:
    """URLs, or paths, of a split's tar files."""
    files = builder.config.data_files
    if split not in files:
        raise UserError(f"dataset_name: {name!r} has no split {split!r}; it has: {', '.join(map(str, files))}")
    return sorted(map(str, files[split]))


def load(action, name: str, *args, **kwargs):
    """Something that `datasets` does, whose many errors become one line."""
    try:
        return patiently(lambda: action(*args, **kwargs))
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(
            f"dataset_name: {name!r} is no local folder or file, and can't be loaded as a data set: {first}"
            f"{did_you_mean_path(name)}"
        ) from None


def from_dataset(dataset, description: str, options: Options, is_ours: bool = True) -> Rows:
    """Rows of a `datasets.Dataset` or `IterableDataset`, whose audio column stays undecoded."""
    features = dataset.features or next(iter(dataset.take(1)), {})
    options = options._replace(columns=only_present(options.columns, features))
    audio_column = choose_path_column(features, options.audio_column, description)
    check_columns(features, options.columns, description)
    is_audio = isinstance(features[audio_column], datasets.Audio)
    if is_audio or isinstance(features[audio_column], dict):
        dataset = dataset.cast_column(audio_column, datasets.Audio(decode=False))
    to_row = DatasetRow(audio_column, options.columns, features, description, None, is_ours)
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedRows(dataset, to_row, description)
    return IndexedRows(dataset, to_row, description)
