"""Which columns of a table are the audio, the text, the label and the spans; and its items -> rows."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import datasets

from acoustic.console import UserError
from acoustic.data.fields import Column, names_of, pick
from acoustic.data.remote import names_this_machine
from acoustic.data.spans import class_names_of, with_names

PATH_COLUMNS = ("file_name", "path", "file", "filename", "audio_path")
NO_AUDIO = {"path": None, "bytes": None}
SPANS_COLUMN = "spans"  # by default


class Options(NamedTuple):
    """What `open_rows` was asked for, but the place and the split."""

    config: str | None
    audio_column: str
    columns: dict[str, Column]
    streaming: bool
    indexed: bool
    other_splits: tuple[str, ...] = ()


def choose_path_column(columns: dict, audio_column: str, description: str) -> str:
    # Only the default name may stand for another: a name that was given is meant.
    for column in (audio_column, *(PATH_COLUMNS if audio_column == "audio" else ())):
        if column in columns:
            return column
    raise UserError(
        f"audio_column_name: {description} has no column {audio_column!r}; it has: {', '.join(map(str, columns))}"
    )


def only_present(columns: dict[str, Column], available) -> dict[str, Column]:
    """Without the spans' column of the default name where there is none: label files may lie beside the audio."""
    absent = columns.get("spans") == SPANS_COLUMN and SPANS_COLUMN not in available
    return {**columns, "spans": None} if absent else columns


def check_columns(available, columns: dict, description: str) -> None:
    for wanted, column in columns.items():
        for name in names_of(column):
            if name not in available:
                raise UserError(
                    f"{wanted}_column_name: {description} has no column {name!r}; it has: "
                    f"{', '.join(map(str, available))}"
                )


def read_columns(item: dict, columns: dict) -> dict:
    return {wanted: pick(item, column) for wanted, column in columns.items()}


# In the place of audio: someone else's table has no business with the files of this machine.
OF_THIS_MACHINE = {**NO_AUDIO, "fault": "a data set from elsewhere names a file of this machine"}


class DatasetRow:
    """One item of a data set -> a row: class numbers become their names, paths get their root.

    is_ours: whether the data set lies on this machine, so that it may name files here.
    """

    def __init__(
        self, audio_column: str, columns: dict, features: dict, description: str, root: Path | None, is_ours: bool
    ):
        self.is_ours = is_ours
        self.audio_column, self.columns, self.description, self.root = audio_column, columns, description, root
        self.sources = {wanted: column for wanted, column in columns.items() if column is not None}
        feature = features.get(columns.get("label"))
        feature = getattr(feature, "feature", feature)  # what a list of labels is a list of
        self.class_names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self.span_names = class_names_of(features.get(columns.get("spans")))

    def __call__(self, item: dict, index: int) -> dict:
        audio = item[self.audio_column] or NO_AUDIO
        if isinstance(audio, str):
            name, audio = audio, {"path": os.path.join(self.root, audio) if self.root else audio, "bytes": None}
        else:
            name = audio.get("path") or (content_name(audio["bytes"]) if audio.get("bytes") else f"row {index}")
        if not self.is_ours and audio.get("bytes") is None and names_this_machine(audio.get("path") or name):
            audio = OF_THIS_MACHINE
        values = {wanted: self.value(wanted, item) if wanted in self.sources else None for wanted in self.columns}
        if "spans" in values:
            values["spans_at"] = f"{self.description} row {index}"
        return {"audio": audio, "name": name, **values}

    def value(self, wanted: str, item: dict):
        """The item's "text", "label" or "spans"; a class number as its name."""
        value = pick(item, self.sources[wanted])
        if wanted == "spans":
            return with_names(value, self.span_names)
        if wanted != "label" or not self.class_names:
            return value
        if isinstance(value, list):
            return [self.class_names[number] if isinstance(number, int) else number for number in value]
        return self.class_names[value] if isinstance(value, int) else value


def content_name(content: bytes) -> str:
    """A name for embedded audio without a path: a row's number differs between shards and moves with every new row."""
    return f"audio with sha256 {hashlib.sha256(content).hexdigest()[:16]}"
