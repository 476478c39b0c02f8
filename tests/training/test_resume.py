"""A run that was cut in two logs what the uninterrupted one logs; no run is overwritten by mistake."""

import shutil
from types import SimpleNamespace

import pytest

import run_pretrain
from acoustic.console import UserError
from acoustic.report.record import read_json
from acoustic.training.resume import find_checkpoint, make_room

COMPARED = ("loss", "accuracy", "grad_norm", "learning_rate", "gumbel_temperature", "masked_fraction", "hours_seen")


def logged(folder) -> dict[int, list]:
    history = read_json(folder / "trainer_state.json")["log_history"]
    return {entry["step"]: [entry[name] for name in COMPARED] for entry in history if "loss" in entry}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(pretrain_args, tmp_path, accumulation):
    """Dropout, Gumbel noise, crops, masks and order all come out the same."""
    options = {"max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": accumulation, "eval_strategy": "no"}
    argv = pretrain_args(**options)
    run_pretrain.main(argv)
    whole = logged(tmp_path / "out")
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    for left in ("checkpoint-6", "model.safetensors"):
        path = tmp_path / "out" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_pretrain.main([*argv, "--resume_from_checkpoint", "true"])
    resumed = logged(tmp_path / "out")
    assert sorted(resumed) == sorted(whole)
    for update in (4, 5, 6):
        assert resumed[update] == pytest.approx(whole[update], rel=1e-5), update


@pytest.fixture
def folder(tmp_path):
    for number in (2, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    return tmp_path


def arguments(folder, resume=None, overwrite=False):
    return SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=resume, overwrite_output_dir=overwrite)


def test_true_is_the_newest(folder):
    assert find_checkpoint(arguments(folder, "true")) == str(folder / "checkpoint-10")
    assert find_checkpoint(arguments(folder, True)) == str(folder / "checkpoint-10")


def test_a_checkpoint_by_name(folder):
    named = str(folder / "checkpoint-2")
    assert find_checkpoint(arguments(folder, named)) == named


@pytest.mark.parametrize("resume", ["true", "/no/such/checkpoint"])
def test_nothing_to_resume_from(tmp_path, resume):
    with pytest.raises(UserError, match="^resume_from_checkpoint: no checkpoint in"):
        find_checkpoint(arguments(tmp_path / "new", resume))


def test_a_run_is_not_overwritten_unasked(folder):
    with pytest.raises(UserError, match="already holds checkpoint-10"):
        find_checkpoint(arguments(folder))
    assert len(list(folder.glob("checkpoint-*"))) == 2


def test_overwriting_discards_the_old_checkpoints(folder):
    given = arguments(folder, overwrite=True)
    assert find_checkpoint(given) is None
    assert len(list(folder.glob("checkpoint-*"))) == 2, "a mistake found later must not cost the old run"
    make_room(given, None)
    assert not list(folder.glob("checkpoint-*"))


def test_a_finished_run_has_nothing_to_resume(folder):
    given = arguments(folder, "true")
    given.max_steps = 10
    (folder / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10}')
    with pytest.raises(UserError, match="has made its 10 updates; raise max_steps"):
        make_room(given, str(folder / "checkpoint-10"))
    given.max_steps = 11
    make_room(given, str(folder / "checkpoint-10"))


def test_a_new_folder_starts_anew(tmp_path):
    assert find_checkpoint(arguments(tmp_path / "new")) is None
