"""When does what sound: spans of a recording from a column, Audacity label files or Raven selection tables.

A column holds a list of {"start", "end", "label"} for each recording, in seconds (JSON text in a csv). Or the labels
lie beside the audio rec.wav:

    rec.txt, rec.labels.txt                        an Audacity label track, exported
        (https://manual.audacityteam.org/man/importing_and_exporting_labels.html)
    rec.selections.txt, rec.Table.1.selections.txt a selection table of Raven (Cornell Lab of Ornithology)

An empty list or file says that nothing sounds; where there is neither, nothing is known.
"""

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from acoustic.console import UserError
from acoustic.data.headers import Skip, read_header
from acoustic.data.remote import is_remote
from acoustic.data.rows import IndexedRows, Rows

AUDACITY_SUFFIXES = (".txt", ".labels.txt")
RAVEN_SUFFIXES = (".selections.txt", ".Table.1.selections.txt")
RAVEN_START, RAVEN_END, RAVEN_LABELS = "Begin Time (s)", "End Time (s)", ("Annotation", "Species", "Label")

# Seconds that a span may reach beyond the recording: what editors round, and an mp3's padding. It is cut off.
TOLERANCE = 0.05
# Two sources that differ by less, in seconds, say the same.
SAME = 1e-3


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """`label` sounds from `start` to `end`, in seconds; a point where they are equal. `where`: file and line."""

    start: float
    end: float
    label: str
    where: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.label!r} from {self.start:g} to {self.end:g} s"


def read_spans(row: dict) -> list[Span] | None:
    """The spans of a recording, by start; None where nothing says which.

    Args:
        row: with the column's value in "spans", its place in "spans_at", and "audio".

    Raises:
        UserError: a label that can't be read, or two sources that disagree.
    """
    at = row.get("spans_at") or row["name"]
    sources = {at: parse_spans(row.get("spans"), at)}
    for path in label_files(row["audio"], alone=sources[at] is None):
        sources[path] = read_raven(path) if path.endswith(RAVEN_SUFFIXES) else read_audacity(path)
    given = {where: spans for where, spans in sources.items() if spans is not None}
    for where, spans in list(given.items())[1:]:
        refuse_disagreement(*next(iter(given.items())), where, spans)
    return next(iter(given.values()), None)


def parse_spans(value, where: str) -> list[Span] | None:
    """A column's value -> spans: a list of mappings, a mapping of lists, JSON text of these; nothing is None."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: the spans are not JSON ({error.msg})") from None
    if value is None or value == "":
        return None
    value = as_mappings(value)
    if not isinstance(value, list) or not all(isinstance(span, Mapping) for span in value):
        raise UserError(f"{where}: spans are a list of {{start, end, label}}, not {str(value)[:60]}")
    spans = []
    for number, span in enumerate(value, 1):
        place = f"{where}, span {number}"
        if missing := [name for name in ("start", "end", "label") if span.get(name) is None]:
            raise UserError(f"{place} has no {missing[0]!r}; each needs start, end (in seconds) and label")
        spans.append(make_span(span["start"], span["end"], span["label"], place))
    return sorted(set(spans))


def as_mappings(value):
    """`datasets.Sequence` of a mapping gives a mapping of lists."""
    if isinstance(value, Mapping) and all(isinstance(part, list) for part in value.values()):
        return [dict(zip(value, parts)) for parts in zip(*value.values())]
    return value


def make_span(start, end, label, where: str) -> Span:
    start, end = to_seconds(start, "start", where), to_seconds(end, "end", where)
    label = str(label).strip()
    if not label:
        raise UserError(f"{where} has no label; write what sounds from {start:g} to {end:g} s")
    if end < start:
        raise UserError(f"{where}: {label!r} ends at {end:g} s, before it starts at {start:g} s")
    if start < -TOLERANCE:
        raise UserError(f"{where}: {label!r} starts at {start:g} s, before the recording")
    return Span(max(start, 0.0), max(end, 0.0), label, where)


def to_seconds(value, name: str, where: str) -> float:
    with suppress(TypeError, ValueError):
        if not isinstance(value, bool) and math.isfinite(seconds := float(value)):
            return seconds
    hint = "; decimals take a point" if isinstance(value, str) and re.fullmatch(r"\s*-?\d+,\d+\s*", value) else ""
    raise UserError(f"{where}: the {name} {value!r} is not a number of seconds{hint}")


def class_names_of(feature) -> list[str] | None:
    """The class names of a column's feature where it is a list of {start, end, label: ClassLabel}."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else feature)
    label = inner.get("label") if isinstance(inner, dict) else None
    label = getattr(label, "feature", label)
    return label.names if isinstance(label, datasets.ClassLabel) else None


def with_names(value, names: list[str] | None):
    """A column's value with class names for class numbers."""
    if names is None or value is None:
        return value
    return [
        {**span, "label": names[span["label"]] if isinstance(span.get("label"), int) else span.get("label")}
        for span in as_mappings(value)
    ]


# ---- label files


def label_files(audio: dict, alone: bool = True) -> list[str]:
    """Those beside a recording that is a local file of its own.

    alone: nothing else has its labels. Where something has, a rec.txt that looks like no label track is another thing,
        a transcript.
    """
    path = audio.get("path")
    if path is None or audio.get("bytes") is not None or "offset" in audio or is_remote(path):
        return []
    stem = os.path.splitext(path)[0]
    found = [stem + suffix for suffix in (*AUDACITY_SUFFIXES, *RAVEN_SUFFIXES) if os.path.isfile(stem + suffix)]
    if found[:1] == [stem + ".txt"] and (not alone or len(found) > 1) and not looks_like_labels(found[0]):
        return found[1:]
    return found


def looks_like_labels(path: str) -> bool:
    first = next((line for _, line in read_lines(path)), "0\t0\t")
    return re.match(r"\s*-?\d+([.,]\d+)?\t", first) is not None


def read_lines(path: str) -> list[tuple[int, str]]:
    """(number, line) of the lines with something on them."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None
    lines = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def read_audacity(path: str) -> list[Span]:
    """start<TAB>end<TAB>label, or start<TAB>label of Audacity 1.2; a line that begins with a backslash has the
    frequencies of the label before it, which are passed over."""
    spans = []
    for number, line in read_lines(path):
        if line.startswith("\\"):
            continue
        where = f"{path} line {number}"
        fields = line.split("\t")
        if len(fields) == 2 and not is_number(fields[1]):
            fields.insert(1, fields[0])
        if len(fields) < 2:
            raise UserError(
                f"{where} is no Audacity label (start, end and label, with tabs between them): {line[:60]}"
            )
        spans.append(make_span(fields[0], fields[1], " ".join(fields[2:]), where))
    return sorted(set(spans))


def is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return False


def write_audacity(path: str | Path, spans: Iterable[Span]) -> None:
    """A file that Audacity imports as a label track; `read_audacity` gives the same spans, to a microsecond."""
    lines = (f"{span.start:.6f}\t{span.end:.6f}\t{' '.join(span.label.split())}\n" for span in sorted(spans))
    Path(path).write_text("".join(lines), encoding="utf-8")


def label_file_stem(name: str, taken: set[str]) -> str:
    """A recording's name -> that of its label file, without folders; `taken` gets it, so that no two are the same."""
    stem = re.sub(r"[^\w.-]+", "_", re.sub(r"\.\w{2,4}$", "", name)).strip("._")[-120:] or "recording"
    found, number = stem, 1
    while found.casefold() in taken:
        number += 1
        found = f"{stem}_{number}"
    taken.add(found.casefold())
    return found


def read_raven(path: str) -> list[Span]:
    """A table with a header. A selection has a row for each view (waveform, spectrogram), and is counted once."""
    lines = read_lines(path)
    if not lines:
        return []
    header, *rows = csv.reader((line for _, line in lines), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = {name.strip().lower(): index for index, name in enumerate(header)}
    label = next((name for name in RAVEN_LABELS if name.lower() in columns), RAVEN_LABELS[0])
    for name in (RAVEN_START, RAVEN_END, label):
        if name.lower() not in columns:
            found = ", ".join(map(repr, header))
            raise UserError(
                f"{path} line {lines[0][0]}: a Raven selection table needs a column {name!r}; it has {found}"
            )
    places = [columns[name.lower()] for name in (RAVEN_START, RAVEN_END, label)]
    spans = {}
    for (number, _), row in zip(lines[1:], rows):
        where = f"{path} line {number}"
        if len(row) <= max(places):
            raise UserError(f"{where} has {len(row)} columns, the header has {len(header)}")
        selection = row[columns["selection"]] if "selection" in columns else number
        if selection not in spans:
            spans[selection] = make_span(*(row[place] for place in places), where)
    return sorted(set(spans.values()))


def refuse_disagreement(where: str, spans: list[Span], other_where: str, others: list[Span]) -> None:
    """
    Raises:
        UserError: two sources do not have the same spans.
    """
    if spans == others:
        return
    for sides in ((spans, others, other_where), (others, spans, where)):
        for span in sides[0]:
            if not any(
                span.label == other.label and abs(span.start - other.start) < SAME and abs(span.end - other.end) < SAME
                for other in sides[1]
            ):
                raise UserError(f"{span.where}: {span} is not in {sides[2]}; keep one of the two, or make them agree")


# ---- before anything is trained on them


def check_spans(rows: Rows) -> None:
    """Read the labels of all recordings, and hold them against the headers of those that are local.

    Of a stream they are read when their turn comes. A progress bar is shown in a terminal.

    Raises:
        UserError: a label that can't be right, or no recording has any.
    """
    if not isinstance(rows, IndexedRows):
        return
    labeled = 0
    for index in tqdm(range(len(rows)), "reading labels", leave=False, disable=None):
        row = rows[index]
        spans = read_spans(row)
        labeled += spans is not None
        if spans and not is_remote(row["audio"].get("path") or ""):
            with suppress(Skip):
                refuse_outside(spans, read_header(row["audio"]).seconds, row["name"])
    if not labeled:
        raise UserError(
            f"spans_column_name: {rows.description} has no spans: neither a column of them nor label files beside the "
            "audio (rec.txt of Audacity, rec.selections.txt of Raven beside rec.wav)"
        )


def refuse_outside(spans: list[Span], seconds: float, name: str) -> None:
    """
    Raises:
        UserError: a span ends after the recording of so many seconds.
    """
    for span in spans:
        if span.end > seconds + TOLERANCE:
            raise UserError(f"{span.where}: {span} goes beyond {name!r}, which has {seconds:.2f} s")
