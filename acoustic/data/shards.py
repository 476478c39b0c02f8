"""Rows inside of larger files, local or behind a URL: WebDataset tars and parquet with embedded audio.

A reader gives (position, row) from any position on, and a damaged part as a row with {"fault": reason}, which is
skipped and reported like any other row that can't be used.
"""

import contextlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

import datasets
import pyarrow
import pyarrow.parquet

from acoustic.data.fields import Column, names_of, pick
from acoustic.data.headers import is_audio_name
from acoustic.data.remote import RemoteFile, is_remote

# Members of a remote tar up to this size are kept from the pass over the tar; larger ones are read window by window.
KEPT_BYTES = 16 * 2**20
# Metadata beside the audio; what is larger is something else.
MAX_TEXT_BYTES = 2**20
TEXT_SUFFIXES = {"txt": "text", "text": "text", "cls": "label", "label": "label"}


def open_binary(path: str):
    return RemoteFile(path) if is_remote(path) else open(path, "rb")


def broken(name: str, reason: str) -> dict:
    return {"audio": {"path": None, "bytes": None, "fault": reason}, "name": name, "text": None, "label": None}


class TarReader:
    """WebDataset's layout: the members of one sample follow each other and share their name up to the first dot.

    `columns` says where the text and the label are: a member's suffix (`txt`, `cls`) or a field of the `.json`
    member. A position is the byte at which a sample's first member begins.
    """

    def __init__(self, columns: dict[str, Column]):
        self.wanted = {wanted: column for wanted, column in columns.items() if column is not None}
        self.names = {name for column in self.wanted.values() for name in names_of(column)}

    def __call__(self, path: str, start: int | None = None) -> Iterator[tuple[int, dict]]:
        place = start or 0
        try:
            with open_binary(path) as file:
                file.seek(place)
                for begin, end, members in samples(file, path):
                    yield begin, self.row(path, file, members)
                    place = end
        except (tarfile.TarError, OSError) as error:
            yield place, broken(f"{path} from byte {place}", f"broken shard: {error}")

    def row(self, path: str, file, members: list[tarfile.TarInfo | str]) -> dict:
        if isinstance(members[0], str):
            return broken(f"{path}: {members[0]}", members[1])
        audio = next((member for member in members if is_audio_name(member.name)), None)
        values = self.values(file, [member for member in members if member is not audio])
        if audio is None:
            return {**broken(f"{path}: {key_of(members[0].name)}", "no audio among its members"), **values}
        content = {"path": path, "bytes": None, "offset": audio.offset_data, "size": audio.size}
        if is_remote(path) and audio.size <= KEPT_BYTES:
            file.seek(audio.offset_data)
            content = {"path": audio.name, "bytes": file.read(audio.size)}
        return {"audio": content, "name": audio.name, **values}

    def values(self, file, members: list[tarfile.TarInfo]) -> dict:
        found = {}
        for member in members if self.wanted else ():
            suffix = member.name.rpartition(".")[2].lower()
            if member.size <= MAX_TEXT_BYTES and suffix in ("json", *TEXT_SUFFIXES, *self.names):
                file.seek(member.offset_data)
                text = file.read(member.size).decode("utf-8", "replace").strip()
                found |= parse_fields(text) if suffix == "json" else {suffix: text, TEXT_SUFFIXES.get(suffix): text}
        return {"text": None, "label": None} | {wanted: pick(found, column) for wanted, column in self.wanted.items()}

    def column(self, path: str, name: str) -> Iterator:
        return (row[name] for _, row in self(path))


def parse_fields(text: str) -> dict:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return fields if isinstance(fields, dict) else {}


def key_of(name: str) -> str:
    """A member's name up to the first dot after its folder: what the members of one sample share."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}"


def begins_sample(member: tarfile.TarInfo, group: list[tarfile.TarInfo]) -> bool:
    """Another key; or, where names have dots (`2024.01.05.wav`, `a.left.wav`), another recording of the same key."""
    if key_of(member.name) != key_of(group[0].name):
        return True
    audio = next((other for other in group if is_audio_name(other.name)), None)
    if audio is None:
        return False
    mine, its = (f"{name.rpartition('.')[0]}." for name in (member.name, audio.name))
    return is_audio_name(member.name) or not (mine.startswith(its) or its.startswith(mine))


def samples(file, path: str) -> Iterator[tuple[int, int, list]]:
    """(first byte, byte behind it, members) of each sample; damaged bytes as [what, reason] in the members' place."""
    group: list[tarfile.TarInfo] = []
    for gap, member in members_of(file, path):
        if group and (gap or member is None or begins_sample(member, group)):
            yield group[0].offset, end_of(group[-1]), group
            group = []
        if gap:
            begin, stop, reason = gap
            yield begin, stop, [f"bytes {begin} to {stop}", reason]
        if member is not None:
            group.append(member)


def members_of(file, path: str) -> Iterator[tuple[tuple[int, int, str] | None, tarfile.TarInfo | None]]:
    """(damage before it, member), and at the end (damage, None)."""
    expected, size = file.tell(), size_of(file)
    if size == 0:
        raise tarfile.ReadError("empty file")
    for member in intact_members(file, size):
        gap = (expected, member.offset, "broken tar member") if member.offset > expected else None
        expected = end_of(member)
        if member.offset_data + member.size > size:
            yield (member.offset, size, f"truncated tar: {member.name} is cut off"), None
            return
        if gap and not is_padding(file, *gap[:2]) and not is_global_header(file, *gap[:2]):
            yield gap, member if member.isfile() else None
        elif member.isfile():
            yield None, member
    gap = (expected, size, "broken tar member")
    yield (gap if size > expected and not is_padding(file, expected, size) else None), None


def intact_members(file, size: int) -> Iterator[tarfile.TarInfo]:
    while file.tell() < size:
        try:
            # ignore_zeros: what is no member is passed over, up to the next that is one.
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # it would keep every member of the tar
                    yield member
                return
        except tarfile.ReadError:
            continue  # a long name without the member that it is for; the file is just behind


def end_of(member: tarfile.TarInfo) -> int:
    return member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def size_of(file) -> int:
    place = file.tell()
    size = file.seek(0, 2)
    file.seek(place)
    return size


def is_padding(file, start: int, stop: int) -> bool:
    """Whether there are only zeros: the two blocks and more that end a tar."""
    place = file.tell()
    file.seek(start)
    content = file.read(min(stop - start, 2**20))
    file.seek(place)
    return not any(content)


def is_global_header(file, start: int, stop: int) -> bool:
    """Whether it is what `git archive` puts in front of a tar: tarfile reads it without making a member of it."""
    place = file.tell()
    file.seek(start)
    try:
        header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    finally:
        file.seek(place)
    blocks = 1 + -(-header.size // tarfile.BLOCKSIZE)
    return header.type == tarfile.XGLTYPE and start + blocks * tarfile.BLOCKSIZE == stop


class ParquetReader:
    """Rows of parquet files that hold the audio itself. A position is the row's number in its file."""

    def __init__(self, to_row, columns: list[str]):
        self.to_row, self.columns = to_row, columns

    def __call__(self, path: str, start: int | None = None) -> Iterator[tuple[int, dict]]:
        number = start or 0
        try:
            with open_binary(path) as source:
                for number, item in read_items(source, self.columns, start or 0):
                    yield number, self.to_row(item, number)
        except (pyarrow.ArrowException, OSError) as error:
            yield number + 1, broken(f"{path} after row {number}", f"broken shard: {first_line(error)}")

    def column(self, path: str, name: str) -> Iterator:
        column = self.to_row.sources.get(name)
        # Of a broken file the rows up to the damage: reading its audio will report it.
        with contextlib.suppress(pyarrow.ArrowException, OSError), open_binary(path) as source:
            for _, item in read_items(source, list(names_of(column)), 0) if column else ():
                yield self.to_row.value(name, item)


def read_items(source, columns: list[str], start: int) -> Iterator[tuple[int, dict]]:
    """(number, row as a dict) from row `start` on; row groups before it are not read."""
    table = pyarrow.parquet.ParquetFile(source)
    missing = [name for name in columns if name not in table.schema_arrow.names]
    if missing:
        raise pyarrow.ArrowInvalid(f"it has no column {missing[0]!r}")
    number = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if number + rows <= start:
            number += rows
            continue
        for batch in table.iter_batches(batch_size=1, row_groups=[group], columns=columns):
            if number + batch.num_rows > start:
                for index in range(max(start - number, 0), batch.num_rows):
                    yield number + index, {name: batch[name][index].as_py() for name in columns}
            number += batch.num_rows


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def read_features(path: str) -> datasets.Features:
    """Columns and types of a parquet file, class names included where `datasets` wrote them."""
    with open_binary(path) as source:
        return datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(source))


def find_readable(paths: list[str]) -> str:
    """The first parquet file whose schema can be read: one broken shard is no reason to end."""
    for path in paths:
        try:
            read_features(path)
            return path
        except (pyarrow.ArrowException, OSError):
            continue
    return paths[0]


def shard_kind(name: str) -> str | None:
    """Whether a file holds rows: ".tar", ".parquet" or None."""
    suffix = PurePosixPath(name.split("?")[0]).suffix.lower()
    return suffix if suffix in (".tar", ".parquet") else None
