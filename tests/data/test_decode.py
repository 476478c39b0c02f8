"""A window read alone is the same as a slice of the whole file; downmixed and at the model's rate."""

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from acoustic.data import decode
from acoustic.data.decode import is_silent, read_window
from acoustic.data.headers import Skip, read_header

# Opus restarts its prediction at a seek; after two seconds of preroll no more than this is left of the difference.
TOLERANCE = {".wav": 0, ".flac": 0, ".ogg": 1e-6, ".mp3": 1e-6, ".opus": 5e-3}


@pytest.mark.parametrize("suffix", TOLERANCE)
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 2), (22_050, 1), (48_000, 2)])
def test_a_window_is_a_slice_of_the_whole_file(tmp_path, audio_file, suffix, rate, channels):
    rate = 16_000 if suffix == ".opus" and rate == 22_050 else rate  # Opus has five rates only
    path = audio_file(tmp_path / f"a{suffix}", seconds=5.3, rate=rate, channels=channels)
    audio = {"path": str(path), "bytes": None}
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    frames = read_header(audio).frames
    assert len(whole) == frames == round(5.3 * rate)
    generator = np.random.default_rng(0)
    starts = [0, *generator.integers(0, frames - 1, 10), *generator.integers(frames - rate, frames - 1, 5)]
    for start in map(int, starts):
        stop = int(generator.integers(start + 1, frames + 1))
        window = read_window(audio, start, stop, rate)
        assert window.shape == (stop - start,) and window.dtype == np.float32
        assert np.abs(window - whole[start:stop]).max() <= TOLERANCE[suffix], (start, stop)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 16_000])
@pytest.mark.parametrize("channels", [1, 3])
def test_downmixed_and_resampled(tmp_path, audio_file, rate, channels):
    path = audio_file(tmp_path / "a.wav", seconds=1.2, rate=rate, channels=channels, seed=3)
    start, stop = rate // 10, rate  # 0.9 s
    window = read_window({"path": str(path), "bytes": None}, start, stop, 16_000)
    frames = torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0][start:stop].mean(axis=1))
    expected = torchaudio.functional.resample(frames, rate, 16_000).numpy()
    assert len(window) == int(np.ceil((stop - start) * 16_000 / rate))
    np.testing.assert_allclose(window, expected, atol=1e-5)


@pytest.mark.parametrize("rate", [44_101, 48_007, 7_919])
def test_rates_without_a_common_divisor_keep_their_pitch(tmp_path, rate):
    time = np.arange(rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate, subtype="FLOAT")
    window = read_window({"path": str(tmp_path / "a.wav"), "bytes": None}, 0, rate, 16_000)
    assert len(window) == 16_000  # and not what the rounded ratio would give
    spectrum = np.abs(np.fft.rfft(window * np.hanning(len(window))))
    assert np.argmax(spectrum) * 16_000 / len(window) == pytest.approx(440, abs=1)


def test_embedded_bytes_read_like_the_file(tmp_path, audio_file):
    path = audio_file(tmp_path / "a.flac", seconds=1, rate=44_100, channels=2)
    from_file = read_window({"path": str(path), "bytes": None}, 1_000, 30_000, 16_000)
    from_bytes = read_window({"path": "elsewhere.flac", "bytes": path.read_bytes()}, 1_000, 30_000, 16_000)
    np.testing.assert_array_equal(from_file, from_bytes)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_is_skipped_only_where_it_is(tmp_path, tone, value):
    samples = tone(1)[:, 0]
    samples[12_000] = value
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    audio = {"path": str(tmp_path / "a.wav"), "bytes": None}
    with pytest.raises(Skip, match="NaN or infinite samples"):
        read_window(audio, 8_000, 16_000, 16_000)
    assert np.isfinite(read_window(audio, 0, 8_000, 16_000)).all()


@pytest.mark.parametrize(("suffix", "reason"), [(".flac", "decoding failed"), (".mp3", "truncated")])
def test_truncated(tmp_path, audio_file, suffix, reason):
    path = audio_file(tmp_path / f"a{suffix}", seconds=4)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    audio = {"path": str(path), "bytes": None}
    frames = read_header(audio).frames
    with pytest.raises(Skip, match=reason):
        read_window(audio, frames - 16_000, frames, 16_000)


def test_a_file_that_vanished_after_the_survey(tmp_path):
    with pytest.raises(Skip, match="no such file"):
        read_window({"path": str(tmp_path / "gone.wav"), "bytes": None}, 0, 100, 16_000)


def test_many_channels_are_read_in_pieces(tmp_path, monkeypatch):
    """What is held at a time is bounded; the mean is the same."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (5_000, 7)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    audio = {"path": str(tmp_path / "a.wav"), "bytes": None}
    monkeypatch.setattr(decode, "MAX_SAMPLES", 7_000)
    np.testing.assert_allclose(read_window(audio, 100, 4_900, 16_000), samples[100:4_900].mean(axis=1), atol=1e-6)


def test_what_is_silent():
    assert is_silent(np.zeros(100, np.float32)) and is_silent(np.full(100, 0.7, np.float32))
    hum = np.sin(np.arange(1_000, dtype=np.float32))
    assert is_silent(hum * 4e-6) and not is_silent(hum * 1e-4)


@pytest.mark.parametrize(
    "codec", ["GSM610", "G721_32", "NMS_ADPCM_16", "IMA_ADPCM", "MS_ADPCM", "ULAW", "ALAW", "PCM_U8"]
)
def test_telephony_codecs_are_read_whether_they_can_seek_or_not(tmp_path, tone, codec):
    soundfile.write(tmp_path / "a.wav", tone(5, 8_000), 8_000, subtype=codec)
    whole = soundfile.read(tmp_path / "a.wav", dtype="float32")[0]
    for start, stop in [(0, 8_000), (8_123, 16_000), (30_000, 40_000)]:
        window = read_window({"path": str(tmp_path / "a.wav"), "bytes": None}, start, stop, 8_000)
        np.testing.assert_array_equal(window, whole[start:stop])
