"""Nothing ends the stream: each fault is skipped and reported by its name with its reason, and good audio goes on."""

import io
import itertools
import json
import os
import resource
import shutil
import struct
import tarfile
import tempfile
import tracemalloc

import datasets
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor

import run_pretrain
import tests.data.http_server as web
from acoustic.console import UserError
from acoustic.data import remote, survey
from acoustic.data.batches import BatchStream
from acoustic.data.collate import Rectangle
from acoustic.data.columns import Options
from acoustic.data.sources import from_dataset, open_rows
from acoustic.data.windows import cover

http_server = web.http_server
RATE = 16_000
GOOD = 12


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.3)


@pytest.fixture(scope="module")
def contents(tmp_path_factory, audio_file) -> dict[str, bytes]:
    """Good recordings of about a second."""
    folder = tmp_path_factory.mktemp("contents")
    names = [f"good {number}.{('wav', 'flac')[number % 2]}" for number in range(GOOD)]
    return {name: audio_file(folder / name, 1.0 + 0.02 * n, seed=n).read_bytes() for n, name in enumerate(names)}


@pytest.fixture
def folder(tmp_path, contents):
    """Twelve good recordings, to which a test adds its fault."""
    (tmp_path / "audio").mkdir()
    for name, content in contents.items():
        (tmp_path / "audio" / name).write_bytes(content)
    return tmp_path / "audio"


def make_stream(rows) -> BatchStream:
    return BatchStream(
        [(rows, 1.0)],
        cover(0.5, 2.0),
        Rectangle(Wav2Vec2FeatureExtractor()),
        rate=RATE,
        batch_seconds=4.0,
        train=True,
        unlabeled=True,
    )


def hear(rows, epochs: int = 2, good_seconds: float = 0.8 * GOOD) -> dict[str, str]:
    """Two epochs of the stream, with good audio in each. Returns what was skipped, {name: reason}."""
    skipped, heard = {}, [0.0] * (epochs + 1)
    for batch in itertools.islice(make_stream(rows), 500):
        skipped |= {fault.name: fault.reason for fault in batch["skipped"]}
        if "input_values" in batch:
            assert torch.isfinite(batch["input_values"]).all()
            assert batch["input_values"].std(dim=1).min() > 0.1
            epoch = batch["state"]["readers"][0]["epoch"]
            heard[min(epoch, epochs)] += batch["audio_seconds"]
        if heard[epochs]:
            break
    assert all(seconds >= good_seconds for seconds in heard[:epochs]), heard
    return skipped


def encoded(samples, container: str = "WAV", subtype: str = "PCM_16") -> bytearray:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=container, subtype=subtype)
    return bytearray(file.getvalue())


def patched(content: bytearray, place: int, form: str, value: int) -> bytes:
    content[place : place + struct.calcsize(form)] = struct.pack(form, value)
    return bytes(content)


# ---- files


def test_unreadable(folder, contents):
    good = contents["good 1.flac"]
    (folder / "bad.flac").write_bytes(good[:4] + bytes(len(good) - 4))
    assert hear(open_rows(str(folder)))["bad.flac"].startswith("not readable as audio: ")


def test_empty(folder):
    (folder / "bad.wav").touch()
    assert hear(open_rows(str(folder))) == {"bad.wav": "empty file"}


def test_a_header_without_samples(folder, contents):
    (folder / "bad.wav").write_bytes(contents["good 0.wav"][:44])
    assert hear(open_rows(str(folder))) == {"bad.wav": "no samples in the file"}


def test_truncated(folder, contents, audio_file):
    (folder / "bad.flac").write_bytes(contents["good 1.flac"][:9_000])
    mp3 = audio_file(folder / "bad.mp3", 4)
    mp3.write_bytes(mp3.read_bytes()[: mp3.stat().st_size // 2])
    skipped = hear(open_rows(str(folder)))
    assert skipped.keys() == {"bad.flac", "bad.mp3"}
    assert skipped["bad.flac"].startswith(("decoding failed", "truncated"))
    assert skipped["bad.mp3"].startswith("truncated")


def test_non_audio(folder):
    (folder / "bad.wav").write_text("these are words " * 200)
    (folder / "bad.mp3").write_bytes(np.random.default_rng(0).bytes(20_000))
    skipped = hear(open_rows(str(folder)))
    assert skipped.keys() == {"bad.wav", "bad.mp3"}
    assert skipped["bad.wav"] == "not readable as audio: Format not recognised"


def test_nan_filled(folder):
    (folder / "bad.wav").write_bytes(encoded(np.full(20_000, np.nan, np.float32), subtype="FLOAT"))
    ((name, reason),) = hear(open_rows(str(folder))).items()
    assert name == "bad.wav" and reason.startswith("NaN or infinite samples")


def test_silent(folder):
    (folder / "zeros.wav").write_bytes(encoded(np.zeros(20_000, np.float32)))
    (folder / "constant.flac").write_bytes(encoded(np.full(20_000, 0.25, np.float32), "FLAC"))
    skipped = hear(open_rows(str(folder)))
    assert skipped.keys() == {"zeros.wav", "constant.flac"}
    assert {reason.split(" (")[0] for reason in skipped.values()} == {"silent"}


def kilobytes() -> dict[str, bytes]:
    """Headers of 100 hours and more over a kilobyte of audio."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 500).astype(np.float32)
    frames = 100 * 3600 * RATE
    wav, au, w64, rf64, flac, aiff, caf, mp3 = (
        encoded(noise, container, "MPEG_LAYER_III" if container == "MP3" else "PCM_16")
        for container in ("WAV", "AU", "W64", "RF64", "FLAC", "AIFF", "CAF", "MP3")
    )
    streaminfo = int.from_bytes(flac[18:26], "big") >> 36 << 36 | frames
    ds64 = rf64.index(b"ds64")
    rf64[ds64 + 16 : ds64 + 32] = struct.pack("<QQ", 2 * frames, frames)
    return {
        "bad.wav": patched(wav, wav.index(b"data") + 4, "<I", 2**32 - 16),
        "bad.au": patched(au, 8, ">I", 2**32 - 16),
        "bad.w64": patched(w64, w64.index(b"data") + 16, "<Q", 2 * frames),
        "bad.rf64": bytes(rf64),
        "bad.flac": bytes(flac[:18] + streaminfo.to_bytes(8, "big") + flac[26:]),
        "bad.aiff": patched(aiff, aiff.index(b"COMM") + 10, ">I", 2**32 - 2),
        "bad.caf": patched(caf, caf.index(b"data") + 4, ">Q", 2 * frames),
        "bad.mp3": patched(mp3, mp3.index(b"Xing") + 8, ">I", 2**31 - 1),
    }


@pytest.mark.parametrize("name", kilobytes())
def test_a_kilobyte_that_claims_a_hundred_hours(folder, name):
    """Either libsndfile knows better, and there are 30 ms of audio, or the claim is refused; in little memory."""
    (folder / name).write_bytes(kilobytes()[name])
    hear(open_rows(str(folder)), epochs=1)  # what is loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    skipped = hear(open_rows(str(folder)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB
    assert skipped.keys() == {name}
    expected = (
        "absurd header",
        "no samples in the file",
        "not readable as audio",
        "0.03 s is shorter than min_duration",
    )
    assert skipped[name].startswith(expected)
    if name in ("bad.flac", "bad.mp3"):
        assert skipped[name].startswith("absurd header: ") and skipped[name].endswith(" bytes")


@pytest.mark.parametrize("rate", [0, 1, 50, 2**31 - 1, 2**32 - 1])
def test_an_absurd_rate(folder, contents, rate):
    (folder / "bad.wav").write_bytes(patched(bytearray(contents["good 0.wav"]), 24, "<I", rate))
    skipped = hear(open_rows(str(folder)))
    assert skipped.keys() == {"bad.wav"}
    assert skipped["bad.wav"] in (
        f"absurd header: {rate} Hz",
        "not readable as audio: no sample rate or no channels in the header",
    )
    assert rate in (0, 2**32 - 1) or "absurd" in skipped["bad.wav"]


@pytest.mark.parametrize("channels", [0, 500, 1_024, 65_535])
def test_an_absurd_number_of_channels(folder, contents, channels):
    content = bytearray(contents["good 0.wav"])
    content[32:34] = struct.pack("<H", 2 * channels & 0xFFFF)
    (folder / "bad.wav").write_bytes(patched(content, 22, "<H", channels))
    skipped = hear(open_rows(str(folder)))
    assert skipped.keys() == {"bad.wav"}
    assert skipped["bad.wav"].startswith(("absurd header: ", "not readable as audio", "no samples"))
    assert channels != 500 or skipped["bad.wav"] == "absurd header: 500 channels"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_permission_denied(folder, contents):
    (folder / "bad.wav").write_bytes(contents["good 0.wav"])
    (folder / "bad.wav").chmod(0)
    if os.geteuid() != 0:
        assert hear(open_rows(str(folder))) == {"bad.wav": "permission denied"}
        return
    with tempfile.TemporaryDirectory() as open_to_all:  # root may read everything, so as somebody else
        os.chmod(open_to_all, 0o755)
        shutil.copytree(folder, f"{open_to_all}/audio")
        os.seteuid(65534)
        try:
            assert hear(open_rows(f"{open_to_all}/audio")) == {"bad.wav": "permission denied"}
        finally:
            os.seteuid(0)


def test_a_file_that_vanishes_after_planning(folder, contents, monkeypatch):
    """Its header was read, its audio is gone; and what was there when the folder was listed."""
    rows = open_rows(str(folder))
    (folder / "good 3.flac").unlink()
    stream = iter(make_stream(rows))
    next(stream)  # a whole epoch is planned by now
    for name in ("good 5.flac", "good 6.wav"):
        (folder / name).unlink()
    skipped = {}
    for batch in itertools.islice(stream, 20):
        skipped |= {fault.name: fault.reason for fault in batch["skipped"]}
    assert skipped == dict.fromkeys(("good 3.flac", "good 5.flac", "good 6.wav"), "no such file")


def test_a_pipe_named_wav(folder):
    os.mkfifo(folder / "bad.wav")
    assert hear(open_rows(str(folder))) == {"bad.wav": "not a regular file"}


def test_a_folder_and_a_dead_link_named_wav(folder):
    (folder / "bad.wav").symlink_to(folder / "nowhere.wav")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    skipped = hear(open_rows(str(folder)))
    assert skipped.keys() == {"bad.wav", "loop.wav"} and skipped["bad.wav"] == "no such file"


def test_a_name_that_is_not_utf8(folder, contents):
    """A good one is heard, a bad one is reported by a name that data_report.json can hold."""
    os.rename(folder / "good 0.wav", os.fsencode(folder) + b"/good \xff.wav")
    with open(os.fsencode(folder) + b"/bad \xfe.wav", "wb"):
        pass
    skipped = hear(open_rows(str(folder)))
    assert skipped == {os.fsdecode(b"bad \xfe.wav"): "empty file"}
    assert json.loads(json.dumps(skipped)) == skipped


# ---- tars, tables


def test_a_broken_tar_member(tmp_path, contents):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [*contents.items(), ("bad.wav", b"garbage " * 300), ("lost.wav", contents["good 0.wav"])]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(tmp_path / "a.tar") as tar:
        lost = tar.getmember("lost.wav").offset
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[lost : lost + 512] = b"?" * 512
    (tmp_path / "a.tar").write_bytes(content)
    skipped = hear(open_rows(str(tmp_path / "a.tar")))
    assert skipped.pop("bad.wav") == "not readable as audio: Format not recognised"
    ((name, reason),) = skipped.items()
    assert f"bytes {lost} to" in name and reason == "broken tar member"


def test_a_broken_shard_among_others(tmp_path, contents):
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, content in list(contents.items())[4 * number : 4 * number + 4]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (tmp_path / "3.tar").write_text("no tar " * 999)
    (tmp_path / "4.tar").touch()
    skipped = hear(open_rows(str(tmp_path)))
    assert len(skipped) == 2 and {name.split("/")[-1][:5] for name in skipped} == {"3.tar", "4.tar"}
    assert all("broken" in reason or "empty" in reason for reason in skipped.values())


def test_a_row_without_audio_in_a_manifest(folder):
    names = [path.name for path in folder.iterdir()]
    lines = [json.dumps({"path": name}) for name in names]
    lines += ['{"path": ""}', '{"path": null}', '{"other": 1}', '{"path": "gone.wav"}']
    (folder / "list.jsonl").write_text("\n".join(lines))
    skipped = hear(open_rows(str(folder / "list.jsonl")))
    rows = {f"row {number}": "no audio in the row" for number in range(GOOD, GOOD + 3)}
    assert skipped == {**rows, "gone.wav": "no such file"}


@pytest.mark.parametrize("path", ["a\0b.wav", "\ud800.wav", "n" * 5_000 + ".wav", "http://[bad/a.wav", "."])
def test_a_path_that_can_not_be_one(folder, path):
    names = [entry.name for entry in folder.iterdir()]
    (folder / "list.jsonl").write_text("\n".join(json.dumps({"path": name}) for name in [*names, path]))
    skipped = hear(open_rows(str(folder / "list.jsonl")))
    assert skipped.keys() == {path} and skipped[path]


def test_a_row_without_audio_in_parquet(tmp_path, contents):
    audio = [{"path": name, "bytes": content} for name, content in contents.items()]
    pd.DataFrame({"audio": [*audio, None, {"path": None, "bytes": None}]}).to_parquet(tmp_path / "a.parquet")
    skipped = hear(open_rows(str(tmp_path / "a.parquet")))
    assert skipped == {f"row {number}": "no audio in the row" for number in (GOOD, GOOD + 1)}


def test_a_broken_file_of_a_datasets_stream(folder, tmp_path):
    """What `datasets` raises ends the reader's epoch, not the run."""
    names = sorted(str(path) for path in folder.iterdir())
    for number in range(3):
        pd.DataFrame({"path": names[4 * number : 4 * number + 4]}).to_parquet(tmp_path / f"{number}.parquet")
    (tmp_path / "2.parquet").write_bytes(b"no parquet " * 99)
    files = sorted(map(str, tmp_path.glob("*.parquet")))
    dataset = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path)
    )
    rows = from_dataset(dataset, "a stream", Options(None, "path", {"text": None, "label": None}, True, False))
    skipped = hear(rows, epochs=6, good_seconds=0)
    assert skipped and all(name.startswith("a stream after row ") for name in skipped)
    assert all(reason.startswith("broken shard: ") for reason in skipped.values())


# ---- the network


@pytest.fixture
def served(http_server, contents):
    """The good recordings and bad.wav, a good one whose server fails; and a manifest of all."""
    for name, content in {**contents, "bad.wav": contents["good 0.wav"]}.items():
        (http_server.folder / name).write_bytes(content)
    (http_server.folder / "list.csv").write_text("\n".join(["path", *contents, "bad.wav"]) + "\n")
    return http_server


def test_a_server_that_fails_once_is_asked_again(served):
    for fault in ("503", "drop", "stall", "short"):
        served.fail("bad.wav", fault, seconds=2)
    served.fail("good 3.flac", "drop")
    assert hear(open_rows(served.url("list.csv"))) == {}
    assert served.fetches("bad.wav") >= 1


@pytest.mark.parametrize(("fault", "word"), [("503", "503"), ("drop", "drop"), ("stall", "")])
def test_a_server_that_always_fails_is_skipped(served, monkeypatch, fault, word):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    served.fail("bad.wav", fault, times=None, seconds=1)
    skipped = hear(open_rows(served.url("list.csv")), epochs=1)
    assert skipped.keys() == {"bad.wav"}
    assert skipped["bad.wav"].startswith("not reachable: ") and word in skipped["bad.wav"]


@pytest.mark.parametrize(("status", "reason"), [("404", "no such file"), ("403", "permission denied")])
def test_what_a_server_refuses_is_not_asked_again(served, status, reason):
    served.fail("bad.wav", status, times=None)
    assert hear(open_rows(served.url("list.csv")), epochs=1) == {"bad.wav": reason}


# ---- too much of it


def run(folder, tmp_path, tiny_config, **changed) -> dict:
    options = {
        "dataset_name": folder,
        "output_dir": tmp_path / "out",
        "config_overrides": json.dumps(tiny_config),
        "min_duration_in_seconds": 0.5,
        "max_duration_in_seconds": 2,
        "batch_seconds": 6,
        "max_steps": 60,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "validation_split_percentage": 0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changed,
    }
    return run_pretrain.main([word for key, value in options.items() for word in (f"--{key}", str(value))])


def test_too_many_bad_headers_end_a_run_before_training(folder, tmp_path, tiny_config):
    (folder / "empty.wav").touch()
    for number in range(3):
        (folder / f"bad {number}.wav").write_text("words " * 100)
    with pytest.raises(
        UserError, match="^max_skipped_fraction: 4 of 16 .*25%.*10%: 3 x not readable as audio"
    ) as error:
        run(folder, tmp_path, tiny_config)
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("listened", [0, 500])
def test_too_much_that_does_not_decode_ends_a_run(folder, tmp_path, tiny_config, monkeypatch, listened, capsys):
    """Their headers are good: found out before training where there are few, and in training where there are many."""
    monkeypatch.setattr(survey, "MAX_LISTENED", listened)
    silence = encoded(np.zeros(20_000, np.float32))
    for number in range(4):
        (folder / f"bad {number}.wav").write_bytes(silence)
    with pytest.raises(UserError, match=r"^max_skipped_fraction: .* \d+%.* 10%: \d+ x silent;") as error:
        run(folder, tmp_path, tiny_config)
    assert "\n" not in str(error.value)
    assert ("loss " in capsys.readouterr().out) == (listened == 0)


def test_a_higher_fraction_lets_it_go_on(folder, tmp_path, tiny_config):
    for number in range(4):
        (folder / f"bad {number}.wav").write_text("words " * 100)
    run(folder, tmp_path, tiny_config, max_skipped_fraction=0.3, max_steps=2)
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["splits"]["train"]["skipped_recordings"].keys() == {f"bad {number}.wav" for number in range(4)}


def test_one_long_bad_recording_is_one_fault(audio_folder, tmp_path, tiny_config):
    """Of a hundred recordings one is five minutes of silence: a hundred and fifty bad windows, 1 % of the rows."""
    folder = audio_folder(100, seconds=0.6, rate=8_000)
    soundfile.write(folder / "long.wav", np.zeros(300 * 8_000, np.float32), 8_000)
    run(folder, tmp_path, tiny_config, batch_seconds=4, max_steps=60, logging_steps=20)
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["splits"]["train"]["skipped_recordings"].keys() == {"long.wav"}
