"""What a header says, and the reason for which a row can't be used."""

import os

import numpy as np
import pytest
import soundfile

from acoustic.data.decode import read_window
from acoustic.data.headers import AUDIO_SUFFIXES, Header, Skip, is_audio_name, read_header


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
        with pytest.raises(Skip, match=f"^{reason}$") as skipped:
            read_header({"path": str(tmp_path / name), "bytes": None})
        assert skipped.value.fault
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


def test_a_part_of_a_file_reads_like_the_file(tmp_path, audio_file):
    """A member of a tar; what lies around it doesn't matter."""
    for suffix in (".wav", ".flac", ".ogg", ".mp3"):
        content = audio_file(tmp_path / f"a{suffix}", seconds=1.5).read_bytes()
        (tmp_path / "all").write_bytes(b"x" * 700 + content + content)
        audio = {"path": str(tmp_path / "all"), "bytes": None, "offset": 700, "size": len(content)}
        alone = {"path": str(tmp_path / f"a{suffix}"), "bytes": None}
        assert read_header(audio) == read_header(alone)
        np.testing.assert_array_equal(
            read_window(audio, 9_000, 20_000, 16_000), read_window(alone, 9_000, 20_000, 16_000)
        )
    with pytest.raises(Skip, match="empty file"):
        read_header({**audio, "size": 0})


def test_a_broken_row_gives_its_own_reason():
    with pytest.raises(Skip, match="^the shard is broken$"):
        read_header({"path": None, "bytes": None, "fault": "the shard is broken"})


def test_many_channels_are_audio(tmp_path):
    """A microphone array; the limit is far above it."""
    soundfile.write(tmp_path / "a.wav", np.ones((1_000, 64), np.float32), 16_000)
    assert read_header({"path": str(tmp_path / "a.wav"), "bytes": None}) == Header(1_000, 16_000, 64)


def test_the_most_compact_audio_is_not_absurd(tmp_path):
    """Ten minutes of a constant in FLAC."""
    soundfile.write(tmp_path / "a.flac", np.zeros(16_000 * 600, np.int16), 16_000)
    header = read_header({"path": str(tmp_path / "a.flac"), "bytes": None})
    assert header.seconds == 600 and header.frames > 300 * (tmp_path / "a.flac").stat().st_size


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(Skip, match="not a regular file"):
        read_header({"path": str(tmp_path / "a.wav"), "bytes": None})
