"""The watch speaks in log, history and card; a collapse ends a run that was told so. Signals wait their turn."""

import os
import signal

import pytest

import run_pretrain
from acoustic.console import RunError
from acoustic.report.record import read_json
from acoustic.training import stopping
from acoustic.training.exchange import Exchange, found_by_first
from acoustic.training.health import Facts, HealthWatch, Verdict
from acoustic.training.stopping import StopSignals

LINE = "codebook collapse: seen by a test; lower --learning_rate"


@pytest.fixture
def collapsing(monkeypatch):
    """The watch finds a collapse at update 3, as long as the history is told to it."""
    see = HealthWatch.see

    def seen(watch, entry):
        see(watch, entry)
        if entry.get("step") != 3 or "loss" not in entry:
            return []
        watch.said.append(Verdict("codebook_collapse", 2, 3, LINE, collapse=True))
        return watch.said[-1:]

    monkeypatch.setattr(HealthWatch, "see", seen)


def test_a_collapse_ends_the_run_where_that_is_asked_for(pretrain_args, tmp_path, collapsing, capsys):
    with pytest.raises(RunError, match=f"stopped at update 3: {LINE}"):
        run_pretrain.main(pretrain_args(max_steps=6, on_collapse="stop"))
    assert capsys.readouterr().out.count(f"health: {LINE}") == 1
    out = tmp_path / "out"
    assert (out / "checkpoint-3" / "complete.json").is_file()
    assert f"## Health\n\n- {LINE}" in (out / "README.md").read_text()
    assert f"stopped before its last update: {LINE}" in (out / "README.md").read_text()
    assert read_json(out / "run.json")["health"] == [LINE]
    assert "eval_loss" not in read_json(out / "all_results.json")


def test_else_it_is_said_and_the_run_goes_on(pretrain_args, tmp_path, collapsing, capsys):
    """Once, in the log; resumed, it is known but not said again."""
    argv = pretrain_args(max_steps=5, save_steps=4, save_total_limit=9)
    run_pretrain.main(argv)
    assert capsys.readouterr().out.count(f"health: {LINE}") == 1
    for path in (tmp_path / "out").iterdir():
        if path.name != "checkpoint-4" and path.is_file():
            path.unlink()
    (tmp_path / "out" / "checkpoint-5").rename(tmp_path / "elsewhere")
    run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])
    assert "health:" not in capsys.readouterr().out
    assert f"## Health\n\n- {LINE}" in (tmp_path / "out" / "README.md").read_text()


def test_the_watch_is_told_what_the_run_was_asked_for(pretrain_args, monkeypatch):
    told = []
    init = HealthWatch.__init__
    monkeypatch.setattr(
        HealthWatch, "__init__", lambda self, facts, family: (told.append(facts), init(self, facts, family))[1]
    )
    options = {"max_steps": 5, "warmup_steps": 0.4, "learning_rate": 1e-4, "gradient_accumulation_steps": 3}
    run_pretrain.main(pretrain_args(**options))
    assert told == [
        Facts(
            num_negatives=10,
            num_codes=32,
            num_groups=2,
            max_steps=5,
            warmup_steps=2,
            learning_rate=1e-4,
            update_seconds=12.0,
            num_workers=0,
            cores=os.cpu_count(),
            negatives_from="masked",
        )
    ]


def test_a_signal_is_noted_and_what_was_there_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler that repeats itself
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_again_ends_it_at_once_but_not_when_a_launcher_passes_it_on(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 1
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        clock[0] += 5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_alone_there_is_nothing_to_exchange():
    assert Exchange(1).totals(2, True, 0.5) == [2.0, 1.0, 0.5]
    assert found_by_first(1, 0, lambda: "found") == "found"
