"""Tables of paths: csv, tsv, jsonl, parquet and fairseq's .tsv; local or behind a URL."""

import csv
import io
import json
import os

import pyarrow
import pyarrow.parquet

from acoustic.console import UserError
from acoustic.data.columns import (
    NO_AUDIO,
    OF_THIS_MACHINE,
    Options,
    check_columns,
    choose_path_column,
    only_present,
    read_columns,
)
from acoustic.data.fields import names_of
from acoustic.data.remote import is_remote, names_this_machine
from acoustic.data.rows import IndexedRows, PackedList
from acoustic.data.shards import open_binary

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def open_manifest(path: str, options: Options) -> IndexedRows:
    """Rows of a table with a column of paths, local or behind a URL; relative ones start where the table is."""
    items, root = read_fairseq(path) or (read_manifest(path), path.rpartition("/")[0])
    if not items:
        raise UserError(f"dataset_name: the manifest {path!r} has no rows")
    _, first = items[0]
    path_column = choose_path_column(first, options.audio_column, path)
    columns = only_present(options.columns, first)
    check_columns(first, columns, path)
    wanted = {path_column, *(name for column in columns.values() for name in names_of(column))}

    def to_row(packed: list, index: int) -> dict:
        place, item = packed
        values = read_columns(item, columns) | ({"spans_at": f"{path} {place}"} if "spans" in columns else {})
        file = item.get(path_column)
        if not file or not isinstance(file, str):
            return {"audio": NO_AUDIO, "name": f"row {index}", **values}
        where = file if is_remote(file) else f"{root}/{file}" if is_remote(root) else os.path.join(root, file)
        if is_remote(path) and names_this_machine(where):
            return {"audio": OF_THIS_MACHINE, "name": file, **values}
        return {"audio": {"path": where, "bytes": None}, "name": file, **values}

    packed = PackedList([place, {name: item.get(name) for name in wanted}] for place, item in items)
    return IndexedRows(packed, to_row, path)


def read_manifest(path: str) -> list[tuple[str, dict]]:
    """(its place: "line 3"; its row by column) for each."""
    try:
        content = read_bytes(path)
        if path.endswith(".parquet"):
            rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
            return [(f"row {number}", row) for number, row in enumerate(rows)]
        text = content.decode("utf-8-sig")
        if path.endswith(".jsonl"):
            lines = enumerate(text.split("\n"), 1)
            return [(f"line {number}", parse_json_line(line, number, path)) for number, line in lines if line.strip()]
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.endswith(".tsv") else ",")
        return [(f"line {table.line_num}", row) for row in table]
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


def read_fairseq(path: str) -> tuple[list[tuple[str, dict]], str] | None:
    """fairseq's manifest: the root folder on the first line, then `path<TAB>frames`. None if it is another .tsv."""
    if not path.endswith(".tsv") or is_remote(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\r\n") for line in file]
    folder = os.path.dirname(path)
    if not lines or not lines[0] or "\t" in lines[0] or not os.path.isdir(os.path.join(folder, lines[0])):
        return None
    items = [(f"line {number}", {"path": line.split("\t")[0]}) for number, line in enumerate(lines[1:], 2) if line]
    return items, os.path.join(folder, lines[0])
