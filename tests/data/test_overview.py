"""The look at a data set: numbers of folders whose content is known, and the command from end to end."""

import json
import math
import os
import shutil

import datasets
import numpy as np
import pytest
import scipy.signal
import soundfile

from acoustic.config import DataArguments
from acoustic.console import UserError
from acoustic.data import __main__ as command
from acoustic.data import overview as overview_module
from acoustic.data.findings import MAX_SKIPPED_FRACTION, findings
from acoustic.data.overview import Recording, find_copies, look, readable
from acoustic.data.rows import IndexedRows
from acoustic.data.sound import FLOOR_DB, WindowSample, measure
from acoustic.data.sources import open_rows
from acoustic.data.windows import Window, cover

pytestmark = pytest.mark.figures

SETTINGS = {"min_duration_in_seconds": 1.0, "max_duration_in_seconds": 5.0, "batch_seconds": 10.0}
RATE = 16_000


def sine(amplitude: float = 0.5, seconds: float = 2.0, rate: int = RATE, hertz: float = 1000) -> np.ndarray:
    """(frames, 1)"""
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate))[:, None]


def noise(seconds: float = 2.0, rate: int = RATE, seed: int = 0, amplitude: float = 0.1) -> np.ndarray:
    return amplitude * np.random.default_rng(seed).standard_normal((round(seconds * rate), 1))


def write(folder, sounds: dict, rate: int = RATE):
    folder.mkdir(exist_ok=True)
    for name, samples in sounds.items():
        soundfile.write(os.fsencode(folder / name), samples, rate)
    return folder


def look_at(folder, **changed):
    settings = {**SETTINGS, **changed}
    plan = cover(settings["min_duration_in_seconds"], settings["max_duration_in_seconds"])
    overview, examples = look(open_rows(str(folder)), plan, settings)
    overview.findings = findings(overview)
    return overview, examples


def measured(samples: np.ndarray, rate: int = RATE):
    return measure("x", samples.astype(np.float32), rate, "")[0]


# --- one window


def test_level_and_peak_of_a_sine():
    sound = measured(sine(0.5))
    assert sound.level == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=0.01)
    assert sound.peak == pytest.approx(20 * math.log10(0.5), abs=0.01)
    assert sound.clipped == 0 and sound.silent == 0 and sound.offset == pytest.approx(0, abs=1e-6)


def test_clipping_is_the_share_of_flat_tops():
    clipped = measured(np.clip(sine(2.0, hertz=100), -1, 1))
    assert clipped.clipped == pytest.approx(2 / math.pi * math.acos(0.5), abs=0.01)
    assert measured(sine(1.0, hertz=100)).clipped == 0  # as loud as can be, and round
    eight_bits = np.clip(np.round(sine(2.0, hertz=100) * 128), -128, 127) / 128
    assert measured(eight_bits).clipped > 0.5


def test_what_goes_beyond_full_scale_is_clipped():
    assert measured(sine(2.0, hertz=100)).clipped == pytest.approx(2 / math.pi * math.acos(0.5), abs=0.01)


def test_silence():
    half = np.concatenate([sine(seconds=1.0), np.zeros((RATE, 1))])
    assert measured(half).silent == pytest.approx(0.5)
    silent = measured(np.zeros((RATE, 1)))
    assert (silent.level, silent.peak, silent.silent, silent.bandwidth) == (FLOOR_DB, FLOOR_DB, 1.0, None)


def test_offset_is_no_level():
    sound = measured(sine(0.1) + 0.25)
    assert sound.offset == pytest.approx(0.25, abs=1e-3)
    assert sound.level == pytest.approx(20 * math.log10(0.1 / math.sqrt(2)), abs=0.05)
    assert measured(np.full((RATE, 1), 0.25)).level == FLOOR_DB


def test_bandwidth_of_full_band_and_upsampled_noise():
    full = measured(noise())
    assert full.bandwidth == pytest.approx(0.99 * RATE / 2, rel=0.01) and full.edge > 0.99 * RATE / 2
    upsampled = measured(scipy.signal.resample_poly(noise(rate=8000), 6, 1), 48_000)
    assert 3500 < upsampled.bandwidth < 4100 and 3900 < upsampled.edge < 4600


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [(1, 1, "alike"), (1, -1, "cancelling"), (1, 0, "one silent"), (0, 0, "alike"), (1, None, "different")],
)
def test_channels(left, right, expected):
    other = noise(seed=1) if right is None else right * noise()
    assert measured(np.hstack([left * noise(), other])).channels == expected


def test_a_window_shorter_than_a_frame_of_the_spectrum():
    assert measured(sine(seconds=0.01)).bandwidth is not None


# --- the sample of windows


def window(number: int, content: bytes | None = None) -> Window:
    row = {"audio": {"path": None, "bytes": content}, "name": str(number)}
    return Window(row, 0, RATE, RATE, 1.0)


def test_every_window_has_the_same_chance():
    counts = np.zeros(20)
    for seed in range(1000):
        sample = WindowSample(size=5, seed=seed)
        for number in range(20):
            sample.offer(window(number))
        for kept in sample.windows:
            counts[int(kept.row["name"])] += 1
    assert counts.sum() == 5000 and counts.min() > 190 and counts.max() < 310


def test_the_sample_holds_a_bounded_amount_of_bytes():
    sample = WindowSample(size=100, max_bytes=1000)
    for number in range(500):
        sample.offer(window(number, b"x" * 90))
        assert sample.held() <= 1000
    assert len(sample.windows) >= 3 and sample.offered == 500


# --- copies


def test_copies_are_found_by_content_and_not_by_name_or_length(tmp_path):
    folder = write(tmp_path / "a", {f"{seed}.wav": noise(seed=seed) for seed in range(4)})
    for name in ("1 again.wav", "1 once more.wav"):
        shutil.copy(folder / "1.wav", folder / name)
    copies = look_at(folder)[0].copies
    assert [sorted(group) for group in copies.groups] == [["1 again.wav", "1 once more.wav", "1.wav"]]
    assert (copies.recordings, copies.checked, copies.unchecked) == (2, 6, 0)


def test_a_difference_outside_of_the_middle_is_no_copy(tmp_path):
    samples = noise(seconds=10)
    other = samples.copy()
    other[-10:] = 0
    assert look_at(write(tmp_path / "a", {"a.wav": samples, "b.wav": other}))[0].copies.groups == []


def test_without_time_it_is_said_what_was_not_checked(tmp_path):
    recordings = [
        Recording(f"{n}.wav", frames=9, rate=9, channels=1, bytes=9, place=(str(tmp_path / "gone"), 0)) for n in (1, 2)
    ]
    copies = find_copies(recordings, time_limit=-1)
    assert (copies.groups, copies.checked, copies.unchecked) == ([], 0, 2)
    assert find_copies(recordings).groups == []  # they vanished


# --- a data set


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """6 good recordings, 2 short ones, 3 that can't be read."""
    folder = tmp_path_factory.mktemp("mixed")
    write(folder, {f"good{seed}.wav": noise(seconds=2 + seed, seed=seed) for seed in range(4)})
    write(folder, {"stereo.flac": np.hstack([noise(2.0, 44_100, s) for s in (8, 9)])}, 44_100)
    write(folder, {"phone.ogg": noise(3.0, 8000)}, 8000)
    write(folder, {"short.wav": noise(0.6), "shorter.wav": noise(0.3)})
    for name, content in (("empty.wav", b""), ("text.wav", b"no audio"), ("text2.wav", b"none either")):
        (folder / name).write_bytes(content)
    return folder


def test_the_numbers_of_a_mixed_folder(mixed):
    overview, examples = look_at(mixed)
    assert (overview.recordings, overview.looked_at, overview.scale) == (11, 11, 1)
    assert overview.seconds == pytest.approx(2 + 3 + 4 + 5 + 2 + 3 + 0.6 + 0.3, abs=0.01)
    assert {rate: value["recordings"] for rate, value in overview.rates.items()} == {16_000: 6, 44_100: 1, 8000: 1}
    assert {count: value["recordings"] for count, value in overview.channels.items()} == {1: 7, 2: 1}
    assert {name: value["recordings"] for name, value in overview.formats.items()} == {"wav": 6, "flac": 1, "ogg": 1}
    assert overview.shortest[0] == "shorter.wav" and overview.longest == ("good3.wav", 5.0)
    readable = ["good0.wav", "good1.wav", "good2.wav", "good3.wav", "stereo.flac", "phone.ogg", "short.wav"]
    sizes = [(mixed / name).stat().st_size for name in [*readable, "shorter.wav"]]
    assert overview.bytes == sum(sizes)
    assert sum(overview.lengths["recordings"]) == 8
    assert sum(overview.lengths["hours"]) * 3600 == pytest.approx(overview.seconds)
    assert len(examples) == 6 and len({example["name"] for example in examples}) == 6


def test_skips_are_counted_by_reason_with_examples(mixed):
    overview, _ = look_at(mixed)
    assert (overview.skipped, overview.unreadable) == (5, 3)
    by_reason = overview.skipped_by_reason
    assert sum(value["recordings"] for value in by_reason.values()) == 5
    assert sorted(by_reason["shorter than min_duration_in_seconds=1"]["examples"]) == ["short.wav", "shorter.wav"]
    assert by_reason["empty file"] == {"recordings": 1, "examples": ["empty.wav"]}
    assert overview.too_short == {"recordings": 2, "would_use": {0.5: 1, 0.25: 2, 0.1: 2}}


def test_an_epoch_is_what_training_would_use(mixed):
    overview, _ = look_at(mixed)
    plan, rows = cover(1.0, 5.0), open_rows(str(mixed))
    assert overview.windows == overview.sample.windows
    assert 0.8 * 19 < overview.used_seconds <= 19
    assert overview.updates == math.ceil(overview.used_seconds / 10)
    assert look(rows, plan, {**SETTINGS, "batch_seconds": 5.0})[0].updates > overview.updates


def test_findings_of_a_mixed_folder(mixed):
    text = "\n".join(look_at(mixed)[0].findings)
    assert "warning: 3 recordings (27 %) can't be read" in text
    assert "2 recordings (18 %) are shorter than 1 s" in text
    assert "--min_duration_in_seconds 0.25 would use 2 of them" in text


def test_nothing_wrong_no_finding(tmp_path):
    sounds = {f"{seed}.wav": noise(seed=seed) for seed in range(6)}
    assert look_at(write(tmp_path / "a", sounds))[0].findings == []


@pytest.mark.parametrize(
    ("sound", "rate", "expected"),
    [
        (lambda seed: np.zeros((2 * RATE + seed, 1)), RATE, "100 % of the windows are digital silence"),
        (lambda seed: np.clip(noise(seed=seed, amplitude=2), -1, 1), RATE, "100 % of the windows are clipped"),
        (lambda seed: noise(seed=seed) + 0.2, RATE, "DC offset"),
        (lambda seed: noise(seed=seed, amplitude=1e-3), RATE, "very quiet"),
        (lambda seed: noise(seed=seed, amplitude=1e-4), RATE, "100 % of the time is below -60 dBFS"),
        (lambda seed: np.hstack([noise(seed=seed)] * 2), RATE, "same sound in all channels"),
        (lambda seed: np.hstack([noise(seed=seed), 0 * noise()]), RATE, "have a silent channel"),
        (lambda seed: np.hstack([noise(seed=seed), -noise(seed=seed)]), RATE, "cancel when they are averaged"),
        (lambda seed: noise(seed=seed, rate=8000), 8000, "100 % of the audio is at 8 kHz"),
        (
            lambda seed: scipy.signal.resample_poly(noise(rate=8000, seed=seed), 6, 1),
            48_000,
            "as if upsampled from 8 kHz",
        ),
        (lambda seed: noise(seconds=40 if seed == 0 else 2, seed=seed), RATE, "one recording (0.wav) holds 80 %"),
        (lambda seed: noise(seed=0), RATE, "5 recordings are copies of others"),
    ],
)
def test_each_finding(tmp_path, sound, rate, expected):
    overview, _ = look_at(write(tmp_path / "a", {f"{seed}.wav": sound(seed) for seed in range(6)}, rate))
    assert any(expected in finding for finding in overview.findings), overview.findings


def test_what_only_decoding_tells_is_found_in_the_sample(tmp_path):
    folder = write(tmp_path / "a", {f"{seed}.wav": noise(seed=seed) for seed in range(6)})
    broken = noise()
    broken[100] = np.nan
    soundfile.write(folder / "nan.wav", broken, RATE, subtype="FLOAT")
    overview, _ = look_at(folder)
    assert list(overview.sample.failed) == ["nan.wav"]
    assert any("1 of 7 sampled windows can't be decoded" in finding for finding in overview.findings)


def test_of_many_recordings_a_sample_is_read_and_scaled(tmp_path, monkeypatch):
    monkeypatch.setattr(overview_module, "MAX_HEADERS", 10)
    folder = write(tmp_path / "a", {f"{seed}.wav": noise(seed=seed) for seed in range(40)})
    overview, _ = look_at(folder)
    assert (overview.recordings, overview.looked_at, overview.about) == (40, 10, "about ")
    assert overview.seconds == pytest.approx(80) and overview.windows == 40
    assert overview.rates[RATE]["recordings"] == 40
    assert any("about 80 s" in line or "about 1.3 min" in line for line in command.page(overview))


def test_of_a_stream_the_first_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(overview_module, "STREAM_ROWS", 4)
    folder = write(tmp_path / "a", {f"{seed}.wav": noise(seed=seed % 3) for seed in range(6)})
    audio = [{"audio": {"bytes": path.read_bytes(), "path": path.name}} for path in sorted(folder.iterdir())]
    features = datasets.Features({"audio": datasets.Audio(decode=False)})
    datasets.Dataset.from_list(audio, features=features).to_parquet(tmp_path / "all.parquet")
    rows = open_rows(str(tmp_path / "all.parquet"))
    assert not isinstance(rows, IndexedRows)
    overview, examples = look(rows, cover(1.0, 5.0), SETTINGS)
    assert (overview.recordings, overview.looked_at, overview.total) == (None, 4, 4)
    assert overview.copies.groups == [["0.wav", "3.wav"]]
    assert len(overview.sample.sounds) == 4 and len(examples) == 4
    assert any("the first 4 rows of a stream" in line for line in command.page(overview))


# --- the command


def run(folder, tmp_path, *options) -> list:
    return [str(folder), "--output_dir", str(tmp_path / "out"), *options]


def test_the_command_prints_draws_and_writes(mixed, tmp_path, capsys):
    command.main(run(mixed, tmp_path))
    printed = capsys.readouterr().out
    assert max(map(len, printed.split("\ndrawn:")[0].splitlines())) <= 100
    for text in ("11 recordings", "16 kHz 6 (75 %)", "skipped       5 (45 %)", "- 2 recordings (18 %)"):
        assert text in printed
    assert (tmp_path / "out" / "figures" / "data.png").stat().st_size > 50_000
    numbers = json.loads((tmp_path / "out" / "data.json").read_text())
    assert numbers["recordings"] == 11 and len(numbers["sample"]["sounds"]) == numbers["windows"]
    assert numbers["settings"] == {
        "min_duration_in_seconds": 1.0,
        "max_duration_in_seconds": 15.6,
        "batch_seconds": 87.5,
    }


def test_names_that_are_no_text(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9 $x_1$ \n") + "long " * 30
    command.main(run(write(tmp_path / "a", {f"{name}.wav": noise(), "日本.wav": noise(0.5)}), tmp_path))
    printed = capsys.readouterr().out
    assert "caf\\udce9 $x" in printed
    assert max(map(len, printed.split("\ndrawn:")[0].splitlines())) <= 100
    assert json.loads((tmp_path / "out" / "data.json").read_text())["longest"][0] == f"{readable(name)}.wav"


@pytest.mark.parametrize("name", ["min_duration_in_seconds", "max_duration_in_seconds", "audio_column_name"])
def test_defaults_are_those_of_training(name):
    assert getattr(command.parse(["x"]), name) == getattr(DataArguments(dataset_name="x"), name)
    assert DataArguments(dataset_name="x").max_skipped_fraction == MAX_SKIPPED_FRACTION


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/no/such/folder"], "there is no folder or file '/no/such/folder'"),
        ([], "FOLDER_OR_ID"),
        (["x", "--nonsense", "1"], "nonsense"),
        (["x", "--min_duration_in_seconds", "9"], "must be at least twice"),
        (["x", "--batch_seconds", "1"], "holds no window"),
        (["x", "--batch_seconds", "many"], "invalid float"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        command.main([*options, "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)


def test_a_data_set_without_anything_to_use(tmp_path):
    folder = write(tmp_path / "a", {"a.wav": noise(0.2), "b.wav": noise(0.3)})
    (folder / "c.wav").write_bytes(b"")
    with pytest.raises(UserError, match="nothing in .* can be used: 2 x shorter than .*, 1 x empty file"):
        command.main(run(folder, tmp_path))


def test_an_output_folder_that_cannot_be_made(mixed, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="output_dir"):
        command.main(run(mixed, tmp_path))
