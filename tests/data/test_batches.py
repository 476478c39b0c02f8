"""Every window of an epoch exactly once, in batches that never hold too much, however many readers there are."""

import io
import itertools
import tarfile
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor

from acoustic.console import UserError
from acoustic.data import order
from acoustic.data.batches import BatchStream
from acoustic.data.collate import Rectangle
from acoustic.data.columns import Options
from acoustic.data.headers import read_header
from acoustic.data.loader import StreamLoader
from acoustic.data.order import Reader
from acoustic.data.sources import from_dataset, from_files, open_rows
from acoustic.data.tally import Tally
from acoustic.data.windows import cover, window_lengths

RATE, SECONDS = 16_000, 3.0


def collate(windows, waveforms) -> dict:
    """What the batch holds, instead of a model's inputs."""
    longest = max(map(len, waveforms))
    return {
        "keys": [(w.row["name"], w.start, w.stop) for w in windows],
        "longest": longest / RATE,
        "input_values": np.zeros((len(windows), longest)),
    }


def make_stream(*rows, train=False, seed=0, rank=0, world_size=1, plan=None, batch_seconds=SECONDS, **kwargs):
    weights = kwargs.pop("weights", [1.0] * len(rows))
    return BatchStream(
        list(zip(rows, weights)),
        plan or cover(0.1, 1.0),
        collate,
        rate=RATE,
        batch_seconds=batch_seconds,
        train=train,
        seed=seed,
        rank=rank,
        world_size=world_size,
        **kwargs,
    )


def one_epoch(rows, world_size=1, workers=0, **kwargs) -> list[dict]:
    batches = []
    for rank in range(world_size):
        stream = make_stream(rows, rank=rank, world_size=world_size, **kwargs)
        batches += StreamLoader(stream, workers)
    return batches


def training_epoch(rows, epoch: int, shard: int, num_shards: int, **kwargs) -> list[dict]:
    """The batches of one epoch of one reader of an endless stream."""
    stream = make_stream(rows, train=True, **kwargs)
    found = itertools.takewhile(lambda b: b["epoch"] <= epoch + 1 + 1e-9, stream.batches(shard, num_shards))
    return [batch for batch in found if batch["state"]["readers"][0]["epoch"] == epoch and "keys" in batch]


def keys(batches) -> list[tuple]:
    return [key for batch in batches for key in batch.get("keys", [])]


def all_windows(rows, plan=None, seed=None, epoch=0) -> list[tuple]:
    """What one reader alone plans of every row."""
    reader = Reader(rows, plan or cover(0.1, 1.0), 0, 1, seed)
    reader.epoch = epoch
    return [(w.row["name"], w.start, w.stop) for w in reader.windows() if w is not None]


@pytest.fixture(scope="module")
def few(tmp_path_factory, audio_file):
    """Five recordings: fewer than 8 a reader, so windows are dealt out instead of rows."""
    folder = tmp_path_factory.mktemp("few")
    for number, seconds in enumerate([0.2, 4.3, 0.7, 2.0, 1.1]):
        audio_file(folder / f"{number}.wav", seconds, seed=number)
    return open_rows(str(folder), "train")


@pytest.fixture(scope="module")
def many(tmp_path_factory, audio_file):
    """Sixty short recordings of random lengths: rows are dealt out."""
    folder = tmp_path_factory.mktemp("many")
    for number, seconds in enumerate(np.random.default_rng(0).uniform(0.1, 1.4, 60)):
        audio_file(folder / f"{number:02d}.wav", seconds, seed=number)
    return open_rows(str(folder), "train")


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, many):
    """The same sixty as a `datasets` stream of three files."""
    folder = tmp_path_factory.mktemp("streamed")
    paths = [row["audio"]["path"] for _, row in many.iterate(0, 1, None, 0)]
    for number in range(3):
        pd.DataFrame({"path": paths[number::3]}).to_parquet(folder / f"{number}.parquet")
    files = sorted(map(str, folder.glob("*.parquet")))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=str(folder))
    return from_dataset(dataset, "streamed", Options(None, "path", {"text": None, "label": None}, True, False))


def write_tar(path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(tmp_path_factory, many):
    """The same sixty in five tars of unequal sizes."""
    folder = tmp_path_factory.mktemp("tars")
    paths = [row["audio"]["path"] for _, row in many.iterate(0, 1, None, 0)]
    for number, (start, stop) in enumerate(itertools.pairwise([0, 3, 20, 21, 45, 60])):
        write_tar(folder / f"{number}.tar", [(p.split("/")[-1], open(p, "rb").read()) for p in paths[start:stop]])
    return open_rows(str(folder))


SOURCES = ["few", "many", "tars", "streamed"]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_every_window_once_over_ranks_and_workers(request, source, world_size, workers):
    """Sixty rows, five tars and three files, whether they divide evenly among one to six readers or not."""
    rows = request.getfixturevalue(source)
    batches = one_epoch(rows, world_size, workers)
    assert Counter(keys(batches)) == Counter(all_windows(rows))
    assert sum(batch["audio_seconds"] for batch in batches) == pytest.approx(
        sum(stop - start for _, start, stop in all_windows(rows)) / RATE
    )


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("source", SOURCES)
def test_a_training_epoch_uses_every_window_once_too(request, source, readers, monkeypatch):
    """In blocks of 7 windows, so that rows, shards and epochs end in the middle of a block and between two."""
    monkeypatch.setattr(order, "BLOCK_WINDOWS", 7)
    rows = request.getfixturevalue(source)
    for epoch in range(3):
        found = [keys(training_epoch(rows, epoch, shard, readers)) for shard in range(readers)]
        planned = all_windows(rows, seed=0, epoch=epoch)
        assert Counter(itertools.chain(*found)) == Counter(planned)
    assert planned != all_windows(rows, seed=0, epoch=0), "the cuts of long recordings must move"


@pytest.mark.parametrize("batch_seconds", [1.0, 1.7, 3.0, 20.0])
@pytest.mark.parametrize("train", [False, True])
def test_a_batch_never_holds_more_than_batch_seconds(many, batch_seconds, train):
    stream = make_stream(many, train=train, batch_seconds=batch_seconds)
    batches = training_epoch(many, 0, 0, 1, batch_seconds=batch_seconds) if train else list(stream)
    for batch in batches:
        assert len(batch["keys"]) * batch["longest"] <= batch_seconds + 1e-3
        assert batch["audio_seconds"] <= batch_seconds + 1e-3
    # Nor much less: what is bucketed by length fills the batches.
    if batch_seconds >= 3:
        assert len(batches) <= 1.3 * sum(batch["audio_seconds"] for batch in batches) / batch_seconds + 2


def test_batches_hold_windows_of_near_length(many):
    lengths = [[stop - start for _, start, stop in batch["keys"]] for batch in one_epoch(many)]
    spread = max(max(batch) - min(batch) for batch in lengths)
    assert spread < (max(map(max, lengths)) - min(map(min, lengths))) / 2


def take(stream, count: int, workers: int = 0) -> list:
    return [batch["keys"] for batch in itertools.islice(StreamLoader(stream, workers), count)]


def test_training_never_ends_and_every_epoch_has_its_own_order(many):
    epochs = [keys(training_epoch(many, epoch, 0, 1)) for epoch in range(3)]
    orders = [[name for name, *_ in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] and sorted(set(orders[0])) == sorted(set(orders[1]))
    progress = [batch["epoch"] for batch in itertools.islice(make_stream(many, train=True), 60)]
    assert progress == sorted(progress) and progress[0] > 0 and progress[-1] > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_the_seed_decides_the_order(many, workers):
    first, again = (take(make_stream(many, train=True, seed=5), 12, workers) for _ in range(2))
    assert first == again
    assert take(make_stream(many, train=True, seed=6), 12, workers) != first


def test_evaluation_is_in_the_same_order_every_time(many):
    stream = make_stream(many)
    assert take(stream, 100) == take(stream, 100)


def test_ranks_draw_different_audio(many):
    first, second = (take(make_stream(many, train=True, rank=rank, world_size=2), 3) for rank in (0, 1))
    assert not set(itertools.chain(*first)) & set(itertools.chain(*second))


# ---- what can't be used


@pytest.fixture
def with_bad_files(audio_folder):
    folder = audio_folder(["good.wav", "also good.wav", "cut.flac", "short.wav"], seconds=[2.0, 1.5, 2.0, 0.05])
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:9_000])
    (folder / "text.wav").write_text("no audio")
    (folder / "zero.wav").touch()
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    names = ["good", "also good", "short", "text", "zero", "folder", "nan", "missing"]
    files = [str(folder / f"{name}.wav") for name in names] + [str(folder / "cut.flac")]
    return from_files(files, str(folder), "with bad files")


REASONS = {
    "short.wav": "0.05 s is shorter than min_duration_in_seconds=0.1",
    "text.wav": "not readable as audio: Format not recognised",
    "zero.wav": "empty file",
    "folder.wav": "a folder, not a file",
    "nan.wav": "NaN or infinite samples",
    "missing.wav": "no such file",
    "cut.flac": "decoding failed",
}


def reasons(reported) -> dict[str, str]:
    """libsndfile says of different windows of a cut file in different words why it can't decode them."""
    return {name: reason.split(":")[0] if name == "cut.flac" else reason for name, reason, *_ in reported}


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 1), (3, 2)])
def test_bad_files_are_skipped_and_reported(with_bad_files, world_size, workers):
    batches = one_epoch(with_bad_files, world_size, workers)
    reported = [entry for batch in batches for entry in batch["skipped"]]
    assert reasons(reported) == REASONS
    headers_only = [entry for entry in reported if entry[0] not in ("cut.flac", "nan.wav")]
    assert len(headers_only) == len(set(headers_only))  # each by one reader alone
    assert sum(batch["rows"] for batch in batches) == len(with_bad_files)
    faulty = [name for name, _, fault, _ in reported if fault and name not in ("cut.flac", "nan.wav")]
    assert sorted(faulty) == ["folder.wav", "missing.wav", "text.wav", "zero.wav"]  # too short is no fault
    good = {name for name, *_ in keys(batches)}
    assert good >= {"good.wav", "also good.wav"} and not good & (set(REASONS) - {"cut.flac"})


def test_training_goes_on_past_bad_files(with_bad_files):
    batches = list(itertools.islice(make_stream(with_bad_files, train=True), 30))
    assert sum("keys" in batch for batch in batches) > 15
    assert reasons(entry for batch in batches for entry in batch["skipped"]) == REASONS


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_nothing_usable_ends_with_the_reason(with_bad_files, workers):
    rows = with_bad_files.select(lambda row: row["name"] in ("nan.wav", "zero.wav"))
    with pytest.raises(UserError, match="no usable audio in share 1 of 1 of 'with bad files'"):
        for _ in StreamLoader(make_stream(rows, train=True), workers):
            pass


def test_a_share_that_is_silent_for_an_epoch_is_not_the_end(with_bad_files):
    """Two windows for two readers, one of them not a number: in some epochs a reader meets only the bad one."""
    rows = with_bad_files.select(lambda row: row["name"] in ("nan.wav", "good.wav"))
    for rank in (0, 1):
        stream = make_stream(rows, train=True, rank=rank, world_size=2, plan=cover(0.1, 2.0))
        found = itertools.islice((batch for batch in stream if "keys" in batch), 10)
        assert {name for name, *_ in keys(found)} == {"good.wav"}


def test_the_loader_hands_batches_on_as_they_are(few):
    (batch, *_) = StreamLoader(make_stream(few), 0, pin_memory=True)
    assert set(batch) == {"keys", "longest", "input_values", "audio_seconds", "skipped", "rows", "epoch"}
    assert not any(isinstance(value, torch.Tensor) for value in batch.values())


# ---- unlabeled audio: batches of one length


def unlabeled(rows, plan, batch_seconds, **kwargs) -> BatchStream:
    rectangle = Rectangle(Wav2Vec2FeatureExtractor(sampling_rate=RATE))
    options = {"rate": RATE, "batch_seconds": batch_seconds, "unlabeled": True, **kwargs}
    return BatchStream([(rows, 1.0)], plan, rectangle, **options)


def test_audio_that_is_cropped_away_does_not_count_as_heard(audio_file, tmp_path):
    for number, seconds in enumerate((0.9, 0.9, 1.0)):
        audio_file(tmp_path / f"{number}.wav", seconds=seconds)
    (batch,) = unlabeled(open_rows(str(tmp_path)), cover(0.1, 1.0), 10, train=False)
    length = max(length for length in window_lengths(0.1, 1.0) if length <= 0.9)
    assert batch["input_values"].shape == (3, round(length * RATE))
    assert batch["audio_seconds"] == pytest.approx(3 * length)


@pytest.mark.parametrize("train", [False, True])
def test_shapes_are_few_and_no_batch_is_nearly_empty(audio_file, tmp_path, train):
    """Any lengths and rates; the batches have few lengths, exactly those of `window_lengths`."""
    generator = np.random.default_rng(1)
    for number in range(150):
        rate = int(generator.choice([8_000, 11_025, 16_000, 22_050, 44_100]))
        audio_file(tmp_path / f"{number}.wav", seconds=float(np.exp(generator.uniform(-1.5, 1.2))), rate=rate)
    rows, plan = open_rows(str(tmp_path)), cover(0.25, 2.0)
    stream = unlabeled(rows, plan, 12.0, train=train)
    batches = list(itertools.takewhile(lambda b: b["epoch"] <= 1, stream))
    lengths = {batch["input_values"].shape[1] for batch in batches}
    assert lengths <= {int(length * RATE + 1e-6) for length in window_lengths(0.25, 2.0)}
    assert len({batch["input_values"].shape for batch in batches}) < len(batches)
    heard = sum(batch["audio_seconds"] for batch in batches)
    seconds = [read_header(row["audio"]).seconds for _, row in rows.iterate(0, 1, None, 0)]
    assert heard > 0.9 * sum(s for s in seconds if s >= 0.25)
    nearly_empty = [b for b in batches if b["audio_seconds"] < 0.4 * 12.0]
    assert len(nearly_empty) <= max(1, len(batches) // 10)


def test_a_window_is_not_cropped_to_a_much_shorter_one(audio_file, tmp_path):
    for number, seconds in enumerate((0.2, 2.0)):
        audio_file(tmp_path / f"{number}.wav", seconds=seconds)
    batches = list(unlabeled(open_rows(str(tmp_path)), cover(0.1, 2.0), 100.0, train=False))
    assert [batch["input_values"].shape[0] for batch in batches] == [1, 1]


def test_silence_teaches_nothing_but_may_be_a_label(audio_file, tmp_path):
    audio_file(tmp_path / "tone.wav", seconds=1.0)
    soundfile.write(tmp_path / "zeros.wav", np.zeros(RATE), RATE)
    soundfile.write(tmp_path / "constant.wav", np.full(RATE, 0.25), RATE)
    rows = open_rows(str(tmp_path))
    (batch,) = unlabeled(rows, cover(0.1, 1.0), 10, train=False)
    assert {name: reason for name, reason, *_ in batch["skipped"]} == {"zeros.wav": "silent", "constant.wav": "silent"}
    assert len(keys(make_stream(rows))) == 3


# ---- several sources


def mixed(few, many, weights=(3.0, 1.0), **kwargs):
    return make_stream(few, many, train=True, weights=weights, batch_seconds=2.0, **kwargs)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 5.0)])
def test_the_weights_are_shares_of_the_audio(few, many, weights, monkeypatch):
    monkeypatch.setattr(order, "BLOCK_WINDOWS", 50)
    batches = list(itertools.islice(mixed(few, many, weights), 400))
    mine = {row["name"] for _, row in few.iterate(0, 1, None, 0)}
    seconds = Counter()
    for name, start, stop in keys(batches):
        seconds[name in mine] += stop - start
    assert seconds[True] / seconds[False] == pytest.approx(weights[0] / weights[1], rel=0.1)


def test_an_evaluation_hears_every_source_once(few, many):
    batches = list(make_stream(few, many))
    assert Counter(keys(batches)) == Counter(all_windows(few) + all_windows(many))


def test_a_source_of_a_mix_without_audio_is_named(few, with_bad_files):
    bad = with_bad_files.select(lambda row: row["name"] in ("zero.wav", "text.wav"))
    bad.description = "the bad ones"
    with pytest.raises(UserError, match="no usable audio .*the bad ones"):
        list(itertools.islice(mixed(few, bad), 10_000))


@pytest.mark.parametrize("readers", [1, 2])
def test_no_more_is_read_than_asked_for(tars, readers):
    """An evaluation on a stream: so much of it, of all lengths, the same every time."""
    heard = [list(make_stream(tars, max_seconds=8.0).batches(shard, readers)) for shard in range(readers)]
    seconds = sum(batch["audio_seconds"] for batches in heard for batch in batches)
    assert 8.0 <= seconds <= 8.0 + readers * 1.0
    assert keys(heard[0]) == keys(make_stream(tars, max_seconds=8.0).batches(0, readers))


def test_a_long_bad_recording_is_one_fault_however_many_readers_share_it(tmp_path, audio_file):
    """Of twenty recordings one is bad for all of its minute: 5 %, with eight readers as with one."""
    for number in range(19):
        audio_file(tmp_path / f"{number}.wav", 1.5, seed=number)
    soundfile.write(tmp_path / "nan.wav", np.full(60 * RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    for readers in (1, 4, 8):
        tally = Tally()
        for shard in range(readers):
            for batch in make_stream(open_rows(str(tmp_path))).batches(shard, readers):
                tally.add(batch["skipped"], batch["rows"])
        assert (tally.faults, tally.rows) == (1, 20), readers


def test_an_evaluation_hears_all_sources_of_a_mix_with_a_stream(few, tars):
    batches = list(make_stream(few, tars, max_seconds=8.0))
    mine = {row["name"] for _, row in few.iterate(0, 1, None, 0)}
    seconds = Counter()
    for name, start, stop in keys(batches):
        seconds[name in mine] += (stop - start) / RATE
    assert seconds[True] == pytest.approx(4, abs=1) and seconds[False] == pytest.approx(4, abs=1)


def test_the_first_blocks_are_small(many, monkeypatch):
    monkeypatch.setattr(order, "BLOCK_WINDOWS", 32)
    blocks = order.Blocks([Reader(many, cover(0.1, 1.0), 0, 1, 0)], [1.0], endless=True)
    assert [len(blocks.take()) for _ in range(3)] == [2, 8, 32]
