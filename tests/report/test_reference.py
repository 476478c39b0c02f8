"""A finished run becomes the curve that later runs of its recipe are held against."""

import pytest

from acoustic.console import UserError
from acoustic.report.record import read_json, write_json
from acoustic.report.reference import MAX_POINTS, keep, load_reference

pytestmark = pytest.mark.figures

HISTORY = [{"step": step, "loss": 1.23456789, "learning_rate": 1.0, "epoch": 0.1} for step in range(1, 1001)]


def finished(folder, **settings):
    folder.mkdir()
    about = dict.fromkeys(("command", "commit", "seed", "processes", "hardware", "wall_seconds"), "known")
    write_json(folder / "run.json", {**about, "settings": settings, "versions": {}})
    history = [*HISTORY, {"step": 1000, "eval_loss": 2.0, "eval_runtime": 3.0}]
    write_json(folder / "trainer_state.json", {"log_history": history})
    write_json(folder / "all_results.json", {"eval_loss": 2.0})
    return str(folder)


def test_what_a_run_logged_is_kept_beside_its_recipe(tmp_path):
    recipe = str(tmp_path / "pretrain.yaml")
    path = keep(finished(tmp_path / "out", objective="cpc"), recipe)
    assert path == tmp_path / "results" / "pretrain_cpc.json"
    history = load_reference(recipe, "cpc")
    assert len(history) <= MAX_POINTS + 1
    assert history[0] == {"step": 1, "loss": 1.2346} and history[-1] == {"step": 1000, "eval_loss": 2.0}
    assert read_json(path)["command"] == "known"
    assert load_reference(recipe, "wav2vec2") == load_reference(None, "cpc") == []
    path.write_text("{")
    assert load_reference(recipe, "cpc") == []


def test_an_unfinished_run_is_none(tmp_path):
    folder = finished(tmp_path / "out")
    (tmp_path / "out" / "all_results.json").unlink()
    with pytest.raises(UserError, match="holds no finished run of run_pretrain.py"):
        keep(folder, "recipe.yaml")
