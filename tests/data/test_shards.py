"""Tars in WebDataset's layout and parquet with embedded audio are read in place, and past what is broken in them."""

import io
import itertools
import json
import tarfile
import tracemalloc

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

import tests.data.http_server as web
from acoustic.console import UserError
from acoustic.data import remote, shards
from acoustic.data.decode import read_window
from acoustic.data.headers import Skip, read_header
from acoustic.data.order import Reader
from acoustic.data.rows import ShardedRows
from acoustic.data.sources import open_rows
from acoustic.data.windows import cover

http_server = web.http_server
RATE = 16_000


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, audio_file) -> list[bytes]:
    """Twelve encoded recordings of 0.3 s, each its own sound."""
    folder = tmp_path_factory.mktemp("clips")
    suffixes = itertools.cycle([".wav", ".flac", ".ogg"])
    return [audio_file(folder / f"{n}{s}", 0.3, seed=n).read_bytes() for n, s in zip(range(12), suffixes)]


SUFFIXES = ["wav", "flac", "ogg"] * 4


def write_tar(path, members: list[tuple[str, bytes | None]], **options) -> list[tarfile.TarInfo]:
    """(name, content), or None for a folder. Returns the members as written."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            tar.addfile(info, None if content is None else io.BytesIO(content))
    with tarfile.open(path) as tar:
        return tar.getmembers()


def listed(rows) -> list[dict]:
    return [row for _, row in rows.iterate(0, 1, None, 0)]


def readable(rows) -> dict[str, np.ndarray]:
    """name -> waveform of the rows that can be read."""
    found = {}
    for row in listed(rows):
        try:
            found[row["name"]] = read_window(row["audio"], 0, read_header(row["audio"]).frames, RATE)
        except Skip:
            continue
    return found


def faults(rows) -> dict[str, str]:
    found = {}
    for row in listed(rows):
        try:
            read_header(row["audio"])
        except Skip as skip:
            found[row["name"]] = str(skip)
    return found


def waveform(content: bytes) -> np.ndarray:
    audio = {"path": None, "bytes": content}
    return read_window(audio, 0, read_header(audio).frames, RATE)


def plain_members(clips) -> list[tuple[str, bytes]]:
    return [(f"{n:03d}.{suffix}", clip) for n, (clip, suffix) in enumerate(zip(clips, SUFFIXES))]


# ---- tars


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_texts_and_labels_by_suffix(tmp_path, clips, style):
    members = []
    for number in range(4):
        key = f"part one/v1.2/clip-{number}"
        members += [(f"{key}.cls", str(number % 2).encode()), (f"{key}.wav", clips[3 * number])]
        members += [(f"{key}.txt", f" said {number}\n".encode()), (f"{key}.other.bin", b"\0" * 700)]
    write_tar(tmp_path / "a.tar", [("part one", None), ("part one/v1.2", None), *members], format=style)
    rows = open_rows(str(tmp_path / "a.tar"), text_column="text", label_column="label")
    assert isinstance(rows, ShardedRows)
    assert [(row["name"], row["text"], row["label"]) for row in listed(rows)] == [
        (f"part one/v1.2/clip-{number}.wav", f"said {number}", str(number % 2)) for number in range(4)
    ]
    assert list(rows.columns("label")) == ["0", "1", "0", "1"]
    by_suffix = open_rows(str(tmp_path / "a.tar"), text_column="txt", label_column="cls")
    assert listed(by_suffix) == listed(rows)
    assert [(row["text"], row["label"]) for row in listed(open_rows(str(tmp_path / "a.tar")))] == [(None, None)] * 4


def test_fields_of_the_json_member(tmp_path, clips):
    members = []
    for number in range(3):
        fields = json.dumps({"said": f"wörd {number}", "kind": number})
        members += [(f"{number}.json", fields.encode()), (f"{number}.flac", clips[3 * number + 1])]
    members += [("3.json", b"{oops"), ("3.flac", clips[1]), ("4.json", b"[1]"), ("4.flac", clips[4])]
    write_tar(tmp_path / "a.tar", members)
    rows = listed(open_rows(str(tmp_path / "a.tar"), text_column="said", label_column="kind"))
    assert [row["text"] for row in rows] == ["wörd 0", "wörd 1", "wörd 2", None, None]
    assert [row["label"] for row in rows] == [0, 1, 2, None, None]


def test_the_audio_is_that_of_the_member(tmp_path, clips):
    write_tar(tmp_path / "a.tar", plain_members(clips))
    found = readable(open_rows(str(tmp_path / "a.tar")))
    assert list(found) == [name for name, _ in plain_members(clips)]
    for name, content in plain_members(clips):
        np.testing.assert_array_equal(found[name], waveform(content))


def test_a_local_member_is_a_part_of_the_tar_and_not_in_memory(tmp_path, tone):
    big = io.BytesIO()
    soundfile.write(big, tone(120), RATE, format="WAV")
    write_tar(tmp_path / "a.tar", [(f"{number}.wav", big.getvalue()) for number in range(3)])
    size = len(big.getvalue())
    del big
    tracemalloc.start()
    rows = listed(open_rows(str(tmp_path / "a.tar")))
    assert [read_header(row["audio"]).seconds for row in rows] == [120] * 3
    read_window(rows[1]["audio"], 100 * RATE, 101 * RATE, RATE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(row["audio"]["bytes"] is None and row["audio"]["size"] == size for row in rows)
    assert peak < size / 4


@pytest.mark.parametrize("name", ["é" * 60 + "/" + "n" * 300 + ".wav", "x/" * 80 + "a.b.c.wav"])
def test_long_names(tmp_path, clips, name):
    """pax and GNU keep them in a member of their own, in front of it."""
    for style in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        members = write_tar(
            tmp_path / "a.tar", [("0.wav", clips[0]), (name, clips[3]), ("2.ogg", clips[2])], format=style
        )
        rows = open_rows(str(tmp_path / "a.tar"))
        assert list(readable(rows)) == ["0.wav", name, "2.ogg"] and not faults(rows)
        positions = [position for position, _ in rows.iterate(0, 1, None, 0)]
        assert [row["name"] for _, row in rows.iterate(0, 1, None, 0, positions[1])] == [name, "2.ogg"]
        assert len(members) == 3


def test_a_global_header_is_no_damage(tmp_path, clips):
    """What `git archive` puts in front."""
    write_tar(
        tmp_path / "a.tar", plain_members(clips)[:3], format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 900}
    )
    rows = open_rows(str(tmp_path / "a.tar"))
    assert len(readable(rows)) == 3 and not faults(rows)


def test_names_with_dates_lose_no_recording(tmp_path, clips):
    """Up to the first dot they are all the same; and several microphones of one sample are several recordings."""
    names = [
        "2024.01.05.txt",
        "2024.01.05.wav",
        "2024.01.06.txt",
        "2024.01.06.wav",
        "a.left.wav",
        "a.right.wav",
        "a.txt",
    ]
    write_tar(tmp_path / "a.tar", [(n, n.encode() if n.endswith("txt") else clips[0]) for n in names])
    rows = open_rows(str(tmp_path / "a.tar"), text_column="text")
    assert [(row["name"], row["text"]) for row in listed(rows)] == [
        ("2024.01.05.wav", "2024.01.05.txt"),
        ("2024.01.06.wav", "2024.01.06.txt"),
        ("a.left.wav", None),
        ("a.right.wav", "a.txt"),
    ]
    for position, row in rows.iterate(0, 1, None, 0):
        assert next(rows.iterate(0, 1, None, 0, position))[1] == row


def test_a_sample_without_audio_is_named(tmp_path, clips):
    write_tar(
        tmp_path / "a.tar", [("0.wav", clips[0]), ("x/1.txt", b"words"), ("x/1.json", b"{}"), ("2.ogg", clips[2])]
    )
    rows = open_rows(str(tmp_path / "a.tar"))
    assert list(readable(rows)) == ["0.wav", "2.ogg"]
    ((name, reason),) = faults(rows).items()
    assert name.endswith("x/1") and reason == "no audio among its members"


def test_a_member_of_garbage_and_an_empty_one(tmp_path, clips):
    write_tar(
        tmp_path / "a.tar", [("0.wav", clips[0]), ("1.wav", b"garbage " * 300), ("2.wav", b""), ("3.ogg", clips[2])]
    )
    rows = open_rows(str(tmp_path / "a.tar"))
    assert list(readable(rows)) == ["0.wav", "3.ogg"]
    assert faults(rows) == {"1.wav": "not readable as audio: Format not recognised", "2.wav": "empty file"}


@pytest.mark.parametrize("broken", [0, 4, 11])
def test_a_broken_header_costs_its_own_sample_only(tmp_path, clips, broken):
    names = [name for name, _ in plain_members(clips)]
    members = write_tar(tmp_path / "a.tar", plain_members(clips))
    content = bytearray((tmp_path / "a.tar").read_bytes())
    start = members[broken].offset
    content[start : start + 512] = np.random.default_rng(0).bytes(512)
    (tmp_path / "a.tar").write_bytes(content)
    rows = open_rows(str(tmp_path / "a.tar"))
    assert list(readable(rows)) == [name for number, name in enumerate(names) if number != broken]
    ((name, reason),) = faults(rows).items()
    assert "a.tar" in name and f"bytes {start} to" in name and reason == "broken tar member"


def test_a_truncated_tar(tmp_path, clips):
    names = [name for name, _ in plain_members(clips)]
    members = write_tar(tmp_path / "a.tar", plain_members(clips))
    whole = (tmp_path / "a.tar").read_bytes()
    cut = members[7]
    for stop, reason in [
        (cut.offset_data + cut.size // 2, "truncated tar: 007.flac is cut off"),
        (cut.offset + 512, "truncated tar: 007.flac is cut off"),
        (cut.offset + 100, "broken tar member"),
    ]:
        (tmp_path / "a.tar").write_bytes(whole[:stop])
        rows = open_rows(str(tmp_path / "a.tar"))
        assert list(readable(rows)) == names[:7]
        ((name, found),) = faults(rows).items()
        assert "a.tar" in name and found == reason
    (tmp_path / "a.tar").write_bytes(whole[: cut.offset])  # between two members: a tar without an end is no damage
    rows = open_rows(str(tmp_path / "a.tar"))
    assert list(readable(rows)) == names[:7] and not faults(rows)


@pytest.mark.parametrize("content", [b"", b"words " * 1_000, b"short", b"\x1f\x8b\x08\0" + bytes(range(256)) * 8])
def test_what_is_no_tar_is_one_fault(tmp_path, clips, content):
    write_tar(tmp_path / "good.tar", plain_members(clips))
    (tmp_path / "bad.tar").write_bytes(content)
    rows = open_rows(str(tmp_path))
    assert len(readable(rows)) == 12
    ((name, reason),) = faults(rows).items()
    assert "bad.tar" in name and ("broken" in reason or "empty" in reason)


def test_whatever_bytes_are_wrong_reading_goes_on(tmp_path, clips):
    """No exception but Skip, no sample twice, and no more lost than bytes were damaged."""
    generator = np.random.default_rng(0)
    write_tar(tmp_path / "a.tar", plain_members(clips), format=tarfile.PAX_FORMAT, pax_headers={"comment": "ü"})
    whole = (tmp_path / "a.tar").read_bytes()
    headers = [info.offset for info in tarfile.open(tmp_path / "a.tar")]
    for _ in range(60):
        content = bytearray(whole)
        for place in generator.choice(headers, 3):
            for _ in range(4):
                content[place + generator.integers(512)] = generator.integers(256)
        (tmp_path / "a.tar").write_bytes(content)
        found = list(readable(open_rows(str(tmp_path / "a.tar"))))
        assert len(found) >= 6 and len(set(found)) == len(found)


def test_reading_a_tar_goes_on_at_every_position(tmp_path, clips):
    members = []
    for number, (name, content) in enumerate(plain_members(clips)):
        members += [(name, content if number != 5 else b"garbage"), (f"{number:03d}.txt", str(number).encode())]
    written = write_tar(tmp_path / "a.tar", [("folder", None), *members])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[written[9].offset : written[9].offset + 512] = b"?" * 512
    (tmp_path / "a.tar").write_bytes(content)
    write_tar(tmp_path / "b.tar", plain_members(clips)[:3])
    (tmp_path / "c.tar").write_bytes(b"no tar " * 400)
    rows = open_rows(str(tmp_path), text_column="text")
    for seed, shard, num_shards in [(None, 0, 1), (3, 0, 1), (3, 1, 2)]:
        found = list(rows.iterate(shard, num_shards, seed, 0))
        for index, (position, _) in enumerate(found):
            assert list(rows.iterate(shard, num_shards, seed, 0, position)) == found[index:]


# ---- parquet


def write_parquet(path, audio: list[dict | None], row_group_size: int = 2, **columns) -> None:
    features = datasets.Features({"audio": datasets.Audio(decode=False)})
    values = {"audio": audio}
    for name, (feature, content) in columns.items():
        features[name], values[name] = feature, content
    table = datasets.Dataset.from_dict(values, features)
    table.to_parquet(path, batch_size=row_group_size)


KIND = datasets.ClassLabel(names=["cat", "dog"])


@pytest.fixture
def parquet(tmp_path, clips):
    """Three files of four rows, in row groups of two, with class labels and texts."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    for part in range(3):
        audio = [{"path": f"{part}-{n}.{SUFFIXES[4 * part + n]}", "bytes": clips[4 * part + n]} for n in range(4)]
        texts = (datasets.Value("string"), [f"said {part}-{n}" for n in range(4)])
        write_parquet(folder / f"{part}.parquet", audio, kind=(KIND, [0, 1, 1, 0]), said=texts)
    assert pyarrow.parquet.ParquetFile(folder / "0.parquet").num_row_groups == 2
    return folder


COLUMNS = {"text_column": "said", "label_column": "kind"}
NAMES = [f"{part}-{n}.{SUFFIXES[4 * part + n]}" for part in range(3) for n in range(4)]


def test_rows_of_parquet(parquet, clips):
    rows = open_rows(str(parquet), **COLUMNS)
    assert isinstance(rows, ShardedRows)
    assert [row["name"] for row in listed(rows)] == NAMES
    assert [row["label"] for row in listed(rows)] == ["cat", "dog", "dog", "cat"] * 3 == list(rows.columns("label"))
    assert [row["text"] for row in listed(rows)] == list(rows.columns("text"))
    for (name, found), content in zip(readable(rows).items(), clips):
        np.testing.assert_array_equal(found, waveform(content), err_msg=name)


def test_reading_parquet_goes_on_at_every_position(parquet):
    rows = open_rows(str(parquet), **COLUMNS)
    for seed, shard, num_shards in [(None, 0, 1), (3, 0, 1), (3, 1, 2)]:
        found = list(rows.iterate(shard, num_shards, seed, 0))
        for index, (position, _) in enumerate(found):
            assert list(rows.iterate(shard, num_shards, seed, 0, position)) == found[index:]


def test_row_groups_before_the_position_are_not_read(parquet, monkeypatch):
    groups = []
    read = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, **options: groups.append(options["row_groups"]) or read(self, **options),
    )
    rows = open_rows(str(parquet / "0.parquet"))
    (position,) = [position for position, row in rows.iterate(0, 1, None, 0) if row["name"] == NAMES[3]]
    groups.clear()
    assert [row["name"] for _, row in rows.iterate(0, 1, None, 0, position)] == [NAMES[3]]
    assert groups == [[1]]


@pytest.mark.parametrize("broken", [0, 1, 2])
@pytest.mark.parametrize("how", ["text", "empty", "truncated", "damaged"])
def test_of_a_broken_parquet_file_the_others_are_read(parquet, broken, how):
    path = parquet / f"{broken}.parquet"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[4 : len(whole) // 2] = bytes(len(whole) // 2 - 4)
    content = {"text": b"words" * 99, "empty": b"", "truncated": whole[: len(whole) // 2], "damaged": bytes(damaged)}[
        how
    ]
    path.write_bytes(content)
    rows = open_rows(str(parquet), **COLUMNS)
    others = [name for name in NAMES if not name.startswith(str(broken))]
    assert [name for name in readable(rows) if name in others] == others
    found = faults(rows)
    assert found and all(name.startswith(str(path)) or name in NAMES for name in found)
    assert any(reason.startswith("broken shard: ") for reason in found.values())
    labels = list(rows.columns("label"))  # a vocabulary must be made of what is there
    assert set(labels) == {"cat", "dog"} and len(labels) >= 8


def test_rows_without_audio_are_faults(tmp_path, clips):
    audio = [
        {"path": "a.wav", "bytes": clips[0]},
        None,
        {"path": None, "bytes": None},
        {"path": "b.wav", "bytes": b""},
    ]
    pd.DataFrame({"audio": audio}).to_parquet(tmp_path / "a.parquet")
    rows = open_rows(str(tmp_path / "a.parquet"))
    assert list(readable(rows)) == ["a.wav"]
    assert faults(rows) == {
        "row 1": "no audio in the row",
        "row 2": "no audio in the row",
        "b.wav": "empty file",
    }


def test_audio_that_is_only_bytes(tmp_path, clips):
    """A struct without a path, as other tools than `datasets` write it."""
    pd.DataFrame({"audio": [{"bytes": clips[0]}, {"bytes": clips[3]}]}).to_parquet(tmp_path / "a.parquet")
    rows = open_rows(str(tmp_path / "a.parquet"))
    assert len(readable(rows)) == 2
    assert all(name.startswith("audio with sha256") for name in readable(rows))


@pytest.mark.parametrize("folder", [False, True])
def test_missing_columns_are_one_line(parquet, folder):
    name = str(parquet if folder else parquet / "1.parquet")
    for options, message in [
        ({"audio_column": "sound"}, "audio_column_name: .* has no column 'sound'; it has: audio, kind, said"),
        ({"text_column": "words"}, "text_column_name: .* has no column 'words'; it has: audio, kind, said"),
        ({"label_column": "species"}, "label_column_name: .* has no column 'species'; it has: audio, kind, said"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            open_rows(name, **options)
        assert "\n" not in str(error.value)


def test_a_file_without_the_column_is_a_fault(parquet):
    """The first file decides what the columns are; another that lacks one is no reason to end."""
    pd.DataFrame({"other": [1, 2]}).to_parquet(parquet / "9.parquet")
    rows = open_rows(str(parquet), **COLUMNS)
    assert list(readable(rows)) == NAMES
    ((name, reason),) = faults(rows).items()
    assert "9.parquet" in name and reason.startswith("broken shard")


# ---- behind a URL


def test_the_same_through_http(http_server, clips):
    server = http_server
    members = [(name, content if name != "004.flac" else b"garbage") for name, content in plain_members(clips)]
    texts = [(f"{name[:3]}.txt", name.encode()) for name, _ in members]
    written = write_tar(server.folder / "a.tar", [m for pair in zip(members, texts) for m in pair])
    content = bytearray((server.folder / "a.tar").read_bytes())
    content[written[12].offset : written[12].offset + 512] = b"?" * 512  # of 006.wav
    (server.folder / "a.tar").write_bytes(content)
    local = open_rows(str(server.folder / "a.tar"), text_column="text")
    rows = open_rows(server.url("a.tar"), text_column="text")
    assert isinstance(rows, ShardedRows)
    assert [(row["name"], row["text"]) for row in listed(rows) if row["audio"].get("fault") is None] == [
        (row["name"], row["text"]) for row in listed(local) if row["audio"].get("fault") is None
    ]
    assert sorted(faults(rows).values()) == sorted(faults(local).values())
    found, expected = readable(rows), readable(local)
    assert len(found) == 10 and found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    positions = [position for position, _ in rows.iterate(0, 1, None, 0)]
    assert positions == [position for position, _ in local.iterate(0, 1, None, 0)]
    assert listed(rows)[7:] == [row for _, row in rows.iterate(0, 1, None, 0, positions[7])]


def test_a_range_of_tars_with_one_that_fails(http_server, clips):
    server = http_server
    for number in range(3):
        write_tar(server.folder / f"{number:02d}.tar", plain_members(clips[4 * number : 4 * number + 4]))
    server.fail("01.tar", "503", times=None)
    server.fail("00.tar", "503", times=1)
    server.fail("02.tar", "drop", times=1)
    rows = open_rows(server.url() + "{00..02}.tar")
    assert [row["name"] for row in listed(rows) if "fault" not in row["audio"]] == [
        f"{n:03d}.{SUFFIXES[n]}" for n in range(4)
    ] * 2
    ((name, reason),) = faults(rows).items()
    assert "01.tar" in name and "503" in reason


def test_parquet_through_http(http_server, parquet):
    for path in parquet.glob("*.parquet"):
        (http_server.folder / path.name).write_bytes(path.read_bytes())
    http_server.fail("1.parquet", "503", times=2)
    local, rows = open_rows(str(parquet), **COLUMNS), open_rows(http_server.url(), **COLUMNS)
    assert listed(rows) == listed(local) and len(listed(rows)) == 12
    assert list(rows.columns("label")) == list(local.columns("label"))
    http_server.fail("2.parquet", "503", times=None)
    assert list(readable(rows)) == NAMES[:8]
    ((name, reason),) = faults(rows).items()
    assert "2.parquet" in name and "503" in reason


def test_a_tar_that_fails_midway_is_reported(tmp_path, audio_file, monkeypatch):
    """What was read stands; the rest is a fault with a reason, and not silently gone."""
    path = audio_file(tmp_path / "clip.wav", 0.5)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(10):
            tar.add(path, f"{number}.wav")
    real = shards.samples

    def failing(file, name):
        for number, sample in enumerate(real(file, name)):
            if number == 4:
                raise OSError("503 Service Unavailable, after 5 attempts")
            yield sample

    monkeypatch.setattr(shards, "samples", failing)
    reader = Reader(open_rows(str(tmp_path / "a.tar")), cover(0.1, 1.0), 0, 1, 0)
    assert len([window for window in reader.windows() if window is not None]) == 4
    assert reader.rows_met == 5
    (skipped,) = reader.skipped
    assert "broken shard: 503 Service Unavailable" in skipped.reason and skipped.fault
