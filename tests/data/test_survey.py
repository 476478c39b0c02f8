"""What the headers say before a run."""

import tarfile

import numpy as np
import pytest
import soundfile

from acoustic.console import UserError
from acoustic.data import survey as survey_module
from acoustic.data.sources import open_rows
from acoustic.data.survey import survey
from acoustic.data.windows import cover


def test_counts_windows_and_reasons(audio_folder):
    folder = audio_folder(["a.wav", "b/c.flac", "short.wav"], seconds=[5, 1.5, 0.5])
    (folder / "bad.wav").write_bytes(b"no audio at all")
    (folder / "zero.mp3").touch()
    plan = cover(1, 2)
    found = survey([(open_rows(str(folder), "train"), 1.0)], plan)
    assert (found.recordings, found.complete) == (5, True)
    assert 6.5 - 2 * 0.25 < found.seconds <= 6.5  # of each recording less than one step of lengths is left out
    assert 4 <= found.windows <= 5
    assert found.tally.report() == {
        "skipped": 3,
        "skipped_by_reason": {
            "not readable as audio: Format not recognised": 1,
            "shorter than min_duration_in_seconds=1": 1,
            "empty file": 1,
        },
        "skipped_recordings": {
            "bad.wav": "not readable as audio: Format not recognised",
            "short.wav": "0.50 s is shorter than min_duration_in_seconds=1",
            "zero.mp3": "empty file",
        },
    }
    assert "5 recordings" in str(found) and "3 skipped" in str(found) and "1 x empty file" in str(found)


def test_small_data_sets_are_listened_to(audio_folder, monkeypatch):
    """A header says nothing of NaN, silence or a missing end; silence is a fault only without labels."""
    folder = audio_folder(10, seconds=1.5)
    soundfile.write(folder / "nan.wav", np.full(24_000, np.nan, np.float32), 16_000, "FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(24_000, np.float32), 16_000)
    sources = [(open_rows(str(folder)), 1.0)]
    for unlabeled, names in ((True, {"nan.wav", "silent.wav"}), (False, {"nan.wav"})):
        found = survey(sources, cover(1, 2), unlabeled=unlabeled)
        assert found.recordings == 12 and found.tally.listed.keys() == names
        with pytest.raises(UserError, match=f"{len(names)} of 12 rows"):
            survey(sources, cover(1, 2), unlabeled=unlabeled, max_skipped_fraction=0.05)
    monkeypatch.setattr(survey_module, "MAX_LISTENED", 11)
    assert not survey(sources, cover(1, 2), unlabeled=True).tally.listed


def test_nothing_usable_names_the_commonest_reason(audio_folder):
    folder = audio_folder(3, seconds=[0.3, 0.4, 0.5])
    with pytest.raises(UserError, match="3 x shorter than min_duration_in_seconds=1"):
        survey([(open_rows(str(folder), "train"), 1.0)], cover(1, 2))


def test_too_many_faults_end_it_with_what_dominates(audio_folder):
    """2 of 6 rows can't be read; the two short ones are no faults."""
    folder = audio_folder(["a.wav", "b.wav", "short.wav", "shorter.wav"], seconds=[1.5, 1.5, 0.5, 0.4])
    (folder / "c.wav").touch()
    (folder / "d.wav").touch()
    sources = [(open_rows(str(folder)), 1.0)]
    with pytest.raises(
        UserError, match="^max_skipped_fraction: 2 of 6 rows of .* 33%.* 30%: 2 x empty file;"
    ) as error:
        survey(sources, cover(1, 2), max_skipped_fraction=0.3)
    assert "shorter" not in str(error.value) and str(folder) in str(error.value)
    assert len(survey(sources, cover(1, 2), max_skipped_fraction=0.34).tally.names) == 4


def test_each_source_of_a_mix_is_judged_and_all_are_counted(audio_folder, tmp_path):
    good = audio_folder(8, seconds=1.5, root=tmp_path / "good")
    bad = audio_folder(["a.wav", "b.wav"], seconds=1.5, root=tmp_path / "bad")
    (bad / "b.wav").write_bytes(b"")
    sources = [(open_rows(str(good)), 2.0), (open_rows(str(bad)), 1.0)]
    found = survey(sources, cover(1, 2))
    assert (found.recordings, found.windows, len(found.tally.names)) == (10, 9, 1)
    with pytest.raises(UserError, match="1 of 2 rows of '.*bad'"):
        survey(sources, cover(1, 2), max_skipped_fraction=0.1)


def test_a_source_that_can_not_be_looked_up_is_not_surveyed(audio_folder, tmp_path):
    folder = audio_folder(2, seconds=1.5)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder / "clip_000.wav", "a.wav")
    sources = [(open_rows(str(folder)), 1.0), (open_rows(str(tmp_path / "a.tar")), 1.0)]
    assert survey(sources, cover(1, 2)) is None
    assert survey(sources[:1], cover(1, 2)).recordings == 2


def test_many_recordings_are_sampled_unless_they_must_be_counted(audio_folder, monkeypatch):
    monkeypatch.setattr(survey_module, "MAX_COUNTED", 10)
    monkeypatch.setattr(survey_module, "SAMPLE", 6)
    rows = open_rows(str(audio_folder(12, seconds=1.5)), "train")
    sources = [(rows, 1.0)]
    sampled, counted = survey(sources, cover(1, 2)), survey(sources, cover(1, 2), count_all=True)
    assert not sampled.complete and "about" in str(sampled)
    assert sampled.windows == counted.windows == 12
    assert sampled.seconds == pytest.approx(counted.seconds) and counted.complete
