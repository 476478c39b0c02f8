"""Tables of paths: csv, tsv, jsonl, parquet and fairseq's .tsv; local or behind a URL."""

import csv
import io
import json
import os

import pyarrow
import pyarrow.parquet

from acoustic.console import UserError
from acoustic.data.columns import NO_AUDIO, Options, check_columns, choose_path_column, read_columns
from acoustic.data.remote import is_remote
from acoustic.data.rows import IndexedRows, PackedList
from acoustic.data.shards import open_binary

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


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
