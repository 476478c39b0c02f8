"""What fits is found without a trace; an update has the audio that was asked for; a resumed run keeps its size."""

import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import run_finetune
import run_pretrain
from acoustic.config import parse_pretraining
from acoustic.console import UserError
from acoustic.report.record import read_json
from acoustic.training import sizing
from acoustic.training.pretraining import PretrainingStep
from acoustic.training.sizing import (
    Trial,
    accumulation,
    choose_sizes,
    control_groups,
    fits_in_memory,
    largest_that_fits,
)


@pytest.mark.parametrize("most", [1, 2, 3, 17, 64])
def test_the_largest_that_fits_is_found_in_few_trials(most):
    for limit in range(most + 3):
        tried = []

        def fits(number: int, tried=tried, limit=limit) -> bool:
            tried.append(number)
            return number <= limit

        assert largest_that_fits(fits, most) == min(limit, most)
        assert max(tried) <= most and len(tried) == len(set(tried)) <= 14


@pytest.mark.parametrize(
    ("share", "batch", "expected"),
    [
        (5760, 87.5, 66),
        (80, 40, 2),
        (80.0001, 40, 2),
        (79, 40, 2),
        (10, 40, 1),
        (40, 40, 1),
        (41, 40, 2),
        (120.3, 40, 3),
    ],
)
def test_the_batches_of_an_update(share, batch, expected):
    """No less audio than was asked for, but for a hundredth of a batch."""
    assert accumulation(share, batch) == expected


def arguments(world_size=1, update_seconds=None, **more):
    args = SimpleNamespace(device=torch.device("cpu"), world_size=world_size, update_seconds=update_seconds)
    return SimpleNamespace(**vars(args), gradient_accumulation_steps=1, ignore_data_skip=False, **more)


def sizes(batch_seconds, fits: float | None = None, longest=15.6, **options) -> tuple[float, int]:
    args = arguments(**options)
    data_args = SimpleNamespace(batch_seconds=batch_seconds, max_duration_in_seconds=longest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizing, "fitting", lambda *_: (fits, ""))
        chosen = choose_sizes(args, data_args, 16_000)
    return chosen, args.gradient_accumulation_steps


def test_without_being_asked_nothing_is_accumulated(capsys):
    assert sizes(None) == (20.0, 1)
    assert sizes(None, longest=30) == (30, 1)
    assert sizes(50.0) == (50.0, 1)
    assert (
        "update: up to 50 s of audio = 50 s in a batch x 1 accumulated x 1 processes on cpu\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("update_seconds", [16, 100, 480, 5760])
@pytest.mark.parametrize("fits", [15.6, 62.4, 600.0])
def test_what_fits_is_dealt_into_equal_parts_of_the_update(world_size, update_seconds, fits):
    batch, steps = sizes("auto", fits, world_size=world_size, update_seconds=update_seconds)
    assert 15.6 <= batch <= fits
    update = batch * steps * world_size
    if batch > 15.6:
        assert update == pytest.approx(update_seconds, rel=0.01)
    else:  # no batch can be smaller than one window
        assert update_seconds * 0.99 <= update or steps == 1


def test_a_size_that_was_given_is_kept(capsys):
    assert sizes(40.0, update_seconds=100) == (40.0, 3)
    assert "up to 120 s of audio = 40 s in a batch x 3 accumulated" in capsys.readouterr().out


def test_of_one_update_no_more_than_is_needed_is_in_a_batch():
    assert sizes(None, update_seconds=16, longest=8) == (16, 1)


@pytest.fixture
def trial(pretrain_args, model):
    _, _, args = parse_pretraining(pretrain_args(bf16="false"))
    return Trial(args, model, PretrainingStep(model, args), longest=1.5, rate=16_000)


def test_a_trial_leaves_no_trace(trial, monkeypatch):
    """Nor one that fails."""
    model = trial.model.eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    trial.on_cpu(10)
    monkeypatch.setattr(trial, "forward", lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert not fits_in_memory(lambda: trial.without_a_trace(lambda: trial.forward(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_estimate_follows_the_audio_and_the_memory(trial, monkeypatch):
    one, two, four = (trial.without_a_trace(partial(trial.bytes_kept, rows)) for rows in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.1) and two - one > 1.5 * 16_000 * 4
    found = {}
    for memory in (1e8, 2e8, 4e8):
        monkeypatch.setattr(sizing, "free_memory", lambda memory=memory: memory)
        found[memory], said = trial.on_cpu(10_000)
        assert said == f"{0.7 * memory / 1e9:.1f} GB"
    assert 0 < found[1e8] < found[2e8] < found[4e8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert trial.on_cpu(10_000)[0] == found[1e8]
    assert trial.on_cpu(2)[0] == 2
    monkeypatch.setattr(sizing, "free_memory", lambda: 1e6)
    assert trial.on_cpu(10)[0] == 0


def test_where_nothing_fits_all_processes_say_so(trial, monkeypatch):
    monkeypatch.setattr(sizing, "free_memory", lambda: 1e6)
    with pytest.raises(UserError, match="not one window of 1.5 s fits in 0.0 GB: lower --max_duration_in_seconds"):
        sizing.fitting(trial.args, 1.5, 16_000, trial.model, trial.step)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="under FSDP, give a number"):
        sizing.fitting(trial.args, 1.5, 16_000, trial.model, trial.step)


def test_on_a_gpu_it_is_tried(trial, monkeypatch):
    """The search, with a device on which 11 windows fit beside what the optimizer needs."""
    rows_tried, taken_by = [], []

    def with_ballast(taken, rows):
        rows_tried.append(rows)
        taken_by.append(taken)
        if rows > 11:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trial, "with_ballast", with_ballast)
    device = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert trial.on_gpu(100) == (11, "80.0 GB")
    assert rows_tried == [1, 2, 4, 8, 16, 12, 10, 11]
    weights = sum(parameter.numel() for parameter in trial.model.parameters())
    assert taken_by[0] == pytest.approx(8 * weights + 8e9, rel=1e-6)


def test_free_memory_heeds_the_limits_of_a_job_and_of_those_around_it(tmp_path, monkeypatch):
    """What keeps copies of files is free, too."""
    group = tmp_path / "slurm" / "job"
    group.mkdir(parents=True)
    monkeypatch.setattr(sizing, "control_groups", lambda: [group, group.parent])
    everything = sizing.free_memory()
    assert everything > 1e8
    for folder, most in ((group, "1000000"), (group.parent, "max")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("400000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert sizing.free_memory() == 700_000
    (group / "memory.max").write_text("max\n")
    assert sizing.free_memory() == pytest.approx(everything, rel=0.2)
    (group.parent / "memory.max").write_text("900000\n")
    assert sizing.free_memory() == 600_000


def test_the_groups_of_this_process_are_found():
    assert all(path.is_relative_to(sizing.CGROUPS) or sizing.CGROUPS.is_relative_to(path) for path in control_groups())


def losses(folder) -> list[float]:
    return [entry["loss"] for entry in read_json(folder / "trainer_state.json")["log_history"] if "loss" in entry]


def test_a_run_of_an_automatic_size_is_one_of_that_size_and_keeps_it(pretrain_args, tmp_path, monkeypatch, capsys):
    automatic = {"batch_seconds": "auto", "update_seconds": 7, "eval_strategy": "no", "save_steps": 2}
    run_pretrain.main(pretrain_args(**automatic, output_dir=tmp_path / "auto", save_total_limit=5))
    said = capsys.readouterr().out
    batch, steps = re.search(r"= ([\d.]+) s in a batch \(.*\) x (\d+) accumulated", said).groups()
    given = {"batch_seconds": batch, "gradient_accumulation_steps": steps, "eval_strategy": "no"}
    run_pretrain.main(pretrain_args(**given, output_dir=tmp_path / "given"))
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")
    shutil.rmtree(tmp_path / "auto" / "checkpoint-4")
    (tmp_path / "auto" / "all_results.json").unlink()
    monkeypatch.setattr(sizing, "free_memory", lambda: 1e6)  # less than at the start; the place in the audio is kept
    again = pretrain_args(**automatic, output_dir=tmp_path / "auto", resume_from_checkpoint="true")
    run_pretrain.main(again)
    assert f"= {batch} s in a batch (as in the checkpoint) x {steps} accumulated" in capsys.readouterr().out
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_seconds": "large"}, "batch_seconds: seconds of audio, or 'auto', not 'large'"),
        ({"batch_seconds": "nan"}, "batch_seconds \\(nan\\) holds no window"),
        ({"update_seconds": 0}, "update_seconds: above 0"),
        ({"update_seconds": 9, "gradient_accumulation_steps": 2}, "update_seconds: chooses gradient_accumulation_st"),
    ],
)
def test_bad_sizes(pretrain_args, options, message):
    with pytest.raises(UserError, match=message):
        parse_pretraining(pretrain_args(**options))


def test_fine_tuning_is_not_sized_by_itself(group_norm_checkpoint, audio_folder, tmp_path):
    folder = audio_folder([f"{name}/{index}.wav" for name in "ab" for index in range(3)])
    words = {"dataset_name": folder, "model_name_or_path": group_norm_checkpoint, "output_dir": tmp_path / "out"}
    words |= {"batch_seconds": "auto", "max_steps": 2, "use_cpu": True}
    with pytest.raises(UserError, match="batch_seconds: 'auto' is for pretraining"):
        run_finetune.main([word for key, value in words.items() for word in (f"--{key}", str(value))])
