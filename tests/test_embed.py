"""`python -m acoustic.embed`: the same embeddings as `tasks.embeddings`, and tones are nearest to their like."""

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from acoustic.console import UserError
from acoustic.data.sources import open_rows
from acoustic.embed import main, neighbours
from acoustic.report import embedding_map
from acoustic.report.embedding_map import alike, draw_map, on_a_plane, scaled
from acoustic.tasks.embeddings import embed, load_encoder

pytestmark = pytest.mark.figures

RATE = 16_000
PITCHES = {"high": 3000, "low": 300}


def tone(path: Path, pitch: float, seconds: float, seed: int) -> str:
    generator = np.random.default_rng(seed)
    wave = 0.2 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * RATE)) / RATE + generator.uniform(0, 6))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave + 0.01 * generator.standard_normal(len(wave)), RATE)
    return str(path)


@pytest.fixture
def tones(tmp_path) -> Path:
    for label, pitch in PITCHES.items():
        for index in range(4):
            tone(tmp_path / "tones" / label / f"{index}.wav", pitch * (1 + 0.02 * index), 0.5 + 0.1 * index, index)
    return tmp_path / "tones"


@pytest.fixture
def made(tones, layer_norm_checkpoint, tmp_path):
    """made(*options) -> the parquet file's path."""

    def make(*options) -> str:
        output = str(tmp_path / "e.parquet")
        main(["make", layer_norm_checkpoint, str(tones), "--output", output, "--overwrite", *map(str, options)])
        return output

    return make


def test_they_are_those_of_the_encoder(made, tones, layer_norm_checkpoint, capsys):
    (tones / "high" / "broken.wav").write_bytes(b"nothing")
    table = pyarrow.parquet.read_table(made("--layer", 1))
    assert "8 recordings" in capsys.readouterr().out
    expected = embed(load_encoder(layer_norm_checkpoint), open_rows(str(tones)))
    assert sorted(table["name"].to_pylist()) == expected.names
    values = dict(zip(table["name"].to_pylist(), table["embedding"].to_pylist()))
    for name, layers in zip(expected.names, expected.values):
        np.testing.assert_allclose(values[name], layers[1], atol=1e-5)
    assert set(table["label"].to_pylist()) == set(PITCHES)
    assert table["end"].to_pylist()[0] == pytest.approx(0.5)
    assert (
        table.schema.metadata[b"layer"] == b"1" and table.schema.metadata[b"model"] == layer_norm_checkpoint.encode()
    )


def test_parts_of_a_recording_have_their_own(made):
    table = pyarrow.parquet.read_table(made("--seconds", 0.3)).to_pylist()
    parts = [(row["start"], row["end"]) for row in table if row["name"] == "low/3.wav"]
    assert parts == [(0.0, pytest.approx(0.8 / 3, abs=1e-4)), *[tuple(map(pytest.approx, p)) for p in parts[1:]]]
    assert len(parts) == 3 and parts[-1][1] == pytest.approx(0.8)


@pytest.mark.parametrize("options", [(), ("--seconds", 0.3)])
def test_the_nearest_are_those_of_a_naive_search(made, options, capsys):
    file = made(*options)
    table = pyarrow.parquet.read_table(file).to_pylist()
    values = np.array([row["embedding"] for row in table])
    values = (values - values.mean(0)) / values.std(0)
    mine = values[[row["name"] == "low/0.wav" for row in table]].mean(0)
    near = [float(v @ mine / np.linalg.norm(v) / np.linalg.norm(mine)) for v in values]
    others = [index for index in np.argsort(near)[::-1] if table[index]["name"] != "low/0.wav"]
    found = neighbours(file, "low/0.wav", 4)
    assert [(row["name"], row["start"]) for row in found] == [
        (table[index]["name"], table[index]["start"]) for index in others[:4]
    ]
    assert [row["similarity"] for row in found] == [pytest.approx(near[index], abs=1e-4) for index in others[:4]]
    capsys.readouterr()
    main(["neighbours", file, "low/0.wav", "-k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and found[0]["name"] in lines[1]


def test_a_copy_of_a_recording_is_its_nearest(made, tones, tmp_path):
    file = made()
    copy = shutil.copy(tones / "high" / "2.wav", tmp_path / "copy.wav")
    best, second = neighbours(file, str(copy), 2)
    assert best["name"] == "high/2.wav" and best["label"] == "high"
    assert best["similarity"] == pytest.approx(1, abs=1e-5)
    assert second["similarity"] < best["similarity"]


def test_a_recording_is_not_its_own_neighbour(made, tones, tmp_path):
    file = made()
    assert all(found["name"] != "high/2.wav" for found in neighbours(file, str(tones / "high" / "2.wav"), 7))
    other = tone(tmp_path / "other" / "high" / "2.wav", 300.0, 1.0, 9)  # of that name, and another sound
    assert len(neighbours(file, other, 8)) == 8


def test_of_a_damaged_recording_the_rest_counts(made, tones, capsys):
    generator = np.random.default_rng(0)
    soundfile.write(tones / "low" / "9.flac", 0.1 * generator.standard_normal(100 * RATE), RATE)
    content = (tones / "low" / "9.flac").read_bytes()
    (tones / "low" / "9.flac").write_bytes(content[: len(content) // 2])
    table = pyarrow.parquet.read_table(made())
    assert "low/9.flac" in table["name"].to_pylist()
    assert "read in part: " in capsys.readouterr().err


def test_a_map_has_its_classes_apart(made, tones, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_map, "MAX_POINTS", 50)
    file = made("--seconds", 0.1)
    main(["map", file, "--output", str(tmp_path / "maps" / "map.png")])
    pixels = plt.imread(tmp_path / "maps" / "map.png")[..., :3]
    assert pixels.shape[0] > 300 and 0.002 < (pixels.min(-1) < 0.95).mean() < 0.9 and not plt.get_fignums()
    values = np.concatenate([np.zeros((5, 8)), np.ones((5, 8))]) + 0.1 * np.random.default_rng(0).normal(size=(10, 8))
    labels = ["low"] * 5 + ["high"] * 5
    assert alike(values, labels) == 1.0 and alike(values, [None] * 10) is None
    assert alike(values, [*labels[:4], "high", *labels[5:]]) < 1.0
    points = on_a_plane(scaled(values))
    far = np.linalg.norm(points[:5].mean(0) - points[5:].mean(0))
    assert far > np.linalg.norm(points[:5] - points[:5].mean(0), axis=1).max()
    unlabeled = draw_map(tmp_path / "plain.png", np.random.default_rng(0).normal(size=(90, 4)), [None] * 90, "all")
    assert unlabeled.exists()


def test_mistakes_are_one_line(made, tones, layer_norm_checkpoint, tmp_path):
    file = made()
    with pytest.raises(UserError, match="'low/9.wav' is neither a name in .* did you mean 'low/"):
        main(["neighbours", file, "low/9.wav"])
    with pytest.raises(UserError, match="layer: 7 is not one of 0 to"):
        made("--layer", 7)
    with pytest.raises(UserError, match="is there already"):
        main(["make", layer_norm_checkpoint, str(tones), "--output", file])
    with pytest.raises(UserError, match="can't be read as parquet"):
        main(["neighbours", str(tones / "low" / "0.wav"), "low/0.wav"])
    pyarrow.parquet.write_table(pyarrow.table({"name": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="acoustic.embed make did not write this"):
        main(["neighbours", str(tmp_path / "other.parquet"), "a"])
    with pytest.raises(UserError, match="should end with .png"):
        main(["map", file, "--output", "map"])
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "bad.wav").write_bytes(b"nothing")
    with pytest.raises(UserError, match="nothing in .* could be read"):
        main(["make", layer_norm_checkpoint, str(tmp_path / "none"), "--output", str(tmp_path / "n.parquet")])
    assert not (tmp_path / "n.parquet").exists()
