"""The benchmark's parts at toy sizes, without FFmpeg, and the arithmetic of its tables."""

import json

import pytest
import torch

from benchmarks import data_stream, predict
from benchmarks.data_stream import Row, beside, padded_share, table


@pytest.fixture
def in_process(monkeypatch):
    """No fresh processes, which only cost the imports again, and no stock path."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(data_stream, "fresh", lambda function, *arguments, **environment: function(*arguments))
    monkeypatch.setattr(data_stream, "why_no_stock", lambda: "not measured: no FFmpeg")
    monkeypatch.setattr(data_stream, "cache_bytes", lambda: 0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", data_stream.PARTS)
def test_a_part_measures_ours_and_says_why_not_stock(part, in_process, tmp_path):
    output = tmp_path / "results" / "numbers.json"
    rows = data_stream.main(["--part", part, "--quick", "--output", str(output)])[part]
    written = json.loads(output.read_text())[part]
    assert [Row(**row) for row in written["rows"]] == rows
    assert written["quick"] and {"command", "commit", "date", "seed", "versions", "hardware"} <= set(written)
    assert all(row.ours is not None or "not measured" in row.note for row in rows)
    if part in ("first_batch", "decode", "random_access", "resume"):
        assert all(row.stock is None for row in rows) and any(row.note == "not measured: no FFmpeg" for row in rows)
    assert (tmp_path / "results" / "data_stream_memory.png").exists() == (part == "memory")


def test_parts_that_were_measured_before_stay_in_the_file(tmp_path):
    output = tmp_path / "numbers.json"
    data_stream.write_results(output, "decode", {"rows": [1]})
    data_stream.write_results(output, "padding", {"rows": [2]})
    assert json.loads(output.read_text()) == {"decode": {"rows": [1]}, "padding": {"rows": [2]}}


def test_a_fresh_process_has_the_environment_and_this_one_keeps_its_own(monkeypatch):
    monkeypatch.delenv("ACOUSTIC_TEST", raising=False)
    assert data_stream.fresh(data_stream.os.getenv, "ACOUSTIC_TEST", ACOUSTIC_TEST="here") == "here"
    assert "ACOUSTIC_TEST" not in data_stream.os.environ


def test_an_undecoded_stream_stops_at_the_same_place(in_process, tmp_path):
    folder = str(data_stream.make_corpus(tmp_path, 60))
    loader = data_stream.resumable(data_stream.BatchStream, folder, 8)
    for _, _ in zip(range(5), data_stream.heard(loader)):
        pass
    assert data_stream.state_after(folder, 5, 8) == loader.state_dict()


def test_padding_and_extrapolation():
    assert padded_share([1, 1, 2, 4], [0, 1, 2, 3], batch_size=2) == pytest.approx(20)
    known = {1000: 3.0, 5000: 11.0}
    assert beside(known, 1000, None) == (3.0, "")
    assert beside(known, 100_000, None) == (pytest.approx(201), "stock: extrapolated from 1,000 and 5,000")
    assert beside({}, 1000, "no FFmpeg") == (None, "no FFmpeg")


def test_a_table_is_markdown():
    lines = table([Row("disk", "MB", 0.0, 230.4), Row("memory", "MB", None, None, "not measured")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[3:5] == [" 0    ", " 230   "] and "| -" in lines[3]


def test_predictions_are_timed_and_the_table_says_both(tmp_path):
    model = predict.make("demo", "classification", str(tmp_path / "model"))["model"]
    audio = predict.synthesize(tmp_path / "a.wav", 0.25)
    found = {"ours": predict.ours(model, "classification", audio)}
    found["pipeline"] = predict.pipeline(model, "classification", audio)
    assert all(way["audio_seconds_per_second"] > 1 for way in found.values())
    results = {"speed": {"demo": {"classification": found}}, "memory": {"classification": {"15": found["ours"]}}}
    (row,) = [line for line in predict.table(results).splitlines() if line.startswith("| demo")]
    numbers = [cell.strip() for cell in row.split("|")[3:5]]
    assert numbers == [f"{way['hours_per_minute']:.2f}" for way in found.values()]
