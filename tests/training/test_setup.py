"""What is derived before a run: so much of the held-out audio as was asked for, a part of every recording."""

from types import SimpleNamespace

import pytest

from acoustic.console import UserError
from acoustic.data.headers import read_header
from acoustic.data.sources import open_rows
from acoustic.data.survey import Survey
from acoustic.data.windows import cover
from acoustic.training import setup
from acoustic.training.saving import SavingTrainer
from acoustic.training.setup import limit_seconds

PLAN = cover(0.1, 0.5)


def windows(rows, plan) -> list[tuple[str, float]]:
    found = []
    for _, row in rows.iterate(0, 1, None, 0):
        found += [(row["name"], window.seconds) for window in plan(row, read_header(row["audio"]), None)]
    return found


def test_an_evaluation_is_as_long_as_asked_for_and_hears_every_recording(audio_folder):
    rows = open_rows(str(audio_folder(5, seconds=20.0)))
    plan = limit_seconds([(rows, 1.0)], PLAN, 30.0)
    heard = windows(rows, plan)
    assert sum(seconds for _, seconds in heard) == pytest.approx(30, abs=0.5)
    assert len({name for name, _ in heard}) == 5
    assert heard == windows(rows, limit_seconds([(rows, 1.0)], PLAN, 30.0))


@pytest.mark.parametrize("seconds", [0.01, 1e6])
def test_at_least_a_window_and_at_most_all(audio_folder, seconds):
    rows = open_rows(str(audio_folder(3, seconds=2.0)))
    heard = windows(rows, limit_seconds([(rows, 1.0)], PLAN, seconds))
    assert len(heard) == (1 if seconds < 1 else len(windows(rows, PLAN)))


def test_nothing_to_evaluate_is_said(audio_folder):
    rows = open_rows(str(audio_folder(2, seconds=0.05)))
    with pytest.raises(UserError, match="eval_split_name: nothing in .* can be used to evaluate"):
        limit_seconds([(rows, 1.0)], PLAN, 10.0)


def test_held_out_audio_is_said(audio_file, tmp_path):
    for name, seconds in (("a", 1.0), ("b", 3.0), ("c", 6.0)):
        audio_file(tmp_path / name / f"{name}.wav", seconds)
    rows = {name: open_rows(str(tmp_path / name), "train") for name in "abc"}
    found = Survey(2, seconds=9.0)
    assert setup.held_out_lines([(rows["a"], 1.0)], found) == ["held out: 1 recordings, 0.00 h (10% of the audio)"]
    lines = setup.held_out_lines([(rows["c"], 1.0), (rows["b"], 1.0)], Survey(1, seconds=1.0))
    assert lines[0] == "held out: 2 recordings, 0.00 h (90% of the audio)" and lines[1].startswith("warning: 90%")
    assert setup.held_out_lines([], found) == [] and setup.held_out_lines([(rows["a"], 1.0)], None) == []


def best_of(**given):
    """What `choose_best` makes of it, of a task that is judged by accuracy."""
    task = SimpleNamespace(best_metric="accuracy", shown_metrics=("accuracy", "macro_f1"), greater_is_better=True)
    return setup.choose_best(SimpleNamespace(given=given, max_steps=100, **{"eval_steps": 10, **given}), task)


def test_which_checkpoint_is_the_best(capsys):
    args = best_of()
    assert (args.metric_for_best_model, args.greater_is_better, args.save_steps) == ("accuracy", True, 10)
    args = best_of(metric_for_best_model="eval_macro_f1")
    assert (args.metric_for_best_model, args.greater_is_better) == ("macro_f1", True)
    assert best_of(metric_for_best_model="loss").greater_is_better is False
    assert best_of(load_best_model_at_end=False, save_steps=7).save_steps == 7
    assert capsys.readouterr().out == ""
    assert best_of(save_steps=7).save_steps == 10
    assert capsys.readouterr().out.startswith("save_steps: 10, as eval_steps")
    with pytest.raises(UserError, match="metric_for_best_model: 'f1' is none of accuracy, macro_f1, loss"):
        best_of(metric_for_best_model="f1")


def test_of_equal_scores_the_one_with_the_lower_loss_is_kept():
    trainer = object.__new__(SavingTrainer)
    trainer.args = SimpleNamespace(
        metric_for_best_model="eval_accuracy", greater_is_better=True, save_strategy="steps"
    )
    trainer.state = SimpleNamespace(best_metric=None, best_global_step=None, global_step=0, log_history=[])
    kept = []
    for step, accuracy, loss in ((1, 0.5, 1.0), (2, 0.9, 0.5), (3, 0.9, 0.6), (4, 0.9, 0.2), (5, 0.8, 0.1)):
        trainer.state.global_step = step
        metrics = {"eval_accuracy": accuracy, "eval_loss": loss}
        trainer.state.log_history.append({"step": step, **metrics})
        if trainer._determine_best_metric(metrics, None):
            kept.append(step)
    assert kept == [1, 2, 4] and trainer.state.best_global_step == 4 and trainer.state.best_metric == 0.9
