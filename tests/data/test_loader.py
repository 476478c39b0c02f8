"""A stream that was saved anywhere goes on with the very next batch, bit for bit, and decodes nothing twice."""

import io
import itertools
import json
import multiprocessing
import os
import signal
import tarfile
import zlib

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from torch.utils.data._utils import signal_handling
from transformers import Wav2Vec2FeatureExtractor

from acoustic.console import ShareError, UserError
from acoustic.data import batches as batches_module
from acoustic.data import loader as loader_module
from acoustic.data import order
from acoustic.data.batches import BatchStream
from acoustic.data.collate import Rectangle
from acoustic.data.columns import Options
from acoustic.data.loader import StreamLoader
from acoustic.data.sources import from_dataset, open_rows
from acoustic.data.windows import cover

RATE = 16_000
COUNT = 70  # batches compared: several epochs of every source here


@pytest.fixture(scope="module")
def folder(tmp_path_factory, audio_file):
    """Recordings of many lengths and rates, a long one, and one of several faults."""
    folder = tmp_path_factory.mktemp("folder")
    generator = np.random.default_rng(0)
    for number, seconds in enumerate(generator.uniform(0.1, 1.6, 40)):
        rate = int(generator.choice([8_000, 16_000, 22_050]))
        audio_file(folder / f"{number:02d}.wav", float(seconds), rate, seed=number)
    audio_file(folder / "long.flac", 9.3, seed=99)
    (folder / "zero.wav").touch()
    (folder / "text.wav").write_text("no audio")
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    cut = audio_file(folder / "cut.flac", 2.0, seed=98)
    cut.write_bytes(cut.read_bytes()[:9_000])
    return folder


@pytest.fixture(scope="module")
def paths(folder):
    return sorted(path for path in folder.iterdir() if path.stat().st_size)


@pytest.fixture(scope="module")
def tars(tmp_path_factory, paths):
    folder = tmp_path_factory.mktemp("tars")
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for path in paths[number::3]:
                tar.add(path, path.name)
    # A member's header that is no header any more.
    damaged = bytearray((folder / "1.tar").read_bytes())
    offset = tarfile.open(folder / "1.tar").getmembers()[4].offset
    damaged[offset : offset + 512] = b"\xff" * 512
    (folder / "1.tar").write_bytes(damaged)
    return open_rows(str(folder))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, paths):
    folder = tmp_path_factory.mktemp("parquet")
    for number in range(2):
        audio = [{"path": path.name, "bytes": path.read_bytes()} for path in paths[number::2]]
        table = datasets.Dataset.from_dict({"audio": audio}, features=datasets.Features({"audio": datasets.Audio()}))
        pyarrow.parquet.write_table(table.data.table, folder / f"{number}.parquet", row_group_size=6)
    return open_rows(str(folder))


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, parquet):
    dataset = datasets.load_dataset(
        "parquet", data_files=parquet.files, split="train", streaming=True, cache_dir=str(tmp_path_factory.mktemp("c"))
    )
    return from_dataset(dataset, "streamed", Options(None, "audio", {"text": None, "label": None}, True, False))


@pytest.fixture(scope="module")
def sources(folder, tars, parquet, streamed):
    files = open_rows(str(folder))
    return {
        "folder": [(files, 1.0)],
        "tars": [(tars, 1.0)],
        "parquet": [(parquet, 1.0)],
        "streamed": [(streamed, 1.0)],
        "mix": [(files, 2.0), (tars, 1.0), (parquet, 0.5)],
    }


@pytest.fixture
def make_loader(sources, monkeypatch):
    """In blocks of 23 windows, so that blocks end in the middle of an epoch, of a shard and of the long recording."""
    monkeypatch.setattr(order, "BLOCK_WINDOWS", 23)

    def make(source, workers=0, rank=0, world_size=1, **changes) -> StreamLoader:
        options = {"rate": RATE, "batch_seconds": 2.5, "train": True, "unlabeled": True, "seed": 3} | changes
        rectangle = Rectangle(Wav2Vec2FeatureExtractor())
        stream = BatchStream(sources[source], cover(0.2, 1.0), rectangle, rank=rank, world_size=world_size, **options)
        return StreamLoader(stream, workers)

    return make


def contents(batch: dict) -> tuple:
    audio = batch["input_values"].numpy().tobytes() if "input_values" in batch else b""
    return zlib.crc32(audio), round(batch["epoch"], 9), batch["skipped"]


def states_and_batches(loader, count: int = COUNT) -> tuple[list[str], list[tuple]]:
    """The state before each batch, as the JSON text that a checkpoint would hold, and the batches."""
    states, batches = [json.dumps(loader.state_dict())], []
    for batch in itertools.islice(loader, count):
        batches.append(contents(batch))
        states.append(json.dumps(loader.state_dict()))
    return states, batches


@pytest.mark.parametrize("readers", [(0, 1), (0, 2), (2, 1), (2, 3)], ids=lambda r: f"{r[0]}workers,{r[1]}ranks")
@pytest.mark.parametrize("source", ["folder", "tars", "parquet", "streamed", "mix"])
def test_resuming_anywhere_gives_the_very_next_batches(make_loader, source, readers):
    """At random positions of each source and division: over 80 in all, through faults and the ends of epochs."""
    workers, world_size = readers
    rank = world_size - 1
    states, batches = states_and_batches(make_loader(source, workers, rank, world_size))
    assert len({audio for audio, *_ in batches}) > COUNT / 2 and batches[-1][1] > 1
    generator = np.random.default_rng([workers, world_size, len(source)])
    for position in generator.choice(COUNT - 4, 4 if workers else 8, replace=False):
        resumed = make_loader(source, workers, rank, world_size)
        resumed.load_state_dict(json.loads(states[position]))
        left = COUNT - position if not workers else 4
        found = [contents(batch) for batch in itertools.islice(resumed, int(left))]
        assert found == batches[position : position + left], (source, position)
        assert json.loads(states[position + left]) == resumed.state_dict()


@pytest.mark.parametrize("source", ["folder", "mix"])
def test_resuming_decodes_nothing_that_was_consumed(make_loader, source, monkeypatch):
    states, _ = states_and_batches(make_loader(source))
    decoded = []
    read_window = batches_module.read_window
    monkeypatch.setattr(batches_module, "read_window", lambda *args: decoded.append(args) or read_window(*args))
    for position in (1, 7, 40):
        decoded.clear()
        resumed = make_loader(source)
        resumed.load_state_dict(json.loads(states[position]))
        batch = next(iter(resumed))
        assert len(decoded) == len(batch["input_values"]) + len(
            [reason for _, reason, *_ in batch["skipped"] if reason.startswith(("NaN", "decoding"))]
        )


@pytest.mark.parametrize("source", ["folder", "tars", "parquet", "streamed", "mix"])
def test_a_state_is_small(make_loader, source):
    states, _ = states_and_batches(make_loader(source, workers=2), 12)
    shared = len(json.dumps(make_loader(source, workers=2).identity()))
    # Bytes a worker; `datasets` says of its own place what it needs to.
    assert (len(states[-1]) - shared) / 2 < (1_100 if source == "streamed" else 600)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"workers": 1}, "num_workers 2, now it is 1"),
        ({"world_size": 2}, "processes 1, now it is 2"),
        ({"batch_seconds": 5.0}, "batch_seconds 2.5, now it is 5.0"),
        ({"seed": 4}, "seed 3, now it is 4"),
        ({"source": "tars"}, "data "),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_another_division_of_the_audio_is_refused(make_loader, changes, word):
    states, _ = states_and_batches(make_loader("folder", 2), 3)
    arguments = {"source": "folder", "workers": 2} | changes
    loader = make_loader(arguments.pop("source"), **arguments)
    with pytest.raises(UserError, match=f"saved with {word}.*--ignore_data_skip true"):
        loader.load_state_dict(json.loads(states[-1]))


def test_a_place_in_other_audio_is_refused_or_warned_of(audio_file, tmp_path, capsys):
    """A recording was replaced by a longer one since: the block would be another."""

    def loader(plan=None) -> StreamLoader:
        options = {"rate": RATE, "batch_seconds": 2.0, "train": True, "unlabeled": True}
        rows = open_rows(str(tmp_path))
        return StreamLoader(
            BatchStream([(rows, 1.0)], plan or cover(0.2, 1.0), Rectangle(Wav2Vec2FeatureExtractor()), **options)
        )

    for number in range(12):
        audio_file(tmp_path / f"{number}.wav", 0.8, seed=number)
    states, _ = states_and_batches(loader(), 3)
    with pytest.raises(UserError, match="saved with window_lengths .* 1.0, now it is .* 0.7"):
        loader(cover(0.2, 0.7)).load_state_dict(json.loads(states[1]))
    audio_file(tmp_path / "5.wav", 1.9)
    resumed = loader()
    resumed.load_state_dict(json.loads(states[1]))
    assert next(iter(resumed))["audio_seconds"] > 0
    assert "warning: the audio is not quite what it was" in capsys.readouterr().err
    audio_file(tmp_path / "new.wav", 1.9)
    with pytest.raises(UserError, match="12 of 12 recordings.*13 of 13 recordings"):
        loader().load_state_dict(json.loads(states[1]))


def test_the_state_is_of_what_was_handed_out_not_of_what_the_workers_prepared(make_loader):
    loader = make_loader("folder", workers=2)
    handed_out = iter(loader)
    first = [contents(next(handed_out)) for _ in range(3)]
    state = json.dumps(loader.state_dict())
    rest = [contents(next(handed_out)) for _ in range(5)]
    resumed = make_loader("folder", workers=2)
    resumed.load_state_dict(json.loads(state))
    assert [contents(batch) for batch in itertools.islice(resumed, 5)] == rest
    assert not {audio for audio, *_ in first} & {audio for audio, *_ in rest}


def test_batches_are_tensors_as_the_collate_made_them(make_loader):
    batch = next(batch for batch in make_loader("folder") if "input_values" in batch)
    assert isinstance(batch["input_values"], torch.Tensor) and batch["input_values"].dtype == torch.float32
    assert "state" not in batch and io.BytesIO(batch["input_values"].numpy().tobytes()).getbuffer().nbytes


def kill_workers(monkeypatch, folder, times: int) -> None:
    """A worker kills itself after each second batch that it makes, `times` times."""
    make = BatchStream.make

    def deadly(stream, *args):
        made = make(stream, *args)
        number = len(list(folder.iterdir()))
        (folder / str(number)).touch()
        if number % 2 and number < 2 * times:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    folder.mkdir()
    monkeypatch.setattr(BatchStream, "make", deadly)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_costs_no_batch(make_loader, tmp_path, monkeypatch, capfd, workers):
    """As the kernel does where memory is short. What it had decoded ahead is decoded again."""
    _, whole = states_and_batches(make_loader("mix", workers), 12)
    kill_workers(monkeypatch, tmp_path / "made", times=1)
    _, survived = states_and_batches(make_loader("mix", workers), 12)
    assert survived == whole
    assert "start anew at the same place (1 of 5 times)" in capfd.readouterr().err


def test_workers_that_die_again_and_again_end_the_run_in_one_line(make_loader, tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_RESTARTS", 0)
    kill_workers(monkeypatch, tmp_path / "made", times=9)
    with pytest.raises(ShareError, match="data workers died 1 times .*use fewer of them or a lower --batch_seconds"):
        states_and_batches(make_loader("folder", 1), 9)


@pytest.mark.parametrize("beside", [False, True])
def test_a_workers_death_does_not_interrupt_an_update(make_loader, beside, monkeypatch):
    """torch would raise from a signal handler, wherever the process is then; also where a plain loader set it."""
    if beside:
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
        assert len(list(torch.utils.data.DataLoader(range(2), num_workers=1, multiprocessing_context="fork"))) == 2
        assert signal.getsignal(signal.SIGCHLD).__module__.startswith("torch.")
    batches = iter(make_loader("folder", 1))
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    assert sum(range(10_000)) == 49_995_000
    assert next(batches)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset"), FileNotFoundError(2, "no socket")])
def test_a_worker_that_dies_in_handing_a_batch_over(make_loader, monkeypatch, error, capsys):
    loader, take, calls = make_loader("folder", 0), loader_module.take, []

    def breaks(batches):
        calls.append(1)
        return take(raising(error) if len(calls) == 3 else batches)

    monkeypatch.setattr(loader_module, "take", breaks)
    _, survived = states_and_batches(loader, 6)
    monkeypatch.setattr(loader_module, "take", take)
    assert survived == states_and_batches(make_loader("folder", 0), 6)[1]
    assert "DataLoader worker exited unexpectedly; the data workers start anew" in capsys.readouterr().err


def test_a_workers_own_error_is_not_its_death():
    with pytest.raises(FileNotFoundError, match="Caught"):
        loader_module.take(raising(FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0.")))


def raising(error: Exception):
    raise error
    yield
