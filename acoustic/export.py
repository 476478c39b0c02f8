"""The codes of a data set, as parquet: what a vq_wav2vec hears as words, for whoever wants to treat audio as text."""

import contextlib
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import transformers
from tqdm.auto import tqdm

from acoustic.console import UserError
from acoustic.data.batches import BatchStream
from acoustic.data.collate import extract
from acoustic.data.headers import Header, Skip
from acoustic.data.loader import StreamLoader
from acoustic.data.rows import Rows
from acoustic.data.tally import Tally, digest, most_common
from acoustic.data.windows import Plan, Window
from acoustic.models import load_config, load_feature_extractor, load_weights
from acoustic.models.build import check_rate

FORMAT = "acoustic.codes 1"
# Frames that are written at a time, 17 minutes at 100 a second. Small arrays that stay keep the memory of large ones
# from being given back: of 5 hours that were written in one piece the process grew by 370 MB, in these by 200.
ROW_GROUP = 100_000


@dataclass(frozen=True)
class HeardFrames:
    """Where frames lie: number i hears the samples [i * hop, i * hop + span) of audio at `rate` Hz."""

    rate: int
    hop: int
    span: int

    def frames_in(self, samples: int) -> int:
        return max((samples - self.span) // self.hop + 1, 0)

    def seconds(self, frames: int) -> float:
        """From the beginning of one frame to that of another so many later."""
        return frames * self.hop / self.rate


class Tokenizer:
    """What makes codes of waveforms: a vq_wav2vec, or what a code_bert keeps of one.

    Args:
        name: of the checkpoint.
        model: `quantize(input_values)` gives its codes (batch, frames, groups).
        extractor: its feature extractor.
    """

    def __init__(self, name: str, config, quantize, extractor, device):
        self.name, self.quantize, self.extractor, self.device = name, quantize, extractor, device
        self.groups, self.entries = config.num_codevector_groups, config.num_codevectors_per_group
        self.grid = HeardFrames(extractor.sampling_rate, config.inputs_to_logits_ratio, config.receptive_field)

    def codes(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """Waveforms of any lengths, (samples,) each -> for each of them (groups, frames) int64.

        Those of one length go through the model together. Nothing is padded: on a CPU that takes half as long
        again, and the rounding of norms that leave padding out could give a window other codes than it has alone.
        """
        alike, found = defaultdict(list), {}
        for index, waveform in enumerate(waveforms):
            alike[len(waveform)].append(index)
        # TensorFloat-32 would be another rounding.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for indices in alike.values():
                inputs = extract(self.extractor, [waveforms[index] for index in indices])["input_values"]
                codes = self.quantize(inputs.to(self.device)).transpose(1, 2).cpu().numpy()
                found.update(zip(indices, codes))
        return [found[index] for index in range(len(waveforms))]


def load_tokenizer(name_or_path: str, revision: str | None = None, device="cpu") -> Tokenizer:
    """Of a vq_wav2vec or code_bert checkpoint. Raises `UserError`."""
    config = load_config(name_or_path, revision)
    if config.model_type not in ("vq_wav2vec", "code_bert"):
        raise UserError(
            f"model_name_or_path: {name_or_path!r} is a {config.model_type} checkpoint, which has no codes to export; "
            "one of vq_wav2vec or code_bert is needed"
        )
    extractor = load_feature_extractor(name_or_path, revision)
    check_rate(name_or_path, config, extractor)
    model, info = load_weights(transformers.AutoModel, name_or_path, revision, config)
    parts = ("reader.",) if config.model_type == "code_bert" else ("encoder.", "quantizer.")
    if lost := sorted(key for key in info["missing_keys"] if key.startswith(parts)):
        raise UserError(f"model_name_or_path: {name_or_path!r} lacks weights of the quantizer: {lost[0]}, ...")
    model = model.to(device).eval()
    if config.model_type == "code_bert":
        return Tokenizer(name_or_path, config.codes, model.reader, extractor, device)
    return Tokenizer(name_or_path, config, model.quantize, extractor, device)


def frames_in_a_row(grid: HeardFrames, max_seconds: float) -> Plan:
    """All frames of a recording, in as few windows as `max_seconds` allows; all but the last have equally many.

    A window begins where a frame of the whole recording would and shares with the next what its last frames hear, so
    no frame is lost or doubled between them. row["place"] is {"first": number of its first frame, "frames"}.
    """
    most = max(grid.frames_in(int(max_seconds * grid.rate)), 1)

    def plan(row: dict, header: Header, generator: np.random.Generator | None) -> Iterator[Window]:
        total = grid.frames_in(math.ceil(header.frames * grid.rate / header.rate))
        if total < 1:
            raise Skip(f"{header.seconds:.3f} s is shorter than a frame")
        return lay_out(row, header, total, math.ceil(total / math.ceil(total / most)))

    def lay_out(row: dict, header: Header, total: int, size: int) -> Iterator[Window]:
        for first in range(0, total, size):
            frames = min(size, total - first)
            # Whole samples of the recording's own rate: begun no later and ended no earlier than the frames are.
            start = first * grid.hop * header.rate // grid.rate
            length = math.ceil(((frames - 1) * grid.hop + grid.span) * header.rate / grid.rate)
            stop = min(start + length, header.frames)
            row = {**row, "place": {"first": first, "frames": frames}}
            yield Window(row, start, stop, header.rate, grid.seconds(frames), alone=size >= total)

    return plan


class InOrder(BatchStream):
    """Batches of windows as they follow one another, for what is written must be in the order of the recordings."""

    def cut(self, block: list[Window], generator=None) -> list[list[Window]]:
        batches, seconds = [], math.inf
        for window in block:
            if seconds + window.seconds > self.batch_seconds + 1e-6:
                batches.append([])
                seconds = 0.0
            batches[-1].append(window)
            seconds += window.seconds
        return batches


def as_they_are(windows: list[Window], waveforms: list[np.ndarray]) -> dict:
    places = [{"name": window.row["name"], **window.row["place"]} for window in windows]
    return {"waveforms": waveforms, "places": places}


@dataclass
class Export:
    """What was written: files, frames, seconds of audio, `counts` (groups, entries) of the codes, and what was not."""

    counts: np.ndarray
    frames: int = 0
    seconds: float = 0.0
    names: set[bytes] = field(default_factory=set)
    skipped: Tally = field(default_factory=Tally)

    @property
    def files(self) -> int:
        return len(self.names)

    @property
    def used(self) -> list[int]:
        """Entries that were met, of each group."""
        return (self.counts > 0).sum(1).tolist()

    def add(self, name: str, codes: np.ndarray, seconds: float) -> None:
        self.names.add(digest(name))
        self.frames, self.seconds = self.frames + codes.shape[1], self.seconds + seconds
        for counts, group in zip(self.counts, codes):
            counts += np.bincount(group, minlength=len(counts))


def export_codes(
    tokenizer: Tokenizer,
    rows: Rows,
    output: str | Path,
    *,
    max_seconds: float = 30.0,
    batch_seconds: float = 30.0,
    collapse: bool = False,
    workers: int = 0,
    total_seconds: float | None = None,
    show_progress: bool = False,
) -> Export:
    """Write one row for each window: name, start, end, codes (groups, frames), text.

    Args:
        output: becomes the file when all of it is written; before that it is a hidden one beside it.
        collapse: of frames whose codes are all those of the frame before, keep none.
        total_seconds: of the progress bar.

    Raises:
        UserError: nothing can be used, or the file can't be written.
    """
    export = Export(np.zeros((tokenizer.groups, tokenizer.entries), np.int64))
    schema = make_schema(tokenizer, rows, collapse)
    bar = tqdm(total=total_seconds and round(total_seconds), desc="codes", unit=" s", disable=not show_progress)
    with bar, written_aside(output) as path, pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        found = listen(tokenizer, rows, export, max_seconds, batch_seconds, workers, bar)
        for group in row_groups(found):
            writer.write_table(to_table(group, schema, collapse))
        if not export.frames:
            reasons = most_common(export.skipped.reasons) or "it is empty"
            raise UserError(f"dataset_name: nothing in {rows.description!r} can be used: {reasons}")
    return export


def listen(
    tokenizer: Tokenizer, rows: Rows, export: Export, max_seconds: float, batch_seconds: float, workers: int, bar: tqdm
) -> Iterator[tuple[str, float, float, np.ndarray]]:
    """(name, start, end, codes (groups, frames) int64) of each window; `export` counts them, `bar` shows them."""
    grid = tokenizer.grid
    plan = frames_in_a_row(grid, max_seconds)
    stream = InOrder([(rows, 1.0)], plan, as_they_are, rate=grid.rate, batch_seconds=batch_seconds, train=False)
    for batch in StreamLoader(stream, workers):
        export.skipped.add(batch["skipped"], batch["rows"])
        if "waveforms" not in batch:
            continue
        for place, codes in zip(batch["places"], tokenizer.codes(batch["waveforms"])):
            first, frames = place["first"], place["frames"]
            start, end = grid.seconds(first), grid.seconds(first + frames)
            export.add(place["name"], codes[:, :frames], end - start)
            yield place["name"], start, end, codes[:, :frames]
        bar.update(round(export.seconds) - bar.n)


def row_groups(found: Iterator[tuple]) -> Iterator[list[tuple]]:
    """What `listen` gives, in lists of at least ROW_GROUP frames; the last may have fewer."""
    group, frames = [], 0
    for row in found:
        group.append(row)
        frames += row[-1].shape[1]
        if frames >= ROW_GROUP:
            yield group
            group, frames = [], 0
    if group:
        yield group


def make_schema(tokenizer: Tokenizer, rows: Rows, collapse: bool) -> pyarrow.Schema:
    """The columns; what the codes are is said in the schema's metadata, in strings."""
    code = pyarrow.int16() if tokenizer.entries <= 2**15 else pyarrow.int32()
    columns = {
        "name": pyarrow.string(),
        "start": pyarrow.float64(),
        "end": pyarrow.float64(),
        "codes": pyarrow.list_(pyarrow.list_(code)),
        "text": pyarrow.string(),
    }
    grid = tokenizer.grid
    about = {
        "format": FORMAT,
        "model": tokenizer.name,
        "audio": rows.description,
        "groups": tokenizer.groups,
        "entries": tokenizer.entries,
        "sampling_rate": grid.rate,
        "inputs_to_logits_ratio": grid.hop,
        "frame_rate": f"{grid.rate / grid.hop:g}",
        "collapsed": str(collapse).lower(),
    }
    return pyarrow.schema(columns, {name: printable(str(value)) for name, value in about.items()})


def to_table(group: list[tuple], schema: pyarrow.Schema, collapse: bool) -> pyarrow.Table:
    names, starts, ends, codes = zip(*group)
    codes = [without_repeats(each) for each in codes] if collapse else codes
    columns = [
        [printable(name) for name in names],
        starts,
        ends,
        [list(each) for each in codes],
        [as_text(each) for each in codes],
    ]
    return pyarrow.table([pyarrow.array(values, kind) for values, kind in zip(columns, schema.types)], schema=schema)


def without_repeats(codes: np.ndarray) -> np.ndarray:
    """(groups, frames) without the frames that are like the one before in all groups."""
    changes = (codes[:, 1:] != codes[:, :-1]).any(0)
    return codes[:, np.concatenate([[True], changes])]


def as_text(codes: np.ndarray) -> str:
    """(groups, frames) -> a word for each frame, its codes joined by hyphens: "12-301 5-77"."""
    return " ".join("-".join(map(str, frame)) for frame in codes.T.tolist())


def printable(text: str) -> str:
    """Names of files that are not UTF-8, with what is not escaped: parquet holds nothing else."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_output(output: str | Path, overwrite: bool) -> None:
    """Before anything takes time. Raises `UserError`."""
    output = Path(output)
    if output.suffix != ".parquet":
        raise UserError(f"output: {str(output)!r} must end in .parquet")
    if not output.parent.is_dir():
        raise UserError(f"output: there is no folder {str(output.parent)!r}")
    if output.is_dir():
        raise UserError(f"output: {str(output)!r} is a folder")
    if output.exists() and not overwrite:
        raise UserError(f"output: {str(output)!r} is there already; --overwrite true replaces it")
    try:
        with written_aside(output, keep=False) as path:
            path.touch()
    except OSError as error:
        raise UserError(f"output: can't write to {str(output)!r}: {error.strerror}") from None


@contextlib.contextmanager
def written_aside(output: str | Path, keep: bool = True) -> Iterator[Path]:
    """A hidden file in the folder, which takes the place of `output` when all went well and else goes."""
    output = Path(output)
    path = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        yield path
        if keep:
            os.replace(path, output)
    finally:
        path.unlink(missing_ok=True)
