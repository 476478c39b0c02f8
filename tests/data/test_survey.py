"""What the headers say before a run."""

import pytest

from acoustic.console import UserError
from acoustic.data import survey as survey_module
from acoustic.data.sources import open_rows
from acoustic.data.survey import survey
from acoustic.data.windows import cover


def test_counts_windows_and_reasons(audio_folder):
    folder = audio_folder(["a.wav", "b/c.flac", "short.wav"], seconds=[5, 1.5, 0.5])
    (folder / "bad.wav").write_bytes(b"no audio at all")
    (folder / "zero.mp3").touch()
    found = survey(open_rows(str(folder), "train"), cover(1, 2))
    assert (found.recordings, found.windows, found.complete) == (5, 4, True)
    assert found.seconds == pytest.approx(6.5)
    assert found.longest_seconds == pytest.approx(5 / 3, abs=1e-3)
    assert found.skipped == {
        "bad.wav": "not readable as audio: Format not recognised",
        "short.wav": "0.50 s is shorter than min_duration_in_seconds=1",
        "zero.mp3": "empty file",
    }
    assert "5 recordings" in str(found) and "3 skipped" in str(found) and "1 x empty file" in str(found)


def test_nothing_usable_names_the_commonest_reason(audio_folder):
    folder = audio_folder(3, seconds=[0.3, 0.4, 0.5])
    with pytest.raises(UserError, match="3 x shorter than min_duration_in_seconds=1"):
        survey(open_rows(str(folder), "train"), cover(1, 2))


def test_many_recordings_are_sampled_unless_they_must_be_counted(audio_folder, monkeypatch):
    monkeypatch.setattr(survey_module, "MAX_COUNTED", 10)
    monkeypatch.setattr(survey_module, "SAMPLE", 6)
    rows = open_rows(str(audio_folder(12, seconds=1.5)), "train")
    sampled, counted = survey(rows, cover(1, 2)), survey(rows, cover(1, 2), count_all=True)
    assert not sampled.complete and "about" in str(sampled)
    assert sampled.windows == counted.windows == 12
    assert sampled.seconds == pytest.approx(counted.seconds) and counted.complete
