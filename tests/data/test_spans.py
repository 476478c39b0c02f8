"""Spans from columns and label files; what can't be right is named in one line, with its file and its line."""

import json

import datasets
import pytest

from acoustic.console import UserError
from acoustic.data.sources import open_rows
from acoustic.data.spans import Span, check_spans, parse_spans, read_audacity, read_raven, read_spans, write_audacity

PUMP, FAN = {"start": 0.1, "end": 0.5, "label": "pump"}, {"start": 0.3, "end": 1.2, "label": "fan"}
SPANS = [Span(0.1, 0.5, "pump"), Span(0.3, 1.2, "fan")]
RAVEN = "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tAnnotation\n"


@pytest.fixture
def manifest(audio_folder):
    """write([spans of clip_000.wav, ...], **options) -> rows of a jsonl; None leaves the column out of a line."""

    def write(values: list, name="metadata.jsonl", **options):
        folder = audio_folder(len(values))
        lines = [
            {"file_name": f"clip_{number:03d}.wav"} | ({} if spans is None else {"spans": spans})
            for number, spans in enumerate(values)
        ]
        (folder / name).write_text("\n".join(map(json.dumps, lines)))
        return open_rows(str(folder), spans_column="spans", **options)

    return write


def everything(rows) -> list:
    return [read_spans(rows[index]) for index in range(len(rows))]


# ---- columns


def test_a_column_of_a_jsonl(manifest):
    rows = manifest([[FAN, PUMP], [], None])
    assert everything(rows) == [SPANS, [], None]
    check_spans(rows)


def test_the_line_number_counts_blank_lines(audio_folder):
    folder = audio_folder(1)
    bad = {"file_name": "clip_000.wav", "spans": [PUMP, {**FAN, "end": 0.2}]}
    (folder / "metadata.jsonl").write_text("\n\n" + json.dumps(bad))
    with pytest.raises(UserError) as error:
        check_spans(open_rows(str(folder), spans_column="spans"))
    place = f"{folder}/metadata.jsonl line 3, span 2"
    assert str(error.value) == f"{place}: 'fan' ends at 0.2 s, before it starts at 0.3 s"


def test_json_in_a_csv(audio_folder):
    folder = audio_folder(2)
    text = json.dumps([PUMP, FAN]).replace('"', '""')
    (folder / "metadata.csv").write_text(f'file_name,spans\nclip_000.wav,"{text}"\nclip_001.wav,\n')
    rows = open_rows(str(folder), spans_column="spans")
    assert everything(rows) == [SPANS, None]
    assert rows[1]["spans_at"] == f"{folder}/metadata.csv line 3"


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_embedded_audio_and_class_numbers(tmp_path, audio_folder, streaming):
    folder = audio_folder(2)
    features = datasets.Features(
        {
            "audio": datasets.Audio(),
            "spans": [
                {
                    "start": datasets.Value("float32"),
                    "end": datasets.Value("float32"),
                    "label": datasets.ClassLabel(names=["fan", "pump"]),
                }
            ],
        }
    )
    items = {
        "audio": [{"path": name, "bytes": (folder / name).read_bytes()} for name in ("clip_000.wav", "clip_001.wav")],
        "spans": [[{"start": 0.25, "end": 0.5, "label": 1}], []],
    }
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(items, features).to_parquet(tmp_path / "set" / "train.parquet")
    rows = open_rows(str(tmp_path / "set"), spans_column="spans", streaming=streaming, indexed=not streaming)
    assert [parse_spans(value, "here") for value in rows.columns("spans")] == [[Span(0.25, 0.5, "pump")], []]
    _, row = next(iter(rows.iterate(0, 1, None, 0)))
    assert read_spans(row) == [Span(0.25, 0.5, "pump")]


def test_a_mapping_of_lists_is_the_same():
    """What `datasets.Sequence` of a mapping gives."""
    value = {"start": [0.1, 0.3], "end": [0.5, 1.2], "label": ["pump", "fan"]}
    assert parse_spans(value, "here") == SPANS


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1, 2", r"here: the spans are not JSON"),
        (5, r"here: spans are a list of {start, end, label}, not 5"),
        ([3], r"here: spans are a list"),
        ([{"start": 0, "end": 1}], r"here, span 1 has no 'label'; each needs start, end \(in seconds\) and label"),
        ([PUMP, {**PUMP, "start": "soon"}], r"here, span 2: the start 'soon' is not a number of seconds"),
        ([{**PUMP, "end": "0,5"}], r"the end '0,5' is not a number of seconds; decimals take a point"),
        ([{**PUMP, "end": float("nan")}], r"the end nan is not a number"),
        ([{**PUMP, "end": True}], r"the end True is not a number"),
        ([{**PUMP, "start": -1}], r"here, span 1: 'pump' starts at -1 s, before the recording"),
        ([{**PUMP, "label": " "}], r"here, span 1 has no label; write what sounds from 0.1 to 0.5 s"),
    ],
)
def test_columns_that_cannot_be_right(value, words):
    with pytest.raises(UserError, match=words):
        parse_spans(value, "here")


def test_a_column_that_was_named_must_be_there(audio_folder, manifest):
    manifest([[PUMP]])
    with pytest.raises(UserError, match="spans_column_name: .* has no column 'events'; it has: file_name, spans"):
        open_rows(str(audio_folder(1)), spans_column="events")


# ---- label files


def test_audacity_files_round_trip(tmp_path):
    spans = [Span(0.0, 0.5, "motor"), Span(0.25, 0.25, "a point"), Span(0.25, 3600.123456, "Größe \\ 2")]
    write_audacity(tmp_path / "a.txt", spans)
    assert read_audacity(str(tmp_path / "a.txt")) == spans
    write_audacity(tmp_path / "empty.txt", [])
    assert read_audacity(str(tmp_path / "empty.txt")) == []


def test_audacity_as_the_manual_shows_it(tmp_path):
    """Points, regions, frequencies, and the two columns of version 1.2; with a mark at the start, as Windows has."""
    path = tmp_path / "a.txt"
    lines = ["2.15\t2.15\tpoint", "\\\t-1.000000\t6334.588867", "3.4\t6.1\tregion", "", "7.5\told one"]
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    assert read_audacity(str(path)) == [Span(2.15, 2.15, "point"), Span(3.4, 6.1, "region"), Span(7.5, 7.5, "old one")]
    assert [span.where for span in read_audacity(str(path))] == [f"{path} line {number}" for number in (1, 3, 5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0\t1\ta\n1.0\t0.5\tb\n", "line 2: 'b' ends at 0.5 s, before it starts at 1 s"),
        ("0\tx\ta\n", "line 1: the end 'x' is not a number"),
        ("0\t1\t\n", "line 1 has no label"),
        ("a transcript\n", "line 1 is no Audacity label .*: a transcript"),
    ],
)
def test_audacity_files_that_cannot_be_right(tmp_path, text, words):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/a.txt {words}"):
        read_audacity(str(tmp_path / "a.txt"))


def test_raven_counts_a_selection_once(tmp_path):
    path = tmp_path / "a.txt"
    rows = [
        "1\tWaveform 1\t1\t0.1\t0.5\tpump",
        "1\tSpectrogram 1\t1\t0.1\t0.5\tpump",
        "2\tSpectrogram 1\t1\t0.3\t1.2\tfan",
    ]
    path.write_text(RAVEN + "\n".join(rows))
    assert read_raven(str(path)) == SPANS
    assert [span.where for span in read_raven(str(path))] == [f"{path} line 2", f"{path} line 4"]
    path.write_text(RAVEN)
    assert read_raven(str(path)) == []


@pytest.mark.parametrize("column", ["Species", "label"])
def test_raven_by_any_name(tmp_path, column):
    """And without numbers of selections every row counts."""
    path = tmp_path / "a.txt"
    path.write_text(f"Begin Time (s)\tEnd Time (s)\t{column}\n0.1\t0.5\tpump\n0.3\t1.2\tfan\n")
    assert read_raven(str(path)) == SPANS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RAVEN.replace("Annotation", "Notes"), "line 1: a Raven selection table needs a column 'Annotation'; it has"),
        (RAVEN.replace("End", "Final"), r"line 1: .* needs a column 'End Time \(s\)'"),
        (RAVEN + "1\tSpectrogram 1\t1\t0.1", "line 2 has 4 columns, the header has 6"),
        (RAVEN + "1\tSpectrogram 1\t1\t0.1\tlate\tpump", "line 2: the end 'late' is not a number"),
    ],
)
def test_raven_tables_that_cannot_be_right(tmp_path, text, words):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/a.txt {words}"):
        read_raven(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", ["a.txt", "a.labels.txt", "a.selections.txt", "a.Table.1.selections.txt"])
def test_label_files_beside_the_audio(audio_folder, name):
    """In a plain folder, and for a manifest without the column."""
    folder = audio_folder(["sub/a.wav", "sub/b.wav"])
    raven = RAVEN + "1\tSpectrogram 1\t1\t0.1\t0.5\tpump\n2\tSpectrogram 1\t1\t0.3\t1.2\tfan\n"
    (folder / "sub" / name).write_text(raven if "selections" in name else "0.3\t1.2\tfan\n0.1\t0.5\tpump\n")
    assert everything(open_rows(str(folder), spans_column="spans")) == [SPANS, None]
    (folder / "metadata.csv").write_text("file_name\nsub/b.wav\nsub/a.wav\n")
    assert everything(open_rows(str(folder), spans_column="spans")) == [None, SPANS]


def test_two_sources_that_agree_and_two_that_do_not(manifest, audio_folder):
    rows, folder = manifest([[PUMP, FAN]]), audio_folder(1)
    label_file = folder / "clip_000.labels.txt"
    write_audacity(label_file, [Span(0.1004, 0.5, "pump"), Span(0.3, 1.2, "fan")])
    assert everything(rows) == [SPANS]
    write_audacity(label_file, [Span(0.1, 0.5, "pump"), Span(0.4, 1.2, "fan")])
    with pytest.raises(UserError) as error:
        check_spans(rows)
    assert str(error.value) == (
        f"{folder}/metadata.jsonl line 1, span 2: 'fan' from 0.3 to 1.2 s is not in {label_file}; keep one of the two,"
        " or make them agree"
    )
    write_audacity(label_file, [*SPANS, Span(0.6, 0.7, "valve")])
    with pytest.raises(UserError, match="clip_000.labels.txt line 3: 'valve' .* is not in .*metadata.jsonl line 1;"):
        check_spans(rows)


def test_a_transcript_beside_labeled_audio_is_no_label_file(manifest, audio_folder):
    rows, folder = manifest([[PUMP]]), audio_folder(1)
    (folder / "clip_000.txt").write_text("the pump runs\n")
    check_spans(rows)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="clip_000.txt line 1 is no Audacity label"):
        check_spans(open_rows(str(folder), spans_column="spans"))


# ---- against the audio


def test_spans_beyond_the_recording(manifest, audio_folder):
    """A clip has 1.5 s; editors round, so a few hundredths more are cut off later."""
    check_spans(manifest([[{**PUMP, "end": 1.54}]]))
    rows = manifest([[PUMP], [FAN, {**PUMP, "end": 1.6}]])
    with pytest.raises(UserError) as error:
        check_spans(rows)
    place = f"{audio_folder(2)}/metadata.jsonl line 2, span 2"
    assert str(error.value) == f"{place}: 'pump' from 0.1 to 1.6 s goes beyond 'clip_001.wav', which has 1.50 s"


def test_no_label_source_at_all(audio_folder, manifest):
    with pytest.raises(
        UserError, match="spans_column_name: .* has no spans: neither a column of them nor label files"
    ):
        check_spans(open_rows(str(audio_folder(2)), spans_column="spans"))
    check_spans(manifest([[], None]))  # in one of them nothing sounds, and that is known


def test_audio_that_cannot_be_read_is_left_to_the_reader(manifest, audio_folder):
    rows = manifest([[{**PUMP, "end": 99}]])
    (audio_folder(1) / "clip_000.wav").write_bytes(b"no audio")
    check_spans(rows)
