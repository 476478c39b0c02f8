"""run.json and data_report.json: complete, bounded, without secrets."""

import json
import subprocess
import sys

import pytest

import run_pretrain
from acoustic.config import parse_pretraining
from acoustic.console import UserError
from acoustic.data.tally import MAX_LISTED, Tally
from acoustic.report.record import command_line, read_json, write_data_report, write_json, write_run

SECRET = "hf_AbCdEfGhIjKl"


@pytest.fixture
def record(tmp_path, monkeypatch):
    """record(argv) -> (run.json's content, its text), as a script called with `argv` writes it; `unseen`: words of the
    command that its parser refuses."""

    def make(argv: list[str], unseen: tuple[str, ...] = ()) -> tuple[dict, str]:
        argv = ["--dataset_name", "sounds", "--output_dir", str(tmp_path), "--use_cpu", "true", *argv]
        monkeypatch.setattr(sys, "argv", ["/somewhere/run_pretrain.py", *argv, *unseen])
        *_, args = parse_pretraining(argv)
        write_run(str(tmp_path), args, ["a note"], 12.34, ["a verdict"])
        return read_json(tmp_path / "run.json"), (tmp_path / "run.json").read_text()

    return make


@pytest.mark.parametrize(
    "words", [["--hub_token", SECRET], [f"--hub_token={SECRET}"], ["--hub-token", SECRET], [f"--hub-token={SECRET}"]]
)
def test_no_token_is_written(record, words):
    with pytest.raises(UserError, match="hub_token: others on this machine can read"):
        record(words)
    content, text = record([], words)
    assert SECRET not in text
    assert "***" in content["command"]


def test_the_verdicts_of_the_watch_are_there(record):
    assert record([])[0]["health"] == ["a verdict"]


def test_the_command_and_what_was_given_are_there(record):
    content, _ = record(["--max_steps", "7", "--config_overrides", '{"num_negatives": 5}'])
    assert content["command"].startswith("run_pretrain.py --dataset_name sounds")
    assert content["settings"]["max_steps"] == 7
    assert content["settings"]["config_overrides"] == {"num_negatives": 5}
    assert set(content["settings"]) == {"dataset_name", "output_dir", "use_cpu", "max_steps", "config_overrides"}
    assert content["notes"] == ["a note"]
    assert content["wall_seconds"] == 12.3
    assert content["seed"] == 42
    assert content["processes"] == 1
    assert content["hardware"]["processor"]
    assert set(content["versions"]) == {
        "python",
        "torch",
        "torchaudio",
        "transformers",
        "datasets",
        "accelerate",
        "soundfile",
    }


def test_the_commit_is_that_of_the_package_whatever_the_folder(record, tmp_path, monkeypatch):
    here = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert here and here in record([])[0]["commit"]


def test_the_command_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["run_pretrain.py", "--dataset_name", "my sounds", "--config_overrides", '{"a": 1}']
    )
    assert command_line() == """run_pretrain.py --dataset_name 'my sounds' --config_overrides '{"a": 1}'"""


def test_the_data_report_is_bounded(tmp_path):
    """A million unreadable files must not make a file of 100 MB; the counts stay whole."""
    tally, others = Tally(), Tally()
    for index in range(5000):
        tally.add([(f"{index:05d}.wav", f"{index / 100} s is shorter than 1", False, 0)], rows=1)
    others.add([(f"x{index}.wav", "empty file", True, 0) for index in range(3)], rows=3)
    others.add([("00007.wav", "0.07 s is shorter than 1", False, 0)], rows=1)  # met by another process as well
    tally.merge(others)
    splits = {"train": tally.report(), "eval": others.report()}
    write_data_report(str(tmp_path), "sounds", 1.23456, splits)
    report = read_json(tmp_path / "data_report.json")
    assert (report["source"], report["hours_seen"], report["skipped"]) == ("sounds", 1.2346, 5003 + 4)
    assert set(report["splits"]) == {"train", "eval"}
    train = report["splits"]["train"]
    assert train["skipped"] == 5003
    assert len(train["skipped_recordings"]) == MAX_LISTED
    assert sum(train["skipped_by_reason"].values()) == 5003
    assert train["skipped_by_reason"]["empty file"] == 3
    assert len(train["skipped_by_reason"]) == 2


def test_reasons_of_every_kind_are_bounded_too(tmp_path):
    tally = Tally()
    tally.add([(f"{index}.wav", f"class {chr(200 + index)!r}", True, 0) for index in range(200)], rows=200)
    write_data_report(str(tmp_path), "sounds", 0, {"train": tally.report()})
    train = read_json(tmp_path / "data_report.json")["splits"]["train"]
    assert train["skipped"] == 200 and len(train["skipped_by_reason"]) == 50


def test_faults_are_counted_per_recording_and_settings_not_at_all():
    """What max_skipped_fraction compares: a recording with two bad windows is one, a short one is no fault."""
    tally = Tally()
    tally.add(
        [("a", "silent", True, 0), ("a", "silent (at 15 s)", True, 0), ("b", "0.5 s is shorter than 1", False, 0)],
        rows=3,
    )
    assert (tally.rows, tally.faults, len(tally.names)) == (3, 1, 2)
    assert tally.fault_reasons["silent"] >= 1 and tally.fault_reasons["shorter than #"] == 0
    assert tally.report()["skipped_recordings"] == {"a": "silent", "b": "0.5 s is shorter than 1"}


def test_json_of_a_missing_file_is_empty(tmp_path):
    assert read_json(tmp_path / "none.json") == {}
    write_json(tmp_path / "some.json", {"path": tmp_path})
    assert read_json(tmp_path / "some.json") == {"path": str(tmp_path)}


def test_a_run_leaves_everything_behind(audio_folder, tiny_config, tmp_path):
    folder = audio_folder(12, seconds=1.2)
    (folder / "empty.wav").write_bytes(b"")
    out = tmp_path / "out"
    options = {
        "dataset_name": folder,
        "output_dir": out,
        "config_overrides": json.dumps(tiny_config),
        "max_steps": 2,
        "logging_steps": 1,
        "batch_seconds": 3,
        "max_duration_in_seconds": 2,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    results = run_pretrain.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
    names = (
        "README.md all_results.json config.json data_report.json figures model.safetensors preprocessor_config.json"
    )
    assert {*names.split(), "run.json", "trainer_state.json"} <= {path.name for path in out.iterdir()}
    assert not list(out.rglob("training_args.bin"))
    assert read_json(out / "all_results.json") == json.loads(json.dumps(results))
    report = read_json(out / "data_report.json")
    assert set(report) == {"source", "hours_seen", "skipped", "splits"}
    assert report["splits"]["train"]["skipped_recordings"] == {"empty.wav": "empty file"}
    assert report["splits"]["train"]["skipped_by_reason"] == {"empty file": 1}
    assert report["skipped"] == 1 and report["hours_seen"] > 0
    seconds = results["hours_seen"] * 3600
    assert 2 * 1.2 <= seconds <= 2 * 3.01
    card = (out / "README.md").read_text()
    assert "figures/pretraining.png" in card and "1 recordings" in card
    assert f"{results['eval_contrastive_loss']:.4g}" in card
