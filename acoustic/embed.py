"""Embeddings of recordings by a frozen encoder, as parquet, and which recordings are most alike.

    python -m acoustic.embed make MODEL AUDIO --output embeddings.parquet [--key value ...]
    python -m acoustic.embed neighbours embeddings.parquet CLIP [-k 5]
    python -m acoustic.embed map embeddings.parquet --output map.png

An embedding is the mean over time of one layer and then its deviation; alike is what has a small cosine distance,
once each value is taken by its difference from the file's mean, in deviations: what all recordings share says nothing.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import transformers
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from transformers.hf_argparser import string_to_bool

from acoustic.console import UserError, did_you_mean, one_line_errors, say
from acoustic.data.headers import Header, Skip
from acoustic.data.sources import open_rows
from acoustic.data.windows import divide_evenly
from acoustic.export import check_output, printable, written_aside
from acoustic.predict.audio import Listening, say_unread
from acoustic.predict.predictor import readable
from acoustic.report.embedding_map import draw_map
from acoustic.tasks.embeddings import MAX_SECONDS, Encoder, Moments, load_encoder

MIN_SECONDS = 0.05
ROW_GROUP = 1000
SCHEMA = {
    "name": pyarrow.string(),
    "start": pyarrow.float64(),
    "end": pyarrow.float64(),
    "label": pyarrow.string(),
    "embedding": pyarrow.list_(pyarrow.float32()),
}


class Embedder:
    """
    Args:
        layer: 0 is what the first layer gets, the last one num_layers - 1; negative ones count from the end.
        seconds: None for one embedding of a whole recording; else one for each of its equal parts, none longer.
    """

    def __init__(self, encoder: Encoder, layer: int | None = None, seconds: float | None = None):
        middle = encoder.num_layers // 2
        self.encoder, self.seconds = encoder, seconds
        self.layer = middle if layer is None else layer if layer >= 0 else encoder.num_layers + layer
        if not 0 <= self.layer < encoder.num_layers:
            raise UserError(f"layer: {layer} is not one of 0 to {encoder.num_layers - 1}, or -1 for the last one")

    @classmethod
    def load(cls, name_or_path: str, layer: int | None, seconds: float | None) -> "Embedder":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_encoder(name_or_path, device=device), layer, seconds)

    def embed(self, row: dict, header: Header, progress=lambda seconds: None) -> list[tuple[float, float, np.ndarray]]:
        """(start, end, embedding) of a recording, or of its parts. Raises `Skip`."""
        found, whole, unread = [], Moments(), []
        windows = divide_evenly(MIN_SECONDS, self.seconds or MAX_SECONDS)(row, header, None)
        for window, waveform in readable(row, windows, self.encoder.rate, unread):
            if int(self.encoder.model._get_feat_extract_output_lengths(len(waveform))) < 1:
                raise Skip(f"{header.seconds:.3f} s are too short for a frame")
            (layers,) = self.encoder.layers([waveform])
            part = whole if self.seconds is None else Moments()
            part.add(layers[self.layer : self.layer + 1])
            if self.seconds is not None:
                found.append((window.start / window.rate, window.stop / window.rate, part.pooled()[0]))
            progress(window.stop / window.rate)
        if not (found or whole.count):
            raise Skip(unread[0]["reason"])
        say_unread(row, unread)
        return found if self.seconds is not None else [(0.0, header.seconds, whole.pooled()[0])]


def write_embeddings(embedder: Embedder, model: str, rows, output: str) -> Listening:
    """A row for each recording or part; `output` becomes the file when all is written.

    Raises:
        UserError: nothing could be read.
    """
    about = {"model": model, "layer": embedder.layer, "seconds": embedder.seconds or "", "audio": rows.description}
    schema = pyarrow.schema(SCHEMA, {name: printable(str(value)) for name, value in about.items()})
    listening = Listening([rows], embedder.embed)
    with written_aside(output) as path, pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in in_groups(listening):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
        if not listening.answered:
            raise UserError(f"nothing in {rows.description!r} could be read")
    return listening


def in_groups(listening: Listening) -> Iterator[list[dict]]:
    group = []
    for row, _, parts in listening:
        label = row.get("label")
        label = None if label is None else printable(str(label))
        group += [
            {"name": printable(row["name"]), "start": start, "end": end, "label": label, "embedding": values}
            for start, end, values in parts
        ]
        if len(group) >= ROW_GROUP:
            yield group
            group = []
    if group:
        yield group


def neighbours(file: str, clip: str, count: int) -> list[dict]:
    """The rows that are nearest to a clip, of other recordings: {"similarity", "name", "start", "end", "label"}.

    Args:
        clip: a name in the file, or an audio file, which is embedded as those in it were.

    Raises:
        UserError: it is neither, or the file is none of ours.
    """
    table, about = read_embeddings(file)
    names = table["name"].to_pylist()
    values = np.stack(table["embedding"].to_numpy())
    own = np.array([name == clip for name in names])
    if own.any():
        wanted = values[own].mean(0)
    elif Path(clip).is_file():
        wanted = embed_file(clip, about)
        own = np.array([Path(clip).resolve().as_posix().endswith(f"/{name}") for name in names])
        if own.any() and not np.allclose(values[own].mean(0), wanted, rtol=1e-2, atol=1e-3):
            own[:] = False  # another recording of that name
    else:
        raise UserError(f"{clip!r} is neither a name in {file} nor an audio file{did_you_mean(clip, set(names))}")
    rest = np.flatnonzero(~own)
    if not len(rest):
        raise UserError(f"{file} holds no other recording than {clip!r}")
    scaler = StandardScaler().fit(values)
    search = NearestNeighbors(n_neighbors=min(count, len(rest)), metric="cosine").fit(scaler.transform(values[rest]))
    distances, places = search.kneighbors(scaler.transform(wanted[None]))
    columns = ("name", "start", "end", "label")
    return [
        {"similarity": 1 - float(distance), **{column: table[column][int(rest[place])].as_py() for column in columns}}
        for distance, place in zip(distances[0], places[0])
    ]


def draw(file: str, output: Path) -> Path:
    """
    Raises:
        UserError: the file holds too few, or is none of ours, or the picture can't be written.
    """
    table, about = read_embeddings(file)
    if len(table) < 3:
        raise UserError(f"{file} holds {len(table)} embeddings: too few for a map")
    values = np.stack(table["embedding"].to_numpy())
    title = f"{len(table):,} embeddings, layer {about['layer']}"
    try:
        return draw_map(output, values, table["label"].to_pylist(), title)
    except OSError as error:
        raise UserError(f"output: can't write to {str(output)!r}: {error.strerror or error}") from None


def read_embeddings(file: str) -> tuple[pyarrow.Table, dict[str, str]]:
    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: can't be read as parquet: {str(error).splitlines()[0][:200]}") from None
    about = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    if not {"model", "layer", "seconds"} <= set(about) or not set(SCHEMA) <= set(table.column_names):
        raise UserError(f"{file}: python -m acoustic.embed make did not write this")
    return table, about


def embed_file(clip: str, about: dict[str, str]) -> np.ndarray:
    """Of all of an audio file: the mean over its parts where the file has parts."""
    seconds = float(about["seconds"]) if about["seconds"] else None
    embedder = Embedder.load(about["model"], int(about["layer"]), seconds)
    found = [parts for _, _, parts in Listening([open_rows(clip)], embedder.embed)]
    if not found:
        raise UserError(f"{clip}: can't be read")
    return np.mean([values for _, _, values in found[0]], axis=0)


# ---- the command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("python -m acoustic.embed", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    add = commands.add_parser("make", help="write embeddings", allow_abbrev=False).add_argument
    add("model_name_or_path", metavar="MODEL", help="a pretrained or fine-tuned model: a folder or a Hub id")
    add("dataset_name", metavar="AUDIO", help="file, folder, glob, manifest, tar shards, URL or Hub id")
    add("--output", required=True, help="the .parquet file to write")
    help = "replace that file"
    add("--overwrite", type=string_to_bool, nargs="?", const=True, default=False, help=help)
    add("--split", default="train", help="subfolder or manifest of a folder that has any; without them, all of it")
    add("--label_column_name", help="column to keep beside the embeddings; default: folder-per-class")
    add("--layer", type=int, help="0 is what the first layer gets, -1 the last one; default: the middle one")
    add("--seconds", type=float, help="an embedding for each part of at most so many; default: one for a recording")
    add = commands.add_parser("neighbours", help="what is most alike", allow_abbrev=False).add_argument
    add("embeddings", metavar="EMBEDDINGS", help="the .parquet file")
    add("clip", metavar="CLIP", help="a name in it, or an audio file")
    add("-k", type=int, default=5, help="so many (default: %(default)s)")
    add = commands.add_parser("map", help="draw all of them on a plane", allow_abbrev=False).add_argument
    add("embeddings", metavar="EMBEDDINGS", help="the .parquet file")
    add("--output", required=True, help="the .png file to write")
    args = parser.parse_args(argv)
    if args.command == "map" and not args.output.endswith(".png"):
        raise UserError(f"output: {args.output!r} should end with .png")
    if args.command == "make" and args.seconds is not None and not args.seconds >= 0.1:
        raise UserError("seconds: at least 0.1")
    if args.command == "neighbours" and args.k < 1:
        raise UserError("k: at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if args.command == "neighbours":
        nearest = neighbours(args.embeddings, args.clip, args.k)
        print(f"{'similarity':>10}  {'seconds':>15}  {'label':<12}  name")
        for found in nearest:
            span = f"{found['start']:.1f} - {found['end']:.1f}"
            print(f"{found['similarity']:>10.4f}  {span:>15}  {found['label'] or '':<12}  {found['name']}")
        return
    if args.command == "map":
        say(f"done: {draw(args.embeddings, Path(args.output))}")
        return
    check_output(args.output, args.overwrite)
    embedder = Embedder.load(args.model_name_or_path, args.layer, args.seconds)
    last = embedder.encoder.num_layers - 1
    say(f"layer {embedder.layer}{f' of 0 to {last}' if last else ', the only one'}, mean and deviation over time")
    rows = open_rows(args.dataset_name, args.split, label_column=args.label_column_name)
    listening = write_embeddings(embedder, args.model_name_or_path, rows, args.output)
    say(
        f"done: {args.output}: {listening.answered:,} recordings, {listening.seconds / 3600:.2f} h; skipped: "
        f"{listening.skipped:,}"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
