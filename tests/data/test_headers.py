"""What a header says, and the reason for which a row can't be used."""

import numpy as np
import pytest
import soundfile

from acoustic.data.headers import AUDIO_SUFFIXES, Skip, is_audio_name, read_header


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3"])
@pytest.mark.parametrize("channels", [1, 2])
def test_length_rate_and_channels(tmp_path, audio_file, suffix, channels):
    path = audio_file(tmp_path / f"a{suffix}", seconds=1.3, rate=48_000, channels=channels)
    header = read_header({"path": str(path), "bytes": None})
    assert (header.frames, header.rate, header.channels) == (62_400, 48_000, channels)
    assert header.seconds == pytest.approx(1.3)
    assert read_header({"path": None, "bytes": path.read_bytes()}) == header


def test_each_bad_file_has_its_reason(tmp_path, audio_file):
    (tmp_path / "text.wav").write_text("this is not audio " * 50)
    (tmp_path / "zero.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "silent.wav", np.zeros(0, np.float32), 16_000)
    flac = audio_file(tmp_path / "good.flac")
    reasons = {
        "text.wav": "not readable as audio: Format not recognised",
        "zero.wav": "empty file",
        "folder.wav": "a folder, not a file",
        "silent.wav": "no samples in the file",
        "missing.wav": "no such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(Skip, match=f"^{reason}$"):
            read_header({"path": str(tmp_path / name), "bytes": None})
    with pytest.raises(Skip, match="^no audio in the row$"):
        read_header({"path": None, "bytes": None})
    with pytest.raises(Skip, match="^empty file$"):
        read_header({"path": "a.wav", "bytes": b""})
    with pytest.raises(Skip, match="^not readable as audio"):
        read_header({"path": None, "bytes": flac.read_bytes()[:20]})


def test_damaged_headers_only_skip(tmp_path, audio_file):
    """Whatever bytes are wrong, the worst that comes is a Skip."""
    generator = np.random.default_rng(0)
    for suffix in (".wav", ".flac", ".ogg"):
        content = audio_file(tmp_path / f"a{suffix}", seconds=0.5).read_bytes()
        skipped = 0
        for _ in range(40):
            damaged = bytearray(content)
            for position in generator.integers(0, 200, 8):
                damaged[position] = generator.integers(256)
            try:
                header = read_header({"path": None, "bytes": bytes(damaged)})
                assert header.frames > 0 and header.rate > 0
            except Skip:
                skipped += 1
        assert skipped > 0


def test_audio_names():
    assert all(is_audio_name(f"a{suffix}") and is_audio_name(f"A.B{suffix.upper()}") for suffix in AUDIO_SUFFIXES)
    assert not any(map(is_audio_name, ("a.txt", "wav", "a.wav.part", "")))
