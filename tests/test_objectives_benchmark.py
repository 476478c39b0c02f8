"""The plumbing of benchmarks/objectives.py: what is measured once, how a probe chooses, what the table says."""

import json
import subprocess

import numpy as np
import pytest
import torch

from acoustic.models import OBJECTIVES
from benchmarks import objectives
from benchmarks.objectives import WORLDS, main, measure, probe_layers, table, tables

SPEED = {
    "audio_seconds_per_second": 200.0,
    "seconds_per_update": 0.2,
    "peak_memory_mb": 1000,
    "encoder_parameters": 10**6,
}
SCORES = {"test": 0.5, "shifted": 0.25, "layer": 1}
RUN = {"hours_heard": 2.0, "probe": SCORES, "probe_random": SCORES, "fine_tuned": SCORES, "fine_tuned_random": SCORES}


def test_all_objectives_are_compared():
    assert set(objectives.OBJECTIVES) == set(OBJECTIVES)
    # code_bert reads the quantizer of the same seed.
    assert objectives.OBJECTIVES.index("vq_wav2vec") < objectives.OBJECTIVES.index("code_bert")


def test_what_is_there_is_not_measured_again_and_a_failure_is_left_out(tmp_path, capsys):
    output, calls = tmp_path / "results" / "numbers.json", []

    def action():
        calls.append(1)
        return {"value": len(calls)}

    for _ in range(2):
        measure(output, ("speed", "demo", "cpc"), action)
    measure(output, ("speed", "demo", "wav2vec"), action)

    def fails():
        raise subprocess.CalledProcessError(1, "x", stderr="the reason")

    measure(output, ("speed", "demo", "broken"), fails)
    written = json.loads(output.read_text())["speed"]["demo"]
    assert {name: entry["value"] for name, entry in written.items()} == {"cpc": 1, "wav2vec": 2}
    assert {"commit", "date", "wall_seconds"} <= set(written["cpc"])
    assert "broken: failed: the reason" in capsys.readouterr().out


def test_updates_follow_from_the_minutes(tmp_path, monkeypatch):
    jobs = []
    results = {"speed": SPEED, "quality": RUN, "floor": {"0": SCORES, "1": SCORES}}
    monkeypatch.setattr(objectives, "run_job", lambda *job: (jobs.append(job), results[job[0]])[1])
    argv = ["--world", "demo", "--objectives", "cpc", "--seeds", "0", "1", "--minutes", "2"]
    main([*argv, "--output", str(tmp_path / "numbers.json")])
    assert jobs[:2] == [("speed", "demo", "cpc"), ("floor", "demo", "0", "1")]
    assert sorted(jobs[2:]) == [("quality", "demo", "cpc", seed, "600") for seed in "01"]


def test_the_table_has_mean_and_range():
    second = {**RUN, "probe": {**SCORES, "test": 0.7}}
    results = {
        "speed": {"demo": {"cpc": SPEED, "wav2vec": SPEED}},
        "quality": {"demo": {"cpc": {"0": RUN, "1": second}, "log_mel": {"0": SCORES, "date": "2026-11-23"}}},
    }
    head, _, floor, cpc, wav2vec = table(results, "demo").splitlines()
    assert "probe, test" in head and "fine-tuned, shifted" in head
    assert floor.startswith("| log-mel bands |") and "50 (50-50)" in floor
    assert cpc.startswith("| cpc | 200 | 1000 | 1.0 | 2.0 | 60 (50-70) / 50 (50-50) |")
    assert wav2vec.startswith("| wav2vec | 200 | 1000 | 1.0 |  |")


def test_a_probe_chooses_its_layer_on_the_labels_alone(monkeypatch):
    """The second layer tells the classes apart in training; the first one does so in the test split only."""
    generator = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 30)
    told, noise = np.repeat(np.eye(3), 30, 0), generator.normal(size=(90, 3))
    splits = {"train": ([noise, told], labels), "test": ([told, told], labels), "shifted": ([noise, noise], labels)}
    monkeypatch.setattr(objectives, "pooled", lambda world, split, layers: splits[split])
    scores = probe_layers("demo", None, "0")
    assert scores["layer"] == 1 and scores["test"] == 1.0 and scores["shifted"] < 0.6


@pytest.mark.parametrize("world", WORLDS)
def test_recipes_of_the_worlds_are_there(world):
    for recipe in (WORLDS[world].recipe, WORLDS[world].finetune):
        assert (objectives.ROOT / recipe).is_file()


def test_clips_are_pooled_over_time(audio_folder, monkeypatch, tmp_path):
    folder = audio_folder(["a/1.wav", "b/2.wav"], seconds=[0.5, 2.0])
    monkeypatch.setitem(WORLDS, "toy", objectives.World("", "", str(folder), "train", (), None, 1.0, 0.5))
    lengths = []

    def layers(waveform):
        lengths.append(len(waveform))
        return [torch.ones(10, 3), torch.arange(10.0)[:, None]]

    (first, second), labels = objectives.pooled("toy", "train", layers)
    assert lengths == [8000, 16000] and list(labels) == ["a", "b"]
    assert first.shape == (2, 6) and second[0].tolist() == pytest.approx([4.5, np.arange(10).std(ddof=1)])


def test_the_readme_has_the_tables_of_the_results():
    results = json.loads((objectives.ROOT / "recipes/objectives/results/comparison.json").read_text())
    assert tables(results) in (objectives.ROOT / "recipes/objectives/README.md").read_text()
    for world in WORLDS:
        for objective in objectives.OBJECTIVES:
            runs = results["quality"][world][objective]
            assert sorted(runs) == ["0", "1", "2"] and results["speed"][world][objective]["seconds_per_update"] > 0
