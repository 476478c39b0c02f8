"""A run that was cut in two logs what the uninterrupted one logs; no run is overwritten by mistake."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import run_pretrain
from acoustic import report
from acoustic.console import NothingToDo, UserError, one_line_errors
from acoustic.data import batches
from acoustic.report.record import read_json
from acoustic.training import checkpoint as files
from acoustic.training import resume
from acoustic.training.resume import find_checkpoint, load_stream_state, make_room, save_stream_state

COMPARED = ("loss", "accuracy", "grad_norm", "learning_rate", "gumbel_temperature", "masked_fraction", "hours_seen")


def logged(folder) -> dict[int, list]:
    history = read_json(folder / "trainer_state.json")["log_history"]
    return {entry["step"]: [entry[name] for name in COMPARED] for entry in history if "loss" in entry}


def cut_off(output_dir, update: int) -> None:
    """As if the run had been killed after the checkpoint of `update`."""
    for path in output_dir.iterdir():
        if path.name != f"checkpoint-{update}":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(pretrain_args, tmp_path, accumulation, workers):
    """Dropout, Gumbel noise, crops, masks and order all come out the same, over the end of an epoch."""
    options = {"max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": accumulation, "eval_strategy": "no"}
    argv = pretrain_args(**options, dataloader_num_workers=workers, save_total_limit=5)
    run_pretrain.main(argv)
    whole = logged(tmp_path / "out")
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    places = [read_json(tmp_path / "out" / f"checkpoint-{update}" / "stream_0.json")["place"] for update in (3, 6)]
    cut_off(tmp_path / "out", 3)
    run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])
    assert logged(tmp_path / "out") == whole
    assert read_json(tmp_path / "out" / "checkpoint-6" / "stream_0.json")["place"] == places[1] != places[0]


def test_what_was_summed_since_the_last_log_is_resumed_too(pretrain_args, tmp_path):
    """A checkpoint lies between two logs; the mean logged next is over updates from both runs."""
    options = {"max_steps": 6, "save_steps": 2, "logging_steps": 3, "logging_first_step": False}
    argv = pretrain_args(**options, eval_strategy="no", save_total_limit=5)
    run_pretrain.main(argv)
    whole = logged(tmp_path / "out")
    assert sorted(whole) == [3, 6]
    cut_off(tmp_path / "out", 4)
    run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])
    assert logged(tmp_path / "out") == whole


def test_a_run_killed_before_its_report_is_finished_without_training(pretrain_args, tmp_path):
    argv = pretrain_args(max_steps=4, save_steps=2, eval_steps=2)
    whole = run_pretrain.main(argv)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    cut_off(tmp_path / "out", 4)
    again = run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])
    for name in ("train_loss", "eval_loss", "eval_accuracy", "hours_seen"):
        assert again[name] == whole[name], name
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    with pytest.raises(UserError, match="has made its 4 updates; raise max_steps"):
        run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])


def test_a_run_killed_in_its_report_writes_it_anew(pretrain_args, tmp_path, monkeypatch, capsys):
    """Whatever was last written; and once it is whole, `auto` finds nothing left to do, which is no failure."""
    argv = pretrain_args(max_steps=2, eval_strategy="no")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(report, "write_card", interrupted)
        run_pretrain.main(argv)
    argv += ["--resume_from_checkpoint", "auto"]
    run_pretrain.main(argv)
    assert (tmp_path / "out" / "README.md").is_file()
    with one_line_errors():
        run_pretrain.main(argv)
    assert "nothing left to do" in capsys.readouterr().out


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_what_was_skipped_before_is_still_told_after(pretrain_args, tmp_path):
    argv = pretrain_args(max_steps=4, save_steps=2, eval_strategy="no", save_total_limit=5, max_skipped_fraction=1)
    folder = Path(argv[argv.index("--dataset_name") + 1])
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan, np.float32), 16_000, "FLOAT")
    run_pretrain.main(argv)
    first = read_json(tmp_path / "out" / "data_report.json")["splits"]["train"]
    assert list(first["skipped_recordings"]) == ["nan.wav"]
    cut_off(tmp_path / "out", 2)
    run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])
    assert read_json(tmp_path / "out" / "data_report.json")["splits"]["train"] == first


def test_resuming_does_not_read_what_was_heard(pretrain_args, tmp_path, monkeypatch):
    argv = pretrain_args(max_steps=20, save_steps=19, eval_strategy="no", dataloader_num_workers=0)
    run_pretrain.main(argv)
    cut_off(tmp_path / "out", 19)
    decoded = []
    read_window = batches.read_window
    monkeypatch.setattr(batches, "read_window", lambda *args: decoded.append(args) or read_window(*args))
    run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])
    (last,) = [entry for step, entry in logged(tmp_path / "out").items() if step == 20]
    assert last and 0 < len(decoded) <= 12  # the windows of one update


def test_the_audio_begins_anew_where_that_is_asked_for(pretrain_args, tmp_path):
    argv = pretrain_args(max_steps=4, save_steps=2, eval_strategy="no", dataloader_num_workers=2)
    run_pretrain.main(argv)
    cut_off(tmp_path / "out", 2)
    fewer = [*argv, "--resume_from_checkpoint", "true", "--dataloader_num_workers", "0"]
    with pytest.raises(UserError, match="saved with num_workers 2, now it is 0.*--ignore_data_skip true"):
        run_pretrain.main(fewer)
    run_pretrain.main([*fewer, "--ignore_data_skip", "true"])
    assert sorted(logged(tmp_path / "out")) == [1, 2, 3, 4]


def test_a_checkpoint_without_the_place_of_this_process_is_refused(tmp_path):
    save_stream_state(str(tmp_path), 0, {"turn": 0})
    assert load_stream_state(str(tmp_path), 0) == {"turn": 0}
    with pytest.raises(UserError, match="place in the audio of 1 processes, and this is number 2"):
        load_stream_state(str(tmp_path), 1)


@pytest.fixture
def folder(tmp_path):
    """checkpoint-2 and checkpoint-10, both whole."""
    for number in (2, 10):
        checkpoint = tmp_path / f"checkpoint-{number}"
        (tmp_path / f"_incomplete-checkpoint-{number}").mkdir()
        (tmp_path / f"_incomplete-checkpoint-{number}" / "trainer_state.json").write_text(
            f'{{"global_step": {number}}}'
        )
        files.publish(checkpoint)
    return tmp_path


def arguments(folder, resume=None, overwrite=False, **more):
    given = {"output_dir": str(folder), "resume_from_checkpoint": resume, "overwrite_output_dir": overwrite}
    return SimpleNamespace(**given, world_size=1, process_index=0, **more)


def break_off(checkpoint) -> None:
    (checkpoint / "trainer_state.json").write_text("{")


@pytest.mark.parametrize("resume", ["true", True, "auto"])
def test_true_is_the_newest(folder, resume):
    assert find_checkpoint(arguments(folder, resume)) == str(folder / "checkpoint-10")


def test_one_that_is_not_whole_is_passed_over_and_kept(folder, capsys):
    break_off(folder / "checkpoint-10")
    given = arguments(folder, "true", max_steps=20)
    chosen = find_checkpoint(given)
    assert chosen == str(folder / "checkpoint-2")
    assert (
        "checkpoint-10 is passed over, it is not whole: trainer_state.json has 1 of 19 bytes"
        in capsys.readouterr().out
    )
    make_room(given, chosen)
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["_damaged-checkpoint-10", "checkpoint-2"]


def test_a_checkpoint_by_name(folder, tmp_path):
    named = str(folder / "checkpoint-10")
    assert find_checkpoint(arguments(folder, named)) == named
    assert find_checkpoint(arguments(tmp_path / "elsewhere", str(folder / "checkpoint-2"))).endswith("checkpoint-2")


def test_a_checkpoint_by_name_must_be_whole(folder):
    break_off(folder / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2' is not a whole checkpoint: trainer_state.json has 1 of 18"):
        find_checkpoint(arguments(folder, str(folder / "checkpoint-2")))


def test_going_back_drops_what_came_after_only_when_told(folder):
    """Later checkpoints would be taken for this run's own the next time."""
    earlier = str(folder / "checkpoint-2")
    with pytest.raises(UserError, match="holds checkpoint-10, which is later than checkpoint-2"):
        find_checkpoint(arguments(folder, earlier))
    given = arguments(folder, earlier, overwrite=True, max_steps=20)
    assert find_checkpoint(given) == earlier
    make_room(given, earlier)
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-2"]


@pytest.mark.parametrize("resume", ["true", "/no/such/checkpoint"])
def test_nothing_to_resume_from(tmp_path, resume):
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="^resume_from_checkpoint: .*whole checkpoint"):
        find_checkpoint(arguments(tmp_path / "new", resume))


def test_auto_starts_anew_where_there_is_nothing(tmp_path, capsys):
    assert find_checkpoint(arguments(tmp_path, "auto")) is None
    assert "a new run" in capsys.readouterr().out


def test_a_run_is_not_overwritten_unasked(folder):
    with pytest.raises(UserError, match="already holds checkpoint-10"):
        find_checkpoint(arguments(folder))
    assert len(list(folder.glob("checkpoint-*"))) == 2


def test_overwriting_discards_the_old_checkpoints(folder):
    given = arguments(folder, overwrite=True)
    assert find_checkpoint(given) is None
    assert len(list(folder.glob("checkpoint-*"))) == 2, "a mistake found later must not cost the old run"
    make_room(given, None)
    assert not list(folder.glob("*checkpoint-*"))


def test_a_finished_run_has_nothing_to_resume(folder):
    given = arguments(folder, "true", max_steps=10)
    make_room(given, str(folder / "checkpoint-10"))  # killed before its report: goes on with that
    (folder / "all_results.json").write_text("{}")
    with pytest.raises(UserError, match="has made its 10 updates; raise max_steps"):
        make_room(given, str(folder / "checkpoint-10"))
    with pytest.raises(NothingToDo, match="has made its 10 updates and its report"):
        make_room(arguments(folder, "auto", max_steps=10), str(folder / "checkpoint-10"))
    given.max_steps = 11
    make_room(given, str(folder / "checkpoint-10"))


def test_a_new_folder_starts_anew(tmp_path):
    assert find_checkpoint(arguments(tmp_path / "new")) is None


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    """One that was told to stop may still be saving; the next waits for it, and not forever."""
    hold = f"import fcntl, sys, time; f = open({str(tmp_path / '_lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    other = subprocess.Popen(
        [sys.executable, "-c", hold + "print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        monkeypatch.setattr(resume, "MAX_SECONDS_TO_WAIT", 2)
        with pytest.raises(UserError, match="another run has been working in"):
            find_checkpoint(arguments(tmp_path))
        assert "waiting for it to end" in capsys.readouterr().out
    finally:
        other.kill()
        other.wait()
    assert find_checkpoint(arguments(tmp_path)) is None
