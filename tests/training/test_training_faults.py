"""What goes wrong in a run is left out, counted and said; too much of it ends the run with its last good weights."""

import copy
import os
import shutil
import signal

import pytest
import torch

import run_pretrain
from acoustic.console import Interrupted, RunError
from acoustic.report.record import read_json
from acoustic.training import checkpoint as files
from acoustic.training import guard, saving
from acoustic.training.trainer import AcousticTrainer

ADAMW = {"optim": "adamw_torch_fused", "learning_rate": 1e-3, "weight_decay": 0.01}


def audio(*lengths: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_values": torch.randn(2, length, generator=generator)} for length in lengths]


@pytest.fixture
def pretrainer(model, make_trainer):
    """make(batches, **arguments) -> a trainer of a copy of the model, drawing its own targets."""
    from acoustic.training.pretraining import PretrainingStep

    def make(given, **arguments):
        return make_trainer(copy.deepcopy(model), given, PretrainingStep, max_steps=len(given), **arguments)

    return make


def spoil(monkeypatch, action, *updates: int) -> None:
    """Do something to a batch just before its forward pass, at these updates."""
    forward = AcousticTrainer.compute_loss

    def spoiled(trainer, model, inputs, **kwargs):
        if trainer.state.global_step in updates:
            inputs = action(inputs)
        return forward(trainer, model, inputs, **kwargs)

    monkeypatch.setattr(AcousticTrainer, "compute_loss", spoiled)


def nonfinite(inputs: dict) -> dict:
    return {**inputs, "input_values": inputs["input_values"] * float("nan")}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_an_update_that_is_not_finite_changes_nothing(pretrainer, monkeypatch, training_log, capsys, optim):
    """Weights, moments and step counts as if it had not been; what is logged is of the finite ones."""
    given = audio(16_000, 12_000, 16_000)
    spoil(monkeypatch, nonfinite, 1)
    weights = []
    trainer = pretrainer(given, **{**ADAMW, "optim": optim}, logging_steps=3, logging_first_step=False)
    step = trainer.guard.on_step_end
    monkeypatch.setattr(
        trainer.guard,
        "on_step_end",
        lambda *args, **kwargs: (weights.append(copy.deepcopy(trainer.model.state_dict())), step(*args, **kwargs))[1],
    )
    trainer.train()
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert any(not torch.equal(weights[1][name], value) for name, value in weights[2].items())
    (entry,) = training_log(trainer.state.log_history)
    assert entry["nonfinite_updates"] == 1
    assert all(value == value and abs(value) < float("inf") for value in entry.values())
    assert (
        "gradients were not finite, updates left out up to update 2: 1 (1 in all); 10 in a row"
        in capsys.readouterr().out
    )
    states = trainer.optimizer.state_dict()["state"].values()
    assert all(float(state["step"]) == 2 for state in states if "step" in state)


def test_too_many_in_a_row_stop_the_run_with_its_last_good_weights(pretrain_args, tmp_path, monkeypatch):
    spoil(monkeypatch, nonfinite, *range(2, 100))
    argv = pretrain_args(max_steps=50, max_nonfinite_updates=5, save_steps=2, save_total_limit=9, eval_strategy="no")
    with pytest.raises(
        RunError, match="stopped at update 7: the gradients of 5 updates in a row up to 7 were not finite"
    ):
        run_pretrain.main(argv)
    out = tmp_path / "out"
    saved = [torch.load(out / f"checkpoint-{n}" / "optimizer.pt", weights_only=True)["state"] for n in (2, 7)]
    for name, state in saved[0].items():
        assert all(torch.equal(value, saved[1][name][key]) for key, value in state.items())
    assert (out / "README.md").is_file() and (out / "figures" / "pretraining.png").is_file()
    history = read_json(out / "trainer_state.json")["log_history"]
    assert [entry["nonfinite_updates"] for entry in history if "nonfinite_updates" in entry] == [1, 2, 3, 4, 5]


def test_they_are_seen_also_where_no_log_comes(pretrain_args, monkeypatch):
    spoil(monkeypatch, nonfinite, *range(2, 100))
    argv = pretrain_args(max_steps=9, max_nonfinite_updates=3, logging_steps=100, eval_strategy="no")
    with pytest.raises(RunError, match="the gradients of 3 updates in a row up to 5 were not finite"):
        run_pretrain.main(argv)


def test_a_log_of_nothing_but_nonfinite_updates_claims_no_loss(pretrainer, monkeypatch, training_log):
    spoil(monkeypatch, nonfinite, 0)
    trainer = pretrainer(audio(16_000), **ADAMW)
    trainer.train()
    (entry,) = training_log(trainer.state.log_history)
    assert entry["loss"] != entry["loss"]


def out_of_memory(inputs: dict) -> dict:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_batch_that_does_not_fit_is_left_out_and_named(pretrainer, monkeypatch, capsys):
    given, options = audio(16_000, 24_000, 16_000), {**ADAMW, "gumbel_temperature_decay": 1.0}
    plain = pretrainer([given[0], given[2]], **options)
    plain.step.add_targets = lambda batch, seed: batch.update(seed=batch["input_values"].shape[1])
    plain.train()
    spoil(monkeypatch, out_of_memory, 1)
    trainer = pretrainer(given, **options)
    trainer.step.add_targets = plain.step.add_targets
    trainer.train()
    assert "out of memory at update 2: a batch of 2 windows of 1.5 s is left out" in capsys.readouterr().out
    weights = plain.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


def test_the_processors_allocator_is_understood(pretrainer, capsys):
    """What torch raises on a CPU is no OutOfMemoryError."""
    trainer = pretrainer(audio(16_000))

    def too_much(loss, **kwargs):
        torch.empty(2**60, dtype=torch.uint8)

    trainer.accelerator.backward = too_much
    trainer.train()
    assert "out of memory at update 1" in capsys.readouterr().out


def test_out_of_memory_again_and_again_stops_the_run(pretrain_args, monkeypatch):
    spoil(monkeypatch, out_of_memory, 1, 2, 4)
    with pytest.raises(
        RunError, match=r"update 5: out of memory 3 times within 100 .* lower --batch_seconds \(now 4\)"
    ):
        run_pretrain.main(pretrain_args(max_steps=50, eval_strategy="no"))


def test_another_error_is_not_taken_for_it(pretrainer, monkeypatch):
    def wrong(inputs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    spoil(monkeypatch, wrong, 0)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        pretrainer(audio(16_000)).train()


def full_disk(monkeypatch, times: int, where: str = "write_files") -> None:
    """The next `times` attempts to write a checkpoint meet a full disk, after the weights are written."""
    left, original = [times], getattr(AcousticTrainer, where)

    def failing(trainer, *args):
        if left[0] > 0:
            left[0] -= 1
            trainer.save_model(args[0], _internal_call=True)
            raise OSError(28, "No space left on device")
        original(trainer, *args)

    monkeypatch.setattr(AcousticTrainer, where, failing)


def test_a_full_disk_costs_a_warning_and_is_tried_again(pretrain_args, tmp_path, monkeypatch, capsys):
    """The checkpoint before stays; the next try is after a while, not at the next save_steps only."""
    monkeypatch.setattr(guard, "RETRY_SECONDS", 0.0)
    argv = pretrain_args(max_steps=9, save_steps=3, save_total_limit=1, eval_strategy="no")
    write, failing = AcousticTrainer.write_files, {6}
    seen = {}

    def sometimes(trainer, folder):
        seen[trainer.state.global_step] = [path.name for path in files.checkpoints(str(tmp_path / "out"))]
        if trainer.state.global_step in failing:
            raise OSError(28, "No space left on device")
        write(trainer, folder)

    monkeypatch.setattr(AcousticTrainer, "write_files", sometimes)
    run_pretrain.main(argv)
    out = capsys.readouterr().out
    assert "checkpoint-6 could not be saved (No space left on device); earlier checkpoints are untouched" in out
    assert seen[6] == seen[7] == ["checkpoint-3"]
    assert sorted(seen) == [3, 6, 7, 9], "tried again at the next update, as no time must pass here"
    assert [path.name for path in files.checkpoints(str(tmp_path / "out"))] == ["checkpoint-9"]
    assert not list((tmp_path / "out").glob("_incomplete-*"))


def test_the_last_checkpoint_is_waited_for(pretrain_args, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guard, "RETRY_SECONDS", 0.01)
    full_disk(monkeypatch, times=3)
    run_pretrain.main(pretrain_args(max_steps=2, save_steps=10, eval_strategy="no"))
    assert capsys.readouterr().out.count("the run waits") == 3
    assert files.what_is_wrong(tmp_path / "out" / "checkpoint-2") is None


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_what_the_system_says_of_a_full_disk_is_understood(pretrain_args, tmp_path, monkeypatch, capsys, limit):
    """safetensors, torch and Python each say it in their own way; files may not grow beyond `limit` here."""
    import resource

    write = AcousticTrainer.write_files
    monkeypatch.setattr(saving, "LAST_TRIES", 1)

    def limited(trainer, folder):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            write(trainer, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(AcousticTrainer, "write_files", limited)
    run_pretrain.main(pretrain_args(max_steps=2, eval_strategy="no"))
    assert "checkpoint-2 could not be saved" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*checkpoint-*"))


def signal_at(monkeypatch, update: int, number: int) -> None:
    forward = AcousticTrainer.compute_loss

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == update:
            os.kill(os.getpid(), number)
        return forward(trainer, *args, **kwargs)

    monkeypatch.setattr(AcousticTrainer, "compute_loss", interrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(pretrain_args, tmp_path, monkeypatch, training_log, number):
    argv = pretrain_args(max_steps=8, eval_strategy="no")
    run_pretrain.main(argv)
    whole = training_log(read_json(tmp_path / "out" / "trainer_state.json")["log_history"])
    handler = signal.getsignal(number)
    argv += ["--overwrite_output_dir", "true"]
    with monkeypatch.context() as patched:
        signal_at(patched, 4, number)
        with pytest.raises(Interrupted, match=f"{number.name} at update 5: .*checkpoint-5 is saved; the same command"):
            run_pretrain.main(argv)
    assert signal.getsignal(number) is handler
    run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])
    resumed = training_log(read_json(tmp_path / "out" / "trainer_state.json")["log_history"])
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in whole]


def evaluations(folder) -> list[dict]:
    history = read_json(folder / "trainer_state.json")["log_history"]
    timed = ("eval_runtime",)
    return [{k: v for k, v in entry.items() if k not in timed} for entry in history if "eval_loss" in entry]


@pytest.mark.parametrize("place", ["before", "during"])
def test_a_signal_does_not_wait_for_an_evaluation(pretrain_args, tmp_path, monkeypatch, place):
    """It can take minutes; the run that goes on begins with it, and ends like one that was never stopped."""
    argv = pretrain_args(max_steps=8, eval_steps=4, logging_steps=3)
    run_pretrain.main(argv)
    whole = evaluations(tmp_path / "out")
    argv += ["--overwrite_output_dir", "true"]
    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="at update 4: .*checkpoint-4 is saved"):
        if place == "before":
            signal_at(patched, 3, signal.SIGTERM)
        else:
            evaluate = AcousticTrainer.get_eval_dataloader
            patched.setattr(
                AcousticTrainer,
                "get_eval_dataloader",
                lambda *args: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*args))[1],
            )
        run_pretrain.main(argv)
    assert not evaluations(tmp_path / "out" / "checkpoint-4")
    run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])
    assert evaluations(tmp_path / "out") == whole and len(whole) >= 2
    totals = [read_json(tmp_path / "out" / name / "trainer_state.json")["total_flos"] for name in ("", "checkpoint-8")]
    assert totals[0] == totals[1]


def test_a_signal_after_the_last_update_leaves_the_report_to_the_next_run(pretrain_args, tmp_path, monkeypatch):
    argv = pretrain_args(max_steps=3, eval_strategy="no")
    write = AcousticTrainer.write_files

    def asked_meanwhile(trainer, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        write(trainer, folder)

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="evaluates and reports, which is all tha"):
        patched.setattr(AcousticTrainer, "write_files", asked_meanwhile)
        run_pretrain.main(argv)
    assert not (tmp_path / "out" / "README.md").exists()
    run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])
    assert (tmp_path / "out" / "README.md").exists()


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True}


def scored(monkeypatch, scores: dict[int, float]) -> None:
    """Evaluations find these accuracies, by update."""
    evaluate = AcousticTrainer.evaluate

    def found(trainer, *args, **kwargs):
        return evaluate(trainer, *args, **kwargs) | {"eval_accuracy": scores.get(trainer.state.global_step, 0.0)}

    monkeypatch.setattr(AcousticTrainer, "evaluate", found)


def test_a_stop_keeps_its_checkpoint_beside_the_best(pretrain_args, tmp_path, monkeypatch):
    """The Trainer would delete all but the best at the end of a run, also of one that is to be continued."""
    scored(monkeypatch, {3: 0.9})
    signal_at(monkeypatch, 6, signal.SIGTERM)
    argv = pretrain_args(max_steps=12, eval_steps=3, save_steps=3, save_total_limit=1, **BEST)
    with pytest.raises(Interrupted, match="checkpoint-7 is saved"):
        run_pretrain.main(argv)
    assert [path.name for path in files.checkpoints(str(tmp_path / "out"))] == ["checkpoint-3", "checkpoint-7"]


def test_the_best_is_one_that_could_be_saved(pretrain_args, tmp_path, monkeypatch):
    scored(monkeypatch, {3: 0.5, 6: 0.9, 9: 0.8, 12: 0.6})
    write = AcousticTrainer.write_files

    def sometimes(trainer, folder):
        if trainer.state.global_step == 6:
            raise OSError(28, "No space left on device")
        write(trainer, folder)

    monkeypatch.setattr(AcousticTrainer, "write_files", sometimes)
    run_pretrain.main(pretrain_args(max_steps=12, eval_steps=3, save_steps=3, **BEST))
    state = read_json(tmp_path / "out" / "trainer_state.json")
    assert (state["best_metric"], state["best_global_step"]) == (0.8, 9)
    assert state["best_model_checkpoint"].endswith("checkpoint-9")


@pytest.mark.parametrize("best_is_left_behind", [False, True])
def test_a_run_goes_on_in_other_folders(pretrain_args, tmp_path, monkeypatch, capsys, best_is_left_behind):
    """As on another machine: the audio and the checkpoints lie elsewhere, and the best one may not be there."""
    scored(monkeypatch, {3: 0.9, 6: 0.5, 9: 0.4, 12: 0.7})
    argv = pretrain_args(max_steps=12, eval_steps=3, save_steps=3, save_total_limit=9, **BEST)
    run_pretrain.main(argv)
    whole = read_json(tmp_path / "out" / "trainer_state.json")
    elsewhere = tmp_path / "elsewhere"
    for update in (6,) if best_is_left_behind else (3, 6):
        shutil.copytree(tmp_path / "out" / f"checkpoint-{update}", elsewhere / "run" / f"checkpoint-{update}")
    assert not [path for path in elsewhere.rglob("*.json") if str(tmp_path) in path.read_text()]
    (tmp_path / "audio").rename(elsewhere / "recordings")
    moved = [word.replace(str(tmp_path / "out"), str(elsewhere / "run")) for word in argv]
    moved = [word.replace(str(tmp_path / "audio"), str(elsewhere / "recordings")) for word in moved]
    run_pretrain.main([*moved, "--resume_from_checkpoint", "true"])
    state = read_json(elsewhere / "run" / "trainer_state.json")
    losses = [[entry["loss"] for entry in history["log_history"] if "loss" in entry] for history in (whole, state)]
    assert losses[0] == losses[1]
    expected = 12 if best_is_left_behind else 3
    assert (state["best_metric"], state["best_global_step"]) == (0.7 if best_is_left_behind else 0.9, expected)
    assert state["best_model_checkpoint"] == str(elsewhere / "run" / f"checkpoint-{expected}")
    assert ("the best so far, checkpoint-3, is not here" in capsys.readouterr().out) == best_is_left_behind


def test_checkpoints_by_the_clock(pretrain_args, tmp_path, monkeypatch):
    """Beside save_steps; half a minute a look at the clock."""
    clock = iter(range(0, 100_000, 30))
    monkeypatch.setattr(guard.time, "monotonic", lambda: next(clock))
    argv = pretrain_args(max_steps=12, save_steps=100, save_minutes=2, save_total_limit=20, eval_strategy="no")
    run_pretrain.main(argv)
    saved = [files.update_of(path) for path in files.checkpoints(str(tmp_path / "out"))]
    assert saved[-1] == 12 and len(saved) >= 3
    assert len({later - earlier for earlier, later in zip(saved[:-2], saved[1:-1])}) == 1
