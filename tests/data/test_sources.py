"""Every kind of source gives the same rows; the held-out part never moves and never leaks."""

import csv
import itertools
import json
import tarfile
import time

import datasets
import fsspec
import numpy as np
import pandas as pd
import pytest

from acoustic.console import UserError
from acoustic.data import shards
from acoustic.data.columns import Options
from acoustic.data.decode import read_window
from acoustic.data.headers import Skip, read_header
from acoustic.data.holdout import hold_out, unit_hash
from acoustic.data.rows import IndexedRows, ShardedRows, StreamedRows
from acoustic.data.sources import expand_braces, from_dataset, open_rows
from acoustic.data.windows import cover, usable

CLIPS = ["a.wav", "b.flac", "c.ogg"]
TEXTS = ["one", "two", "three"]
LABELS = ["dog", "cat", "dog"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture
def clips(audio_folder):
    """A folder with CLIPS in `clips/`, half a second each."""
    folder = audio_folder([f"clips/{name}" for name in CLIPS], seconds=0.5)
    return folder


def table(column: str = "path", prefix: str = "clips/") -> list[dict]:
    return [
        {column: f"{prefix}{name}", "text": text, "species": label} for name, text, label in zip(CLIPS, TEXTS, LABELS)
    ]


def write_table(path, items: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    elif path.suffix == ".parquet":
        pd.DataFrame(items).to_parquet(path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, items[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(items)
    return path


def embedded(folder, label=None, audio_paths: bool = True) -> datasets.Dataset:
    """CLIPS as a data set that holds the files' bytes."""
    audio = [
        {"bytes": (folder / "clips" / name).read_bytes(), "path": name if audio_paths else None} for name in CLIPS
    ]
    features = datasets.Features(
        {
            "audio": datasets.Audio(decode=False),
            "text": datasets.Value("string"),
            "species": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    return datasets.Dataset.from_dict(
        {"audio": audio, "text": TEXTS, "species": [["cat", "dog"].index(label) for label in LABELS]}, features
    )


def listed(rows) -> list[dict]:
    return [row for _, row in rows.iterate(0, 1, None, 0)]


def check(rows, kind=IndexedRows, texts=True, labels=True) -> None:
    """The rows are CLIPS with their texts and labels, and their audio can be read."""
    assert isinstance(rows, kind)
    found = listed(rows)
    assert [row["name"].split("/")[-1] for row in found] == CLIPS
    assert [row["text"] for row in found] == (TEXTS if texts else [None] * 3)
    if labels:
        assert [row["label"] for row in found] == LABELS
        assert list(rows.columns("label")) == LABELS
    assert list(rows.columns("text")) == (TEXTS if texts else [None] * 3)
    assert [read_header(row["audio"]).frames for row in found] == [8_000] * 3
    assert all(len(read_window(row["audio"], 0, 8_000, 16_000)) == 8_000 for row in found)


# ---- folders and globs


def test_folder_is_searched_recursively_and_hidden_files_are_left_out(audio_folder):
    names = ["a.wav", "b/c.FLAC".lower(), "b/d/e.ogg", "b/d/f.opus", "g/h.mp3"]
    folder = audio_folder([*names, ".hidden/x.wav", "b/.y.wav"], seconds=0.2)
    (folder / "b" / "notes.txt").write_text("no audio")
    (folder / "b" / "LOUD.WAV").write_bytes((folder / "a.wav").read_bytes())
    rows = listed(open_rows(str(folder), "train"))
    assert sorted(row["name"] for row in rows) == sorted([*names, "b/LOUD.WAV"])
    assert {row["name"]: row["label"] for row in rows}["b/d/e.ogg"] == "b"  # the first folder below the root
    assert {row["name"]: row["label"] for row in rows}["a.wav"] is None


def test_a_link_back_into_the_folder_ends(audio_folder):
    folder = audio_folder(["b/a.wav"], seconds=0.2)
    (folder / "b" / "loop").symlink_to(folder)
    assert len(open_rows(str(folder), "train")) == 1


def test_glob(audio_folder):
    folder = audio_folder(["x/a.wav", "x/b.flac", "y/deep/c.wav", "z/d.wav"], seconds=0.2)
    (folder / "x" / "a.txt").touch()
    names = [row["name"] for row in listed(open_rows(f"{folder}/[xy]/**/*", "train"))]
    assert names == ["x/a.wav", "x/b.flac", "y/deep/c.wav"]
    with pytest.raises(UserError, match="no audio file matches"):
        open_rows(f"{folder}/*/*.mp3", "train")


def test_braces_and_ranges():
    assert expand_braces("a/{b,c}/{08..10}.tar") == [f"a/{x}/{n}.tar" for x in "bc" for n in ("08", "09", "10")]
    assert expand_braces("{9..11}") == ["9", "10", "11"]
    assert expand_braces("plain [ab]*.wav") == ["plain [ab]*.wav"]


def test_a_pattern_with_braces(audio_folder):
    folder = audio_folder(["x1.wav", "x2.wav", "x3.wav", "y.flac"], seconds=0.2)
    assert names_of(open_rows(f"{folder}/{{x{{1..2}}.wav,y.*}}")) == {"x1.wav", "x2.wav", "y.flac"}


def test_shards_named_like_their_split(clips, tmp_path):
    """As the Hub lays them out; the rows that are trained on are not tested on."""
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, number in (("train", 0), ("train", 1), ("test", 2)):
        embedded(clips).select([number]).to_parquet(
            tmp_path / "hub" / "data" / f"{split}-{number:05d}-of-00002.parquet"
        )
    assert names_of(open_rows(str(tmp_path / "hub"), "train")) == {CLIPS[0], CLIPS[1]}
    assert names_of(open_rows(str(tmp_path / "hub"), "test")) == {CLIPS[2]}
    with pytest.raises(UserError, match="has no split 'dev'"):
        open_rows(str(tmp_path / "hub"), "dev")


def test_a_single_recording(audio_folder):
    folder = audio_folder(["a.wav"], seconds=0.2)
    assert [row["name"] for row in listed(open_rows(str(folder / "a.wav"), "train"))] == ["a.wav"]


def test_label_from_folder(audio_folder):
    folder = audio_folder(["train/dog/a.wav", "train/cat/b.wav", "train/dog/sub/c.wav"], seconds=0.2)
    rows = open_rows(str(folder), "train")
    assert {row["name"]: row["label"] for row in listed(rows)} == {
        "dog/a.wav": "dog",
        "cat/b.wav": "cat",
        "dog/sub/c.wav": "dog",
    }


# ---- manifests


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["path", "file_name", "recording"])
def test_manifest_with_paths_relative_to_it(clips, suffix, column, monkeypatch, tmp_path):
    manifest = write_table(clips / f"list{suffix}", table(column))
    monkeypatch.chdir(tmp_path)
    audio_column = column if column == "recording" else "audio"
    check(
        open_rows(str(manifest), "train", audio_column=audio_column, text_column="text", label_column="species"),
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_manifest_with_absolute_paths(clips, suffix, tmp_path):
    manifest = write_table(tmp_path / "elsewhere" / f"list{suffix}", table(prefix=f"{clips}/clips/"))
    check(open_rows(str(manifest), "train", text_column="text", label_column="species"))


def test_names_are_the_same_in_every_kind_of_manifest(clips):
    names = {
        suffix: [row["name"] for row in listed(open_rows(str(write_table(clips / f"list{suffix}", table())), "train"))]
        for suffix in (".csv", ".tsv", ".jsonl", ".parquet")
    }
    assert all(value == [f"clips/{name}" for name in CLIPS] for value in names.values())


def test_fairseq_manifest(clips, tmp_path):
    lines = [f"{clips}/clips", *(f"{name}\t8000" for name in CLIPS)]
    (tmp_path / "valid.tsv").write_text("\n".join(lines) + "\n")
    check(open_rows(str(tmp_path / "valid.tsv"), "train"), texts=False, labels=False)
    check(open_rows(str(tmp_path), "valid"), texts=False, labels=False)


def test_a_tsv_with_a_header_is_not_taken_for_fairseqs(clips):
    (clips / "list.tsv").write_text("path\nclips/a.wav\n")
    assert [row["name"] for row in listed(open_rows(str(clips / "list.tsv"), "train"))] == ["clips/a.wav"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_folder_with_metadata(clips, suffix):
    write_table(clips / f"metadata{suffix}", table("file_name"))
    check(open_rows(str(clips), "train", text_column="text", label_column="species"))


def test_rows_without_a_usable_path_are_skipped(clips):
    items = [{"path": "clips/a.wav"}, {"path": None}, {"path": 7}, {"other": 1}, {"path": "gone.wav"}]
    rows = listed(open_rows(str(write_table(clips / "list.jsonl", items)), "train"))
    assert read_header(rows[0]["audio"]).frames == 8_000
    for row in rows[1:]:
        with pytest.raises(Skip, match="no audio in the row" if row["name"].startswith("row") else "no such file"):
            read_header(row["audio"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"path\n", "has no rows"),
        ("a.csv", b"\xff\xfe\x00path", "is not UTF-8 text"),
        ("a.csv", b"path\n" + b"x" * 200_000, "is not a table of text"),
        ("a.csv", b"sound,text\nx.wav,hello\n", "has no column 'audio'; it has: sound, text"),
        ("a.jsonl", b'{"path": "a.wav"}\n{oops\n', "line 2 is not JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1 is not a JSON object"),
        ("a.parquet", b"no parquet", "can't read .* as parquet: "),
        ("a.xlsx", b"PK", "is neither audio nor a manifest"),
    ],
)
def test_broken_manifests(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_rows(str(tmp_path / name), "train")


# ---- data sets


def test_parquet_with_embedded_audio(clips, tmp_path):
    embedded(clips).to_parquet(tmp_path / "e.parquet")
    columns = {"text_column": "text", "label_column": "species"}
    path = str(tmp_path / "e.parquet")
    check(open_rows(path, "train", **columns), ShardedRows)
    check(open_rows(path, "train", streaming=True, **columns), ShardedRows)
    check(open_rows(path, "train", indexed=True, **columns), IndexedRows)
    dataset = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
    options = Options(None, "audio", {"text": "text", "label": "species"}, True, False)
    check(from_dataset(dataset, "a stream", options), StreamedRows)


def test_embedded_audio_is_read_in_place(clips, tmp_path):
    """Not a byte of it is written anywhere, unless rows must be looked up by number."""
    embedded(clips).to_parquet(tmp_path / "e.parquet")
    cache = tmp_path / "datasets_cache"
    list(open_rows(str(tmp_path / "e.parquet")).iterate(0, 1, 0, 0))
    assert not cache.exists()
    open_rows(str(tmp_path / "e.parquet"), indexed=True)
    assert cache.exists()


def test_saved_to_disk(clips, tmp_path):
    columns = {"text_column": "text", "label_column": "species"}
    embedded(clips).save_to_disk(tmp_path / "saved")
    check(open_rows(str(tmp_path / "saved"), "train", **columns))
    datasets.DatasetDict(train=embedded(clips), test=embedded(clips).select([1])).save_to_disk(tmp_path / "splits")
    check(open_rows(str(tmp_path / "splits"), "train", **columns))
    assert len(open_rows(str(tmp_path / "splits"), "test")) == 1
    with pytest.raises(UserError, match="has no split 'dev'; it has: train, test"):
        open_rows(str(tmp_path / "splits"), "dev")


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_parquet(clips, tmp_path, streaming):
    (tmp_path / "shards").mkdir()
    for number in range(3):
        embedded(clips).select([number]).to_parquet(tmp_path / "shards" / f"train-{number:05d}-of-00003.parquet")
    columns = {"text_column": "text", "label_column": "species"}
    check(open_rows(str(tmp_path / "shards"), "train", streaming=streaming, **columns), ShardedRows)
    check(open_rows(str(tmp_path / "shards"), "train", streaming=streaming, indexed=True, **columns), IndexedRows)


def test_columns_of_a_stream_are_read_without_the_audio(clips, tmp_path, monkeypatch):
    embedded(clips).to_parquet(tmp_path / "e.parquet")
    rows = open_rows(str(tmp_path / "e.parquet"), "train", text_column="text", streaming=True)
    asked = []
    read = shards.read_items
    monkeypatch.setattr(
        shards, "read_items", lambda source, columns, start: asked.append(columns) or read(source, columns, start)
    )
    assert list(rows.columns("text")) == TEXTS
    assert asked == [["text"]]


# ---- splits and columns


def test_split_is_a_subfolder_or_a_manifest(clips, audio_folder):
    audio_folder(["dev/x.wav"], seconds=0.2, root=clips)
    write_table(clips / "test.csv", table())
    assert len(open_rows(str(clips), "train")) == 4  # neither train/ nor train.csv: all of the folder
    assert [row["name"] for row in listed(open_rows(str(clips), "dev"))] == ["x.wav"]
    check(open_rows(str(clips), "test", text_column="text", label_column="species"))
    with pytest.raises(UserError, match="has no split 'valid'.*it has: clips/, dev/, test.csv"):
        open_rows(str(clips), "valid")


def test_a_manifest_says_which_files_of_the_folder_of_its_name(audio_folder, tmp_path):
    folder = audio_folder(["train/a.wav", "train/b.wav", "train/c.wav"], seconds=0.2, root=tmp_path / "data")
    (folder / "train.csv").write_text("file_name,label\ntrain/a.wav,pump\ntrain/c.wav,fan\n")
    rows = listed(open_rows(str(folder), "train", label_column="label"))
    assert [(row["name"], row["label"]) for row in rows] == [("train/a.wav", "pump"), ("train/c.wav", "fan")]


def test_a_missing_column_is_named_with_those_that_are_there(clips, tmp_path):
    manifest = write_table(clips / "list.csv", table())
    embedded(clips).to_parquet(tmp_path / "e.parquet")
    for source in (manifest, tmp_path / "e.parquet"):
        with pytest.raises(UserError, match="^text_column_name: .* has no column 'words'; it has: .*text, species"):
            open_rows(str(source), "train", text_column="words")
        with pytest.raises(UserError, match="^label_column_name: .* has no column 'kind'"):
            open_rows(str(source), "train", label_column="kind")
    with pytest.raises(UserError, match="^text_column_name: .* plain folder.*metadata.csv"):
        open_rows(str(clips / "clips"), "train", text_column="text")
    with pytest.raises(UserError, match="^label_column_name: .* plain folder.*metadata.csv"):
        open_rows(str(clips / "clips"), "train", label_column="species")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nowhere/", "no/such/folder", "nowhere.csv"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match="there is no folder or file"):
        open_rows(name, "train")


# ---- order and parts


def test_shards_are_disjoint_and_the_order_changes_with_the_epoch(audio_folder):
    rows = open_rows(str(audio_folder(10, seconds=0.1)), "train")
    for num_shards in (1, 2, 3):
        orders = []
        for epoch in (0, 1):
            shards = [
                [row["name"] for _, row in rows.iterate(shard, num_shards, 7, epoch)] for shard in range(num_shards)
            ]
            assert sorted(itertools.chain(*shards)) == sorted(row["name"] for row in listed(rows))
            orders.append(shards)
        assert orders[0] != orders[1]
    again = [row["name"] for _, row in rows.iterate(0, 3, 7, 1)]
    assert again == orders[1][0]


def streamed(folder) -> StreamedRows:
    """A folder's parquet files as a `datasets` stream with paths."""
    files = sorted(map(str, folder.glob("*.parquet")))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return from_dataset(dataset, "a stream", Options(None, "path", {"text": None, "label": None}, True, False))


@pytest.mark.parametrize("files", [1, 5])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_shards_of_a_stream_are_disjoint(tmp_path, files, num_shards):
    for number in range(files):
        pd.DataFrame({"path": [f"{number}-{row}.wav" for row in range(4)]}).to_parquet(tmp_path / f"{number}.parquet")
    rows = streamed(tmp_path)
    assert rows.can_divide(num_shards) == (files >= num_shards)
    num_shards = min(num_shards, files)  # else every reader walks all rows, and takes its share of the windows
    for seed in (None, 7):
        started = time.perf_counter()
        names = [row["name"] for shard in range(num_shards) for _, row in rows.iterate(shard, num_shards, seed, 0)]
        assert sorted(names) == [f"{number}-{row}.wav" for number in range(files) for row in range(4)]
        assert time.perf_counter() - started < 4  # datasets' interleaving would sleep 5 s at the end of every epoch


@pytest.mark.parametrize("local", [True, False])
def test_the_files_of_a_stream_come_in_another_order_every_epoch(tmp_path, local):
    for number in range(6):
        pd.DataFrame({"path": [f"{number}.wav"]}).to_parquet(tmp_path / f"{number}.parquet")
    rows = open_rows(str(tmp_path), "train", audio_column="path", streaming=True) if local else streamed(tmp_path)
    assert isinstance(rows, ShardedRows if local else StreamedRows)
    orders = [tuple(row["name"] for _, row in rows.iterate(0, 1, 7, epoch)) for epoch in (0, 1, 2, 0)]
    assert len(set(orders)) == 3 and orders[0] == orders[3]
    assert len({order[0] for order in orders}) > 1


def test_a_row_keeps_its_name_in_every_part(clips):
    """Rows without a path of their own are named by number; a part must not count anew."""
    rows = open_rows(str(write_table(clips / "list.jsonl", [{"path": "a.wav"}, *[{"path": None}] * 4])), "train")
    assert [row["name"] for row in listed(rows.take([2, 4]).take([1]))] == ["row 4"]
    assert [row["name"] for row in listed(rows.select(lambda row: row["name"] != "a.wav"))] == [
        f"row {number}" for number in (1, 2, 3, 4)
    ]


def names_of(rows) -> set[str]:
    return {row["name"] for row in listed(rows)}


def manifest_rows(folder, names):
    return open_rows(str(write_table(folder / "list.csv", [{"path": name} for name in names])), "train")


def test_held_out_part_never_moves_and_never_leaks(tmp_path):
    names = [f"clip {number}.wav" for number in range(400)]
    train, held_out = map(names_of, hold_out(manifest_rows(tmp_path, names), 10))
    assert train | held_out == set(names) and not train & held_out
    assert 20 <= len(held_out) <= 60
    shuffled = np.random.default_rng(0).permutation(names).tolist()
    assert names_of(hold_out(manifest_rows(tmp_path, shuffled), 10)[1]) == held_out
    more = [*(f"new {number}.wav" for number in range(300)), *names]
    train_of_more, held_out_of_more = map(names_of, hold_out(manifest_rows(tmp_path, more), 10))
    assert held_out_of_more & set(names) == held_out and train_of_more & set(names) == train


@pytest.mark.parametrize("percentage", [0.001, 50, 99.9])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_both_parts_hold_something(tmp_path, count, percentage):
    train, held_out = hold_out(manifest_rows(tmp_path, [f"{number}.wav" for number in range(count)]), percentage)
    assert len(train) >= 1 and len(held_out) >= 1 and len(train) + len(held_out) == count


def test_nothing_to_hold_out(tmp_path):
    rows = manifest_rows(tmp_path, ["a.wav"])
    assert hold_out(rows, 10) == (rows, None)
    assert hold_out(manifest_rows(tmp_path, ["a.wav", "b.wav"]), 0)[1] is None


@pytest.mark.parametrize("indexed", [False, True])
def test_embedded_audio_without_paths_is_held_out_by_its_content(tmp_path, audio_file, indexed):
    """A number in the stream would change with the order, and a recording with it between the two parts."""
    contents = [audio_file(tmp_path / "a.wav", seconds=0.05, seed=seed).read_bytes() for seed in range(30)]
    features = datasets.Features({"audio": datasets.Audio(decode=False)})

    def parts(order, folder):
        folder.mkdir()
        for number in range(3):
            audio = [{"bytes": contents[index], "path": None} for index in order[number::3]]
            datasets.Dataset.from_dict({"audio": audio}, features).to_parquet(folder / f"{number}.parquet")
        train, held_out = hold_out(open_rows(str(folder), "train", indexed=indexed), 30)
        return [
            {row["audio"]["bytes"] for shard in range(2) for _, row in part.iterate(shard, 2, seed, 0)}
            for part, seed in ((train, 3), (held_out, None))
        ]

    train, held_out = parts(list(range(30)), tmp_path / "one")
    assert not train & held_out and train | held_out == set(contents) and held_out
    assert parts(list(range(29, -1, -1)), tmp_path / "two") == [train, held_out]


def test_a_single_list_has_no_other_split(tmp_path, audio_file):
    """The rows that were trained on must not be tested on under another name."""
    audio_file(tmp_path / "a.wav", seconds=0.2)
    (tmp_path / "list.csv").write_text("path\na.wav\n")
    for name in (str(tmp_path / "list.csv"), str(tmp_path / "*.wav"), str(tmp_path / "a.wav")):
        assert len(open_rows(name)) == 1
        with pytest.raises(UserError, match="without a split 'test'"):
            open_rows(name, "test")


def test_labels_of_a_stream_are_class_names_in_columns_and_rows(tmp_path, audio_file):
    features = datasets.Features(
        {"audio": datasets.Audio(decode=False), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    files = [str(audio_file(tmp_path / f"{number}.wav", seconds=0.2)) for number in range(3)]
    table = datasets.Dataset.from_dict({"audio": files, "kind": [0, 1, 1]}, features=features)

    def make(label):
        options = Options(None, "audio", {"text": None, "label": label}, True, False)
        return from_dataset(table.to_iterable_dataset(), "test", options)

    rows = make("kind")
    assert list(rows.columns("label")) == ["cat", "dog", "dog"]
    assert [row["label"] for row in listed(rows)] == ["cat", "dog", "dog"]
    assert list(rows.select(lambda row: row["name"] != files[1]).columns("label")) == ["cat", "dog"]
    assert list(make(None).columns("label")) == []


def test_a_given_audio_column_is_not_replaced_by_another(tmp_path, audio_file):
    audio_file(tmp_path / "a.wav", seconds=0.2)
    (tmp_path / "list.csv").write_text("file_name,x\na.wav,1\n")
    with pytest.raises(UserError, match="has no column 'wav'"):
        open_rows(str(tmp_path / "list.csv"), audio_column="wav")


def test_audio_behind_a_url_is_read_through_fsspec(tmp_path, audio_file):
    audio_file(tmp_path / "a.wav", seconds=0.2)
    audio = {"path": "memory://sounds/a.wav", "bytes": None}
    with fsspec.open(audio["path"], "wb") as file:
        file.write((tmp_path / "a.wav").read_bytes())
    assert read_header(audio).seconds == pytest.approx(0.2)
    with pytest.raises(Skip, match="no such file"):
        read_header({"path": "memory://sounds/b.wav", "bytes": None})


def test_what_is_held_out_can_be_used(tmp_path, audio_file):
    """A tiny folder whose smallest hash is that of a broken file must still be evaluated on audio."""
    names = sorted((f"{number}.wav" for number in range(5)), key=unit_hash)
    for number, name in enumerate(names):
        audio_file(tmp_path / name, seconds=0.5) if number else (tmp_path / name).write_bytes(b"")
    is_usable = usable(cover(0.1, 1.0))
    training, held_out = hold_out(open_rows(str(tmp_path)), 1e-6, is_usable)
    assert [row["name"] for row in listed(held_out)] == [names[1]]
    assert names_of(training) == {names[0], *names[2:]}
    for name in names[2:]:
        (tmp_path / name).write_bytes(b"")
    whole, nothing = hold_out(open_rows(str(tmp_path)), 1e-6, is_usable)  # the one good file is for training
    assert nothing is None and len(whole) == 5


def test_m4a_and_webm_in_a_folder_are_read(tmp_path, tone, audio_file):
    """What libsndfile doesn't know is found by its name and read by FFmpeg, embedded in a tar as well."""
    av = pytest.importorskip("av")
    folder = tmp_path / "audio"
    audio_file(folder / "a.wav", 2)
    for name, codec, rate in (("b.m4a", "aac", 44_100), ("c.webm", "libopus", 48_000)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=rate, layout="mono")
            samples = tone(2, rate)[:, 0]
            for start in range(0, len(samples), 960):
                frame = av.AudioFrame.from_ndarray(samples[None, start : start + 960], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = rate, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    for source in (folder, tmp_path / "a.tar"):
        rows = listed(open_rows(str(source)))
        assert [row["name"] for row in rows] == ["a.wav", "b.m4a", "c.webm"]
        for row in rows:
            header = read_header(row["audio"])
            assert header.seconds == pytest.approx(2, abs=0.05) and header.channels == 1
            window = read_window(row["audio"], header.rate // 2, header.rate, 16_000)
            assert len(window) == 8_000 and 0.1 < window.std() < 0.4


def test_train_without_a_folder_of_its_own_leaves_the_other_splits_out(audio_folder):
    """Else the test set would be trained on."""
    folder = str(audio_folder(["dog/a.wav", "cat/b.wav", "test/dog/c.wav", "test/cat/d.wav"], seconds=0.2))
    names = [row["name"] for _, row in open_rows(folder, other_splits=("test",)).iterate(0, 1, None, 0)]
    assert sorted(names) == ["cat/b.wav", "dog/a.wav"]
    assert len(open_rows(folder)) == 4
    tested = [row["name"] for _, row in open_rows(folder, "test").iterate(0, 1, None, 0)]
    assert sorted(tested) == ["cat/d.wav", "dog/c.wav"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_shards_of_the_other_splits_are_left_out(tmp_path, audio_file, scheme):
    clip = audio_file(tmp_path / "clip.wav", 0.2)
    (tmp_path / "shards").mkdir()
    for name in ("training-0", "validation-0", "test-00000-of-00001"):
        with tarfile.open(tmp_path / "shards" / f"{name}.tar", "w") as tar:
            tar.add(clip, f"{name}.wav")

    def names(split: str, *others: str) -> list[str]:
        rows = open_rows(f"{scheme}{tmp_path}/shards", split, other_splits=others)
        return sorted(row["name"] for _, row in rows.iterate(0, 1, None, 0))

    assert names("train", "validation", "test") == ["training-0.wav"]
    assert names("validation") == ["validation-0.wav"] and names("test") == ["test-00000-of-00001.wav"]
    with pytest.raises(UserError, match="has no split 'dev'"):
        names("dev")
