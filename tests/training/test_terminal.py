"""The lines that a person reads."""

import sys
from types import SimpleNamespace

import pytest

from acoustic.training import terminal
from acoustic.training.terminal import Terminal, duration

LOGS = {
    "loss": 2.4136,
    "accuracy": 0.43,
    "code_perplexity": 183.4,
    "audio_seconds_per_second": 1820.0,
    "grad_norm": 1.0,
}


@pytest.fixture
def see(monkeypatch, capsys):
    """see(is a terminal, (update, logs), ...) -> the lines; 100 s pass before the first of 100 updates."""
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])

    def see(is_terminal: bool, *logged, line_seconds: float = 60.0, watch=None) -> list[str]:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
        callback, state = Terminal(watch), SimpleNamespace(global_step=0, max_steps=100, is_world_process_zero=True)
        args = SimpleNamespace(disable_tqdm=True, line_seconds=line_seconds)
        callback.on_train_begin(args, state, None)
        clock[0] += 90.0
        for update, logs in logged:
            clock[0] += 10.0
            state.global_step = update
            callback.on_log(args, state, None, logs=logs)
        return capsys.readouterr().out.splitlines()

    return see


def test_a_line_of_training(see):
    assert see(True, (20, {**LOGS, "hours_seen": 0.5})) == [
        "update 20 of 100 | loss 2.414 | accuracy 43% | perplexity 183 | 1,820 audio s/s | 0.50 h heard | 7 min left"
    ]


def test_how_the_run_is(see):
    for active, shown in (({}, "healthy"), ({"at_chance": None, "data_bound": None}, "at chance, data bound")):
        (line,) = see(True, (20, {"loss": 1.0}), watch=SimpleNamespace(active=active))
        assert line == f"update 20 of 100 | loss 1.000 | 7 min left | {shown}"


def test_an_evaluation(see):
    logs = {"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_accuracy_1": 0.9, "epoch": 1.0}
    assert see(False, (20, logs)) == ["held out after update 20 | loss 1.000 | accuracy 50%"]
    assert see(False, (100, {"test_loss": 2.0, "test_wer": 0.25})) == ["test after update 100 | loss 2.000 | WER 25%"]
    assert see(False, (100, {"train_runtime": 1.0, "train_loss": 2.0})) == []


def test_it_is_quiet_where_nobody_looks(see):
    logged = [(update, LOGS) for update in range(10, 101, 10)]
    assert len(see(True, *logged)) == 10
    assert [line.split(" |")[0] for line in see(False, *logged)] == [
        "update 10 of 100",
        "update 70 of 100",
        "update 100 of 100",
    ]
    assert len(see(False, *logged, line_seconds=0.0)) == 10


@pytest.mark.parametrize(
    "seconds, said",
    [(40, "40 s"), (700, "12 min"), (12_000, "3 h 20 min"), (187_000, "2 d 4 h"), (3_599, "1 h 0 min")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said
