"""Every window of an epoch exactly once, in batches that never hold too much, however many readers there are."""

import itertools
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor

from acoustic.console import UserError
from acoustic.data.batches import BatchStream, make_loader
from acoustic.data.collate import CropToShortest
from acoustic.data.sources import from_files, open_rows
from acoustic.data.windows import cover

RATE, SECONDS = 16_000, 3.0


def collate(windows, waveforms, generator) -> dict:
    """What the batch holds, instead of a model's inputs."""
    longest = max(map(len, waveforms))
    return {
        "keys": [(w.row["name"], w.start, w.stop) for w in windows],
        "longest": longest / RATE,
        "input_values": np.zeros((len(windows), longest)),
    }


def make_stream(rows, *, train=False, seed=0, rank=0, world_size=1, plan=None, batch_seconds=SECONDS) -> BatchStream:
    return BatchStream(
        rows,
        plan or cover(0.1, 1.0),
        collate,
        rate=RATE,
        batch_seconds=batch_seconds,
        train=train,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def one_epoch(rows, world_size=1, workers=0, **kwargs) -> list[dict]:
    batches = []
    for rank in range(world_size):
        stream = make_stream(rows, rank=rank, world_size=world_size, **kwargs)
        batches += make_loader(stream, workers)
    return batches


def keys(batches) -> list[tuple]:
    return [key for batch in batches for key in batch.get("keys", [])]


def all_windows(rows, plan=None) -> list[tuple]:
    plan = plan or cover(0.1, 1.0)
    found = []
    for row in rows.iterate(0, 1, None, 0):
        info = soundfile.info(row["audio"]["path"])
        header = type("Header", (), {"frames": info.frames, "rate": info.samplerate, "seconds": info.duration})
        found += [(w.row["name"], w.start, w.stop) for w in plan(row, header, None)]
    return found


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
    """The same sixty as a stream of three parquet files."""
    folder = tmp_path_factory.mktemp("streamed")
    paths = [row["audio"]["path"] for row in many.iterate(0, 1, None, 0)]
    for number in range(3):
        pd.DataFrame({"path": paths[number::3]}).to_parquet(folder / f"{number}.parquet")
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    yield open_rows(str(folder), "train", audio_column="path", streaming=True)
    datasets.config.HF_DATASETS_CACHE = cache


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("source", ["few", "many"])
def test_every_window_once_over_ranks_and_workers(request, source, world_size, workers):
    rows = request.getfixturevalue(source)
    batches = one_epoch(rows, world_size, workers)
    assert Counter(keys(batches)) == Counter(all_windows(rows))
    assert sum(batch["audio_seconds"] for batch in batches) == pytest.approx(
        sum(stop - start for _, start, stop in all_windows(rows)) / RATE
    )


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 2)])
def test_every_window_once_from_a_stream(streamed, many, world_size, workers):
    found = keys(one_epoch(streamed, world_size, workers))
    expected = Counter((row.split("/")[-1], start, stop) for row, start, stop in all_windows(many))
    assert Counter((row.split("/")[-1], start, stop) for row, start, stop in found) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("source", ["few", "many"])
def test_a_training_epoch_uses_every_window_once_too(request, source, world_size):
    rows = request.getfixturevalue(source)
    for epoch in range(2):
        streams = [make_stream(rows, train=True, rank=rank, world_size=world_size) for rank in range(world_size)]
        found = keys(b for rank, stream in enumerate(streams) for b in stream.epoch(epoch, rank, world_size))
        assert Counter(found) == Counter(all_windows(rows))


@pytest.mark.parametrize("batch_seconds", [1.0, 1.7, 3.0, 20.0])
@pytest.mark.parametrize("train", [False, True])
def test_a_batch_never_holds_more_than_batch_seconds(many, batch_seconds, train):
    stream = make_stream(many, train=train, batch_seconds=batch_seconds)
    batches = list(stream.epoch(0, 0, 1))
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
    return [batch["keys"] for batch in itertools.islice(make_loader(stream, workers), count)]


def test_training_never_ends_and_every_epoch_has_its_own_order(few):
    per_epoch = len(list(make_stream(few, train=True).epoch(0, 0, 1)))
    batches = take(make_stream(few, train=True), 5 * per_epoch)
    epochs = [batches[start : start + per_epoch] for start in range(0, 5 * per_epoch, per_epoch)]
    assert len({str(epoch) for epoch in epochs}) > 1
    assert len({str(next(iter(make_stream(few, train=True).epoch(e, 0, 1)))["keys"]) for e in range(8)}) > 2


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
    return from_files(files, folder, "with bad files")


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
    return {name: reason.split(":")[0] if name == "cut.flac" else reason for name, reason in reported}


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 1), (3, 2)])
def test_bad_files_are_skipped_and_reported(with_bad_files, world_size, workers):
    batches = one_epoch(with_bad_files, world_size, workers)
    reported = [entry for batch in batches for entry in batch["skipped"]]
    assert reasons(reported) == REASONS
    headers_only = [entry for entry in reported if entry[0] not in ("cut.flac", "nan.wav")]
    assert len(headers_only) == len(set(headers_only))  # each by one reader alone
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
        for _ in make_loader(make_stream(rows, train=True), workers):
            pass


def test_a_share_that_is_silent_for_an_epoch_is_not_the_end(with_bad_files):
    """Two windows for two readers, one of them not a number: in some epochs a reader meets only the bad one."""
    rows = with_bad_files.select(lambda row: row["name"] in ("nan.wav", "good.wav"))
    for rank in (0, 1):
        stream = make_stream(rows, train=True, rank=rank, world_size=2, plan=cover(0.1, 2.0))
        found = itertools.islice((batch for batch in stream if "keys" in batch), 10)
        assert {name for name, *_ in keys(found)} == {"good.wav"}


def test_the_loader_hands_batches_on_as_they_are(few):
    (batch, *_) = make_loader(make_stream(few), 0, pin_memory=True)
    assert set(batch) == {"keys", "longest", "input_values", "audio_seconds", "skipped"}
    assert not any(isinstance(value, torch.Tensor) for value in batch.values())


def test_audio_that_is_cropped_away_does_not_count_as_heard(audio_file, tmp_path):
    for number, seconds in enumerate((0.5, 0.6, 1.0)):
        audio_file(tmp_path / f"{number}.wav", seconds=seconds)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    stream = BatchStream(
        open_rows(str(tmp_path)),
        cover(0.1, 1.0),
        CropToShortest(extractor, random=False),
        rate=RATE,
        batch_seconds=10,
        train=False,
    )
    (batch,) = stream
    assert batch["input_values"].shape == (3, RATE // 2)
    assert batch["audio_seconds"] == pytest.approx(1.5)
