"""A long mp3 that stays open gives the same samples, to the last bit or next to it, as one opened for each window."""

import os

import numpy as np
import pytest
import soundfile

from acoustic.data import handles
from acoustic.data.decode import read_window

RATE = 16_000


@pytest.fixture
def long_mp3(tmp_path, tone, monkeypatch):
    """40 s that count as long."""
    monkeypatch.setattr(handles, "MIN_SECONDS", 30)
    handles._kept.clear()
    soundfile.write(tmp_path / "long.mp3", tone(40.0, RATE), RATE, format="MP3")
    yield str(tmp_path / "long.mp3")
    handles._kept.clear()


def read(path: str, start: int) -> np.ndarray:
    return read_window({"path": path, "bytes": None}, start, start + RATE, RATE)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=5e-7)


def test_windows_in_any_order_are_the_same(long_mp3):
    whole, _ = soundfile.read(long_mp3, dtype="float32")
    for start in np.random.default_rng(0).integers(0, 38 * RATE, 30):
        assert_same(read(long_mp3, int(start)), whole[start : start + RATE])
    assert len(handles._kept) == 1


def test_short_files_and_other_formats_are_closed(long_mp3, tmp_path, tone):
    soundfile.write(tmp_path / "short.mp3", tone(5.0, RATE), RATE, format="MP3")
    soundfile.write(tmp_path / "long.wav", tone(40.0, RATE), RATE)
    for name in ("short.mp3", "long.wav"):
        read(str(tmp_path / name), 100)
    assert not handles._kept


def test_a_replaced_file_is_opened_anew(long_mp3, tone):
    read(long_mp3, 0)
    soundfile.write(long_mp3, tone(41.0, RATE, seed=5), RATE, format="MP3")
    whole, _ = soundfile.read(long_mp3, dtype="float32")
    assert_same(read(long_mp3, 3 * RATE), whole[3 * RATE : 4 * RATE])


def test_few_stay_open(long_mp3, tmp_path, monkeypatch):
    monkeypatch.setattr(handles, "KEPT_OPEN", 2)
    for number in range(4):
        os.link(long_mp3, tmp_path / f"{number}.mp3")
        read(str(tmp_path / f"{number}.mp3"), 0)
    assert [path for _, path, *_ in handles._kept] == [os.fsencode(tmp_path / f"{n}.mp3") for n in (2, 3)]


def test_a_fork_opens_its_own(long_mp3):
    """Two processes that share a file descriptor share its position."""
    expected = read(long_mp3, 5 * RATE)
    child = os.fork()
    if child == 0:
        os._exit(
            0 if all((read(long_mp3, n * RATE) is not None) for n in range(30)) and len(handles._kept) == 2 else 1
        )
    for _ in range(30):
        assert_same(read(long_mp3, 5 * RATE), expected)
    assert os.waitpid(child, 0)[1] == 0


def test_after_a_window_beyond_the_end_the_next_is_right(long_mp3):
    with pytest.raises(Exception, match="truncated"):
        read_window({"path": long_mp3, "bytes": None}, 39 * RATE, 60 * RATE, RATE)
    assert_same(read(long_mp3, RATE), soundfile.read(long_mp3, dtype="float32")[0][RATE : 2 * RATE])
