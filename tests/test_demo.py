"""The demo's comparison: what is measured, and what the table says of it. The whole of it is `make demo`."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

pytestmark = pytest.mark.figures

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "recipes" / "demo" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_the_part_that_is_compared_is_synthesised(demo, monkeypatch):
    """The other parts would take longer than the whole comparison may."""
    commands = []

    def stop(command, check):
        commands.append(command)
        raise InterruptedError

    monkeypatch.setattr(demo.subprocess, "run", stop)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--hours", "0.5"])
    with pytest.raises(InterruptedError):
        demo.main()
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "demo"))
    args = importlib.import_module("synthesize").parse_arguments(commands[0][2:])
    assert (args.parts, args.hours) == (["components"], 0.5)


def test_frozen_learns_from_the_budget_and_scores_the_splits(demo):
    generator = np.random.default_rng(0)
    labels = np.repeat(["fan", "gear", "pump"], 12)
    centres = {"fan": (9, 0), "gear": (0, 9), "pump": (-9, -9)}
    apart = np.array([centres[label] for label in labels]) + generator.standard_normal((36, 2))
    noise = generator.standard_normal((36, 2))
    scores = demo.frozen([(apart, labels), (apart, labels), (noise, labels)], budget=4, draw=0)
    assert scores["test"] == 1.0
    assert scores["shifted"] < 0.7


def test_clip_features_are_mean_and_deviation_of_the_scaled_clip(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DATA", str(tmp_path))
    for kind in ("fan", "gear"):
        (tmp_path / "test" / kind).mkdir(parents=True)
        soundfile.write(tmp_path / "test" / kind / "0.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 1600), 16_000)
    features, labels = demo.clip_features("test", lambda waveforms: waveforms[:, :, None].repeat(1, 1, 3))
    assert labels.tolist() == ["fan", "gear"]
    assert features.shape == (2, 6)
    np.testing.assert_allclose(features[:, :3], 0, atol=1e-5)
    np.testing.assert_allclose(features[:, 3:], 1, atol=1e-5)


def test_the_same_encoders_are_compared(demo, group_norm_checkpoint):
    found = dict(demo.encoders(group_norm_checkpoint))
    waveforms = torch.randn(2, 16_000)
    with torch.no_grad():
        bands, random, pretrained = (encode(waveforms) for encode in found.values())
    assert tuple(found) == demo.FROZEN
    assert bands.shape == (2, 101, 64)
    assert random.shape == pretrained.shape
    assert not torch.allclose(random, pretrained)


def test_the_table_holds_every_start_with_mean_and_range(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "OUTPUT", str(tmp_path))
    rows = [
        {"start": start, "budget": 5, "draw": draw, "test": 0.5 + draw / 10, "shifted": 0.4}
        for start in demo.STARTS
        for draw in range(3)
    ]
    demo.report(rows, SimpleNamespace(draws=3), 66.0)
    table = (tmp_path / "README.md").read_text()
    for start in demo.STARTS:
        assert f"| 5 | {start} | 60% (50% to 70%) | 40% (40% to 40%) |" in table
    assert "1.1 minutes" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert (tmp_path / "figures" / "comparison.png").is_file()
