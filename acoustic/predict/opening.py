"""What is named on a command line -> recordings, whatever else lies there: labels and splits don't matter."""

from pathlib import Path

from acoustic.console import UserError
from acoustic.data.headers import is_audio_name
from acoustic.data.remote import is_remote
from acoustic.data.rows import IndexedRows, PackedList, Rows
from acoustic.data.sources import find_audio, has_pattern, open_rows


def open_audio(
    names: list[str], split: str | None = None, machine_column: str | None = None
) -> tuple[list[Rows], list[tuple[str, str]]]:
    """
    Args:
        names: audio files and folders of them, at any depth; and what else `open_rows` opens: globs, manifests,
            shards, URLs, data sets.
        split: of folders and data sets. By default a folder of audio files is taken as it is, all of it, and of a data
            set the split "train".
        machine_column: of manifests and data sets, which machine is heard; it becomes a row's "machine".

    Returns:
        recordings, in the order of the names; and (name, reason) of what can't be opened.
    """
    sources, failed, files = [], [], []

    def gather() -> None:
        if files:
            sources.append(IndexedRows(PackedList(files), row_of, "the files"))
            files.clear()

    for name in names:
        found = local_files(name, split)
        files += found
        if not found:
            gather()
            try:
                sources.append(open_rows(name, split or "train", machine_column=machine_column))
            except UserError as error:
                failed.append((name, str(error).removeprefix("dataset_name: ")))
    gather()
    return sources, failed


def local_files(name: str, split: str | None) -> list[tuple[str, str]]:
    """(path, name) of an audio file, there or not, or of those in a folder; none for anything else."""
    path = Path(name).expanduser()
    if path.is_dir():
        is_saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
        return (
            [] if split or is_saved else [(file, file[len(str(path)) :].lstrip("/")) for file in find_audio(path)[0]]
        )
    is_one = is_audio_name(name) and not is_remote(name) and (path.is_file() or not has_pattern(name))
    return [(str(path), path.name)] if is_one else []


def row_of(file: list[str], index: int) -> dict:
    path, name = file
    return {"audio": {"path": path, "bytes": None}, "name": name, "label": None, "text": None}
